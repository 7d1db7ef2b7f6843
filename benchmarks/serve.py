"""``python -m benchmarks.serve``: throughput and latency of the server under load.

    python -m benchmarks.serve --start "/models/gpt-oss-20b --slots 128 --capacity 8192"
    python -m benchmarks.serve --address http://HOST:PORT --lengths 6000/1000 --json load.json
    python -m benchmarks.serve --start "--slots 8" --scale 0.05 --concurrency 1 --concurrency 20
    python -m benchmarks.serve --start "--slots 16" --soak 180 --cancel 0.2 --check  # every answer

So many clients ask at a time, each again as soon as it is answered; eos is a token as any other, so
that answers have the lengths that were asked for. One request of every client comes before and is
not counted.
"""

import asyncio
import datetime
import json
import multiprocessing
import shlex
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import serve_soak
from benchmarks.serve_client import Answer, complete, metrics_of, model_of, session_for, start

CONCURRENCY = (1, 20, 32, 64, 128)
LENGTHS = ("1000/1000", "6000/1000")
SPREAD = 0.1  # lengths are uniform in so much around their mean

_all_warm: Barrier  # of the processes of clients, in each of them


def main(
    address: Annotated[str, typer.Option(help="http://HOST:PORT of a server.")] = "",
    start_: Annotated[
        str | None, typer.Option("--start", help="Or start one: options of examples/serve.py.")
    ] = None,
    concurrency: Annotated[list[int] | None, typer.Option(help="Clients (1 to 128).")] = None,
    lengths: Annotated[list[str] | None, typer.Option(help="Mean tokens, PROMPT/ANSWER.")] = None,
    scale: Annotated[float, typer.Option(help="Of all lengths.")] = 1.0,
    requests: Annotated[int, typer.Option(min=1, help="Of every client, that are counted.")] = 4,
    client_processes: Annotated[
        int, typer.Option(min=1, help="To spread clients over, where one is not enough.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Of prompts and lengths.")] = 0,
    json_: Annotated[Path | None, typer.Option("--json", help="Where to write figures.")] = None,
    soak: Annotated[float, typer.Option(help="Instead: seconds of 64 clients at random.")] = 0.0,
    cancel: Annotated[float, typer.Option(help="With --soak: share of clients that leave.")] = 0.0,
    check: Annotated[
        bool, typer.Option("--check", help="With --soak --start: compare with Runner's answers.")
    ] = False,
) -> None:
    """Loads a server, and prints a table."""
    if (start_ is None) == (not address):
        raise typer.BadParameter("pass either --address of a server, or --start to have one.")
    if soak:
        if start_ is None:
            raise typer.BadParameter("--soak needs --start: it watches the server's memory.")
        sys.exit(serve_soak.run(shlex.split(start_), soak, cancel, check, seed))
    cells = [
        (clients, *(max(1, round(scale * float(part))) for part in each.split("/")))
        for each in lengths or LENGTHS
        for clients in concurrency or CONCURRENCY
    ]
    rng = np.random.default_rng(seed)
    if start_ is None:
        report = asyncio.run(_load(address, cells, requests, client_processes, rng))
    else:
        with start(shlex.split(start_)) as started:
            load = _load(started.address, cells, requests, client_processes, rng)
            report = asyncio.run(load)
    if json_ is not None:
        json_.write_text(json.dumps(report, indent=1) + "\n")


async def _load(
    address: str, cells: list[Any], requests: int, processes: int, rng: np.random.Generator
) -> dict[str, Any]:
    """All cells of the table, which is printed; and for --json."""
    async with session_for(address) as session:
        model = await model_of(session)
        for _, prompt, new in cells:
            longest, capacity = round((1 + SPREAD) * (prompt + new)), model["max_model_len"]
            if longest > capacity:
                raise typer.BadParameter(
                    f"{prompt} and {new} tokens, and a tenth more, are {longest}; the server holds"
                    f" {capacity}: raise its --capacity or lower --scale."
                )
        before = await metrics_of(session)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, spawn, _enter, (spawn.Barrier(processes),)) as pool:
            rows = []
            for cell in cells:
                parts = (
                    pool.submit(_clients, address, model, part, requests, each)
                    for part, each in zip(
                        _shares(cell, processes), rng.spawn(processes), strict=True
                    )
                )
                measured = await asyncio.gather(*map(asyncio.wrap_future, parts))
                rows.append(_figures(cell, *zip(*measured, strict=True)))
        compiled = (await metrics_of(session))["compilations"] - before["compilations"]
    report = {
        "date": datetime.date.today().isoformat(),
        "devices": model["devices"],
        "model": model["id"],
        "slots": model["slots"],
        "compilations": compiled,
        "rows": rows,
    }
    _print(report)
    return report


