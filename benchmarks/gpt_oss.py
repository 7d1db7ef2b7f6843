"""``python -m benchmarks.gpt_oss``: a whole gpt-oss model of random weights, from disk to tokens.

Writes the checkpoint in the real layout if the folder has none, loads it, and measures prefill and
decoding at several batch sizes: tokens/s, and how much of a step the MoE layers are, measured by
themselves. ``--cold`` drops the files from the page cache before they are loaded.
"""

import dataclasses
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from jax_w4moe import _ffi
from jax_w4moe.bench import machine
from jax_w4moe.models import (
    TINY_GPT_OSS,
    GptOss,
    GptOssConfig,
    Runner,
    Yarn,
    save_random_gpt_oss,
    spread_over,
)

GPT_OSS_20B = GptOssConfig(
    vocab_size=201088,
    hidden_size=2880,
    intermediate_size=2880,
    num_hidden_layers=24,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=64,
    num_local_experts=32,
    num_experts_per_tok=4,
    layer_types=("sliding_attention", "full_attention") * 12,
    yarn=Yarn(32.0, 4096, truncate=False),
)
CONFIGS = {
    "20b": GPT_OSS_20B,
    "120b": dataclasses.replace(
        GPT_OSS_20B,
        num_hidden_layers=36,
        num_local_experts=128,
        layer_types=GPT_OSS_20B.layer_types[:2] * 18,
    ),
    "tiny": TINY_GPT_OSS,
}
ACT_DTYPES = {"fp8": jnp.float8_e4m3fn, "bf16": jnp.bfloat16}


def main(
    shape: Annotated[str, typer.Option(help="20b, 120b or tiny.")] = "tiny",
    folder: Annotated[
        Path | None, typer.Option(help="Of the checkpoint (a temporary one).")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Rows (1, 8, 64).")] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 512,
    capacity: Annotated[int, typer.Option(help="Tokens that a row can hold.")] = 2048,
    steps: Annotated[int, typer.Option(help="Decoding steps that are timed.")] = 64,
    act_dtype: Annotated[str, typer.Option(help="fp8 or bf16.")] = "fp8",
    attention: Annotated[str | None, typer.Option(help="xla or cudnn (the fastest).")] = None,
    expert_parallel: Annotated[int, typer.Option(help="Devices to spread experts over.")] = 1,
    tensor_parallel: Annotated[int, typer.Option(help="Devices to slice them over.")] = 1,
    cold: Annotated[bool, typer.Option("--cold", help="Load from the disk itself.")] = False,
) -> None:
    """Prints one table for the load and one for the tokens."""
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as temporary:
        path = folder or Path(temporary) / "checkpoint"
        if not (path / "config.json").exists():
            began = time.perf_counter()
            save_random_gpt_oss(path, CONFIGS[shape], shards=1 if shape == "tiny" else 16)
            console.print(f"written in {time.perf_counter() - began:.1f} s")
        if cold:
            drop_cached(path)
        spread = spread_over(expert_parallel, tensor_parallel)
        began = time.perf_counter()
        model = GptOss.from_pretrained(
            path, act_dtype=ACT_DTYPES[act_dtype], attention=attention, **spread
        )
        jax.block_until_ready(jax.tree.leaves(model))
        seconds = time.perf_counter() - began
        console.print(load_table(path, seconds))
    runner = Runner(model)
    table = Table(title=", ".join(f"{k} {v}" for k, v in machine.header().items()))
    for name in (
        "batch",
        "prefill tokens/s",
        "ms per prompt batch",
        "decode tokens/s",
        "ms per step",
        "MoE layers, ms",
        "share of the step, %",
        "handler calls per step",
        "cache, GB",
    ):
        table.add_column(name, justify="right")
    for rows in batch or (1, 8, 64):
        table.add_row(*measure(runner, rows, min(prompt, capacity), capacity, steps))
    console.print(table)


def measure(runner: Runner, rows: int, prompt: int, capacity: int, steps: int) -> list[str]:
    """One row of the table."""
    vocabulary = runner.model.config.vocab_size
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, vocabulary, (rows, prompt)), jnp.int32)
    lengths = jnp.full(rows, prompt, jnp.int32)
    cache = runner.init_cache(rows, capacity)
    nbytes = cache.nbytes
    prefill_s = []
    for _ in range(4):  # the first compiles
        began = time.perf_counter()
        logits, cache = runner.prefill(cache, tokens, lengths)
        jax.block_until_ready(logits)
        prefill_s.append(time.perf_counter() - began)
    ids = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    step_s = []
    for _ in range(4):  # measurements of back-to-back steps; the first compiles
        handled = handler_calls()
        began = time.perf_counter()
        for _ in range(steps):
            logits, cache = runner.decode(cache, ids)
        jax.block_until_ready(logits)
        step_s.append((time.perf_counter() - began) / steps)
        handled = handler_calls() - handled
        lengths_left = capacity - int(cache.lengths.max())
        if lengths_left < steps:
            _, cache = runner.prefill(cache, tokens, lengths)
    prefill, step = statistics.median(prefill_s[1:]), statistics.median(step_s[1:])
    moe = moe_seconds(runner.model, rows, steps)
    return [
        str(rows),
        f"{rows * prompt / prefill:.0f}",
        f"{prefill * 1e3:.2f}",
        f"{rows / step:.1f}",
        f"{step * 1e3:.3f}",
        f"{moe * 1e3:.3f}",
        f"{100 * moe / step:.0f}",
        f"{handled / steps:.1f}",
        f"{nbytes / 1e9:.2f}",
    ]


