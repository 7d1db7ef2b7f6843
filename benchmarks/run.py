"""``python -m benchmarks.run``: times every op that has a kernel; prints a table, writes JSON."""

import datetime
import json
import pathlib
import subprocess
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from rich.console import Console
from rich.table import Table

import jax_w4moe as w4
from benchmarks import spec, timing


def environment() -> dict[str, str]:
    """What every figure must be read with."""
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split("\n")[0]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "driver": driver,
        "jax": jax.__version__,
        "jax_w4moe": str(w4.build_info()["version"]),
        "commit": commit or "unknown",
    }


def quantize_fp8(bandwidth: float) -> list[dict[str, Any]]:
    """Kernel against its floor: a launch on 8 elements, and its bytes (3 per element) copied."""
    rows = []
    tiny = [jnp.ones((1, 8), jnp.bfloat16) for _ in range(timing.MAX_INPUTS)]
    launch_us = timing.median_us(lambda x: w4.quantize_fp8(x, implementation="cuda_sm90"), tiny)
    for case in spec.QUANTIZE:
        shape = (case.num_tokens, case.hidden_size)

        def tokens(key: jax.Array, shape: tuple[int, int] = shape) -> jax.Array:
            return jax.random.normal(key, shape, jnp.bfloat16)

        elements = case.num_tokens * case.hidden_size
        inputs = timing.rotating_inputs(tokens, 2 * elements)
        time_us = timing.median_us(lambda x: w4.quantize_fp8(x, implementation="cuda_sm90"), inputs)
        xla_us = timing.median_us(lambda x: w4.quantize_fp8(x, implementation="xla"), inputs)
        floor_us = launch_us + 3 * elements / bandwidth * 1e6
        rows.append(
            {
                "op": "quantize_fp8",
                "case": case.name,
                "time_us": time_us,
                "floor_us": floor_us,
                "ratio": time_us / floor_us,
                "xla_us": xla_us,
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
    bandwidth = timing.copy_bandwidth()
    rows = quantize_fp8(bandwidth)
    header = environment()
    table = Table(
        title=", ".join(f"{k} {v}" for k, v in header.items())
        + f"; copy {bandwidth / 1e12:.2f} TB/s; median of {timing.REPEATS}",
        title_justify="left",
    )
    for column in ("op", "case", "time us", "floor us", "ratio", "plain XLA us"):
        table.add_column(column, justify="left" if column in ("op", "case") else "right")
    for row in rows:
        table.add_row(
            row["op"],
            row["case"],
            f"{row['time_us']:.2f}",
            f"{row['floor_us']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['xla_us']:.2f}",
        )
    Console(width=110).print(table)
    if output:
        output.write_text(
            json.dumps({**header, "copy_bandwidth": bandwidth, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    typer.run(main)
