"""MXFP4 against ml_dtypes and against the definition of its scale word."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_w4moe import MXFP4, MXFP4_WIDE, QuantizedTensor, pack, unpack
from tests.helpers.compare import assert_bitwise
from tests.helpers.oracle import E2M1


def test_dequantize_every_code_and_every_scale() -> None:
    codes = np.tile(np.arange(16, dtype=np.uint8), (256, 2))
    scales = np.arange(256, dtype=np.uint8)[:, None]
    actual = np.asarray(MXFP4.dequantize(jnp.asarray(codes), jnp.asarray(scales)))
    with np.errstate(over="ignore"):
        scale = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
        expected = (E2M1[codes] * scale).astype(np.float32)
    assert_bitwise(actual[:255], expected[:255])
    nonzero = (codes[255] & 7) != 0
    assert np.isnan(actual[255][nonzero]).all()


@pytest.mark.parametrize("exponent", [-126, -40, 0, 3, 100])
def test_quantize_rounds_as_e2m1_does(rng: np.random.Generator, exponent: int) -> None:
    """With the OCP scale, codes are ml_dtypes' own rounding to float4_e2m1fn, ties included."""
    grid = np.concatenate([np.linspace(-8, 8, 1025)[:-1], rng.uniform(-8, 8, 1024)])
    groups = grid.astype(np.float32).reshape(-1, 32)
    groups[:, 0] = 4.0  # pins every group's scale
    groups = np.clip(groups, -7.99, 7.99)
    weights = np.ldexp(groups, exponent).astype(np.float32)
    codes, scales = MXFP4.quantize(jnp.asarray(weights))
    assert (np.asarray(scales) == 127 + exponent).all() or exponent == -126
    if exponent != -126:
        clipped = np.clip(groups, -6, 6).astype(ml_dtypes.float4_e2m1fn)
        assert_bitwise(codes, clipped.view(np.uint8) & 15)


def test_quantized_weights_are_close() -> None:
    weights = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    restored = np.asarray(MXFP4.dequantize(*MXFP4.quantize(jnp.asarray(weights))))
    error = np.sqrt(np.mean((restored - weights) ** 2)) / np.sqrt(np.mean(weights**2))
    assert 0.05 < error < 0.15  # 4-bit rounding is about 11 % RMS of a Gaussian


def test_quantize_keeps_every_spread_packable() -> None:
    weights = np.ones((1, 128), np.float32)
    weights[0, 32:64] = 2.0**-30
    weights[0, 64:96] = 0.0
    codes, scales = MXFP4.quantize(jnp.asarray(weights))
    _, inexact = MXFP4.words_from_scales(codes, scales)
    assert int(inexact.sum()) == 0
    assert np.asarray(scales).tolist() == [[125, 111, 127, 125]]


def test_scale_word_holds_the_weights_exactly() -> None:
    """e2m1 * 2**(index - 9) is exact in E4M3, and times the word's f32 it is the weight."""
    for lowest in (0, 1, 5, 100, 240):
        scales = np.array([[lowest, lowest + 14, lowest + 7, lowest + 1]], np.uint8)
        codes = np.tile(np.arange(16, dtype=np.uint8), 8)[None]
        words, inexact = MXFP4.words_from_scales(jnp.asarray(codes), jnp.asarray(scales))
        word = int(np.asarray(words)[0, 0, 0])
        assert int(inexact.sum()) == 0
        assert word & ~0x7F87FFF8 == 0  # reserved bits are zero
        row_scale = np.float64(np.uint32(word & 0x7F800000).view(np.float32))
        for group in range(4):
            index = (word >> 4 * group & 0x78) // 8
            values = E2M1 * 2.0 ** (index - 9)
            in_e4m3 = values.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
            assert (in_e4m3 == values).all()
            assert (in_e4m3 * row_scale == E2M1 * 2.0 ** (int(scales[0, group]) - 127.0)).all()


@pytest.mark.parametrize(
    ("scales", "count"),
    [([100, 115, 115, 115], 1), ([100, 101, 115, 116], 2), ([100, 114, 255, 110], 2)],
)
def test_what_cannot_be_exact_is_counted(scales: list[int], count: int) -> None:
    codes = jnp.full((1, 128), 3, jnp.uint8)
    _, inexact = MXFP4.words_from_scales(codes, jnp.asarray([scales], jnp.uint8))
    if 255 in scales:
        assert int(inexact[0, 0]) >= 1
    else:
        assert int(inexact[0, 0]) == count


def test_a_zero_group_may_have_any_scale() -> None:
    codes = jnp.concatenate([jnp.full((1, 96), 3, jnp.uint8), jnp.full((1, 32), 8, jnp.uint8)], 1)
    words, inexact = MXFP4.words_from_scales(codes, jnp.asarray([[120, 121, 122, 0]], jnp.uint8))
    assert int(inexact[0, 0]) == 0
    assert np.asarray(MXFP4.scales_from_words(words)).tolist() == [[120, 121, 122, 127]]


def test_scales_of_other_dtypes() -> None:
    scales = np.array([0, 1, 127, 254], np.uint8)
    e8m0 = scales.view(ml_dtypes.float8_e8m0fnu)
    assert_bitwise(MXFP4.canonical_scales(jnp.asarray(e8m0)), scales)
    assert_bitwise(MXFP4.canonical_scales(jnp.asarray(e8m0.astype(np.float32))), scales)
    bad = jnp.asarray([0.0, 3.0, -1.0, np.inf, np.nan], jnp.float32)
    assert np.asarray(MXFP4.canonical_scales(bad)).tolist() == [255] * 5
    with pytest.raises(TypeError, match="scales: dtype int32 does not hold MXFP4 scales; pass"):
        MXFP4.canonical_scales(jnp.zeros(4, jnp.int32))


def test_wide_holds_any_spread(rng: np.random.Generator) -> None:
    """All bytes but NaN's, in any company, and back."""
    scales = rng.permuted(np.repeat(np.arange(255, dtype=np.uint8), 4)[None], axis=1).reshape(
        1, 1, -1
    )
    scales = np.concatenate([scales, scales[..., :4]], axis=-1)
    codes = rng.integers(0, 256, (1, 1, scales.shape[-1] * 16), dtype=np.uint8) | 1
    q = QuantizedTensor(
        jnp.asarray(np.repeat(codes, 32, axis=1)),
        jnp.asarray(np.repeat(scales, 32, axis=1)),
        MXFP4_WIDE,
    )
    back = unpack(pack(q))
    assert_bitwise(back.codes, q.codes)
    assert_bitwise(back.scales, q.scales)
    bad = dataclasses.replace(q, scales=q.scales.at[0, 3, 7].set(255))
    with pytest.raises(ValueError, match=r"row 3, k from 128: a scale is NaN"):
        pack(bad)
    with pytest.raises(ValueError, match="take MXFP4_WIDE, which holds any"):
        pack(dataclasses.replace(q, format=MXFP4))


def test_wide_quantizes_without_a_window() -> None:
    weights = np.ones((1, 128), np.float32)
    weights[0, 32:64] = 2.0**-60
    _, scales = MXFP4_WIDE.quantize(jnp.asarray(weights))
    assert np.asarray(scales).tolist() == [[125, 65, 125, 125]]
