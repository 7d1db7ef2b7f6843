"""The choice: the argument, else what autotune measured, else the shipped table, else the model."""

import os
import pathlib
from typing import NamedTuple

import jax

from jax_w4moe import implementation
from jax_w4moe.tuning import model, winners
from jax_w4moe.tuning.problem import Problem, Tactic, alike, check, tactics
from jax_w4moe.tuning.winners import Winner


class Choice(NamedTuple):
    """A tactic, and where it came from, in words."""

    tactic: Tactic
    source: str


class _Loaded:
    """Loaded winners by (device, key). Compared by identity: see ``_loaded``."""

    def __init__(self, entries: dict[tuple[str, Problem], Winner]) -> None:
        self.entries = entries


# A part of the key of every cache of jax.jit: when winners are added, which makes a new object,
# functions are traced again, and no choice of before is kept.
_loaded = jax.make_user_context(_Loaded({}))


def choose(problem: Problem, tactic: Tactic | None = None) -> Choice:
    """Chooses at trace time.

    Args:
      problem: the static shapes.
      tactic: the caller's choice.

    Raises:
      TypeError, ValueError: as :func:`jax_w4moe.tuning.check`.
    """
    check(problem, tactic)
    if tactic is not None:
        return Choice(tactic, "the argument")
    device = implementation.device_kind()
    if device is not None and (winner := loaded(device, problem)):
        return Choice(winner.tactic, "autotune")
    return packaged(device, problem)


def packaged(device: str | None, problem: Problem) -> Choice:
    """What the package chooses by itself on a kind of device, or where there is none."""
    if device is not None:
        table = winners.shipped(device)
        for measured in alike(problem):
            winner = table.get(measured)
            if winner and winner.tactic in tactics(problem):
                return Choice(winner.tactic, f"the measured table for {device}")
    return Choice(model.best(problem), "the cost model")


def loaded(device: str, problem: Problem) -> Winner | None:
    """What was loaded for a problem, or measured by autotune in this process."""
    winner: Winner | None = _loaded.value.entries.get((device, problem.key()))
    return winner


def use(device: str, entries: dict[Problem, Winner]) -> None:
    """Adds winners, for all threads; traced functions are traced again."""
    added = {(device, problem): winner for problem, winner in entries.items()}
    _loaded.set_global(_Loaded({**_loaded.value.entries, **added}))


def load_tactics(path: str | os.PathLike[str]) -> None:
    """Uses the winners that :func:`jax_w4moe.autotune` wrote, from now on, on their kind of device.

    Jitted functions are traced and compiled again at their next call; what was compiled ahead of
    time or exported keeps its tactics. In a program of several hosts, load the same file on each.

    Args:
      path: the file.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is something else, or names a tactic that this version has not.
    """
    use(*winners.load(pathlib.Path(path)))
