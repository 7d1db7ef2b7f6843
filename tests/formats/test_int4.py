"""INT4 with a scale per 128 or 32 of K against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_w4moe as w4
from jax_w4moe import INT4_G32, INT4_G128
from tests.helpers.compare import assert_bitwise
from tests.helpers.oracle import dequantize_int4

both = pytest.mark.parametrize("format", [INT4_G128, INT4_G32], ids=lambda f: f.name)


@pytest.mark.parametrize(
    ("format", "dtype"),
    [(INT4_G128, jnp.float32), (INT4_G128, jnp.bfloat16), (INT4_G32, jnp.bfloat16)],
    ids=str,
)
def test_dequantize_every_code(format: w4.WeightFormat, dtype: jnp.dtype) -> None:
    """-8 included, and scales below zero."""
    codes = np.tile(np.arange(16, dtype=np.uint8), (4, format.group_size // 16))
    scales = jnp.asarray([[0.01171875], [-3.0], [2.0**-126], [0.0]], dtype)
    canonical = format.canonical_scales(scales)
    actual = format.dequantize(jnp.asarray(codes), canonical)
    expected = dequantize_int4(codes[:, ::2] | codes[:, 1::2] << 4, np.asarray(scales))
    assert_bitwise(actual, expected.astype(np.float32))


@both
def test_quantize_is_close_and_uses_seven_steps(
    rng: np.random.Generator, format: w4.WeightFormat
) -> None:
    weights = rng.standard_normal((64, 256)).astype(np.float32)
    weights[3, :128] = 0
    codes, scales = format.quantize(jnp.asarray(weights))
    restored = np.asarray(format.dequantize(codes, scales))
    steps = np.repeat(np.asarray(scales, np.float32), format.group_size, axis=1)
    # A bf16 scale may be 2**-9 smaller than amax / 7, of which there are seven.
    slack = 0.0001 if format is INT4_G128 else 7 / 512
    assert (np.abs(restored - weights) <= steps * (0.5 + slack)).all()
    assert set(np.asarray(codes).flat) == set(range(16)) - {8}  # -8 is not used
    assert np.asarray(scales)[3, 0] == 1


@both
def test_every_scale_comes_back(format: w4.WeightFormat) -> None:
    exponents = np.arange(-126, 120)
    scales = np.concatenate([np.ldexp(1.2345, exponents), -np.ldexp(1.0, exponents)])
    scales = np.concatenate([scales, np.zeros(-len(scales) % 128)])
    scales = jnp.asarray(scales.reshape(1, 32, -1), format.scale_dtype)
    codes = jnp.full((1, 32, scales.shape[2] * format.group_size // 2), 0x18, jnp.uint8)  # -8 and 1
    q = w4.QuantizedTensor(codes, scales, format)
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
        with pytest.raises(ValueError, match="expert 0, row 5, k from 128: a scale is .* beyond"):
            w4.pack(q)
        assert np.asarray(jax.jit(w4.pack)(q).inexact_groups).tolist() == [1]
    with pytest.raises(TypeError, match="dtype uint8 does not hold INT4_G128 scales; .*float32"):
        w4.pack(w4.QuantizedTensor(codes, jnp.ones((1, 32, 2), jnp.uint8), INT4_G128))
    with pytest.raises(TypeError, match="float32 does not hold INT4_G32 scales; pass bfloat16"):
        w4.pack(w4.QuantizedTensor(codes, jnp.ones((1, 32, 8)), INT4_G32))
    q = w4.QuantizedTensor(
        codes, jnp.ones((1, 32, 8), jnp.bfloat16).at[0, 5, 6].set(jnp.inf), INT4_G32
    )
    with pytest.raises(ValueError, match="expert 0, row 5, k from 128: a scale is inf, beyond"):
        w4.pack(q)
    with pytest.raises(ValueError, match=r"\(1, 32, 8\), need \(1, 32, 2\): one scale per"):
        w4.pack(w4.QuantizedTensor(codes, jnp.ones((1, 32, 8)), INT4_G128))
    with pytest.raises(ValueError, match="K=192 is not a positive multiple of 128; zero-pad"):
        w4.pack(w4.QuantizedTensor(codes[..., :96], scales, INT4_G128))
    with pytest.raises(TypeError, match="dtype int8, need uint8 .* or int4; view the bytes"):
        w4.pack(w4.QuantizedTensor(codes.astype(jnp.int8), scales, INT4_G128))
    kernels = [jnp.ones(s) for s in ((1, 96, 128), (1, 96, 128), (1, 128, 96))]
    with pytest.raises(ValueError, match="intermediate_size I=96 is not a .* multiple of 128"):
        w4.quantize_experts(*kernels, INT4_G128)
