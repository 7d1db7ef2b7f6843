"""INT4 with a scale per 128 of K against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_w4moe as w4
from jax_w4moe import INT4_G128
from tests.helpers.compare import assert_bitwise
from tests.helpers.oracle import dequantize_int4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dequantize_every_code(dtype: jnp.dtype) -> None:
    """-8 included, and scales below zero."""
    codes = np.tile(np.arange(16, dtype=np.uint8), (4, 8))
    scales = jnp.asarray([[0.01171875], [-3.0], [2.0**-126], [0.0]], dtype)
    canonical = INT4_G128.canonical_scales(scales)
    actual = INT4_G128.dequantize(jnp.asarray(codes), canonical)
    expected = dequantize_int4(codes[:, ::2] | codes[:, 1::2] << 4, np.asarray(scales))
    assert_bitwise(actual, expected.astype(np.float32))


def test_quantize_is_close_and_uses_seven_steps(rng: np.random.Generator) -> None:
    weights = rng.standard_normal((64, 256)).astype(np.float32)
    weights[3, :128] = 0
    codes, scales = INT4_G128.quantize(jnp.asarray(weights))
    restored = np.asarray(INT4_G128.dequantize(codes, scales))
    assert (np.abs(restored - weights) <= np.repeat(scales, 128, axis=1) * 0.5001).all()
    assert set(np.asarray(codes).flat) == set(range(16)) - {8}  # -8 is not used
    assert np.asarray(scales)[3, 0] == 1


def test_every_scale_comes_back() -> None:
    exponents = np.arange(-126, 120)
    scales = np.concatenate([np.ldexp(1.2345, exponents), -np.ldexp(1.0, exponents)])
    scales = scales.astype(np.float32).reshape(1, -1, 1)
    codes = jnp.full((1, scales.shape[1], 64), 0x18, jnp.uint8)  # -8 and 1
    pad = -scales.shape[1] % 32
    q = w4.QuantizedTensor(
        jnp.pad(codes, ((0, 0), (0, pad), (0, 0))),
        jnp.pad(jnp.asarray(scales), ((0, 0), (0, pad), (0, 0))),
        INT4_G128,
    )
    restored = w4.unpack(w4.pack(q))
    assert_bitwise(restored.scales, q.scales)
    assert_bitwise(restored.codes, q.codes)


def test_unpacked_codes_pack_to_the_same_bytes(rng: np.random.Generator) -> None:
    codes = jnp.asarray(rng.integers(0, 256, (1, 32, 64)), jnp.uint8)
    scales = jnp.ones((1, 32, 1), jnp.bfloat16)
    pairs = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(1, 32, 128).astype(jnp.int32)
    unpacked = ((pairs ^ 8) - 8).astype(jnp.int4)
    one = w4.pack(w4.QuantizedTensor(codes, scales, INT4_G128))
    other = w4.pack(w4.QuantizedTensor(unpacked, scales, INT4_G128))
    assert_bitwise(other.data, one.data)


def test_what_cannot_be_packed_is_refused() -> None:
    codes, scales = jnp.full((1, 32, 128), 0x11, jnp.uint8), jnp.ones((1, 32, 2), jnp.float32)
    for bad in (np.nan, np.inf, 2.0**120, 1e-45):
        q = w4.QuantizedTensor(codes, scales.at[0, 5, 1].set(bad), INT4_G128)
        if bad == 1e-45:
            bits = jax.lax.bitcast_convert_type(scales, jnp.uint32).at[0, 5, 1].set(1)
            q = w4.QuantizedTensor(
                codes, jax.lax.bitcast_convert_type(bits, jnp.float32), INT4_G128
            )
        with pytest.raises(ValueError, match="expert 0, row 5, k from 128: its scale is .* beyond"):
            w4.pack(q)
        assert np.asarray(jax.jit(w4.pack)(q).inexact_groups).tolist() == [1]
    with pytest.raises(TypeError, match="dtype uint8 does not hold INT4 scales; pass float32"):
        w4.pack(w4.QuantizedTensor(codes, jnp.ones((1, 32, 2), jnp.uint8), INT4_G128))
    with pytest.raises(ValueError, match=r"\(1, 32, 8\), need \(1, 32, 2\): one scale per"):
        w4.pack(w4.QuantizedTensor(codes, jnp.ones((1, 32, 8)), INT4_G128))
    with pytest.raises(ValueError, match="K=192 is not a positive multiple of 128; zero-pad"):
        w4.pack(w4.QuantizedTensor(codes[..., :96], scales, INT4_G128))
    with pytest.raises(TypeError, match="dtype int8, need uint8 .* or int4; view the bytes"):
        w4.pack(w4.QuantizedTensor(codes.astype(jnp.int8), scales, INT4_G128))
    kernels = [jnp.ones(s) for s in ((1, 96, 128), (1, 96, 128), (1, 128, 96))]
    with pytest.raises(ValueError, match="intermediate_size I=96 is not a .* multiple of 128"):
        w4.quantize_experts(*kernels, INT4_G128)
