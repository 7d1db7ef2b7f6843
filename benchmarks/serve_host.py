"""``python -m benchmarks.serve_host``: what a token costs the server's host, without a model.

    python -m benchmarks.serve_host  # 128 clients, a device that takes 5 ms for a step
    python -m benchmarks.serve_host --clients 32 --launch-ms 3 --client-processes 2

The server is the real one; its steps only sleep, without the GIL, and answer random ids. The load
is that of benchmarks/serve.py, in processes of its own.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from jax_w4moe.serving import Engine, Steps, server
from jax_w4moe.serving.api import application
from jax_w4moe.serving.steps import prefill_shapes
from jax_w4moe.serving.text import Text

VOCABULARY = 201_088
CAPACITY = 8192
PROMPT = 20


class Sleep:
    """Tokens that are there at some time."""

    def __init__(self, ids: np.ndarray, ready_at: float) -> None:
        self._ids = ids
        self._ready_at = ready_at

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        time.sleep(max(0.0, self._ready_at - time.perf_counter()))
        return self._ids


class SleepingSteps(Steps):
    """One step at a time, as a device takes them.

    Attributes:
      idle_s: how long the device waited for a step while there were some to do.
    """

    def __init__(self, slots: int, step_s: float, launch_s: float) -> None:
        self.prompts = prefill_shapes(slots, CAPACITY)
        self.slots = slots
        self.capacity = CAPACITY
        self.vocab_size = VOCABULARY
        self.eos_token_ids = ()
        self.idle_s = 0.0
        self._step_s = step_s
        self._launch_s = launch_s
        self._ready_at = 0.0
        self._rng = np.random.default_rng(0)

    def run(self, plan: np.ndarray) -> Any:
        time.sleep(self._launch_s)
        now = time.perf_counter()
        if now - self._ready_at < 0.2:  # else there was nothing to do
            self.idle_s += max(0.0, now - self._ready_at)
        self._ready_at = max(self._ready_at, now) + self._step_s
        ids = self._rng.integers(0, VOCABULARY, len(plan), np.int32)
        return Sleep(ids, self._ready_at)


def main(
    clients: Annotated[int, typer.Option(min=1, help="That stream, each in a slot.")] = 128,
    tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 300,
    step_ms: Annotated[float, typer.Option(help="That the device takes for a step.")] = 5.0,
    launch_ms: Annotated[float, typer.Option(help="That starting one takes the host.")] = 0.0,
    client_processes: Annotated[int, typer.Option(min=1, help="The clients'.")] = 1,
) -> None:
    """Serves a load, and prints what it cost."""
    steps = SleepingSteps(clients, 1e-3 * step_ms, 1e-3 * launch_ms)
    engine = Engine(steps)
    listener = server.bind("127.0.0.1", 0)
    listener.listen()
    options = {
        "--address": "http://{}:{}".format(*listener.getsockname()),
        "--concurrency": clients,
        "--lengths": f"{PROMPT}/{tokens}",
        "--requests": 2,
        "--client-processes": client_processes,
    }
    command = [sys.executable, "-m", "benchmarks.serve"]
    command += [str(part) for option in options.items() for part in option]

    def load() -> None:
        with contextlib.suppress(OSError):
            subprocess.run(command, check=False)
        os.kill(os.getpid(), signal.SIGTERM)

    app = application(engine, Text(Path(os.devnull)), "sleep")
    threading.Thread(target=load).start()
    before = time.process_time()
    server.run(engine, app, listener, f"steps of {step_ms:g} ms")
    cpu_s = time.process_time() - before
    count = engine.metrics.registry.get_sample_value("jax_w4moe_generated_tokens_total") or 1
    print(
        f"{1e6 * cpu_s / count:.1f} us of the server's CPU per token, {count:.0f} tokens; the"
        f" device waited {steps.idle_s:.2f} s."
    )


if __name__ == "__main__":
    typer.run(main)
