"""Around the op: what a call's arguments mean, and the shard_map that it opens."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_w4moe import varying
from jax_w4moe.formats.layout import BLOCK_K, round_up
from jax_w4moe.sharding.placement import (
    DISPATCH,
    EXCHANGES,
    PARTIAL_SUMS,
    Placement,
    Tokens,
    axes_at,
    check_in_mesh,
    check_model_axes,
    is_alike,
    put,
    rows_spec,
    sharding_of,
)
from jax_w4moe.sharding.specs import expert_specs
from jax_w4moe.types import PackedExperts


def place(
    x: Array,
    experts: PackedExperts,
    *,
    expert_axis: str | None,
    tensor_axis: str | None,
    token_axes: str | Sequence[str] | None,
    exchange: str | None,
    mesh: Any,
) -> tuple[Placement, Any]:
    """What a call's arguments mean.

    Returns:
      The placement, and the mesh to open a shard_map on; None inside the caller's own.

    Raises:
      ValueError: axes, sizes or shardings that do not fit.
    """
    model = [axis for axis in (expert_axis, tensor_axis) if axis is not None]
    if not model:
        raise ValueError(
            "mesh, token_axes and exchange say how to spread a layer over expert_axis or"
            " tensor_axis; name one of these as well."
        )
    check_model_axes(expert_axis, tensor_axis)
    if exchange is not None and exchange not in EXCHANGES:
        raise ValueError(f"exchange={exchange!r} is unknown; use one of {', '.join(EXCHANGES)}.")
    around = jax.sharding.get_abstract_mesh()
    manual = set(around.manual_axes)
    inside = [axis for axis in model if axis in manual]
    if inside and len(inside) < len(model):
        other = next(axis for axis in model if axis not in manual)
        raise ValueError(
            f"axis {other!r} is not manual in the shard_map around this call, {inside[0]!r} is;"
            " make both manual, or none."
        )
    if isinstance(token_axes, str):
        token_axes = (token_axes,)
    if inside:
        if token_axes is None:
            token_axes = _varying_axes(x, experts, model)
        return _placement(expert_axis, tensor_axis, token_axes, exchange), None

    mesh = mesh if mesh is not None else _mesh_around(around, experts)
    check_in_mesh(mesh, expert_axis=expert_axis, tensor_axis=tensor_axis, token_axes=token_axes)
    if token_axes is None:
        token_axes = _spec_axes(x, mesh)
    placement = _placement(expert_axis, tensor_axis, token_axes, exchange)
    _check_sharded(experts, placement, mesh)
    parts = math.prod(mesh.shape[axis] for axis in placement.token_axes)
    if x.shape[0] % parts:
        raise ValueError(
            f"x: T={x.shape[0]} tokens cannot be spread over {parts} devices (token_axes="
            f"{placement.token_axes}); pad T to {round_up(x.shape[0], parts)} with ids of -1."
        )
    return placement, mesh


def _placement(
    expert_axis: str | None,
    tensor_axis: str | None,
    token_axes: Sequence[str],
    exchange: str | None,
) -> Placement:
    placement = Placement(expert_axis, tensor_axis, tuple(token_axes), exchange)
    if exchange == DISPATCH and not placement.can_dispatch:
        raise ValueError(
            f"exchange={exchange!r} sends tokens to the devices of the expert axis that hold their"
            f" experts; with expert_axis={expert_axis!r} and token_axes={placement.token_axes} it"
            " cannot: spread tokens over the expert axis and not over the tensor axis, or take"
            f" {PARTIAL_SUMS!r}, which gives the same bits."
        )
    return placement


def refuse_spread(experts: PackedExperts) -> None:
    """Refuses weights on several devices in a call that names no axis: XLA would gather them.

    Raises:
      ValueError: their sharding is known (eagerly, or on a mesh of explicit axes) and not trivial.
    """
    for name, array in (("w13", experts.w13.data), ("w2", experts.w2.data)):
        sharding = sharding_of(array)
        if isinstance(sharding, NamedSharding) and any(entry for entry in sharding.spec):
            raise ValueError(
                f"experts.{name}: spread over devices as {sharding.spec}, and the call names no"
                " axis, so that all weights would be gathered; pass expert_axis or tensor_axis."
            )


def run(
    placement: Placement,
    mesh: Any,
    op: Callable[[Tokens, PackedExperts], Array],
    tokens: Tokens,
    experts: PackedExperts,
) -> Array:
    """Calls an op that is made for the inside of a shard_map, opening one where there is none."""
    if mesh is None:
        _check_local(experts, placement)
        return op(tokens, experts)
    sharding = NamedSharding(mesh, rows_spec(placement))
    tokens = jax.tree.map(lambda array: put(array, sharding), tokens)
    y: Array = _mapped(op, placement, mesh)(tokens, experts)
    return y


@functools.cache
def _mapped(op: Callable[[Tokens, PackedExperts], Array], placement: Placement, mesh: Any) -> Any:
    rows = rows_spec(placement)
    specs = (rows, expert_specs(placement.expert_axis, placement.tensor_axis))
    return jax.jit(jax.shard_map(op, mesh=mesh, in_specs=specs, out_specs=rows))


def _mesh_around(around: Any, experts: PackedExperts) -> Any:
    """The mesh of the context, else of the weights."""
    if around.axis_names:
        return around
    mesh = getattr(sharding_of(experts.w13.data), "mesh", None)
    if mesh is None or not mesh.axis_names:
        raise ValueError(
            "experts: they lie on one device, and there is no mesh around; place them with"
            " shard_experts(experts, mesh, ...), or leave expert_axis and tensor_axis out."
        )
    return mesh


def _varying_axes(x: Array, experts: PackedExperts, model: Sequence[str]) -> tuple[str, ...]:
    """Inside the caller's shard_map: the model axes that tokens are spread over, by their types."""
    if not set(model) <= varying.axes_of(experts.w13.data) | varying.axes_of(experts.w2.data):
        raise ValueError(
            f"experts: inside this shard_map they are the same on all devices of {model[0]!r}, or"
            " it was opened with check_vma=False; spread them with in_specs=expert_specs(...), and"
            " say token_axes= where types are not checked."
        )
    axes = varying.axes_of(x)
    return tuple(a for a in jax.sharding.get_abstract_mesh().axis_names if a in axes)


