"""A layer as several that hold a slice of the intermediate size each: what TP computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import jax_w4moe as w4
from jax_w4moe.formats.layout import BLOCK_K, round_up
from tests.helpers.compare import as_float64


def sum_of_slices(
    weights: w4.ExpertWeights, tokens: tuple[jax.Array, ...], parts: int
) -> np.ndarray:
    """The sum of the slices' results, by the mirrored reference: each has its own FP8 scales of h.

    Args:
      weights: canonical, with biases.
      tokens: x, topk_ids, topk_weights.
      parts: how many slices, of multiples of 128; those beyond I hold nothing.

    Returns:
      float64[T, H].
    """
    x, ids, routing_weights = tokens
    intermediate = weights.w13.codes.shape[1] // 2
    size = round_up(-(-intermediate // parts), BLOCK_K)
    format = weights.w2.format
    total = np.zeros(x.shape)
    for first in range(0, intermediate, size):
        end = min(first + size, intermediate)
        rows = np.r_[first:end, intermediate + first : intermediate + end]
        w13, w2 = weights.w13, weights.w2
        of_groups = range(format.num_scales(first), format.num_scales(end))
        w13 = dataclasses.replace(w13, codes=w13.codes[:, rows], scales=w13.scales[:, rows])
        w2 = dataclasses.replace(
            w2,
            codes=w2.codes[..., first // 2 : end // 2],
            scales=w2.scales[..., [*range(format.row_scales), *of_groups]],
        )
        w2_bias = weights.w2_bias if first == 0 else jnp.zeros_like(weights.w2_bias)
        sliced = w4.ExpertWeights(w13, w2, weights.w13_bias[:, rows], w2_bias)
        y = w4.reference.fused_moe(x, sliced, ids, routing_weights, mode="mirrored")
        total += as_float64(y)
    return total
