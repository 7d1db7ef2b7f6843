"""A server from a model's folder: loading, compiling, HTTP, and an end that loses nothing."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import uvicorn

from jax_w4moe.models import GptOss, GptOssConfig, spread_over
from jax_w4moe.models import checks as model_checks
from jax_w4moe.serving import checks
from jax_w4moe.serving.api import application
from jax_w4moe.serving.engine import Engine
from jax_w4moe.serving.peers import DEVICE_ERROR_S, lead_or_follow
from jax_w4moe.serving.steps import Steps, prefill_shapes
from jax_w4moe.serving.text import Text

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_HEARTBEAT_S = 10  # a process on another host that is silent for so long is given up


def serve(
    path: str | os.PathLike[str],
    *,
    slots: int = 8,
    capacity: int = 4096,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_queue: int = 256,
    prefill_tokens: int = 1024,
    expert_parallel: int = 0,
    tensor_parallel: int = 1,
    act_dtype: Any = jnp.float8_e4m3fn,
    name: str = "",
    coordinator: str = "",
    processes: int = 1,
    process: int = 0,
) -> None:
    """Serves a model until SIGINT or SIGTERM; every request that was accepted is answered first.

    Args:
      path: the model's folder, of the Hugging Face layout.
      slots, capacity, prefill_tokens: as in :class:`jax_w4moe.serving.Steps`.
      host, port: where to listen; port 0 takes a free one. The line that is printed says which.
      max_queue: requests that may wait for a slot; any more are refused.
      expert_parallel: devices to spread experts over, with the bits of one device; 0: all devices
        of several processes, or one.
      tensor_parallel: devices to slice experts over.
      act_dtype: of the experts' activations.
      name: the model's for clients; "": its folder's.
      coordinator: HOST:PORT of process 0 for several processes, which all call this.
      processes: how many there are.
      process: this one's number; process 0 listens.

    Raises:
      ValueError, TypeError, NotImplementedError, OSError: options or files that do not do.
      RuntimeError: the device failed while serving.
    """
    # Before anything large is read.
    checks.max_queue(max_queue)
    prefill_shapes(slots, capacity, prefill_tokens=prefill_tokens)
    config, text = GptOssConfig.from_pretrained(path), Text(Path(path))
    model_checks.cache_sizes(slots, capacity, config.max_position_embeddings)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(bind(host, port)) if process == 0 else None
        if coordinator:
            _join(coordinator, processes, process)
        model = load(
            path,
            expert_parallel=expert_parallel,
            tensor_parallel=tensor_parallel,
            act_dtype=act_dtype,
        )
        steps = Steps(model, slots=slots, capacity=capacity, prefill_tokens=prefill_tokens)
        steps.warm_up()
        try:
            leader = lead_or_follow(steps, coordinator.rpartition(":")[0]) if coordinator else None
            if listener is not None:
                announce = None if leader is None else leader.announce
                engine = Engine(steps, max_queue=max_queue, announce=announce)
                name = name or Path(path).resolve().name
                app = application(engine, text, name)
                run(engine, app, listener, f"{name}, {slots} slots of {capacity} tokens")
                if leader is not None:
                    leader.stop()
        except jax.errors.JaxRuntimeError:
            if coordinator:
                # Perhaps because another process is gone, which then is what is to be said.
                time.sleep(DEVICE_ERROR_S)
            raise
    if coordinator:
        jax.distributed.shutdown()


def _join(coordinator: str, processes: int, process: int) -> None:
    """Makes this process one of several."""
    jax.distributed.initialize(
        coordinator,
        num_processes=processes,
        process_id=process,
        heartbeat_timeout_seconds=_HEARTBEAT_S,
    )
    # JAX takes SIGTERM for a notice of preemption now. Process 0 has its own handlers once it
    # serves, and says when it is over.
    signal.signal(signal.SIGTERM, signal.SIG_DFL if process == 0 else signal.SIG_IGN)
    if process > 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def load(
    path: str | os.PathLike[str],
    *,
    expert_parallel: int = 0,
    tensor_parallel: int = 1,
    **options: Any,
) -> GptOss:
    """Loads a model onto the devices of all processes.

    Args:
      path: its folder.
      expert_parallel, tensor_parallel: as in :func:`serve`.
      **options: of :class:`jax_w4moe.models.GptOss`.

    Returns:
      The model.

    Raises:
      ValueError: not so many devices, or devices of a process that would have no part.
    """
    spread = spread_over(expert_parallel, tensor_parallel)
    return GptOss.from_pretrained(path, **spread, **options)


class _Server(uvicorn.Server):
    """Says where it is when clients can come."""

    def __init__(self, config: uvicorn.Config, what: str) -> None:
        super().__init__(config)
        self._what = what

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            host, port = listener.getsockname()[:2]
            print(f"Serving {self._what} on http://{host}:{port}", flush=True)


def run(engine: Engine, app: Any, listener: socket.socket, what: str) -> None:
    """Serves until a signal comes and what was accepted is finished."""
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off")
    server = _Server(config, what)

    def end(*_: Any) -> None:
        server.should_exit = True

    # uvicorn has handlers of its own while it serves, and afterwards raises the signal again.
    former = {which: signal.signal(which, end) for which in _SIGNALS}

    async def main() -> None:
        running = asyncio.create_task(engine.run())
        running.add_done_callback(end)
        await server.serve(sockets=[listener])
        engine.close()
        await running

    try:
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(main())
    finally:
        for which, handler in former.items():
            signal.signal(which, handler)
    print("All requests are finished.", file=sys.stderr, flush=True)


def bind(host: str, port: int) -> socket.socket:
    """Takes the port, without listening yet: before anything is loaded."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise OSError(
            f"{host}:{port} cannot be listened on ({error}); pass another port."
        ) from None
    return listener
