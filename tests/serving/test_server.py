"""A server in one process and, as a user starts it, in two; and how they end."""

import concurrent.futures
import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

pytest.importorskip("starlette", reason="needs the extra [serve]")
import httpx

from jax_w4moe import serving
from jax_w4moe.models import GptOss, save_random_gpt_oss
from jax_w4moe.serving import Engine, Request, Steps, server
from jax_w4moe.serving.api import application
from jax_w4moe.serving.text import Text
from tests.serving.common import CONFIG, SLOTS, Offline

pytestmark = pytest.mark.xdist_group("serving")  # steps are compiled once

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve.py"
LIMIT_S = 120.0


@contextlib.contextmanager
def started(folder: Path, *options: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A server of the test model, and its address."""
    command = [sys.executable, str(EXAMPLE), str(folder), "--port", "0", "--slots", str(SLOTS)]
    process = subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    watchdog = threading.Timer(LIMIT_S, process.terminate)
    watchdog.start()
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"Serving gpt_oss, 4 slots of \d+ tokens on (http://\S+)", line):
                yield process, found[1]
                break
        else:
            raise AssertionError("".join(lines))
    finally:
        watchdog.cancel()
        process.terminate()
        process.wait()
        process.stdout.close() if process.stdout else None


def post(address: str, prompt: tuple[int, ...], **options: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "temperature": 0, **options}
    response = httpx.post(f"{address}/v1/completions", json=body, timeout=LIMIT_S)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_what_was_accepted(
    steps: Steps, tmp_path: Path, which: signal.Signals
) -> None:
    """A signal among many requests: all are answered, no more are taken, and it returns."""
    count = 16
    listener = server.bind("127.0.0.1", 0)
    address = "http://{}:{}".format(*listener.getsockname())
    engine = Engine(steps)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    finished_before = []

    def clients() -> list[dict[str, Any]]:
        while True:
            with contextlib.suppress(httpx.ConnectError):
                assert httpx.get(f"{address}/health").status_code == 200
                break
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            posts = [
                pool.submit(post, address, (1, index), max_tokens=20, ignore_eos=True)
                for index in range(count)
            ]
            values = {"total": 0.0}
            while sum(values.values()) < count:
                text = httpx.get(f"{address}/metrics").text
                found = re.findall(
                    r"^jax_w4moe_(\w+_requests|requests_total)\S* (\S+)$", text, re.M
                )
                values = {name: float(value) for name, value in found}
            finished_before.append(values.get("requests_total", 0))
            os.kill(os.getpid(), which)
            return [future.result() for future in posts]

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answers = pool.submit(clients)
        server.run(engine, application(engine, Text(tmp_path), "tiny"), listener, "tiny")
        assert [len(answer["token_ids"]) for answer in answers.result()] == [20] * count
    assert finished_before[0] < count
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/health")
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_device_that_fails(steps: Steps, tmp_path: Path, monkeypatch: Any) -> None:
    """Its requests end with an error, and the server by itself."""
    engine = Engine(steps)
    listener = server.bind("127.0.0.1", 0)
    address = "http://{}:{}".format(*listener.getsockname())

    def fail(_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(steps, "run", fail)

    def client() -> int:
        while True:
            with contextlib.suppress(httpx.ConnectError):
                return httpx.post(f"{address}/v1/completions", json={"prompt": [1]}).status_code

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        status = pool.submit(client)
        with pytest.raises(RuntimeError, match="out of memory"):
            server.run(engine, application(engine, Text(tmp_path), "tiny"), listener, "tiny")
        assert status.result() == 500


def test_two_processes(tmp_path: Path) -> None:
    """The answers of one device; when one process is killed, one sentence, and all are gone."""
    folder = tmp_path / "gpt_oss"
    one_layer = {"num_hidden_layers": 1, "layer_types": ("full_attention",)}
    save_random_gpt_oss(folder, dataclasses.replace(CONFIG, **one_layer))
    offline = Offline(GptOss.from_pretrained(folder, act_dtype=jnp.bfloat16), padded=24)
    options = ("--capacity", "24", "--activations", "bf16", "--processes", "2")
    with started(folder, *options) as (process, address):
        prompts = [(index,) * (1 + 3 * index) for index in range(6)]
        with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(lambda prompt: post(address, prompt, max_tokens=9), prompts))
        for prompt, answer in zip(prompts, answers, strict=True):
            expected = offline.answer(Request(prompt, 9))
            assert (answer["token_ids"], answer["finish_reason"]) == expected
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        began = time.monotonic()
        os.kill(int(children[1]), signal.SIGKILL)
        assert process.wait(LIMIT_S) == 1 and time.monotonic() - began < 10
        assert process.stdout is not None
        last = process.stdout.read().splitlines()[-1]
        assert last.startswith("Process 1 ended with code -9; all others are stopped, ")
        assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_options_that_do_not_do(
    folder: Path, model: GptOss, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it is said before anything is loaded."""
    sentence = "expert_parallel=16 times tensor_parallel=1 is 16, but there are 8 devices; "
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}ask for no more.$"):
        serving.load(folder, expert_parallel=16)
    monkeypatch.setattr(server, "load", lambda *_, **__: pytest.fail("it was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=rf"^127.0.0.1:{port} cannot be listened on \(.*\); "):
            serving.serve(folder, port=port, capacity=24)
    with pytest.raises(FileNotFoundError, match="/no/such/folder"):
        serving.serve("/no/such/folder")
    for options, sentence in (
        ({"slots": 0}, "slots=0 is below 1; "),
        ({"capacity": 65}, "capacity=65 is not in 1..64 "),
        ({"max_queue": 0}, "max_queue=0 is below 1; "),
        ({"prefill_tokens": 0}, "prefill_tokens=0 is below 1; "),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
            serving.serve(folder, port=0, **({"capacity": 24} | options))
