"""``python -m benchmarks.run``: times every op that has a kernel; prints a table, writes JSON."""

import datetime
import functools
import json
import pathlib
import subprocess
from collections.abc import Iterable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import jax_w4moe as w4
from benchmarks import spec, timing
from jax_w4moe import roofline
from jax_w4moe.formats import LAYOUT_VERSION
from jax_w4moe.formats.layout import BLOCK_ROWS, CODE_BYTES, RECORD_BYTES, record_grid
from jax_w4moe.timing import REPEATS, median_us
from jax_w4moe.types import RowOrder


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


def packed(key: jax.Array, layer: spec.Layer) -> w4.PackedExperts:
    """Random codes under one scale: what the kernels do does not depend on the values."""

    def tensor(key: jax.Array, rows: int, columns: int, order: RowOrder) -> w4.PackedTensor:
        grid = record_grid(rows, columns, 2 if order == "gate_up" else 1)
        data = jax.random.bits(key, (layer.num_experts, *grid, RECORD_BYTES), jnp.uint8)
        word = np.array([118 << 23 | 0x5555 << 3], np.uint32).view(np.uint8)
        scales = jnp.asarray(np.tile(word, BLOCK_ROWS))
        data = data.at[..., CODE_BYTES:].set(scales.reshape(1, 1, 1, -1))
        exact = jnp.zeros(layer.num_experts, jnp.int32)
        shape = (layer.num_experts, rows, columns)
        return w4.PackedTensor(data, exact, w4.MXFP4, shape, order, LAYOUT_VERSION)

    hidden, intermediate = layer.hidden_size, layer.intermediate_size
    keys = jax.random.split(key)
    return w4.PackedExperts(
        tensor(keys[0], 2 * intermediate, hidden, "gate_up"),
        tensor(keys[1], hidden, intermediate, "canonical"),
    )


def fused_moe(layers: Iterable[spec.Layer] = spec.LAYERS) -> list[dict[str, Any]]:
    """The layer on uniform routing, against jax_w4moe.roofline."""
    rows = []
    for layer in layers:
        make = jax.jit(packed, static_argnums=1)
        sets = [make(key, layer) for key in jax.random.split(jax.random.key(0), 3)]
        for num_tokens in spec.NUM_TOKENS:
            x = jax.random.normal(jax.random.key(1), (num_tokens, layer.hidden_size), jnp.bfloat16)
            logits = jax.random.normal(jax.random.key(2), (num_tokens, layer.num_experts))
            ids, weights = w4.topk_routing(logits, layer.top_k)
            run = functools.partial(
                w4.fused_moe, topk_ids=ids, topk_weights=weights, implementation="cuda_sm90"
            )
            time_us = median_us(lambda experts, run=run, x=x: run(x, experts), sets)
            touched = roofline.touched_experts(ids, layer.num_experts)
            nbytes, flops = roofline.layer_work(sets[0], ids.size, touched)
            floor_us = roofline.floor_us(nbytes, flops)
            rows.append(
                {
                    "op": "fused_moe",
                    "case": f"{layer.name} T={num_tokens}",
                    "time_us": time_us,
                    "floor_us": floor_us,
                    "ratio": time_us / floor_us,
                    "remark": f"{touched} experts, {nbytes / time_us * 1e-6:.2f} TB/s"
                    f" = {nbytes / time_us * 1e8 / roofline.READ_BYTES_PER_S:.0f} % of read,"
                    f" {flops / time_us * 1e-6:.0f} TFLOPS",
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
    rows += fused_moe()
    header = environment()
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
