"""The layer in bf16 by ``tokamax.ragged_dot``, whose kernels tokamax chooses."""

import jax
import tokamax

from jax_w4moe.bench.backends import ragged_dot

prepare = ragged_dot.prepare


def run(
    weights: ragged_dot.Weights, x: jax.Array, topk_ids: jax.Array, topk_weights: jax.Array
) -> jax.Array:
    """The layer; as ``fused_moe`` without biases."""
    return ragged_dot.layer(tokamax.ragged_dot, weights, x, topk_ids, topk_weights)
