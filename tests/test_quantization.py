"""The FP8 rule against ml_dtypes, and the public op around it."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_w4moe as w4
from jax_w4moe import quantization
from jax_w4moe.quantization import quantize_per_token
from tests.helpers import data
from tests.helpers.compare import assert_bitwise, assert_bitwise_or_nan


def _numpy_rule(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The documented rule, one f32 operation at a time."""
    values = x.astype(np.float32)
    floor = np.float32(2.0**-100)
    amax = np.maximum(np.abs(values).max(axis=-1, keepdims=True, initial=0), floor)
    inverse = np.float32(448) / amax
    scaled = np.clip(values * inverse, np.float32(-448), np.float32(448))
    return scaled.astype(ml_dtypes.float8_e4m3fn), amax * (np.float32(1) / np.float32(448))


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 96), (2, 2880), (64, 256), (0, 32), (3, 0)])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 3e4, 2.0**-120])
def test_rule_bit_for_bit(rng: np.random.Generator, shape: tuple[int, int], scale: float) -> None:
    x = (rng.standard_normal(shape) * scale).astype(ml_dtypes.bfloat16)
    x_fp8, x_scale = w4.quantize_fp8(jnp.asarray(x))
    expected_fp8, expected_scale = _numpy_rule(x)
    assert_bitwise(x_fp8, expected_fp8)
    assert_bitwise(x_scale, expected_scale)
    assert x_scale.shape == (shape[0], 1)


def test_inverse_is_the_correctly_rounded_division() -> None:
    """For every bf16 from the smallest amax on, infinity and NaN included."""
    values = np.append(np.arange(27 << 7, 0x7F80 + 1), 0x7FC0).astype(np.uint16)
    amax = (values.astype(np.uint32) << 16).view(np.float32)
    actual = np.asarray(quantization._inverse(jnp.asarray(amax.view(np.int32))))
    np.testing.assert_array_equal(actual, np.float32(448) / amax)


def test_rounding_to_e4m3_stays_when_compiled() -> None:
    """Every bf16, and what lies between E4M3's neighbours: a conversion there and back may go."""
    e4m3 = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    middle = (e4m3[1:] + e4m3[:-1]) / 2
    edges = np.concatenate([middle, np.nextafter(middle, 0), np.nextafter(middle, np.float32(448))])
    every = (np.arange(1 << 16).astype(np.uint32) << 16).view(np.float32)
    values = np.concatenate([every, edges, -edges])
    expected = np.clip(values, np.float32(-448), np.float32(448))
    with np.errstate(invalid="ignore"):  # NaN
        expected = expected.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    for run in (quantization.round_to_e4m3, jax.jit(quantization.round_to_e4m3)):
        assert_bitwise_or_nan(run(jnp.asarray(values)), expected)
    rows = jnp.asarray(every[np.isfinite(every)].reshape(-1, 128), jnp.bfloat16)
    there_and_back = jax.jit(lambda x: quantize_per_token(x)[0].astype(jnp.float32))(rows)
    assert_bitwise(there_and_back, np.asarray(quantize_per_token(rows)[0]).astype(np.float32))


@pytest.mark.parametrize("scale", [1.0, 1e-3, 3e4])
def test_intermediate_is_rounded_to_bf16_before_fp8(rng: np.random.Generator, scale: float) -> None:
    """Compiled, where XLA would leave out a plain conversion to bf16 and back."""
    h = (rng.standard_normal((64, 512)) * scale).astype(np.float32)

    @jax.jit
    def intermediate(h: jax.Array) -> tuple[jax.Array, jax.Array]:
        return quantization.quantize_per_token(quantization.round_to_bf16(h))

    h_fp8, h_scale = intermediate(jnp.asarray(h))
    rounded = h.astype(ml_dtypes.bfloat16).astype(np.float32)
    amax = np.abs(rounded).max(axis=-1, keepdims=True)
    scaled = np.clip(rounded * (np.float32(448) / amax), np.float32(-448), np.float32(448))
    assert_bitwise(h_fp8, scaled.astype(ml_dtypes.float8_e4m3fn))
    assert_bitwise(h_scale, amax * (np.float32(1) / np.float32(448)))
    direct = np.clip(h * (np.float32(448) / amax), np.float32(-448), np.float32(448))
    assert (direct.astype(ml_dtypes.float8_e4m3fn) != np.asarray(h_fp8)).any()  # it matters


