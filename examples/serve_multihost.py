"""A jitted decoding loop of a small MoE stack whose experts are spread over several processes.

    python examples/serve_multihost.py                      # two processes on this machine
    python examples/serve_multihost.py --steps 1000 --layers 4

On several hosts, one process each, with the same options on all:

    python examples/serve_multihost.py --coordinator HOST:PORT --processes 2 --process 0
    python examples/serve_multihost.py --coordinator HOST:PORT --processes 2 --process 1

Started without --coordinator it starts them all itself, a GPU each or, where there are none, two
CPU devices each. If one of them ends, the others are stopped and one sentence says which it was.
"""

import sys
import time
from typing import Annotated

import typer

from jax_w4moe.launcher import run_processes

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 256, 256, 16, 4
TOKENS_PER_DEVICE = 8
CPU_DEVICES = 2  # of a process
HEARTBEAT_S = 10  # a process on another host that is silent for so long is given up


def main(
    processes: Annotated[int, typer.Option(help="Processes in all.")] = 2,
    layers: Annotated[int, typer.Option(help="MoE layers.")] = 2,
    steps: Annotated[int, typer.Option(help="Decoding steps.")] = 50,
    coordinator: Annotated[str, typer.Option(help="HOST:PORT of process 0.")] = "",
    process: Annotated[int, typer.Option(help="This process's number.")] = 0,
    lose_after: Annotated[
        float, typer.Option(help="Kill the last process after so many seconds, to see it.")
    ] = 0.0,
) -> None:
    """Serves random tokens through random experts, and prints tokens per second."""
    if coordinator:
        serve(coordinator, processes, process, layers, steps)
    else:
        program = [__file__, "--layers", str(layers), "--steps", str(steps)]
        sys.exit(
            run_processes(program, processes, cpu_devices=CPU_DEVICES, lose_after_s=lose_after)
        )


def serve(coordinator: str, processes: int, process: int, layers: int, steps: int) -> None:
    """One process: its share of the experts, and the loop."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    import jax_w4moe as w4

    jax.distributed.initialize(
        coordinator,
        num_processes=processes,
        process_id=process,
        heartbeat_timeout_seconds=HEARTBEAT_S,
    )
    mesh = jax.make_mesh(
        (jax.device_count(),), ("expert",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    rows = NamedSharding(mesh, P("expert"))
    everywhere = NamedSharding(mesh, P())

    @jax.jit
    def make(key: jax.Array) -> tuple[w4.PackedExperts, jax.Array]:
        keys = jax.random.split(key, 4)
        shapes = [(INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]
        kernels = [
            jax.random.normal(k, (EXPERTS, *shape)) / 16
            for k, shape in zip(keys, shapes, strict=False)
        ]
        experts = w4.pack_experts(w4.quantize_experts(*kernels))
        return experts, jax.random.normal(keys[3], (HIDDEN, EXPERTS))

    # Of a checkpoint each process would read its own experts; these are small.
    model = []
    for layer in range(layers):
        experts, router = make(jax.random.key(layer))
        experts = w4.shard_experts(experts, mesh, expert_axis="expert")
        model.append((experts, jax.device_put(router, everywhere)))

    def step(x: jax.Array, model: list[tuple[w4.PackedExperts, jax.Array]]) -> jax.Array:
        for experts, router in model:
            logits = x.astype(jnp.float32) @ router
            ids, weights = w4.topk_routing(logits, TOP_K)
            y = w4.fused_moe(x, experts, ids, weights, expert_axis="expert", token_axes="expert")
            x = x + y
            scale = jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True))
            x = (x * scale).astype(jnp.bfloat16)
        return x

    decode = jax.jit(step, donate_argnums=0)
    num_tokens = TOKENS_PER_DEVICE * jax.device_count()

    @jax.jit
    def prompt() -> jax.Array:
        return jax.random.normal(jax.random.key(7), (num_tokens, HIDDEN), jnp.bfloat16)

    x = jax.jit(prompt, out_shardings=rows)()
    x = jax.block_until_ready(decode(x, model))
    if process == 0:
        print(
            f"{jax.device_count()} devices of {processes} processes, {layers} layers of {EXPERTS}"
            f" experts, {num_tokens} tokens a step",
            flush=True,
        )
    began = reported = time.monotonic()
    for done in range(1, steps + 1):
        x = jax.block_until_ready(decode(x, model))
        now = time.monotonic()
        if process == 0 and (now - reported > 1 or done == steps):
            reported = now
            print(
                f"step {done} of {steps}: {done * num_tokens / (now - began):.0f} tokens/s",
                flush=True,
            )
    jax.distributed.shutdown()


if __name__ == "__main__":
    typer.run(main)
