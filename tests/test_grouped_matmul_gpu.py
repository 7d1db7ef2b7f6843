"""The grouped GEMM kernel: exact weights, f32 promotion, the same bits from every tile."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_w4moe as w4
from jax_w4moe import _ffi, reference
from jax_w4moe.ops import grouped_matmul as op
from jax_w4moe.ops import tiles
from jax_w4moe.ops.experts import scale_attributes
from jax_w4moe.types import RowOrder
from tests.helpers import data
from tests.helpers.compare import as_float64, assert_bitwise, relative_rms
from tests.helpers.oracle import dequantize_mxfp4

pytestmark = pytest.mark.gpu

kernel = functools.partial(w4.grouped_matmul, implementation="cuda_sm90")


# Every compiled tile, whatever the number of rows.
every_tactic = pytest.mark.parametrize("tactic", [w4.Tactic(t) for t in tiles.TILE_TOKENS], ids=str)


@every_tactic
@pytest.mark.parametrize("row_order", ["canonical", "gate_up"])
def test_one_hot_rows_give_back_the_weights(tactic: w4.Tactic, row_order: RowOrder) -> None:
    """448 times each weight bit for bit, for all codes and every spread of scales up to 14."""
    rows = 16 * 15 * 15 // 25 * 4  # 576: nine slabs, so that the last warpgroups are idle
    index = np.arange(rows)
    codes = (np.arange(256) + index[:, None]) % 16
    low, spread = 100 + index % 7, index % 15
    scales = np.stack([low, low + spread, low + spread // 2, low + spread // 3], axis=1)
    q = w4.QuantizedTensor(
        jnp.asarray((codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8))[None],
        jnp.asarray(np.concatenate([scales, scales[::-1]], 1).astype(np.uint8))[None],
        w4.MXFP4,
    )
    lhs = (jnp.eye(256) * 448).astype(jnp.float8_e4m3fn)
    sizes = jnp.asarray([256], jnp.int32)
    out = kernel(
        lhs,
        w4.pack(q, row_order=row_order),
        sizes,
        x_scale=1.0,
        preferred_element_type=jnp.float32,
        tactic=tactic,
    )
    expected = 448 * dequantize_mxfp4(np.asarray(q.codes), np.asarray(q.scales))[0].T
    np.testing.assert_array_equal(np.asarray(out), expected.astype(np.float32))


@every_tactic
def test_same_sign_data_at_large_k(tactic: w4.Tactic) -> None:
    """Without promotion in f32 every 128 of K this is wrong by 12 %."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 8, (1, 64, 7168))
    q = w4.QuantizedTensor(
        jnp.asarray((codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)),
        jnp.full((1, 64, 7168 // 32), 120, jnp.uint8),
        w4.MXFP4,
    )
    lhs = jnp.asarray(rng.uniform(200, 448, (16, 7168)), jnp.float32).astype(jnp.float8_e4m3fn)
    out = kernel(
        lhs,
        w4.pack(q),
        jnp.asarray([16], jnp.int32),
        x_scale=1.0,
        preferred_element_type=jnp.float32,
        tactic=tactic,
    )
    weights = dequantize_mxfp4(np.asarray(q.codes), np.asarray(q.scales))[0]
    expected = as_float64(lhs) @ weights.T
    assert np.max(np.abs(as_float64(out) - expected) / expected) < 1e-3


SHAPES = ((3, 96, 64), (5, 192, 160), (4, 576, 384), (2, 2880, 2880), (9, 64, 32))


@every_tactic
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("row_order", ["canonical", "gate_up"])
def test_against_the_mirrored_reference(
    rng: np.random.Generator, tactic: w4.Tactic, shape: tuple[int, int, int], row_order: RowOrder
) -> None:
    """Uneven groups, empty ones, rows of no group, sizes that are no multiple of anything."""
    if row_order == "gate_up" and shape[1] % 64:
        pytest.skip("two halves of 48 rows are no multiple of 32")
    num_experts, _, columns = shape
    rhs = w4.pack(data.quantized(rng, shape), row_order=row_order)
    sizes = rng.integers(0, 40, num_experts)
    sizes[rng.integers(num_experts)] = 0
    lhs = data.tokens(rng, int(sizes.sum()) + 5, columns)
    group_sizes = jnp.asarray(sizes, jnp.int32)
    for dtype, bound in ((jnp.float32, 1e-3), (jnp.bfloat16, 3e-3)):
        out = kernel(lhs, rhs, group_sizes, preferred_element_type=dtype, tactic=tactic)
        expected = reference.grouped_matmul(lhs, rhs, group_sizes, mode="mirrored")
        assert out.dtype == dtype
        assert relative_rms(out, expected) < bound
        assert not as_float64(out)[sizes.sum() :].any()


@pytest.mark.parametrize("act_dtype", [jnp.float8_e4m3fn, jnp.bfloat16])
def test_every_tile_and_width_gives_the_same_bits(rng: np.random.Generator, act_dtype: Any) -> None:
    """Groups of every width that a tile is cut to, and of several tiles."""
    counts = [*range(1, 64, 5), 64, 65, 0, 80, 95, 96, 97, 112, 119, 120, 121, 129, 144, 160]
    counts += [161, 200, 224, 225, 240, 241, 288, 289, 577]
    rhs = w4.pack(data.quantized(rng, (len(counts), 320, 1152)))
    sizes = jnp.asarray(counts, jnp.int32)
    lhs = data.tokens(rng, sum(counts), 1152)
    how = {"act_dtype": act_dtype}
    results = [
        np.asarray(kernel(lhs, rhs, sizes, tactic=w4.Tactic(tile), **how))
        for tile in tiles.compiled("mxfp4", act_dtype)
    ]
    for result in results[1:]:
        assert_bitwise(result, results[0])
    for group, start in enumerate(np.cumsum([0, *counts[:-1]])):
        if counts[group]:
            alone = kernel(
                lhs[start : start + 1], rhs, jnp.zeros_like(sizes).at[group].set(1), **how
            )
            assert_bitwise(alone, results[0][start : start + 1])
    expected = reference.grouped_matmul(lhs, rhs, sizes, mode="mirrored", **how)
    assert relative_rms(results[0], expected) < 3e-3


def test_other_rows_may_be_nan_and_repeats_agree(rng: np.random.Generator) -> None:
    rhs = w4.pack(data.quantized(rng, (3, 192, 256)))
    sizes = jnp.asarray([5, 9, 3], jnp.int32)
    lhs = data.tokens(rng, 17, 256)
    clean = np.asarray(kernel(lhs, rhs, sizes))
    dirty = np.asarray(kernel(lhs.at[6].set(jnp.nan), rhs, sizes))
    keep = np.arange(17) != 6
    assert_bitwise(dirty[keep], clean[keep])
    assert np.isnan(dirty[6].astype(np.float32)).all()
    for _ in range(20):
        assert_bitwise(kernel(lhs, rhs, sizes), clean)


def test_sizes_out_of_range_are_clipped(rng: np.random.Generator) -> None:
    rhs = w4.pack(data.quantized(rng, (4, 64, 128)))
    lhs = data.tokens(rng, 20, 128)
    for sizes in ([3, -7, 10_000, 5], [2**31 - 1, 2**31 - 1, 0, 1], [0, 0, 0, 0], [-1, -1, -1, 9]):
        group_sizes = jnp.asarray(sizes, jnp.int32)
        out = kernel(lhs, rhs, group_sizes, preferred_element_type=jnp.float32)
        wide = np.clip(np.asarray(sizes, np.int64), 0, 20)
        expected = reference.grouped_matmul(lhs, rhs, jnp.asarray(wide, jnp.int32), mode="mirrored")
        assert relative_rms(out, expected) < 1e-3


def test_replayed_by_cuda_graphs(rng: np.random.Generator) -> None:
    rhs = w4.pack(data.quantized(rng, (4, 256, 256)))
    sizes = jnp.asarray([4, 4, 4, 4], jnp.int32)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(x: jax.Array, rhs: w4.PackedTensor, sizes: jax.Array) -> jax.Array:
        for _ in range(6):
            x = jnp.tanh(kernel(x, rhs, sizes))
        return x

    x = data.tokens(rng, 16, 256)
    for _ in range(4):
        x = jax.block_until_ready(step(x, rhs, sizes))
    recorded = _ffi.call_count("grouped_matmul")
    assert recorded > 0
    for _ in range(5):
        x = jax.block_until_ready(step(x, rhs, sizes))
    assert _ffi.call_count("grouped_matmul") == recorded


def test_handler_checks_again(rng: np.random.Generator) -> None:
    rhs = w4.pack(data.quantized(rng, (2, 64, 128)))
    lhs, scale = w4.quantize_fp8(data.tokens(rng, 8, 128))
    sizes = jnp.asarray([4, 4], jnp.int32)

    def call(workspace: int, tile: int, width: int = 64) -> None:
        types = [
            jax.ShapeDtypeStruct((8, width), jnp.float32),
            jax.ShapeDtypeStruct((workspace,), jnp.uint8),
        ]
        out = _ffi.call(
            "grouped_matmul",
            types,
            lhs,
            scale,
            rhs.data,
            sizes,
            format="mxfp4",
            is_bf16=False,
            gate_up=False,
            **scale_attributes(w4.PerToken()),
            tile_tokens=tile,
        )
        jax.block_until_ready(out)

    needed, smallest = op.workspace_bytes(8, 1, 2), min(tiles.TILE_TOKENS)
    call(needed, smallest)
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"workspace has {needed - 1} bytes"):
        call(needed - 1, smallest)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no tile of 24 tokens is compiled"):
        call(needed, 24)
    with pytest.raises(jax.errors.JaxRuntimeError, match="N=65 does not fit 1 row blocks of 64"):
        call(needed, smallest, width=65)


def test_fp8_rows_for_bf16_activations_are_refused(rng: np.random.Generator) -> None:
    rhs = w4.pack(data.quantized(rng, (1, 64, 128)))
    lhs, scale = w4.quantize_fp8(data.tokens(rng, 4, 128))
    sizes = jnp.asarray([4], jnp.int32)
    with pytest.raises(NotImplementedError, match="bfloat16 for x of float8_e4m3fn has no SM90"):
        kernel(lhs, rhs, sizes, x_scale=scale, act_dtype=jnp.bfloat16)
