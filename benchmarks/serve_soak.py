"""Many clients for a long time: every answer checked, memory and compilations watched."""

import asyncio
import collections
import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serve_client import (
    Answer,
    Started,
    complete,
    metrics_of,
    model_of,
    session_for,
    start,
)

CLIENTS = 64
PROMPTS = 48  # different ones
SETTLE_S = 20.0  # memory is compared with what it is after so long
MAX_GROWTH = 0.05
SAMPLE_S = 5.0


def run(options: list[str], seconds: float, cancel: float, check: bool, seed: int) -> int:
    """Starts a server with these options of examples/serve.py, and soaks it.

    Returns:
      An exit code: 1 if an answer was wrong, a program was compiled, or memory grew.
    """
    rng = np.random.default_rng(seed)
    with contextlib.ExitStack() as stack:
        parsed = _parse(options)
        if parsed["path"] is None:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "tiny"
            _write_tiny(path)
            parsed["path"], options = path, [str(path), *options]
        pool = _prompts(parsed, rng)
        expected = _answers(parsed, pool) if check else None
        with start(options) as started:
            problems = asyncio.run(_soak(started, pool, expected, seconds, cancel, rng))
    for problem in problems[:10]:
        print(problem)
    print(f"{len(problems)} problems; the server ended with code 0.")
    return min(1, len(problems))


async def _soak(
    started: Started,
    pool: list[list[int]],
    expected: list[list[int]] | None,
    seconds: float,
    cancel: float,
    rng: np.random.Generator,
) -> list[str]:
    """Runs the clients; returns what went wrong."""
    problems: list[str] = []
    counts: collections.Counter[str] = collections.Counter()
    resident: list[tuple[float, int]] = []
    began = time.monotonic()
    async with session_for(started.address) as session:
        capacity = (await model_of(session))["max_model_len"]
        before = await metrics_of(session)

        async def client() -> None:
            while time.monotonic() - began < seconds:
                index = int(rng.integers(len(pool)))
                room = capacity + 1 - len(pool[index])
                max_tokens = int(rng.integers(1, room + 1))
                leaves = rng.random() < cancel
                leave_after = int(rng.integers(0, max_tokens)) if leaves else None
                answer = await complete(session, pool[index], max_tokens, leave_after)
                if answer.status != 200:
                    problems.append(f"HTTP status {answer.status}")
                    continue
                counts["tokens"] += len(answer.tokens)
                counts["left" if answer.finish_reason is None else answer.finish_reason] += 1
                if answer.finish_reason is None and not leaves:
                    problems.append(f"prompt {index}: the answer broke off")
                if expected is not None and not _is_right(answer, expected[index], max_tokens):
                    problems.append(f"prompt {index}: {answer}, need {expected[index]}")

        async def watch() -> None:
            while True:
                resident.append((time.monotonic() - began, started.resident_bytes()))
                await asyncio.sleep(SAMPLE_S)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        watching.cancel()
        while (after := await metrics_of(session))["running_requests"]:
            await asyncio.sleep(0.1)  # those whose clients have left
    compiled = after["compilations"] - before["compilations"]
    if compiled:
        problems.append(f"{compiled:.0f} programs were compiled")
    settle_s = min(SETTLE_S, seconds / 2)
    settled = [memory for at, memory in resident if at >= settle_s]
    growth = settled[-1] / settled[0] - 1
    if growth > MAX_GROWTH:
        problems.append(f"memory grew by {100 * growth:.1f} %")
    elapsed = time.monotonic() - began
    server = {n.split('"')[1]: int(v) for n, v in after.items() if n.startswith("requests_total")}
    print(
        f"{elapsed:.0f} s, {CLIENTS} clients: {sum(counts.values()) - counts['tokens']} requests"
        f" ({counts['left']} left early), {counts['tokens']} tokens,"
        f" {counts['tokens'] / elapsed:.0f} tokens/s, {len(problems)} problems,"
        f" {compiled:.0f} compilations\n"
        f"memory of all processes: {settled[0] / 2**20:.0f} MiB after {settle_s:.0f} s,"
        f" {settled[-1] / 2**20:.0f} MiB in the end, at most"
        f" {max(settled) / 2**20:.0f} MiB ({100 * growth:+.1f} %)\n"
        f"the server counts: {server}"
    )
    return problems


def _is_right(answer: Answer, expected: list[int], max_tokens: int) -> bool:
    """Whether these are the first tokens of the expected ones, as many as there should be."""
    count = len(answer.tokens)
    wanted = {None: count, "length": max_tokens, "stop": len(expected)}
    return answer.tokens == expected[:count] and count == wanted.get(answer.finish_reason)


def _parse(options: list[str]) -> dict[str, Any]:
    """Options as examples/serve.py reads them."""
    import typer

    from examples import serve

    app = typer.Typer()
    app.command()(serve.main)
    return typer.main.get_command(app).make_context("serve", list(options)).params


def _write_tiny(path: Path) -> None:
    from jax_w4moe.models import TINY_GPT_OSS, save_random_gpt_oss

    save_random_gpt_oss(path, TINY_GPT_OSS)


def _prompts(parsed: dict[str, Any], rng: np.random.Generator) -> list[list[int]]:
    from jax_w4moe.models import GptOssConfig

    vocabulary = GptOssConfig.from_pretrained(parsed["path"]).vocab_size
    lengths = rng.integers(1, parsed["capacity"] + 1, PROMPTS)
    return [rng.integers(0, vocabulary, length).tolist() for length in lengths]


def _answers(parsed: dict[str, Any], pool: list[list[int]]) -> list[list[int]]:
    """Greedy answers by Runner, to full rows, with the server's sizes, each by itself."""
    from examples import serve
    from jax_w4moe.models import GptOss, Runner
    from jax_w4moe.serving.steps import prefill_shapes

    slots, capacity = parsed["slots"], parsed["capacity"]
    shapes = prefill_shapes(slots, capacity, prefill_tokens=parsed["prefill_tokens"])
    act_dtype = serve.ACTIVATIONS[parsed["activations"]]
    model = GptOss.from_pretrained(parsed["path"], act_dtype=act_dtype)
    runner = Runner(model)

    def greedy(prompt: list[int]) -> Iterator[int]:
        padded = next(length for length in shapes if length >= len(prompt))
        tokens = np.zeros((shapes[padded], padded), np.int32)
        tokens[0, : len(prompt)] = prompt
        at = np.arange(shapes[padded])
        lengths = np.where(at == 0, len(prompt), 0).astype(np.int32)
        where = np.where(at == 0, 0, -1).astype(np.int32)
        cache = runner.init_cache(slots, capacity)
        logits, cache = runner.prefill(cache, tokens, lengths, where)
        for _ in range(capacity + 1 - len(prompt)):
            token = int(np.asarray(logits[0]).argmax())
            if token in model.config.eos_token_ids:
                return
            yield token
            row = np.full(slots, token, np.int32)
            logits, cache = runner.decode(cache, row, np.arange(slots) == 0)

    return [list(greedy(prompt)) for prompt in pool]
