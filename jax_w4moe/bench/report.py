"""Rows as a table, as one sentence, as JSON, and compared with those of an earlier run."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from jax_w4moe.bench import peers
from jax_w4moe.bench.sweep import Row

NOISE = 0.03
"""A smaller relative difference means nothing, nor one within the measurements' spread."""


def table(rows: Sequence[Row], header: dict[str, str]) -> Table:
    """All rows; the peers' columns are filled where they were measured."""
    result = Table(title=", ".join(f"{k} {v}" for k, v in header.items()), title_justify="left")
    others = sorted({name for row in rows for name in row.backends_us})
    for name in ("layer", "T", "routing"):
        result.add_column(name, justify="right" if name == "T" else "left", no_wrap=True)
    for name in ("us", "± %", "floor", "ratio", "floor + acts", "TB/s", "TFLOPS", "MHz", "W"):
        result.add_column(name, justify="right")
    result.add_column("best peer", no_wrap=True)
    for name in ("its us", "ours / its", "FP8 weights", *others):
        result.add_column(name, justify="right")
    for i, row in enumerate(rows):
        known = _peers(row)
        best = _best(row)
        result.add_row(
            row.shape,
            str(row.num_tokens),
            row.routing,
            _figure(row.time_us),
            f"{row.spread * 50:.1f}",
            _figure(row.floor_us),
            f"{row.ratio:.2f}",
            _figure(row.moved_floor_us),
            f"{row.tb_per_s:.2f}",
            _figure(row.tflops),
            str(row.sm_mhz or "-"),
            _figure(row.watts),
            best[0] if best else "-",
            _figure(best[1] if best else None),
            f"{row.time_us / best[1]:.2f}" if best else "-",
            _figure(known.get(peers.FP8_WEIGHTS)),
            *(_figure(row.backends_us.get(name)) for name in others),
            end_section=i + 1 < len(rows) and rows[i + 1].shape != row.shape,
        )
    return result


def summary(rows: Sequence[Row]) -> str:
    """Ours and the best peers' geometric mean of time over floor, where peers were measured."""
    cells = [(row, best) for row in rows if (best := _best(row))]
    if not cells:
        return "No peer was measured on these layers."
    ours = _geometric_mean([row.ratio for row, _ in cells])
    theirs = _geometric_mean([best[1] / row.floor_us for row, best in cells])
    ahead = sum(row.time_us < best[1] for row, best in cells)
    measured = peers.table()
    return (
        f"{len(cells)} cells with peers (measured on {measured['hardware']}, {measured['date']}):"
        f" time / floor {ours:.2f} on geometric mean, the best peer of each {theirs:.2f};"
        f" ahead of it in {ahead}."
    )


def save(path: Path, rows: Sequence[Row], header: dict[str, str]) -> None:
    """Writes rows and header as JSON."""
    content = {"header": header, "rows": [dataclasses.asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load(path: Path, header: dict[str, str]) -> list[Row]:
    """Reads the rows that :func:`save` wrote, to compare them with those of this run.

    Args:
      path: the file.
      header: this run's.

    Raises:
      ValueError: it is another file, or another device's, or of other clocks.
      FileNotFoundError: there is none.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rows, old = [Row(**row) for row in content["rows"]], content["header"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} was not written by this version's bench --json ({error!r}); measure again."
        ) from error
    for name in ("device", "format", "act_dtype", "clocks"):
        if old.get(name) != header[name]:
            raise ValueError(
                f"{path}: {name} is {old.get(name)!r}, of this run {header[name]!r}; compare runs"
                " of one kind."
            )
    return rows


@dataclasses.dataclass(frozen=True)
class Change:
    """A cell of two runs: relative change of the time, and the noise to see it against."""

    row: Row
    old_us: float
    relative: float
    noise: float

    def __str__(self) -> str:
        row = self.row
        return (
            f"{row.shape} T={row.num_tokens} {row.routing}: {self.old_us:.1f} ->"
            f" {row.time_us:.1f} us ({self.relative:+.1%}, noise {self.noise:.1%})"
        )


def compare(rows: Sequence[Row], old_rows: Sequence[Row]) -> list[Change]:
    """The cells that both runs measured."""
    before = {(row.shape, row.num_tokens, row.routing): row for row in old_rows}
    changes = []
    for row in rows:
        was = before.get((row.shape, row.num_tokens, row.routing))
        if was:
            noise = max(NOISE, was.spread, row.spread)
            changes.append(Change(row, was.time_us, row.time_us / was.time_us - 1, noise))
    return changes


def _peers(row: Row) -> dict[str, float]:
    # They were measured with balanced routing.
    return peers.times_us(row.shape, row.num_tokens) if row.routing == "balanced" else {}


def _best(row: Row) -> tuple[str, float] | None:
    return peers.best(row.shape, row.num_tokens) if row.routing == "balanced" else None


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"
