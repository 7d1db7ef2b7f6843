"""Microseconds of an op on a GPU: many calls per measurement, the median of many measurements.

A measurement is one jitted program that loops over a set of inputs, so the host's share vanishes.
Inputs that together exceed the L2 cache several times over are cold in it.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

COLD_BYTES = 512 << 20  # the largest L2 of a Hopper GPU is 60 MB
CALLS = 1024
REPEATS = 30


def median_us(
    op: Callable[[Any], Any], inputs: Sequence[Any], *, calls: int = CALLS, repeats: int = REPEATS
) -> float:
    """Microseconds per call of ``op``, the median over ``repeats`` measurements.

    Args:
      op: the function; traced once.
      inputs: arrays or trees of them with ``nbytes``, taken in turn.
      calls: per measurement, at most.
      repeats: measurements.

    Returns:
      Microseconds.
    """
    rounds = max(2, min(calls, COLD_BYTES * 64 // max(inputs[0].nbytes, 1)) // len(inputs))

    @jax.jit
    def measurement(inputs: Sequence[Any]) -> list[Any]:
        def round_of_calls(i: jax.Array, _: list[Any]) -> list[Any]:
            # The barrier ties the inputs to i: without it XLA would call op once, before the loop.
            _, fresh = jax.lax.optimization_barrier((i, list(inputs)))
            return [op(x) for x in fresh]

        return jax.lax.fori_loop(0, rounds, round_of_calls, [op(x) for x in inputs])

    jax.block_until_ready(measurement(inputs))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(measurement(inputs))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) / ((rounds + 1) * len(inputs)) * 1e6