def test_error_is_that_of_e4m3(rng: np.random.Generator) -> None:
    x = data.tokens(rng, 64, 512)
    x_fp8, x_scale = w4.quantize_fp8(x)
    restored = np.asarray(x_fp8).astype(np.float64) * np.asarray(x_scale)
    expected = np.asarray(x).astype(np.float64)
    assert np.sqrt(((restored - expected) ** 2).sum() / (expected**2).sum()) < 0.03


def test_special_rows_touch_only_themselves() -> None:
    x = np.ones((5, 64), ml_dtypes.bfloat16)
    x[1, 3], x[2, 5], x[3] = np.nan, np.inf, 0
    x_fp8, x_scale = w4.quantize_fp8(jnp.asarray(x))
    values = np.asarray(x_fp8).astype(np.float32)
    assert np.isnan(values[1]).all() and np.isnan(np.asarray(x_scale)[1]).all()
    assert np.isnan(values[2, 5]) and np.isinf(np.asarray(x_scale)[2]).all()
    assert not values[3].any() and np.isfinite(np.asarray(x_scale)[3]).all()
    assert (values[[0, 4]] == 448).all()


def test_jit_and_vmap_agree(rng: np.random.Generator) -> None:
    x = data.tokens(rng, 3, 4, 96)
    rows = w4.quantize_fp8(x.reshape(12, 96))
    for batched in (jax.vmap(w4.quantize_fp8)(x), jax.jit(jax.vmap(w4.quantize_fp8))(x)):
        for actual, expected in zip(batched, rows, strict=True):
            assert_bitwise(actual.reshape(12, -1), expected)


def test_rows_do_not_depend_on_each_other(rng: np.random.Generator) -> None:
    x = data.tokens(rng, 65, 288)
    together = quantize_per_token(x)
    for row in range(0, 65, 8):
        for a, b in zip(quantize_per_token(x[row : row + 1]), together, strict=True):
            assert_bitwise(a, b[row : row + 1])


def test_scales_that_are_powers_of_two() -> None:
    """The least that is not below amax / 448, for every mantissa of amax."""
    mantissas = 1 + np.arange(128) / 128
    amax = np.concatenate([np.ldexp(mantissas, e) for e in (-90, -1, 0, 7, 100)])
    x = np.stack([amax, -amax / 2, np.zeros_like(amax)], axis=1).astype(ml_dtypes.bfloat16)
    x_fp8, x_scale = quantize_per_token(jnp.asarray(x), w4.PerToken(pow2=True))
    expected = 2.0 ** np.ceil(np.log2(amax / 448))
    assert_bitwise(x_scale[:, 0], expected.astype(np.float32))
    rounded = (x.astype(np.float64) / expected[:, None]).astype(ml_dtypes.float8_e4m3fn)
    assert_bitwise(x_fp8, rounded)
    zeros, scale = quantize_per_token(jnp.zeros((1, 4), jnp.bfloat16), w4.PerToken(pow2=True))
    assert not np.asarray(zeros).view(np.uint8).any() and 0 < float(scale[0, 0]) < 1e-30
    bad = jnp.asarray([[1, jnp.nan], [1, jnp.inf]], jnp.bfloat16)
    values, scale = quantize_per_token(bad, w4.PerToken(pow2=True))
    assert np.isnan(np.asarray(values).astype(np.float32)[0]).all() and np.isnan(scale[0, 0])
    assert np.isinf(scale[1, 0]) and float(values[1, 0]) == 0


