"""Many layers in one program, as a decoding step has them, against one layer by itself.

The layers take turns on several sets of weights, far more than any cache holds, and on routings.
The calls are independent; XLA runs them one after the other.
"""

import statistics

import jax

from jax_w4moe.bench.layers import calls, layer, random_experts
from jax_w4moe.bench.shapes import Shape
from jax_w4moe.timing import Program

NUM_TOKENS = (1, 16, 64)

LAYERS = 40
SETS = 8


def layer_us(shape: Shape, num_tokens: int) -> tuple[float, float, int]:
    """Microseconds per layer in a program of 40 layers, and of one layer by itself; weight bytes.

    By itself is as ``sweep`` measures it: one set of weights, on which routings take turns. The
    bytes are those of all sets.

    Args:
      shape: every layer's.
      num_tokens: T.
    """
    keys = jax.random.split(jax.random.key(0), SETS)
    sets = [random_experts(key, shape) for key in keys]
    routings = calls(sets[0], "balanced", num_tokens, shape)
    layers = [(routings[i % len(routings)], sets[i % SETS]) for i in range(LAYERS)]
    stack = Program(lambda arguments: layer(*arguments), layers, calls=LAYERS)
    alone = Program(layer, routings, (sets[0],))
    each_us, alone_us = (statistics.median(program.times_us()) for program in (stack, alone))
    return each_us, alone_us, sets[0].nbytes * SETS
