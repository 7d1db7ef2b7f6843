"""Times a layer over token counts and routings, and other backends beside it."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_w4moe import roofline
from jax_w4moe.bench import machine
from jax_w4moe.bench.layers import Call, calls, layer, random_experts
from jax_w4moe.bench.shapes import Shape
from jax_w4moe.formats import MXFP4, WeightFormat
from jax_w4moe.timing import CALLS, REPEATS, Program
from jax_w4moe.types import PackedExperts

PAUSE_S = 0.2  # before a burst
BURSTS = 10


@dataclasses.dataclass(frozen=True)
class Row:
    """One cell of the benchmark: a layer, a token count and a routing.

    Attributes:
      shape: the layer's name.
      num_tokens: T.
      routing: one of ``layers.ROUTINGS``.
      time_us: microseconds of a call, the median of the measurements.
      spread: their interquartile range over the median.
      floor_us: the least time of reading the touched weights, or of the products.
      moved_floor_us: the same with the activations' bytes (``roofline.activation_bytes``).
      touched: experts that a routing touches, the mean of the routings.
      tb_per_s: weight bytes read over the time, 1e12 per second.
      tflops: useful products over the time, 1e12 FLOP per second.
      sm_mhz, watts: the GPU's while it ran this; None if unknown.
      backends_us: microseconds of other backends; None for one that failed.
    """

    shape: str
    num_tokens: int
    routing: str
    time_us: float
    spread: float
    floor_us: float
    moved_floor_us: float
    touched: float
    tb_per_s: float
    tflops: float
    sm_mhz: int | None
    watts: float | None
    backends_us: dict[str, float | None]

    @property
    def ratio(self) -> float:
        """Time over floor."""
        return self.time_us / self.floor_us


def sweep(
    shapes: Sequence[Shape],
    num_tokens: Sequence[int],
    routings: Sequence[str],
    *,
    format: WeightFormat = MXFP4,
    act_dtype: Any = jnp.float8_e4m3fn,
    backends: dict[str, ModuleType] | None = None,
    burst: bool = False,
    tune: bool = False,
    report: Callable[[str], None] = print,
) -> Iterator[Row]:
    """Times every combination of layer, routing and token count.

    Args:
      shapes: the layers; the weights of one at a time are in memory.
      num_tokens: values of T.
      routings: of ``layers.ROUTINGS``.
      format: of the weights.
      act_dtype: of the activations.
      backends: modules with ``prepare`` and ``run`` to time on the same weights and calls.
      burst: time bursts after pauses, not programs back to back.
      tune: first call each layer outside of a program, so that autotune sees it.
      report: takes the sentence about a backend that failed.

    Yields:
      One row each.
    """
    op = functools.partial(layer, act_dtype=act_dtype)
    for shape in shapes:
        experts = random_experts(jax.random.key(0), shape, format)
        prepared = {name: (b, b.prepare(experts)) for name, b in (backends or {}).items()}
        for routing in routings:
            for count in num_tokens:
                rotating = calls(experts, routing, count, shape)
                if tune:
                    jax.block_until_ready(op(rotating[0], experts))
                others: dict[str, float | None] = {}
                for name, (backend, weights) in prepared.items():
                    # What another library cannot run must not end the run.
                    try:
                        program = _program(_op(backend), rotating, weights)
                        others[name] = statistics.median(_times_us(program, burst))
                    except Exception as error:
                        others[name] = None
                        first = str(error).partition("\n")[0]
                        report(f"{name} on {shape.name}, T={count}: {first}")
                yield _row(op, experts, shape, routing, rotating, others, burst)


def _row(
    op: Callable[..., jax.Array],
    experts: PackedExperts,
    shape: Shape,
    routing: str,
    rotating: list[Call],
    others: dict[str, float | None],
    burst: bool,
) -> Row:
    program = _program(op, rotating, experts)
    times = _times_us(program, burst)
    if burst:
        time.sleep(PAUSE_S)
    clock, power = machine.under_load(program) or (None, None)
    time_us = statistics.median(times)
    low, high = np.percentile(times, [25, 75])
    ids = [np.asarray(call.topk_ids) for call in rotating]
    touched = statistics.fmean(roofline.touched_experts(i, shape.num_experts) for i in ids)
    pairs = statistics.fmean(float(np.sum(i >= 0)) for i in ids)
    num_tokens = len(ids[0])
    nbytes, flops = roofline.layer_work(experts, pairs, touched)
    activations = roofline.activation_bytes(experts, num_tokens, pairs)
    return Row(
        shape=shape.name,
        num_tokens=num_tokens,
        routing=routing,
        time_us=time_us,
        spread=float(high - low) / time_us,
        floor_us=roofline.floor_us(nbytes, flops),
        moved_floor_us=roofline.floor_us(nbytes + activations, flops),
        touched=touched,
        tb_per_s=nbytes / time_us * 1e-6,
        tflops=flops / time_us * 1e-6,
        sm_mhz=clock,
        watts=power,
        backends_us=others,
    )


def _program(op: Callable[..., jax.Array], rotating: list[Call], weights: Any) -> Program:
    # From T = 4,096 on a program of each call once is long enough, and still short as a burst.
    return Program(op, rotating, (weights,), calls=CALLS if len(rotating) > 2 else 2)


def _times_us(program: Program, burst: bool) -> list[float]:
    if burst:
        return program.times_us(repeats=BURSTS, pause_s=PAUSE_S)
    return program.times_us(repeats=REPEATS)


def _op(backend: ModuleType) -> Callable[..., jax.Array]:
    def op(call: Call, weights: Any) -> jax.Array:
        y: jax.Array = backend.run(weights, *call)
        return y

    return op
