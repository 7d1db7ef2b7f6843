"""The layer in bf16 by ``jax.lax.ragged_dot``: what JAX brings by itself."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_w4moe.packing import dequantize_experts, unpack_experts
from jax_w4moe.types import PackedExperts


class Weights(NamedTuple):
    """bf16[E, H, 2I], gate columns first, and bf16[E, I, H]."""

    w13: jax.Array
    w2: jax.Array


@jax.jit
def prepare(experts: PackedExperts) -> Weights:
    """The same weights in bf16."""
    gate, up, down = dequantize_experts(unpack_experts(experts), jnp.dtype(jnp.bfloat16))
    return Weights(jnp.concatenate([gate, up], 1).swapaxes(1, 2), down.swapaxes(1, 2))


def run(weights: Weights, x: jax.Array, topk_ids: jax.Array, topk_weights: jax.Array) -> jax.Array:
    """The layer; as ``fused_moe`` without biases."""
    return layer(jax.lax.ragged_dot, weights, x, topk_ids, topk_weights)


def layer(
    ragged_dot: Callable[..., Any],
    weights: Weights,
    x: jax.Array,
    topk_ids: jax.Array,
    topk_weights: jax.Array,
) -> jax.Array:
    """The layer around any ``ragged_dot``: sort by expert, gather, GEMM, SwiGLU, GEMM, combine."""
    num_experts = weights.w13.shape[0]
    live = (topk_ids >= 0) & (topk_ids < num_experts)
    expert = jnp.where(live, topk_ids, num_experts).reshape(-1)
    order = jnp.argsort(expert)
    sizes = jnp.zeros(num_experts, jnp.int32).at[expert].add(1, mode="drop")
    rows = x[order // topk_ids.shape[1]]
    gate, up = jnp.split(
        ragged_dot(rows, weights.w13, sizes, preferred_element_type=jnp.float32), 2, axis=1
    )
    h = (jax.nn.silu(gate) * up).astype(jnp.bfloat16)
    out = ragged_dot(h, weights.w2, sizes, preferred_element_type=jnp.float32)
    slots = out[jnp.argsort(order)].reshape(*topk_ids.shape, -1)
    # Rows of no group are whatever the product leaves there.
    slots = jnp.where(live[..., None], slots * topk_weights[..., None], 0)
    return jnp.sum(slots, axis=1).astype(jnp.bfloat16)