def _enter(barrier: Barrier) -> None:
    """Begins a process of clients."""
    global _all_warm
    _all_warm = barrier


def _shares(cell: Any, processes: int) -> list[Any]:
    """The cell of every process: its part of the clients, at times none."""
    clients, *means = cell
    return [((clients + index) // processes, *means) for index in range(processes)]


def _clients(*arguments: Any) -> tuple[float, float, list[Answer]]:
    """One process' clients: when they began and ended, and their answers."""
    try:
        return asyncio.run(_cell(*arguments))
    except BaseException:
        _all_warm.abort()  # the others are not to wait
        raise


async def _cell(
    address: str, model: dict[str, Any], cell: Any, requests: int, rng: np.random.Generator
) -> tuple[float, float, list[Answer]]:
    clients, *means = cell

    def draw() -> tuple[list[int], int]:
        prompt, new = (
            int(rng.integers(max(1, round((1 - SPREAD) * mean)), round((1 + SPREAD) * mean) + 1))
            for mean in means
        )
        return rng.integers(0, model["vocab_size"], prompt).tolist(), new

    async with session_for(address) as session:

        async def client(count: int) -> list[Answer]:
            drawn = [draw() for _ in range(count)]
            return [await complete(session, *each, ignore_eos=True) for each in drawn]

        await asyncio.gather(*(client(1) for _ in range(clients)))
        _all_warm.wait()
        began = time.perf_counter()
        answers = await asyncio.gather(*(client(requests) for _ in range(clients)))
        return began, time.perf_counter(), [answer for each in answers for answer in each]


def _figures(
    cell: Any, began: list[float], ended: list[float], parts: list[list[Answer]]
) -> dict[str, Any]:
    """Throughput, and mean, median and P99 of latencies, ms."""
    seconds = max(ended) - min(began)
    answers = [answer for part in parts for answer in part]
    clients, prompt, new = cell
    if bad := [answer for answer in answers if answer.finish_reason != "length"]:
        raise RuntimeError(
            f"{len(bad)} requests did not get all their tokens; the first: HTTP status"
            f" {bad[0].status}, {bad[0].finish_reason!r}."
        )
    generated = sum(len(answer.tokens) for answer in answers)
    prompts = sum(answer.prompt_tokens for answer in answers)
    several = [answer for answer in answers if len(answer.tokens) > 1]
    latencies = {
        "ttft": [answer.times[0] - answer.began for answer in answers],
        "itl": [gap for answer in answers for gap in np.diff(answer.times).tolist()],
        "tpot": [(a.times[-1] - a.times[0]) / (len(a.tokens) - 1) for a in several],
    }
    return {
        "clients": clients,
        "prompt": prompt,
        "answer": new,
        "requests": len(answers),
        "requests_per_s": len(answers) / seconds,
        "output_tokens_per_s": generated / seconds,
        "total_tokens_per_s": (generated + prompts) / seconds,
        **{
            f"{name}_ms": [
                1e3 * float(of(values or [0.0]))
                for of in (statistics.fmean, statistics.median, lambda v: np.percentile(v, 99))
            ]
            for name, values in latencies.items()
        },
    }


def _print(report: dict[str, Any]) -> None:
    table = Table(
        title=f"{report['model']}, {report['slots']} slots, {report['devices']}, {report['date']};"
        f" {report['compilations']:.0f} compilations meanwhile; latencies: mean / median / P99, ms"
    )
    columns = ("clients", "prompt / answer", "requests/s", "output tokens/s", "all tokens/s")
    for column in (*columns, "TTFT", "ITL", "TPOT"):
        table.add_column(column, justify="right")
    for row in report["rows"]:
        rates = (row["requests_per_s"], row["output_tokens_per_s"], row["total_tokens_per_s"])
        table.add_row(
            str(row["clients"]),
            f"{row['prompt']} / {row['answer']}",
            f"{rates[0]:.2f}",
            *(f"{rate:.0f}" for rate in rates[1:]),
            *(
                " / ".join(f"{value:.1f}" for value in row[f"{name}_ms"])
                for name in ("ttft", "itl", "tpot")
            ),
        )
    console = Console()
    console.print(table) if console.is_terminal else Console(width=160).print(table)


if __name__ == "__main__":
    typer.run(main)
