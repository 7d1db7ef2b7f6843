"""Files of measured winners: those that ``autotune`` writes, and those shipped in ``tables/``.

A file belongs to one kind of device: ``{"device": ..., "date": ..., "entries": [...]}``, an entry
being ``{"problem": {...}, "tactic": {...}, "time_us": ...}`` with the fields of a ``Problem`` (its
key) and of the winning ``Tactic``.
"""

import dataclasses
import datetime
import functools
import json
import os
import pathlib
import re
from typing import Any, NamedTuple

from jax_w4moe.tuning.problem import Problem, Tactic, check


class Winner(NamedTuple):
    """The fastest tactic, and its microseconds."""

    tactic: Tactic
    time_us: float


class Winners(NamedTuple):
    """What was measured on one kind of device, by the problems' keys."""

    device: str
    entries: dict[Problem, Winner]


def load(path: pathlib.Path) -> Winners:
    """Reads a file.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is something else, or names a tactic that this version has not.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        device, entries = str(content["device"]), dict(map(_read, content["entries"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no tactics ({error!r}); delete it and run autotune again."
        ) from error
    for problem, winner in entries.items():
        try:
            check(problem, winner.tactic)
        except ValueError as error:
            raise ValueError(f"{path}: {error} Delete it and run autotune again.") from error
    return Winners(device, entries)


def save(path: pathlib.Path, winners: Winners) -> None:
    """Writes a file, atomically, over what another run of the same device left there."""
    if path.exists():
        there = load(path)
        check_device(path, there.device, winners.device)
        winners = Winners(winners.device, {**there.entries, **winners.entries})
    entries = sorted(winners.entries.items(), key=lambda entry: dataclasses.astuple(entry[0]))
    lines = ",\n".join(json.dumps(_row(*entry)) for entry in entries)  # one each, to be read
    header = {"device": winners.device, "date": datetime.date.today().isoformat()}
    text = f'{json.dumps(header)[:-1]}, "entries": [\n{lines}\n]}}\n'
    written = path.with_name(f".{path.name}.{os.getpid()}")
    written.write_text(text, encoding="utf-8")
    os.replace(written, path)


def check_device(path: pathlib.Path, there: str, here: str) -> None:
    """Refuses to mix the figures of two kinds of devices."""
    if there != here:
        raise ValueError(f"{path} is for {there!r}, this GPU is {here!r}; use another file.")


@functools.cache
def shipped(device: str) -> dict[Problem, Winner]:
    """The entries that the package has for a kind of device; none if it was never measured."""
    name = re.sub(r"[^a-z0-9]+", "_", device.lower())
    path = pathlib.Path(__file__).parent / "tables" / f"{name}.json"
    return load(path).entries if path.exists() else {}


def _row(problem: Problem, winner: Winner) -> dict[str, Any]:
    return {
        "problem": dataclasses.asdict(problem),
        "tactic": dataclasses.asdict(winner.tactic),
        "time_us": round(winner.time_us, 2),
    }


def _read(row: dict[str, Any]) -> tuple[Problem, Winner]:
    return Problem(**row["problem"]), Winner(Tactic(**row["tactic"]), float(row["time_us"]))
