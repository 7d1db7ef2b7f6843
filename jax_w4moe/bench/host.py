"""The host's cost of one jitted call: what Python and XLA take to dispatch it, without waiting."""

import statistics
import time
from typing import Any

import jax

from jax_w4moe.bench.layers import calls, layer, random_experts
from jax_w4moe.bench.shapes import Shape

_CALLS = 50  # few enough to be queued without waiting for the device
_REPEATS = 30


def dispatch_us(shape: Shape) -> tuple[float, float]:
    """Microseconds to dispatch a compiled ``fused_moe`` at T = 1, and an addition beside it.

    The addition, ``x + 1`` on the same x, is what any jitted call costs here.
    """
    experts = random_experts(jax.random.key(0), shape)
    call = calls(experts, "balanced", 1, shape)[0]

    return _median_us(jax.jit(layer), call, experts), _median_us(jax.jit(lambda x: x + 1), call.x)


def _median_us(function: Any, *arguments: Any) -> float:
    for _ in range(5):
        jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        results = [function(*arguments) for _ in range(_CALLS)]
        times.append(time.perf_counter() - start)
        jax.block_until_ready(results)
    return statistics.median(times) / _CALLS * 1e6
