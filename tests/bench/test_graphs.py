"""Builds side by side: what a build answers, and what the table makes of it."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from benchmarks import graphs
from jax_w4moe.bench.shapes import SHAPES

CELLS = [(SHAPES["flash"], 1, 64), (SHAPES["gptoss"], 4096, 160)]


def _text(table: Table) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """Answers a cell with its T as microseconds and its tile as the hash."""
    path = tmp_path / "build"
    path.write_text('#!/bin/sh\n[ "$1" = mxfp4 ] && [ $# = 4 ] || { echo no >&2; exit 2; }\n')
    with path.open("a") as file:
        file.write("while read h i e k t tile; do echo $t.5 $tile; done\n")
    path.chmod(0o755)
    return path


def test_a_build_answers_every_cell(build: Path) -> None:
    answers = graphs.run(build, CELLS, "mxfp4", "float8_e4m3fn", 0.1)
    assert answers == [(1.5, "64"), (4096.5, "160")]


def test_a_build_that_fails(build: Path) -> None:
    with pytest.raises(RuntimeError, match=r"build ended with 2: no\."):
        graphs.run(build, CELLS, "nvfp4", "float8_e4m3fn", 0.1)


def test_medians_and_bits() -> None:
    old = [[(10.0, "a"), (100.0, "b")], [(12.0, "a"), (100.0, "b")], [(11.0, "a"), (100.0, "b")]]
    new = [[(22.0, "a"), (90.0, "c")], [(22.0, "a"), (90.0, "b")], [(22.0, "a"), (90.0, "b")]]
    rounds = [list(pair) for pair in zip(old, new, strict=True)]
    text = _text(graphs.table([Path("old"), Path("new")], CELLS, rounds))
    first, second = (line for line in text.splitlines() if "flash" in line or "gptoss" in line)
    assert "11.0 (+0.0%)" in first and "22.0 (+100.0%)" in first and "equal" in first
    assert "90.0 (-10.0%)" in second and "differ" in second


def test_default_tiles_are_the_tables_and_the_models() -> None:
    assert graphs.default_tile(SHAPES["gptoss"], 4096, "mxfp4", "float8_e4m3fn") == 160
    assert graphs.default_tile(SHAPES["gptoss"], 4096, "int4_g128", "float8_e4m3fn") == 160
    assert graphs.default_tile(SHAPES["flash"], 16, "mxfp4", "bfloat16") == 32  # not in the table


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": ["flush"]}, "flush"),
        ({"format": "int5"}, "format 'int5' is unknown; use one of"),
        ({"act_dtype": "bf16"}, "act-dtype 'bf16' is unknown; use float8_e4m3fn or bfloat16"),
    ],
)
def test_unknown_names_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        graphs.main([Path("none")], **options)
