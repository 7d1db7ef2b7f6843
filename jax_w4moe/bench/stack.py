"""Many layers in one program, as a decoding step has them, against one layer by itself.

The layers take turns on several sets of weights, far more than any cache holds, and on routings.
The calls are independent; XLA runs them one after the other.
"""

import statistics

import jax

from jax_w4moe.bench.layers import Call, calls, random_experts
from jax_w4moe.bench.shapes import Shape
from jax_w4moe.moe import fused_moe
from jax_w4moe.timing import Program
from jax_w4moe.types import PackedExperts

NUM_TOKENS = (1, 16, 64)

LAYERS = 40
SETS = 8


def layer_us(shape: Shape, num_tokens: int) -> tuple[float, float]:
    """Microseconds per layer in a program of 40 layers, and of one layer by itself.

    By itself is as ``sweep`` measures it: one set of weights, on which routings take turns.

    Args:
      shape: every layer's.
      num_tokens: T.
    """
    keys = jax.random.split(jax.random.key(0), SETS)
    sets = [random_experts(key, shape) for key in keys]
    routings = calls(sets[0], "balanced", num_tokens, shape)
    layers = [(routings[i % len(routings)], sets[i % SETS]) for i in range(LAYERS)]
    stack = Program(_layer, layers, calls=LAYERS)
    alone = Program(lambda call, experts: _layer((call, experts)), routings, (sets[0],))
    return statistics.median(stack.times_us()), statistics.median(alone.times_us())


def weight_bytes(shape: Shape) -> int:
    """Bytes of all sets of weights."""
    experts = jax.eval_shape(lambda key: random_experts(key, shape), jax.random.key(0))
    nbytes: int = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(experts))
    return nbytes * SETS


def _layer(arguments: tuple[Call, PackedExperts]) -> jax.Array:
    call, experts = arguments
    return fused_moe(call.x, experts, call.topk_ids, call.topk_weights)
