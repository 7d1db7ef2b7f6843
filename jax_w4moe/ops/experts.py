"""What ``fused_moe`` and ``expert_mlp`` share: experts as operands, their part of a workspace."""

from typing import Any

import jax
import jax.numpy as jnp

from jax_w4moe.activations import Activation, SiTU
from jax_w4moe.formats.layout import BLOCK_ROWS
from jax_w4moe.ops import tiles
from jax_w4moe.quantization import Per128, PerToken, ScaleRule, Static
from jax_w4moe.tuning import Tactic
from jax_w4moe.types import PackedExperts


def workspace_parts(num_rows: int, experts: PackedExperts, act_dtype: Any) -> list[int]:
    """Bytes of the parts, by csrc/launch/experts.cu, which checks their sum."""
    _, row_blocks13, k_blocks13, _ = experts.w13.data.shape
    k_blocks2 = experts.w2.data.shape[2]
    return [
        4 * num_rows,  # phases
        *tiles.image_parts(num_rows, k_blocks13, act_dtype),  # x
        *tiles.image_parts(num_rows, k_blocks2, act_dtype),  # h
        2 * num_rows * row_blocks13 * BLOCK_ROWS // 2,  # h, bf16
    ]


def operands(experts: PackedExperts) -> list[jax.Array]:
    """The weights and biases, in the handlers' order."""
    return [
        experts.w13.data,
        or_nothing(experts.w13_bias),
        experts.w2.data,
        or_nothing(experts.w2_bias),
    ]


def or_nothing(array: jax.Array | None) -> jax.Array:
    """An operand that may be left out: no elements stand for None."""
    return jnp.zeros(0, jnp.float32) if array is None else array


def attributes(
    experts: PackedExperts,
    act_dtype: Any,
    act_scale: ScaleRule,
    activation: Activation,
    tactic: Tactic,
    rows_per_expert: int = 0,
) -> dict[str, Any]:
    """What the handlers are told beside their operands, by the names in csrc/ffi/experts.h."""
    if isinstance(activation, SiTU):
        kind, parameters = 1, (activation.gate_bound, activation.up_bound, 0.0)
    else:
        limit = float("inf") if activation.limit is None else activation.limit
        kind, parameters = 0, (activation.alpha, activation.beta, limit)
    return {
        "format": experts.format.name,
        "is_bf16": tiles.is_bf16(act_dtype),
        "activation": kind,
        **{f"activation_{name}": p for name, p in zip("abc", parameters, strict=True)},
        **scale_attributes(act_scale),
        "h_scale": act_scale.h_scale if isinstance(act_scale, Static) else 0.0,
        "tile_tokens": tactic.tile_tokens,
        "rows_per_expert": rows_per_expert,
    }


def scale_attributes(rule: ScaleRule) -> dict[str, Any]:
    """The rule of x's scales, as handlers know it."""
    return {
        "pow2_scales": isinstance(rule, PerToken) and rule.pow2,
        "per_128": isinstance(rule, Per128),
        "x_scale": rule.x_scale if isinstance(rule, Static) else 0.0,
    }
