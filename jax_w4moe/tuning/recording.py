"""``autotune``: times every legal tactic of the calls inside a block, and keeps the winners."""

import contextlib
import contextvars
import os
import pathlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from jax_w4moe import _ffi, implementation
from jax_w4moe.timing import Program
from jax_w4moe.tuning import choice, winners
from jax_w4moe.tuning.problem import Problem, Tactic, tactics
from jax_w4moe.tuning.winners import Winner, Winners

_REPEATS = 9
_PLATFORM = "gpu"

_recording: contextvars.ContextVar[Winners | None] = contextvars.ContextVar(
    "recording", default=None
)


@contextlib.contextmanager
def autotune(path: str | os.PathLike[str]) -> Iterator[None]:
    """Inside the block, a call of an op on a GPU's JAX arrays times every legal tactic first.

    A traced call (under jit) is not timed. The winner is used from then on, also after the block,
    for calls of the same shapes (rows rounded up to three bits), jitted ones included;
    :func:`jax_w4moe.load_tactics` says what is traced again. What the file holds already is used
    and not measured again: delete it to start afresh. At the end winners are written to it,
    atomically, beside those that are there. Results do not depend on the tactic, bit for bit.

    Args:
      path: a JSON file, written if need be.

    Raises:
      RuntimeError: the kernels cannot run here.
      FileNotFoundError: there is no folder to write it to.
      ValueError: the file is something else, or another kind of device's.
    """
    reason = _ffi.why_unavailable()
    if reason:
        raise RuntimeError(f"autotune measures on a Hopper GPU: {reason}")
    device = str(implementation.device_kind())
    file = pathlib.Path(path)
    if not file.absolute().parent.is_dir():
        raise FileNotFoundError(f"{file.parent} does not exist; make it, or write elsewhere.")
    if file.exists():
        there = winners.load(file)
        winners.check_device(file, there.device, device)
        choice.use(*there)
    found = Winners(device, {})
    token = _recording.set(found)
    try:
        yield
    finally:
        _recording.reset(token)
        if found.entries:
            winners.save(file, found)


def wanted(problem: Problem, operands: Any) -> bool:
    """Whether a call should be measured: inside autotune, on a GPU's arrays, and not known yet."""
    recording = _recording.get()
    if recording is None or not problem.num_rows:
        return False
    if choice.loaded(recording.device, problem):
        return False
    return all(map(_on_gpu, jax.tree.leaves(operands)))


def _on_gpu(leaf: Any) -> bool:
    if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array):
        return False
    return {device.platform for device in leaf.devices()} == {_PLATFORM}


def record(
    problem: Problem, op: Callable[[Tactic], Callable[..., Any]], calls: Sequence[Any]
) -> None:
    """Times every legal tactic and uses the fastest from now on.

    Args:
      problem: what is measured.
      op: the op with a tactic.
      calls: tuples of its arguments, which take turns; cold in L2 if they read different weights.
    """
    recording = _recording.get()
    assert recording is not None
    times = {tactic: _median_us(op(tactic), calls) for tactic in tactics(problem)}
    tactic = min(times, key=lambda t: times[t])
    entry = {problem.key(): Winner(tactic, times[tactic])}
    recording.entries.update(entry)
    choice.use(recording.device, entry)


def _median_us(op: Callable[..., Any], calls: Sequence[Any]) -> float:
    program = Program(lambda call: op(*call), calls, calls=len(calls))
    return statistics.median(program.times_us(repeats=_REPEATS))
