"""Microseconds of an op on a GPU, as a step of a compiled program that is replayed.

A program calls the op on each of a set of inputs, a dozen calls or so; programs are dispatched back
to back, so that the host's share vanishes behind the device's. Inputs that together exceed the L2
cache several times over are cold in it.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

CALLS = 12  # of a program, at least
SECONDS = 0.02  # of a measurement, about
REPEATS = 30


def median_us(op: Callable[[Any], Any], inputs: Sequence[Any], *, repeats: int = REPEATS) -> float:
    """Microseconds per call of ``op``, the median over ``repeats`` measurements.

    Args:
      op: the function; traced as often as it is called in a program. What it closes over becomes a
        constant of the program, so large arrays must be inputs.
      inputs: arrays or trees of them, taken in turn.
      repeats: measurements.

    Returns:
      Microseconds.
    """
    rounds = -(-CALLS // len(inputs))

    @jax.jit
    def program(inputs: Sequence[Any]) -> list[Any]:
        results: list[Any] = []
        for _ in range(rounds):
            # The barrier makes each round's calls new ones to XLA, and orders them.
            results, inputs = jax.lax.optimization_barrier((results, inputs))
            results = [*results, *map(op, inputs)]
        return results

    def seconds(programs: int) -> float:
        start = time.perf_counter()
        for _ in range(programs - 1):
            program(inputs)
        jax.block_until_ready(program(inputs))
        return time.perf_counter() - start

    for _ in range(5):  # compiled, then recorded, then replayed
        once = seconds(1)
    programs = max(2, min(50, round(SECONDS / once)))
    times = [seconds(programs) for _ in range(repeats)]
    return statistics.median(times) / (programs * rounds * len(inputs)) * 1e6
