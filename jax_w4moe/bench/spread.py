"""A layer over several devices, against what each of them computes of it: the price of exchange."""

import dataclasses
import statistics
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_w4moe import sharding
from jax_w4moe.bench.layers import Call, calls, random_experts
from jax_w4moe.bench.shapes import Shape
from jax_w4moe.moe import fused_moe
from jax_w4moe.timing import Program
from jax_w4moe.types import PackedExperts

NUM_TOKENS = (1, 8, 32, 128, 1024, 8192)
"""Tokens of a device."""

KINDS = ("expert", "tensor")

_AXIS = "devices"


class Spread(NamedTuple):
    """Microseconds of a layer.

    Attributes:
      kind: "expert": tokens are spread as well; "tensor": all devices have the same.
      devices: how many.
      num_tokens: of each device.
      layer_us: the layer, exchange included.
      compute_us: the same local work on every device, without exchange.
    """

    kind: str
    devices: int
    num_tokens: int
    layer_us: float
    compute_us: float


def measure(shape: Shape, kind: str, devices: int, num_tokens: int, repeats: int = 30) -> Spread:
    """Measures one cell.

    Args:
      shape: the whole layer.
      kind: one of ``KINDS``.
      devices: the first so many of this process.
      num_tokens: of each device.
      repeats: measurements of which the median is taken.
    """
    mesh = Mesh(np.array(jax.devices()[:devices]), (_AXIS,), axis_types=(AxisType.Auto,))
    axes: dict[str, Any] = {f"{kind}_axis": _AXIS}
    token_axes = (_AXIS,) if kind == "expert" else ()
    rows = NamedSharding(mesh, P(token_axes or None))
    whole = random_experts(jax.random.key(0), shape)
    everyone = num_tokens * (devices if kind == "expert" else 1)
    routings = calls(whole, "balanced", everyone, shape)
    experts = sharding.shard_experts(whole, mesh, **axes)
    del whole

    def layer(call: Call, experts: PackedExperts) -> jax.Array:
        return fused_moe(*_arguments(call, experts), token_axes=token_axes, mesh=mesh, **axes)

    placement = sharding.Placement(**axes)

    def local(call: Call, experts: PackedExperts) -> jax.Array:
        part = sharding.local_part(experts, placement)
        ids = sharding.local_ids(call.topk_ids, experts, placement)
        return fused_moe(*_arguments(call._replace(topk_ids=ids), part))

    specs = (P(), sharding.expert_specs(**axes))
    compute = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(_AXIS))
    times = []
    for op, placing in ((layer, rows), (compute, NamedSharding(mesh, P()))):
        placed = [jax.tree.map(lambda a, to=placing: jax.device_put(a, to), c) for c in routings]
        times.append(statistics.median(Program(op, placed, (experts,)).times_us(repeats=repeats)))
    return Spread(kind, devices, num_tokens, *times)


def _arguments(call: Call, experts: PackedExperts) -> tuple[Any, ...]:
    return call.x, experts, call.topk_ids, call.topk_weights


def whole(shape: Shape) -> Shape:
    """The layer that a share's name stands for: all experts, the whole of I."""
    for suffix, field in (("_ep8", "num_experts"), ("_tp8", "intermediate_size")):
        if shape.name.endswith(suffix):
            size = 8 * getattr(shape, field)
            changed = {field: size, "name": shape.name.removesuffix(suffix)}
            return dataclasses.replace(shape, **changed)
    return shape
