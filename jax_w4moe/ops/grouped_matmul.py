"""Groups of rows times their expert's packed matrix on the GPU."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from jax_w4moe import _ffi
from jax_w4moe.ops import tiles
from jax_w4moe.ops.experts import or_nothing, scale_attributes
from jax_w4moe.quantization import ScaleRule
from jax_w4moe.tuning import Tactic
from jax_w4moe.types import PackedTensor


def workspace_bytes(
    num_rows: int, k_blocks: int, num_experts: int, act_dtype: Any = jnp.float8_e4m3fn
) -> int:
    """Bytes of workspace, by the formula of csrc/launch/grouped_matmul.cu, which checks it."""
    return tiles.workspace_bytes(
        num_rows, num_experts, tiles.image_parts(num_rows, k_blocks, act_dtype)
    )


def grouped_matmul_cuda(
    lhs: Array,
    x_scale: Float32[Array, "M 1"] | None,
    rhs: PackedTensor,
    group_sizes: Int32[Array, "E"],
    act_dtype: Any,
    act_scale: ScaleRule,
    out_dtype: jnp.dtype,
    tactic: Tactic,
) -> Array:
    """``out[m] = x_scale[m] * (weights of m's expert) @ x_fp8[m]``, accumulated in f32.

    Args:
      lhs: rows grouped by expert, bf16 without x_scale or float8_e4m3fn with it. Not checked here,
        like all else.
      x_scale: scales of FP8 rows.
      rhs: one packed projection.
      group_sizes: rows per expert.
      act_dtype: float8_e4m3fn, or bfloat16 for rows of bf16.
      act_scale: the rule of FP8 scales.
      out_dtype: bfloat16 or float32.
      tactic: how the kernel goes about it.

    Returns:
      [M, N] in canonical column order; rows of no group are zero.
    """
    lhs_type = jax.typeof(lhs)
    num_experts, _, k_blocks, _ = rhs.data.shape
    nbytes = workspace_bytes(lhs.shape[0], k_blocks, num_experts, act_dtype)
    out, _ = _ffi.call(
        "grouped_matmul",
        [
            lhs_type.update(shape=(lhs.shape[0], rhs.shape[1]), dtype=out_dtype),
            lhs_type.update(shape=(nbytes,), dtype=jnp.uint8),
        ],
        lhs,
        or_nothing(x_scale),
        rhs.data,
        group_sizes,
        format=rhs.format.name,
        is_bf16=tiles.is_bf16(act_dtype),
        **scale_attributes(act_scale),
        gate_up=rhs.row_order == "gate_up",
        tile_tokens=tactic.tile_tokens,
    )
    return out
