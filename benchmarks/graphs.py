"""``python -m benchmarks.graphs BUILD...``: builds of the kernels side by side, without JAX.

Each BUILD is a program that ``make graphs`` made of one state of the sources. They take turns, so
that they meet the same clocks and temperatures; the first is what the others are compared with.
"""

import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import typer
from rich.console import Console
from rich.table import Table

from jax_w4moe.bench.command import named_act_dtype, named_format, named_layers
from jax_w4moe.bench.layers import row_scale_words
from jax_w4moe.bench.shapes import Shape
from jax_w4moe.tuning import Problem
from jax_w4moe.tuning.choice import packaged

Cell = tuple[Shape, int, int]  # T, tile_tokens
Answer = tuple[float, str]  # microseconds, a hash of y


def default_tile(shape: Shape, num_tokens: int, format: str, act_dtype: str) -> int:
    """What the package chooses on an H200."""
    problem = Problem(
        "fused_moe",
        shape.hidden_size,
        shape.intermediate_size,
        shape.num_experts,
        num_tokens * shape.top_k,
        act_dtype,
        format,
    )
    return packaged("NVIDIA H200", problem).tactic.tile_tokens


def run(build: Path, cells: Sequence[Cell], format: str, act_dtype: str, s: float) -> list[Answer]:
    """One round of a build: an answer for each cell."""
    lines = "".join(
        f"{c.hidden_size} {c.intermediate_size} {c.num_experts} {c.top_k} {count} {tile}\n"
        for c, count, tile in cells
    )
    words = [str(word) for word in row_scale_words(named_format(format))]
    command = [str(build.resolve()), format, act_dtype, str(s), *words]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{build} ended with {done.returncode}: {done.stderr.strip()}.")
    return [(float(us), y) for us, y in map(str.split, done.stdout.splitlines())]


def table(builds: Sequence[Path], cells: Sequence[Cell], rounds: list[list[list[Answer]]]) -> Table:
    """Medians over ``rounds[round][build][cell]``, and what they are to the first build's."""
    result = Table("shape", "T", "tile", *(str(build) for build in builds), "bits")
    for at, (shape, count, tile) in enumerate(cells):
        times = [statistics.median(r[b][at][0] for r in rounds) for b in range(len(builds))]
        columns = [f"{us:,.1f} ({us / times[0] - 1:+.1%})" for us in times]
        same = len({answers[at][1] for r in rounds for answers in r}) == 1
        result.add_row(
            shape.name, str(count), str(tile), *columns, "equal" if same else "[red]differ"
        )
    return result


def main(
    builds: list[Path],
    shape: Annotated[list[str] | None, typer.Option(help="By default all.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="By default 1, 16, 256, 4096.")] = None,
    tile: Annotated[list[int] | None, typer.Option(help="By default what would be chosen.")] = None,
    format: str = "mxfp4",
    act_dtype: Annotated[str, typer.Option(help="Or bfloat16.")] = "float8_e4m3fn",
    rounds: int = 3,
    seconds: Annotated[float, typer.Option(help="Of a measurement.")] = 0.02,
) -> None:
    """Times layers in every build in turn, and compares their results bit for bit."""
    layers = named_layers(shape or ())
    named_format(format)  # or it is refused
    named_act_dtype(act_dtype)
    jax.config.update("jax_platforms", "cpu")  # the builds need the GPU's memory
    cells = [
        (layer, count, size)
        for layer in layers
        for count in tokens or (1, 16, 256, 4096)
        for size in tile or [default_tile(layer, count, format, act_dtype)]
    ]
    measured = [
        [run(build, cells, format, act_dtype, seconds) for build in builds] for _ in range(rounds)
    ]
    Console().print(table(builds, cells, measured))


if __name__ == "__main__":
    typer.run(main)
