"""Tables, summaries and comparisons on made-up rows; the peers' file; the machine's figures."""

import io
import subprocess
from typing import Any

import jax.numpy as jnp
import pytest
from rich.console import Console

from jax_w4moe.bench import machine, peers, report
from jax_w4moe.bench.shapes import NUM_TOKENS, SHAPES
from jax_w4moe.bench.sweep import Row

HEADER = {"date": "today", "device": "a GPU", "clocks": "sustained"}


def row(shape: str = "flash", num_tokens: int = 4, **changes: Any) -> Row:
    values: dict[str, Any] = {
        "time_us": 100.0,
        "spread": 0.01,
        "floor_us": 80.0,
        "moved_floor_us": 81.0,
        "touched": 24.0,
        "tb_per_s": 3.2,
        "tflops": 12.0,
        "sm_mhz": 1755,
        "watts": 600.5,
        "backends_us": {},
    }
    return Row(shape, num_tokens, changes.pop("routing", "balanced"), **{**values, **changes})


def _cells(*rows: Row) -> list[list[str]]:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(report.table(rows, HEADER))
    lines = console.export_text().splitlines()
    return [[c.strip() for c in line[1:-1].split("│")] for line in lines if line.startswith("│")]


def test_table() -> None:
    shown, skewed = _cells(row(backends_us={"tokamax": 594.0}), row(routing="zipf", sm_mhz=None))
    expected = ["flash", "4", "balanced", "100.0", "0.5", "80.0", "1.25", "81.0", "3.20", "12.0"]
    peer = ["1755", "600.5", "flashinfer_w4a8", "131.3", "0.76", "185.7", "594.0"]
    assert shown == [*expected, *peer]
    assert skewed[10] == "-" and skewed[12:] == ["-"] * 5


def test_summary() -> None:
    ahead, behind = row(), row("gptoss", 1, time_us=60.0, floor_us=30.0)
    text = report.summary([ahead, behind, row(routing="zipf"), row("qwen3")])
    ours = (1.25 * 2.0) ** 0.5
    theirs = (131.3 / 80 * 47.4 / 30) ** 0.5
    assert text.startswith("2 cells with peers (measured on NVIDIA H200, driver 580, 2026-11-20):")
    assert f"floor {ours:.2f} on geometric mean, the best peer of each {theirs:.2f}" in text
    assert text.endswith("ahead of it in 1.")


@pytest.mark.parametrize(
    ("old_spread", "new_us", "slower"),
    [(0.0, 102.9, False), (0.0, 103.1, True), (0.05, 104.0, False), (0.05, 106.0, True)],
)
def test_noise(old_spread: float, new_us: float, slower: bool) -> None:
    [change] = report.compare([row(time_us=new_us, spread=0.0)], [row(spread=old_spread)])
    assert (change.relative > change.noise) is slower
    assert not report.compare([row(num_tokens=1)], [row()])


def test_peers() -> None:
    """48 cells; single GEMMs and the layer with FP8 weights are nobody's best peer."""
    table = peers.table()
    cells = [(shape, t) for shape in SHAPES for t in NUM_TOKENS if peers.times_us(shape, t)]
    assert len(cells) == 48 == sum(map(len, table["us"].values()))
    assert set(table["us"]) == set(SHAPES) - {"qwen3"}
    assert not any("dgup" in name for name in peers.names())
    assert all(peers.best(*cell) for cell in cells)
    assert peers.best("r1_tp8", 1) == ("marlin_w4a16", 34.2)
    assert {peers.best(*cell)[0] for cell in cells} == {"flashinfer_w4a8", "marlin_w4a16"}  # type: ignore[index]


# --- the machine ----------------------------------------------------------------------------------


class _Query:
    """An nvidia-smi that answers at the third look."""

    def __init__(self, answer: str) -> None:
        self.answer, self.looks = answer, 0

    def poll(self) -> int | None:
        self.looks += 1
        return 0 if self.looks > 2 else None

    def communicate(self) -> tuple[str, None]:
        return self.answer, None


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("1755, 698.30\n", (1755, 698.3)), ("[N/A], [N/A]\n", None), ("", None)],
)
def test_under_load(monkeypatch: pytest.MonkeyPatch, answer: str, expected: object) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: _Query(answer))
    dispatched = []

    def run() -> Any:
        dispatched.append(1)
        return jnp.ones(())

    assert machine.under_load(run) == expected
    assert len(dispatched) == 3


def test_header_without_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert machine.under_load(lambda: None) is None
    header = machine.header()
    assert (header["driver"], header["commit"]) == ("none", "unknown")
