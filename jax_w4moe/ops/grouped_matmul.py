"""Groups of FP8 rows times their expert's packed matrix on the GPU."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float8e4m3fn, Float32, Int32

from jax_w4moe import _ffi
from jax_w4moe.formats.layout import round_up
from jax_w4moe.types import PackedTensor

TILE_TOKENS = (8, 16, 32, 64, 128)
"""Tokens of the compiled tiles; results do not depend on the tile, bit for bit."""

_ATOM = 8  # tokens of a swizzle atom; every expert's rows are padded to whole ones
_PLAN_BYTES = 16_512  # of csrc/schedule/grouped.cuh


def tile_tokens(num_rows: int, num_experts: int) -> int:
    """The smallest tile that holds the expected rows of an expert."""
    expected = -(-num_rows // num_experts)
    return next((tile for tile in TILE_TOKENS if tile >= expected), TILE_TOKENS[-1])


def workspace_bytes(num_rows: int, num_experts: int, k_blocks: int) -> int:
    """Bytes of workspace: the plan and the token image. csrc/launch/grouped_matmul.cu checks it."""
    padding = min(num_rows, num_experts) * (_ATOM - 1)
    atoms = round_up(num_rows + padding, _ATOM) // _ATOM + TILE_TOKENS[-1] // _ATOM
    return _PLAN_BYTES + atoms * k_blocks * 1024


def grouped_matmul_cuda(
    lhs: Float8e4m3fn[Array, "M K"],
    x_scale: Float32[Array, "M 1"],
    rhs: PackedTensor,
    group_sizes: Int32[Array, "E"],
    out_dtype: jnp.dtype,
) -> Array:
    """``out[m] = x_scale[m] * (weights of m's expert) @ lhs[m]``, accumulated in f32.

    Args:
      lhs: rows grouped by expert. Not checked here, like all else.
      x_scale: their scales.
      rhs: one packed projection.
      group_sizes: rows per expert.
      out_dtype: bfloat16 or float32.

    Returns:
      [M, N] in canonical column order; rows of no group are zero.
    """
    num_experts, num_rows, _ = rhs.shape
    lhs_type = jax.typeof(lhs)
    nbytes = workspace_bytes(lhs.shape[0], num_experts, rhs.data.shape[2])
    out, _ = _ffi.call(
        "grouped_matmul",
        [
            lhs_type.update(shape=(lhs.shape[0], num_rows), dtype=out_dtype),
            lhs_type.update(shape=(nbytes,), dtype=jnp.uint8),
        ],
        lhs,
        x_scale,
        rhs.data,
        group_sizes,
        gate_up=rhs.row_order == "gate_up",
        tile_tokens=tile_tokens(lhs.shape[0], num_experts),
    )
    return out
