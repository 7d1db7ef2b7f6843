"""``python -m benchmarks.run``: ``quantize_fp8`` and the ceilings; prints a table, writes JSON."""

import json
import pathlib
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from rich.console import Console
from rich.table import Table

import jax_w4moe as w4
from benchmarks import spec, timing
from jax_w4moe.bench import machine
from jax_w4moe.timing import REPEATS


def quantize_fp8(bandwidth: float) -> list[dict[str, Any]]:
    """Kernel against its floor: a launch on 8 elements, and its bytes (3 per element) copied."""
    rows = []
    tiny = [jnp.ones((1, 8), jnp.bfloat16) for _ in range(timing.MAX_INPUTS)]
    launch_us = timing.looped_us(lambda x: w4.quantize_fp8(x, implementation="cuda_sm90"), tiny)
    for case in spec.QUANTIZE:
        shape = (case.num_tokens, case.hidden_size)

        def tokens(key: jax.Array, shape: tuple[int, int] = shape) -> jax.Array:
            return jax.random.normal(key, shape, jnp.bfloat16)

        elements = case.num_tokens * case.hidden_size
        inputs = timing.rotating_inputs(tokens, 2 * elements)
        time_us = timing.looped_us(lambda x: w4.quantize_fp8(x, implementation="cuda_sm90"), inputs)
        xla_us = timing.looped_us(lambda x: w4.quantize_fp8(x, implementation="xla"), inputs)
        floor_us = launch_us + 3 * elements / bandwidth * 1e6
        rows.append(
            {
                "op": "quantize_fp8",
                "case": case.name,
                "time_us": time_us,
                "floor_us": floor_us,
                "ratio": time_us / floor_us,
                "remark": f"plain XLA {xla_us:.2f} us",
            }
        )
    return rows


def main(
    output: Annotated[pathlib.Path | None, typer.Option(help="Where to write the JSON.")] = None,
) -> None:
    """Runs all benchmarks on the first GPU."""
    reason = w4.why_unavailable()
    if reason:
        raise SystemExit(reason)
    rates = {
        "copy TB/s": timing.copy_bandwidth() / 1e12,
        "read TB/s": timing.read_bandwidth() / 1e12,
        "FP8 TFLOPS": timing.fp8_rate() / 1e12,
    }
    rows = quantize_fp8(rates["copy TB/s"] * 1e12)
    header = machine.header()
    title = ", ".join(f"{k} {v}" for k, v in header.items())
    title += "; " + ", ".join(f"{k} {v:.2f}" for k, v in rates.items())
    table = Table(title=f"{title}; median of {REPEATS}", title_justify="left")
    for column in ("op", "case", "time us", "floor us", "ratio", ""):
        table.add_column(column, justify="left" if column in ("op", "case", "") else "right")
    for row in rows:
        figures = (f"{row[name]:.2f}" for name in ("time_us", "floor_us", "ratio"))
        table.add_row(row["op"], row["case"], *figures, row["remark"])
    Console(width=120).print(table)
    if output:
        output.write_text(json.dumps({**header, **rates, "rows": rows}, indent=1))


if __name__ == "__main__":
    typer.run(main)
