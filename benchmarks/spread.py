"""``python -m benchmarks.spread``: ``bench --spread`` with a process for each GPU."""

import os
import socket
import subprocess
import sys
from typing import Annotated

import jax
import typer
from rich.console import Console

from jax_w4moe.bench import command


def main(
    processes: Annotated[int, typer.Option(help="A GPU each.")] = 2,
    shape: Annotated[list[str] | None, typer.Option(help="Layers.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Of a device.")] = None,
    process: Annotated[int, typer.Option(hidden=True)] = -1,
    port: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Starts the processes and waits; the first one prints."""
    if process < 0:
        sys.exit(start(processes))
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=processes, process_id=process)
    with open(os.devnull, "w") as nowhere:
        console = Console() if process == 0 else Console(file=nowhere)
        command.spread(shape or ("flash",), tokens or (), console=console)


def start(processes: int) -> int:
    """Starts this program once per GPU, with the options that it was given."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.spread", *sys.argv[1:], "--port", str(port)]
    children = [
        subprocess.Popen(
            [*command, "--process", str(number)],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": str(number)},
        )
        for number in range(processes)
    ]
    return max(child.wait() for child in children)


if __name__ == "__main__":
    typer.run(main)
