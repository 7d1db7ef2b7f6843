"""The experts of an MoE layer on rows that are grouped already, on the GPU."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from jax_w4moe import _ffi
from jax_w4moe.activations import Activation
from jax_w4moe.ops import experts as operands
from jax_w4moe.ops import tiles
from jax_w4moe.quantization import ScaleRule
from jax_w4moe.tuning import Tactic
from jax_w4moe.types import PackedExperts


def workspace_bytes(
    num_rows: int, experts: PackedExperts, act_dtype: Any = jnp.float8_e4m3fn
) -> int:
    """Bytes of workspace, by the formula of csrc/launch/expert_mlp.cu, which checks it."""
    parts = operands.workspace_parts(num_rows, experts, act_dtype)
    return tiles.workspace_bytes(num_rows, experts.num_experts, parts)


def expert_mlp_cuda(
    rows: Array,
    x_scale: Float32[Array, "... 1"] | None,
    experts: PackedExperts,
    group_sizes: Int32[Array, "E"],
    act_dtype: Any,
    act_scale: ScaleRule,
    activation: Activation,
    tactic: Tactic,
) -> Array:
    """The two projections of every group's expert with the activation between them.

    Args:
      rows: bf16[M, H] or [E, M_max, H] without x_scale, or float8_e4m3fn with it. Nothing is
        checked here.
      x_scale: scales of FP8 rows.
      experts: packed experts.
      group_sizes: rows per expert.
      act_dtype: float8_e4m3fn, or bfloat16 for rows of bf16.
      act_scale: the rule of FP8 scales.
      activation: the gated activation.
      tactic: how the kernels go about it.

    Returns:
      bf16, shaped like rows; rows of no group are zero.
    """
    shape, masked = rows.shape, rows.ndim == 3
    flat = rows.reshape(-1, shape[-1])
    scales = None if x_scale is None else x_scale.reshape(-1, 1)
    row_type = jax.typeof(flat)
    nbytes = workspace_bytes(flat.shape[0], experts, act_dtype)
    out, _ = _ffi.call(
        "expert_mlp",
        [
            row_type.update(dtype=jnp.bfloat16),
            row_type.update(shape=(nbytes,), dtype=jnp.uint8),
        ],
        flat,
        operands.or_nothing(scales),
        *operands.operands(experts),
        group_sizes,
        **operands.attributes(
            experts, act_dtype, act_scale, activation, tactic, shape[1] if masked else 0
        ),
    )
    return out.reshape(shape)
