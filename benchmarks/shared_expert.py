"""``python -m benchmarks.shared_expert``: does XLA run a shared expert while tokens travel?

A DeepSeek-V4-Flash layer over an expert axis, a shared expert in bf16 on every device's own tokens,
and both in one program. What both save against the sum of the two was overlapped.
"""

import functools
import statistics
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_w4moe.bench import spread
from jax_w4moe.bench.layers import Call, calls
from jax_w4moe.bench.shapes import SHAPES
from jax_w4moe.timing import Program
from jax_w4moe.types import PackedExperts

TOKENS = (8, 32, 128, 1024)


def main(tokens: Annotated[list[int] | None, typer.Option(help="Of a device.")] = None) -> None:
    """Measures on all devices of this process."""
    shape = SHAPES["flash"]
    layer = spread.Layer(shape, "expert", jax.device_count())
    everywhere = NamedSharding(layer.mesh, P())

    @functools.partial(jax.jit, out_shardings=everywhere)
    def kernels() -> list[jax.Array]:
        hidden, intermediate = shape.hidden_size, shape.intermediate_size
        shapes = [(hidden, intermediate), (hidden, intermediate), (intermediate, hidden)]
        keys = jax.random.split(jax.random.key(1), 3)
        return [
            jax.random.normal(key, own, jnp.bfloat16) * own[0] ** -0.5
            for key, own in zip(keys, shapes, strict=True)
        ]

    def routed(call: Call, experts: PackedExperts, _: Any) -> jax.Array:
        return layer.call(call, experts)

    def shared(call: Call, _: Any, kernels: list[jax.Array]) -> jax.Array:
        gate, up, down = kernels
        return (jax.nn.silu(call.x @ gate) * (call.x @ up)) @ down

    def both(call: Call, experts: PackedExperts, kernels: list[jax.Array]) -> jax.Array:
        return routed(call, experts, None) + shared(call, None, kernels)

    arguments = (layer.experts, kernels())
    for count in tokens or TOKENS:
        routings = layer.place(
            calls(layer.experts, "balanced", count * layer.devices, shape), layer.rows
        )
        times = [
            statistics.median(Program(op, routings, arguments).times_us())
            for op in (routed, shared, both)
        ]
        print(
            f"{count} tokens a device: routed {times[0]:.1f} us, shared {times[1]:.1f} us, both"
            f" {times[2]:.1f} us: {times[0] + times[1] - times[2]:.1f} us overlapped.",
            flush=True,
        )


if __name__ == "__main__":
    typer.run(main)
