"""A gpt-oss checkpoint behind an OpenAI-style HTTP server with continuous batching.

    python examples/serve.py /models/gpt-oss-20b --slots 64 --capacity 8192
    python examples/serve.py /models/gpt-oss-120b --slots 128 --processes 2  # a GPU each
    python examples/serve.py  # a tiny random model, written for it

    curl http://127.0.0.1:8000/v1/completions -d '{"prompt": [5, 6, 7], "max_tokens": 20}'

On several hosts, one process each, with the same options on all, and process 0's address:

    python examples/serve.py /models/gpt-oss-120b --coordinator HOST:PORT --processes 2 --process 0
    python examples/serve.py /models/gpt-oss-120b --coordinator HOST:PORT --processes 2 --process 1

Ctrl-C, or SIGTERM, ends it when all requests that were accepted are answered.
"""

import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import typer

from jax_w4moe import serving
from jax_w4moe.launcher import run_processes
from jax_w4moe.models import TINY_GPT_OSS, save_random_gpt_oss

ACTIVATIONS = {"fp8": jnp.float8_e4m3fn, "bf16": jnp.bfloat16}


def main(
    path: Annotated[Path | None, typer.Argument(help="The model's folder.")] = None,
    slots: Annotated[int, typer.Option(help="Sequences decoded together.")] = 8,
    capacity: Annotated[int, typer.Option(help="Tokens of each, prompt and answer.")] = 1024,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait.")] = 256,
    prefill_tokens: Annotated[int, typer.Option(help="Of a prefill of several prompts.")] = 1024,
    expert_parallel: Annotated[
        int, typer.Option(help="Devices to spread experts over; 0: all of several processes.")
    ] = 0,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Devices to slice them over.")] = 1,
    activations: Annotated[str, typer.Option(help="fp8 or bf16.")] = "fp8",
    processes: Annotated[int, typer.Option(min=1, help="Processes in all.")] = 1,
    coordinator: Annotated[str, typer.Option(help="HOST:PORT of process 0.")] = "",
    process: Annotated[int, typer.Option(help="This process's number.")] = 0,
    cpu_devices: Annotated[int, typer.Option(help="Of a process without a GPU.")] = 2,
) -> None:
    """Serves completions, until Ctrl-C."""
    if activations not in ACTIVATIONS:
        raise typer.BadParameter(f"activations={activations!r}, need fp8 or bf16.")
    with contextlib.ExitStack() as stack:
        options = sys.argv[1:]
        if path is None:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "tiny"
            save_random_gpt_oss(path, TINY_GPT_OSS)
            options = [str(path), *options]
        if processes > 1 and not coordinator:
            sys.exit(run_processes([__file__, *options], processes, cpu_devices=cpu_devices))
        try:
            serving.serve(
                path,
                slots=slots,
                capacity=capacity,
                host=host,
                port=port,
                max_queue=max_queue,
                prefill_tokens=prefill_tokens,
                expert_parallel=expert_parallel,
                tensor_parallel=tensor_parallel,
                act_dtype=ACTIVATIONS[activations],
                coordinator=coordinator,
                processes=processes,
                process=process,
            )
        except (ValueError, TypeError, NotImplementedError, OSError, RuntimeError) as error:
            sys.exit(str(error))


if __name__ == "__main__":
    typer.run(main)
