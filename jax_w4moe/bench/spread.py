"""A layer over several devices, against what each of them computes of it: the price of exchange."""

import dataclasses
import functools
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_w4moe import sharding
from jax_w4moe.bench.layers import Call, calls, random_experts
from jax_w4moe.bench.shapes import Shape
from jax_w4moe.moe import fused_moe
from jax_w4moe.sharding.dispatch import LEAST_TOKENS
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
      bf16_us: the layer with tokens sent as bf16 and quantised where they arrive, or None.
      dispatch_us: the layer with tokens sent to the devices that need them only, or None.
    """

    kind: str
    devices: int
    num_tokens: int
    layer_us: float
    compute_us: float
    bf16_us: float | None
    dispatch_us: float | None


class Layer:
    """A layer's weights on the first so many devices.

    Args:
      shape: the whole layer.
      kind: one of ``KINDS``.
      devices: how many, of all processes.

    Attributes:
      mesh: of one axis.
      experts: the weights, on it.
      rows: the sharding of tokens.
    """

    def __init__(self, shape: Shape, kind: str, devices: int) -> None:
        self.shape, self.kind, self.devices = shape, kind, devices
        self.mesh = Mesh(np.array(jax.devices()[:devices]), (_AXIS,), axis_types=(AxisType.Auto,))
        self._axes: dict[str, Any] = {f"{kind}_axis": _AXIS}
        token_axes = (_AXIS,) if kind == "expert" else ()
        self._placement = sharding.Placement(**self._axes, token_axes=token_axes)
        self.rows = NamedSharding(self.mesh, P(token_axes or None))

        @jax.jit
        def weights() -> PackedExperts:
            whole = random_experts(jax.random.key(0), shape)
            return sharding.shard_experts(whole, self.mesh, **self._axes)

        self.experts = weights()

    def measure(self, num_tokens: int, repeats: int = 30) -> Spread:
        """Measures one cell.

        Args:
          num_tokens: of each device.
          repeats: measurements of which the median is taken.
        """
        is_expert = self.kind == "expert"
        everyone = num_tokens * (self.devices if is_expert else 1)
        routings = calls(self.experts, "balanced", everyone, self.shape)
        everywhere = NamedSharding(self.mesh, P())

        def time_us(op: Any, placing: NamedSharding) -> float:
            program = Program(op, self.place(routings, placing), (self.experts,))
            return statistics.median(program.times_us(repeats=repeats))

        return Spread(
            self.kind,
            self.devices,
            num_tokens,
            time_us(self.call, self.rows),
            time_us(self._mapped(self._local, P(), P(_AXIS)), everywhere),
            time_us(self._mapped(self._bf16, P(_AXIS), P(_AXIS)), self.rows) if is_expert else None,
            time_us(functools.partial(self.call, exchange="dispatch"), self.rows)
            if is_expert and num_tokens >= LEAST_TOKENS
            else None,
        )

    def place(self, routings: Sequence[Call], to: NamedSharding) -> list[Call]:
        """The calls, sharded so."""
        return [
            jax.tree.map(lambda array: jax.device_put(np.asarray(array), to), call)
            for call in routings
        ]

    def call(self, call: Call, experts: PackedExperts, exchange: str | None = None) -> jax.Array:
        """The layer."""
        return fused_moe(
            *_arguments(call, experts),
            token_axes=self._placement.token_axes,
            mesh=self.mesh,
            exchange=exchange,
            **self._axes,
        )

    def _mapped(self, op: Any, rows: P, out: P) -> Any:
        specs = (rows, sharding.expert_specs(**self._axes))
        return jax.shard_map(op, mesh=self.mesh, in_specs=specs, out_specs=out)

    def _local(self, call: Call, experts: PackedExperts) -> jax.Array:
        """What a device computes, of the tokens of all."""
        part = sharding.local_part(experts, self._placement)
        ids = sharding.local_ids(call.topk_ids, experts, self._placement)
        return fused_moe(*_arguments(call._replace(topk_ids=ids), part))

    def _bf16(self, call: Call, experts: PackedExperts) -> jax.Array:
        parts = self._local(sharding.gather(call, self._placement), experts)
        return sharding.bring_home(parts, self._placement)


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