def handler_calls() -> int:
    """How often the MoE op's handler has run; a step that is replayed from a graph runs none."""
    return _ffi.call_count("fused_moe") if _ffi.is_available() else 0


def moe_seconds(model: GptOss, rows: int, steps: int) -> float:
    """The MoE layers of a step by themselves, one after the other: routers and experts."""
    leaves, structure = jax.tree.flatten([block.mlp for block in model.layers])

    @jax.jit
    def all_layers(leaves: list[Any], x: jax.Array) -> jax.Array:
        for layer in jax.tree.unflatten(structure, leaves):
            y = layer(x)
            # Another routing for every layer, of numbers as large as a norm gives.
            x = jnp.roll(y / (jnp.max(jnp.abs(y)) + 1), 1, axis=-1) + x
        return x

    hidden = model.config.hidden_size
    x = jax.random.normal(jax.random.key(0), (rows, 1, hidden), model.dtype)

    def run() -> float:
        began = time.perf_counter()
        for _ in range(steps):
            y = all_layers(leaves, x)
        jax.block_until_ready(y)
        return (time.perf_counter() - began) / steps

    return statistics.median([run() for _ in range(4)][1:])


def load_table(path: Path, seconds: float) -> Table:
    """How long loading took, and what the devices then hold."""
    stored = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if not all(stats):  # a CPU does not say
        stats = [{"bytes_in_use": math.nan, "peak_bytes_in_use": math.nan}]
    held = sum(stat["bytes_in_use"] for stat in stats)
    peak = max(stat["peak_bytes_in_use"] for stat in stats)
    row = {
        "files, GB": f"{stored / 1e9:.2f}",
        "load, s": f"{seconds:.1f}",
        "GB/s": f"{stored / 1e9 / seconds:.2f}",
        "devices hold, GB": f"{held / 1e9:.2f}",
        "over the files, %": f"{100 * (held / stored - 1):.1f}",
        "peak of one, GB": f"{peak / 1e9:.2f}",
    }
    table = Table(*row)
    table.add_row(*row.values())
    return table


def drop_cached(path: Path) -> None:
    """Has the page cache forget a folder's files."""
    for file in path.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    typer.run(main)
