"""The kernels on weights of every format: exact weights, the reference's values, the same bits."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import jax_w4moe as w4
from jax_w4moe import reference
from jax_w4moe.formats import formats
from jax_w4moe.ops import tiles
from tests.helpers import data
from tests.helpers.compare import MIRRORED_RMS, assert_bitwise, relative_rms
from tests.helpers.oracle import DEQUANTIZE

pytestmark = pytest.mark.gpu

every_format = pytest.mark.parametrize("format", formats(), ids=lambda f: f.name)
FP8, BF16 = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.bfloat16)
every_act_dtype = pytest.mark.parametrize("act_dtype", [FP8, BF16], ids=str)
every_tile = pytest.mark.parametrize(
    ("act_dtype", "tile"),
    [
        *((FP8, tile) for tile in tiles.TILE_TOKENS),
        *((BF16, tile) for tile in tiles.BF16_TILE_TOKENS),
    ],
    ids=str,
)
kernel = functools.partial(w4.grouped_matmul, implementation="cuda_sm90")
layer = functools.partial(w4.fused_moe, implementation="cuda_sm90")

BF16_RMS = 5e-3  # h, slots and y are rounded to bf16

# (H, I, E, k): small, with a padded K-block, and a rank of DeepSeek-R1.
SHAPES = ((256, 128, 4, 2), (384, 640, 5, 3), (7168, 2048, 32, 8))


@every_format
@every_tile
def test_one_hot_rows_give_back_the_weights(
    rng: np.random.Generator, format: w4.WeightFormat, act_dtype: jnp.dtype, tile: int
) -> None:
    """448 times each weight, rounded once to f32: all codes, scales of both signs."""
    q = data.quantized(rng, (1, 576, 256), format)
    codes = np.asarray(q.codes)
    assert len(set(codes.flat)) == 256
    out = kernel(
        (jnp.eye(256) * 448).astype(act_dtype),
        w4.pack(q),
        jnp.asarray([256], jnp.int32),
        act_dtype=act_dtype,
        x_scale=1.0 if act_dtype == FP8 else None,
        preferred_element_type=jnp.float32,
        tactic=w4.Tactic(tile),
    )
    expected = 448 * DEQUANTIZE[format.name](codes, np.asarray(q.scales))[0].T
    np.testing.assert_array_equal(np.asarray(out), expected.astype(np.float32))


@every_format
def test_every_bf16_mantissa(rng: np.random.Generator, format: w4.WeightFormat) -> None:
    """One value per row, the 256 significands of both signs in turn: each weight times it."""
    q = data.quantized(rng, (1, 64, 256), format)
    values = (1 + np.arange(256) % 128 / 128) * np.where(np.arange(256) < 128, 1, -1)
    out = kernel(
        jnp.asarray(np.diag(values), jnp.bfloat16),
        w4.pack(q),
        jnp.asarray([256], jnp.int32),
        act_dtype=BF16,
        preferred_element_type=jnp.float32,
    )
    weights = DEQUANTIZE[format.name](np.asarray(q.codes), np.asarray(q.scales))[0].T
    np.testing.assert_array_equal(np.asarray(out), (values[:, None] * weights).astype(np.float32))


@functools.lru_cache(maxsize=2)
def _experts(format: w4.WeightFormat, shape: tuple[int, int, int, int]) -> w4.PackedExperts:
    return data.packed_experts(shape, bias=True, format=format)


@every_format
@every_act_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_against_the_reference(
    format: w4.WeightFormat, act_dtype: jnp.dtype, shape: tuple[int, int, int, int]
) -> None:
    """And a token is bitwise the same in every batch."""
    hidden, _, num_experts, top_k = shape
    experts = _experts(format, shape)
    rng = np.random.default_rng(0)
    x = data.tokens(rng, 2049, hidden)
    ids, weights = data.routing(rng, "random", 2049, num_experts, top_k)
    run = functools.partial(layer, act_dtype=act_dtype)
    everything = np.asarray(run(x, experts, ids, weights))
    bounds = (1e-2, MIRRORED_RMS) if act_dtype == FP8 else (3e-3, BF16_RMS)
    for count in (1, 9, 65, 300):
        rows = rng.permutation(2049)[:count]
        arguments = (x[rows], experts, ids[rows], weights[rows])
        y = run(*arguments)
        assert_bitwise(y, everything[rows])
        for mode, bound in zip(("mirrored", "exact"), bounds, strict=True):
            expected = reference.fused_moe(*arguments, act_dtype=act_dtype, mode=mode)
            assert relative_rms(y, expected) <= bound
    for _ in range(100):
        assert_bitwise(run(x, experts, ids, weights), everything)


def test_int4_with_an_empty_expert(rng: np.random.Generator) -> None:
    """Two experts, one without rows; scales of both signs around 0.005."""
    codes = rng.integers(0, 256, (2, 1024, 256), dtype=np.uint8)
    scales = (0.005 * rng.standard_normal((2, 1024, 4))).astype(np.float32)
    q = w4.QuantizedTensor(jnp.asarray(codes), jnp.asarray(scales), w4.INT4_G128)
    lhs, sizes = data.tokens(rng, 2, 512), jnp.asarray([0, 2], jnp.int32)
    for scale_dtype in (jnp.float32, jnp.bfloat16):
        rhs = w4.pack(w4.QuantizedTensor(q.codes, q.scales.astype(scale_dtype), w4.INT4_G128))
        out = kernel(lhs, rhs, sizes, preferred_element_type=jnp.float32)
        expected = reference.grouped_matmul(lhs, rhs, sizes, mode="mirrored")
        assert relative_rms(out, expected) < 1e-3
        assert relative_rms(out, reference.grouped_matmul(lhs, rhs, sizes)) < 4e-2