def test_a_scale_per_128_values(rng: np.random.Generator) -> None:
    """Against ml_dtypes in float64; what bf16 cannot hold would not come back equal."""
    x = np.array(data.tokens(rng, 9, 320)).astype(np.float64)
    x[:, 128:256] *= 2.0**-30
    x[3, 256:], x[4, 300] = 0, 300.0
    x = x.astype(ml_dtypes.bfloat16)
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 64))).reshape(9, 3, 128)
    amax = np.maximum(np.abs(padded).max(axis=-1, keepdims=True), 2.0**-100)
    scale = 2.0 ** np.ceil(np.log2(amax / 448))
    expected = (padded / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
    expected = expected.reshape(9, 384)[:, :320].astype(np.float32)
    actual = quantization.round_per_128(jnp.asarray(x))
    assert_bitwise(actual, expected)
    assert_bitwise(actual.astype(jnp.bfloat16).astype(jnp.float32), expected)
    assert_bitwise(quantization.round_per_128(actual), expected)
    bad = np.array(x)
    bad[0, 5], bad[1, 200] = np.nan, np.inf
    broken = np.isnan(quantization.round_per_128(jnp.asarray(bad)))
    assert broken[0, :128].all() and broken[1, 128:256].all() and broken.sum() == 256


def test_static_scales(rng: np.random.Generator) -> None:
    """One for each projection; a value beyond 448 of it saturates."""
    x = np.array(data.tokens(rng, 5, 64))
    x[0, 0], x[1, 1] = np.inf, np.nan
    rule = w4.Static(0.005, 3.0)
    for before, scale in (("w13", 0.005), ("w2", 3.0)):
        x_fp8, x_scale = quantization.quantize(jnp.asarray(x), rule, before)
        assert_bitwise(x_scale, np.full((5, 1), scale, np.float32))
        scaled = x.astype(np.float32) * (np.float32(1) / np.float32(scale))
        expected = np.clip(scaled, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        assert_bitwise_or_nan(x_fp8, expected)
    for bad in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="Static: h_scale=.* is not in .* pass the positive"):
            w4.Static(1.0, bad)


def test_scales_of_128_values_are_folded(rng: np.random.Generator) -> None:
    """Exactly, where they are powers of two; a group of scale zero is zero."""
    x = np.asarray(rng.standard_normal((6, 320)), ml_dtypes.float8_e4m3fn)
    powers = 2.0 ** rng.integers(-3, 3, (6, 3))
    powers[2, 1], powers[4] = 0, 0
    for scales, bound in ((powers, 0.0), (rng.uniform(0.5, 2, (6, 3)), 0.03)):
        folded, scale = quantization.fold_scales(jnp.asarray(x), jnp.asarray(scales, jnp.float32))
        assert_bitwise(scale[:, 0], scales.max(axis=1).astype(np.float32))
        restored = np.asarray(folded).astype(np.float64) * np.asarray(scale)
        expected = x.astype(np.float64) * np.repeat(scales, 128, axis=1)[:, :320]
        error = np.sqrt(np.sum((restored - expected) ** 2) / np.sum(expected**2))
        assert error <= bound + 1e-2 * (bound == 0)
        if bound == 0:
            fine = np.abs(expected) >= 2.0**-6 * np.asarray(scale)  # no E4M3 subnormals
            np.testing.assert_array_equal(restored[fine], expected[fine])


def test_refusals() -> None:
    with pytest.raises(TypeError, match="x: dtype float32, need bfloat16; use x.astype"):
        w4.quantize_fp8(jnp.ones((2, 32)))
    with pytest.raises(ValueError, match=r"x: shape \(32,\) has rank 1, need bf16\[T, H\]"):
        w4.quantize_fp8(jnp.ones(32, jnp.bfloat16))
    with pytest.raises(NotImplementedError, match="quantize_fp8: no gradient to x"):
        jax.grad(lambda x: w4.quantize_fp8(x)[1].sum())(jnp.ones((2, 32), jnp.bfloat16))
