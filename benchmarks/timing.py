"""Inputs that are cold in L2, microseconds of ops of few of them, and the rates of plain XLA."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_w4moe.timing import REPEATS

COLD_BYTES = 512 << 20  # the largest L2 of a Hopper GPU is 60 MB
MAX_INPUTS = 32
CALLS = 1024


def looped_us(op: Callable[[Any], Any], inputs: Sequence[Any]) -> float:
    """Microseconds per call in a loop on the device, the median over 30 measurements.

    For ops of a few microseconds, where the host's share of a replayed program would not vanish.
    """
    rounds = max(2, min(CALLS, COLD_BYTES * 64 // max(inputs[0].nbytes, 1)) // len(inputs))

    @jax.jit
    def measurement(inputs: Sequence[Any]) -> list[Any]:
        def round_of_calls(i: jax.Array, _: list[Any]) -> list[Any]:
            # The barrier ties the inputs to i: without it XLA would call op once, before the loop.
            _, fresh = jax.lax.optimization_barrier((i, list(inputs)))
            return [op(x) for x in fresh]

        return jax.lax.fori_loop(0, rounds, round_of_calls, [op(x) for x in inputs])

    jax.block_until_ready(measurement(inputs))
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(measurement(inputs))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) / ((rounds + 1) * len(inputs)) * 1e6


def rotating_inputs(make: Callable[[jax.Array], jax.Array], nbytes: int) -> list[jax.Array]:
    """Inputs of ``nbytes`` each, as many as make them cold in L2, 32 at most."""
    count = min(MAX_INPUTS, max(4, COLD_BYTES // nbytes))
    return [jax.jit(make)(key) for key in jax.random.split(jax.random.key(0), count)]


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a plain elementwise kernel over 1 GiB."""
    inputs = [jnp.ones(1 << 28, jnp.float32) for _ in range(2)]
    return 2 * inputs[0].nbytes / (looped_us(lambda x: x + 1, inputs) * 1e-6)


def read_bandwidth() -> float:
    """Bytes per second of a plain reduction over 1 GiB."""
    inputs = [jnp.ones(1 << 28, jnp.int32) for _ in range(2)]
    return inputs[0].nbytes / (looped_us(jnp.max, inputs) * 1e-6)


def fp8_rate() -> float:
    """FLOP/s of XLA's (cuBLASLt's) FP8 matrix product at 8,192."""
    n = 8192
    inputs = [
        jax.random.normal(key, (2, n, n), jnp.bfloat16).astype(jnp.float8_e4m3fn)
        for key in jax.random.split(jax.random.key(0), 2)
    ]

    def product(pair: jax.Array) -> jax.Array:
        return jax.lax.dot_general(
            pair[0], pair[1], (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16
        )

    return 2 * n**3 / (looped_us(product, inputs) * 1e-6)