def _spec_of(array: Array, mesh: Any) -> P | None:
    """An array's spec, where it can be known: eagerly, or on a mesh of explicit axes."""
    if isinstance(array, jax.core.Tracer) and AxisType.Explicit not in mesh.axis_types:
        return None
    sharding = sharding_of(array)
    return sharding.spec if isinstance(sharding, NamedSharding) else P()


def _spec_axes(x: Array, mesh: Any) -> tuple[str, ...]:
    """The axes that rows are spread over already; none where that is unknown."""
    spec = _spec_of(x, mesh)
    return axes_at(spec, 0) if spec is not None else ()


def _check_sharded(experts: PackedExperts, placement: Placement, mesh: Any) -> None:
    """Global weights: of sizes that divide, and spread already, where that can be known."""
    expert_parts = mesh.shape[placement.expert_axis] if placement.expert_axis else 1
    tensor_parts = mesh.shape[placement.tensor_axis] if placement.tensor_axis else 1
    held, blocks = experts.w13.data.shape[0], experts.w2.data.shape[2]
    if held % expert_parts:
        raise ValueError(
            f"experts: E={held} cannot be spread over {expert_parts} devices of"
            f" {placement.expert_axis!r}; shard_experts appends empty ones up to"
            f" {round_up(held, expert_parts)}."
        )
    if blocks % tensor_parts:
        raise ValueError(
            f"experts: I={experts.intermediate_size} is {blocks} blocks of {BLOCK_K}, which cannot"
            f" be spread over {tensor_parts} devices of {placement.tensor_axis!r}; shard_experts"
            f" appends empty ones up to {round_up(blocks, tensor_parts)}."
        )
    wanted = expert_specs(placement.expert_axis, placement.tensor_axis)
    for name, array, spec in (
        ("w13", experts.w13.data, wanted.w13.data),
        ("w2", experts.w2.data, wanted.w2.data),
    ):
        found = _spec_of(array, mesh)
        if found is not None and not is_alike(found, spec):
            raise ValueError(
                f"experts.{name}: spread as {found}, need {spec}; place the weights with"
                f" shard_experts(experts, mesh, expert_axis={placement.expert_axis!r},"
                f" tensor_axis={placement.tensor_axis!r})."
            )


def _check_local(experts: PackedExperts, placement: Placement) -> None:
    """Weights inside the caller's shard_map are this device's part."""
    axes = (placement.expert_axis, placement.tensor_axis)
    parts = [jax.lax.axis_size(axis) if axis else 1 for axis in axes]
    blocks = -(-experts.intermediate_size // BLOCK_K)
    for name, held, whole, count in (
        ("E", experts.w13.data.shape[0], experts.num_experts, parts[0]),
        (f"I/{BLOCK_K}", experts.w2.data.shape[2], blocks, parts[1]),
    ):
        if held * count != round_up(whole, count):
            raise ValueError(
                f"experts: {name}={held} inside a shard_map over {count} devices, need"
                f" {-(-whole // count)} of {whole}; pass in_specs=expert_specs(...) to shard_map,"
                " for weights from shard_experts."
            )
