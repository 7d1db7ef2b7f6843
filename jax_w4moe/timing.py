"""Microseconds of an op on a GPU, as a step of a compiled program that is replayed.

A program calls the op on each of a set of inputs, a dozen calls or so; programs are dispatched back
to back, before the ones before them have ended, so that the device never waits for the host. Inputs
that together exceed the L2 cache several times over are cold in it.
"""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

CALLS = 12  # of a program, at least
SECONDS = 0.02  # of a measurement, about
REPEATS = 30
_UNCOUNTED = 5  # rounds


class Program:
    """Calls of an op on each input in turn, compiled into one program and warmed up.

    Calling it dispatches it once, without waiting, and returns the results.

    Args:
      op: ``op(input, *shared)``; traced as often as it is called in a program. What it closes over
        becomes a constant of the program, so large arrays must be arguments.
      inputs: arrays or trees of them, taken in turn.
      shared: further arguments, the same for every call.
      calls: of the op in the program, at least.

    Attributes:
      calls: of the op in the program.
    """

    def __init__(
        self,
        op: Callable[..., Any],
        inputs: Sequence[Any],
        shared: tuple[Any, ...] = (),
        calls: int = CALLS,
    ) -> None:
        rounds = -(-calls // len(inputs))
        self.calls = rounds * len(inputs)

        @jax.jit
        def program(inputs: Sequence[Any], shared: tuple[Any, ...]) -> list[Any]:
            results: list[Any] = []
            for _ in range(rounds):
                # The barrier makes each round's calls new ones to XLA, and orders them.
                results, inputs = jax.lax.optimization_barrier((results, inputs))
                results = [*results, *(op(x, *shared) for x in inputs)]
            return results

        self._dispatch = functools.partial(program, inputs, shared)
        for _ in range(5):  # compiled, then recorded, then replayed
            self._once = self._seconds(1)

    def __call__(self) -> Any:
        return self._dispatch()

    def times_us(self, *, repeats: int = REPEATS, pause_s: float = 0.0) -> list[float]:
        """Microseconds per call of the op, of each of ``repeats`` measurements.

        The host's time to start and to notice an end does not count.

        Args:
          repeats: measurements.
          pause_s: without a pause a measurement is 20 ms of programs, from the end of the 20 ms
            before; the next are dispatched meanwhile, and the first do not count. With one it is
            what a burst of four programs, or of 4 ms, takes longer than one of half as many, each
            after that many seconds of idleness.
        """
        programs = max(2, min(50, round((SECONDS / 10 if pause_s else SECONDS) / self._once)))
        if jax.process_count() > 1:  # all processes must run as many
            programs = int(multihost_utils.broadcast_one_to_all(np.int32(programs)))
        if pause_s:
            seconds = [
                self._burst(2 * programs, pause_s) - self._burst(programs, pause_s)
                for _ in range(repeats)
            ]
        else:
            # The first rounds' ends are seen late, while the host, slower at first, dispatches.
            ends = self._ends(programs, _UNCOUNTED + repeats + 1)[_UNCOUNTED:]
            seconds = [end - start for start, end in itertools.pairwise(ends)]
        return [s / (programs * self.calls) * 1e6 for s in seconds]

    def _ends(self, programs: int, rounds: int) -> list[float]:
        """When each of rounds of programs has ended; the next is dispatched before that."""
        ends = []
        running = self._round(programs)
        for _ in range(rounds):
            following = self._round(programs)
            jax.block_until_ready(running)
            ends.append(time.perf_counter())
            running = following
        jax.block_until_ready(running)
        return ends

    def _burst(self, programs: int, pause_s: float) -> float:
        time.sleep(pause_s)
        self._seconds(1)  # so that the host, too, is awake
        return self._seconds(programs)

    def _seconds(self, programs: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(self._round(programs))
        return time.perf_counter() - start

    def _round(self, programs: int) -> Any:
        """Dispatches them; the last one's results."""
        for _ in range(programs - 1):
            self()
        return self()


def median_us(op: Callable[[Any], Any], inputs: Sequence[Any], *, repeats: int = REPEATS) -> float:
    """Microseconds per call of ``op`` on ``inputs`` in turn: the median of a :class:`Program`'s."""
    return statistics.median(Program(op, inputs).times_us(repeats=repeats))
