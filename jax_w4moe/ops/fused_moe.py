"""A whole MoE layer after its router, on the GPU, as one custom call."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float8e4m3fn, Float32, Int32

from jax_w4moe import _ffi
from jax_w4moe.activations import SwiGLU
from jax_w4moe.formats.layout import BLOCK_ROWS, round_up
from jax_w4moe.ops import tiles
from jax_w4moe.types import PackedExperts

_MAX_ROWS = 65_536  # more are worked off in chunks of whole tokens
_ROUTE_PAIRS = 1024  # (token, slot) pairs of one block


def workspace_bytes(num_tokens: int, top_k: int, experts: PackedExperts) -> int:
    """Bytes of workspace, by the formula of csrc/launch/fused_moe.cu, which checks it."""
    num_experts, row_blocks13, k_blocks13, _ = experts.w13.data.shape
    k_blocks2 = experts.w2.data.shape[2]
    rows = min(num_tokens, max(1, _MAX_ROWS // top_k)) * top_k
    parts = [
        tiles.PLAN_BYTES,
        tiles.PLAN_BYTES,
        4 * -(-rows // _ROUTE_PAIRS) * num_experts,
        4 * num_experts,
        *[4 * rows] * 5,  # two maps between pairs and rows, the scales of x and h, h's amax
        tiles.image_bytes(rows, num_experts, k_blocks13),
        tiles.image_bytes(rows, num_experts, k_blocks2),
        2 * rows * row_blocks13 * BLOCK_ROWS // 2,  # h, bf16
        2 * rows * experts.hidden_size,  # slots, bf16
    ]
    return sum(round_up(part, 128) for part in parts)


def fused_moe_cuda(
    x: Float8e4m3fn[Array, "T H"],
    x_scale: Float32[Array, "T 1"],
    experts: PackedExperts,
    topk_ids: Int32[Array, "T k"],
    topk_weights: Float32[Array, "T k"],
    activation: SwiGLU,
) -> BFloat16[Array, "T H"]:
    """The layer on FP8 tokens; the rounding points are R2 to R6 of ``docs/numerics.md``.

    Args:
      x: quantised tokens. Nothing is checked here.
      x_scale: their scales.
      experts: packed experts.
      topk_ids: expert ids; outside [0, E) means none.
      topk_weights: routing weights.
      activation: the gated activation.

    Returns:
      bf16[T, H].
    """
    x_type = jax.typeof(x)
    no_bias = jnp.zeros(0, jnp.float32)
    nbytes = workspace_bytes(x.shape[0], topk_ids.shape[1], experts)
    y, _ = _ffi.call(
        "fused_moe",
        [
            x_type.update(dtype=jnp.bfloat16),
            x_type.update(shape=(nbytes,), dtype=jnp.uint8),
        ],
        x,
        x_scale,
        experts.w13.data,
        no_bias if experts.w13_bias is None else experts.w13_bias,
        experts.w2.data,
        no_bias if experts.w2_bias is None else experts.w2_bias,
        topk_ids,
        topk_weights,
        alpha=activation.alpha,
        beta=activation.beta,
        limit=float("inf") if activation.limit is None else activation.limit,
        tile_tokens=tiles.tile_tokens(topk_ids.size, experts.num_experts),
    )
    return y
