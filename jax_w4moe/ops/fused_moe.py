"""A whole MoE layer after its router, on the GPU, as one custom call."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32, Int32

from jax_w4moe import _ffi
from jax_w4moe.activations import Activation
from jax_w4moe.ops import experts as operands
from jax_w4moe.ops import tiles
from jax_w4moe.quantization import ScaleRule
from jax_w4moe.tuning import Tactic
from jax_w4moe.types import PackedExperts

_MAX_ROWS = 65_536  # more are worked off in chunks of whole tokens
_COUNTED_PAIRS = 1024  # (token, slot) pairs of one block; no more need no counts


def workspace_bytes(
    num_tokens: int, top_k: int, experts: PackedExperts, act_dtype: Any = jnp.float8_e4m3fn
) -> int:
    """Bytes of workspace, by the formula of csrc/launch/fused_moe.cu, which checks it."""
    rows = min(num_tokens, max(1, _MAX_ROWS // top_k)) * top_k
    blocks = 0 if rows <= _COUNTED_PAIRS else -(-rows // _COUNTED_PAIRS)
    return tiles.workspace_bytes(
        rows,
        experts.num_experts,
        [
            *operands.workspace_parts(rows, experts, act_dtype),
            4 * blocks * (experts.num_experts + 1),  # counts
            8 * rows,  # places
            2 * rows * experts.hidden_size,  # slots, bf16
        ],
    )


def fused_moe_cuda(
    x: Array,
    x_scale: Float32[Array, "T 1"] | None,
    experts: PackedExperts,
    topk_ids: Int32[Array, "T k"],
    topk_weights: Float32[Array, "T k"],
    act_dtype: Any,
    act_scale: ScaleRule,
    activation: Activation,
    tactic: Tactic,
) -> BFloat16[Array, "T H"]:
    """The layer; its rounding points are R1 to R6 of ``docs/numerics.md``.

    Args:
      x: bf16[T, H] without x_scale, or float8_e4m3fn[T, H] with it. Nothing is checked here.
      x_scale: scales of FP8 tokens.
      experts: packed experts.
      topk_ids: expert ids; outside [0, E) means none.
      topk_weights: routing weights.
      act_dtype: float8_e4m3fn; or bfloat16, which leaves out R1 and R4 and wants x as bf16.
      act_scale: the rule of FP8 scales.
      activation: the gated activation.
      tactic: how the kernels go about it.

    Returns:
      bf16[T, H].
    """
    x_type = jax.typeof(x)
    nbytes = workspace_bytes(x.shape[0], topk_ids.shape[1], experts, act_dtype)
    y, _ = _ffi.call(
        "fused_moe",
        [
            x_type.update(dtype=jnp.bfloat16),
            x_type.update(shape=(nbytes,), dtype=jnp.uint8),
        ],
        x,
        operands.or_nothing(x_scale),
        *operands.operands(experts),
        topk_ids,
        topk_weights,
        **operands.attributes(experts, act_dtype, act_scale, activation, tactic),
    )
    return y
