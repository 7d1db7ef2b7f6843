"""The kernels on weights of every format: exact weights, the reference's values, the same bits."""

import functools
import re

import jax
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
every_format_and_tile = pytest.mark.parametrize(
    ("format", "act_dtype", "tile"),
    [
        pytest.param(format, act_dtype, tile, id=f"{format.name}-{act_dtype}-{tile}")
        for format in formats()
        for act_dtype in (FP8, BF16)
        for tile in tiles.compiled(format.name, act_dtype)
    ],
)
kernel = functools.partial(w4.grouped_matmul, implementation="cuda_sm90")
layer = functools.partial(w4.fused_moe, implementation="cuda_sm90")

BF16_RMS = 5e-3  # h, slots and y are rounded to bf16

# (H, I, E, k): small, with a padded K-block, and a rank of DeepSeek-R1.
SHAPES = ((256, 128, 4, 2), (384, 640, 5, 3), (7168, 2048, 32, 8))


@every_format_and_tile
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


@every_act_dtype
def test_every_scale_byte(act_dtype: jnp.dtype) -> None:
    """A row of MXFP4 for each byte of which f32 holds 2**11 times the largest weight."""
    scales = np.minimum(np.arange(256), 234).astype(np.uint8)
    codes = np.tile(np.arange(16, dtype=np.uint8) * 17, (1, 256, 4))
    scales = np.repeat(scales[None, :, None], 4, axis=2)
    out = kernel(
        jnp.eye(128).astype(act_dtype),
        w4.pack(w4.QuantizedTensor(jnp.asarray(codes), jnp.asarray(scales), w4.MXFP4)),
        jnp.asarray([128], jnp.int32),
        act_dtype=act_dtype,
        x_scale=1.0 if act_dtype == FP8 else None,
        preferred_element_type=jnp.float32,
    )
    expected = DEQUANTIZE["mxfp4"](codes, scales)[0].T.astype(np.float32)
    np.testing.assert_array_equal(np.asarray(out), expected)


@pytest.mark.parametrize(
    ("tokens", "hidden", "num_experts", "top_k", "intermediate"),
    [
        (1, 128, 2, 2, 128),
        (4, 128, 4, 2, 128),
        (4, 768, 8, 2, 512),
        (4, 2048, 8, 4, 1024),
        (4, 4096, 8, 4, 2048),
    ],
)
def test_bf16_activations_on_small_layers(
    tokens: int, hidden: int, num_experts: int, top_k: int, intermediate: int
) -> None:
    """The sizes and scales of FlashInfer's tests of MXFP4 with bf16."""
    rng = np.random.default_rng(0)
    sizes = (2 * intermediate, hidden), (hidden, intermediate)
    w13, w2 = (data.quantized(rng, (num_experts, *s), low=118, high=123) for s in sizes)
    experts = w4.pack_experts(w4.ExpertWeights(w13, w2))
    x = data.tokens(rng, tokens, hidden)
    ids, weights = data.routing(rng, "random", tokens, num_experts, top_k)
    y = layer(x, experts, ids, weights, act_dtype=BF16)
    assert relative_rms(y, reference.fused_moe(x, experts, ids, weights)) <= BF16_RMS


@every_format
def test_one_copy_of_the_weights_prefills_in_fp8_and_decodes_in_bf16(
    rng: np.random.Generator, format: w4.WeightFormat
) -> None:
    """Two programs on the same arrays, which neither copies."""
    experts = data.packed_experts((256, 128, 4, 2), format=format)
    calls = {
        dtype: (data.tokens(rng, count, 256), *data.routing(rng, "random", count, 4, 2))
        for dtype, count in ((FP8, 300), (BF16, 3))
    }
    for dtype, (x, ids, weights) in calls.items():
        program = jax.jit(functools.partial(layer, act_dtype=dtype))
        text = program.lower(x, experts, ids, weights).compile().as_text()
        shape = ",".join(map(str, experts.w13.data.shape))
        assert f"u8[{shape}]" in text and not re.search(r" copy[.(-]", text)
        y = layer(x, experts, ids, weights, act_dtype=dtype)
        expected = reference.fused_moe(x, experts, ids, weights)
        assert relative_rms(y, expected) <= (BF16_RMS if dtype == BF16 else MIRRORED_RMS)


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
