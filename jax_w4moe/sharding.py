"""Experts on several devices: how packed weights are placed, and how tokens reach them.

An expert axis of the mesh holds whole experts (EP); a tensor axis holds slices of the intermediate
size (TP). The op runs in a ``shard_map`` that is manual over all axes of the mesh. Weights never
move. Tokens that are sharded over one of those axes are gathered, in one collective; every device
computes what its weights give; and results are exchanged in one collective (two, where many rows
are wanted everywhere) and summed, or picked, at home in a fixed order: activations are never
reduced on the way, so a result does not depend on the other tokens nor on timing.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_w4moe import checks, varying
from jax_w4moe.formats.layout import BLOCK_K, round_up
from jax_w4moe.types import PackedExperts, PackedTensor

_ROW_BLOCKS = 4  # of w13, for a K-block of w2: 128 of I, gate and up, in blocks of 64 rows

EXCHANGES = ("partial_sums", "slot_rows")

_SCATTERED_ROWS = 256  # so many that are wanted everywhere are summed in parts, then gathered


class Tokens(NamedTuple):
    """The operands of a layer that have a row per token."""

    x: Array
    x_scale: Array | None
    topk_ids: Array
    topk_weights: Array


@dataclasses.dataclass(frozen=True)
class Placement:
    """Over which axes of a mesh a layer is spread; static.

    Attributes:
      expert_axis: whole experts are spread over it, or None.
      tensor_axis: the intermediate size is, or None.
      token_axes: tokens are, in this order; replicated over all other axes.
      exchange: one of ``EXCHANGES``.
    """

    expert_axis: str | None
    tensor_axis: str | None
    token_axes: tuple[str, ...]
    exchange: str

    @property
    def model_axes(self) -> tuple[str, ...]:
        """The axes that weights are spread over."""
        return tuple(axis for axis in (self.expert_axis, self.tensor_axis) if axis)

    @property
    def gathered_axes(self) -> tuple[str, ...]:
        """Those of them that tokens are spread over as well."""
        return tuple(axis for axis in self.token_axes if axis in self.model_axes)


class _AnyValue:
    """Equal to everything: the static fields of specs match those of any weights."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


def expert_specs(expert_axis: str | None = None, tensor_axis: str | None = None) -> PackedExperts:
    """PartitionSpecs of packed experts: in_specs of ``shard_map``, or for a NamedSharding each.

    Args:
      expert_axis: the mesh axis that experts are spread over, or None.
      tensor_axis: the mesh axis that the intermediate size is spread over, or None.

    Returns:
      Packed experts with a spec in place of each array, a prefix of any packed experts.
    """
    anything: Any = _AnyValue()

    def tensor(spec: P) -> PackedTensor:
        groups: Any = P(expert_axis)
        data: Any = spec
        return PackedTensor(data, groups, anything, anything, anything, anything)

    rows: Any = P(expert_axis, tensor_axis)
    columns: Any = P(expert_axis)
    return PackedExperts(tensor(rows), tensor(P(expert_axis, None, tensor_axis)), rows, columns)


def shard_experts(
    experts: PackedExperts,
    mesh: Mesh,
    *,
    expert_axis: str | None = None,
    tensor_axis: str | None = None,
) -> PackedExperts:
    """Places packed experts on a mesh, as they are: no record changes.

    Where a count does not divide, experts and records of zeros are appended: their rows contribute
    nothing, no id leads to them. What was appended for another mesh is dropped before.

    Args:
      experts: packed experts, on one device or on another mesh.
      mesh: the devices.
      expert_axis: the axis that experts are spread over, or None.
      tensor_axis: the axis that the intermediate size is spread over, in steps of 128, or None.

    Returns:
      The same experts, sharded as :func:`expert_specs` says.

    Raises:
      ValueError: an axis that is not in the mesh, or the same axis twice.
      TypeError: something other than packed experts.
    """
    for name, axis in (("expert_axis", expert_axis), ("tensor_axis", tensor_axis)):
        if axis is not None and axis not in mesh.axis_names:
            raise ValueError(_unknown_axis(name, axis, mesh.axis_names))
    if expert_axis is not None and expert_axis == tensor_axis:
        raise ValueError(
            f"expert_axis and tensor_axis are both {expert_axis!r}; name two axes of the mesh, or"
            " leave one out."
        )
    checks.packed_shards(experts)
    num_experts = round_up(experts.num_experts, mesh.shape[expert_axis] if expert_axis else 1)
    blocks = round_up(
        -(-experts.intermediate_size // BLOCK_K), mesh.shape[tensor_axis] if tensor_axis else 1
    )
    resized = _resized(experts, num_experts, blocks)
    specs = expert_specs(expert_axis, tensor_axis)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    return jax.tree.map(jax.device_put, resized, _like(resized, shardings))


def _like(experts: PackedExperts, tree: PackedExperts) -> PackedExperts:
    """A tree of specs or shardings with the static fields and missing biases of real weights."""

    def tensor(real: PackedTensor, own: PackedTensor) -> PackedTensor:
        return dataclasses.replace(real, data=own.data, inexact_groups=own.inexact_groups)

    return PackedExperts(
        tensor(experts.w13, tree.w13),
        tensor(experts.w2, tree.w2),
        None if experts.w13_bias is None else tree.w13_bias,
        None if experts.w2_bias is None else tree.w2_bias,
    )


def _resized(experts: PackedExperts, num_experts: int, blocks: int) -> PackedExperts:
    """With so many experts and K-blocks of w2: zeros appended, or appended zeros dropped."""

    def resize(array: Array, sizes: dict[int, int]) -> Array:
        for axis, size in sizes.items():
            missing = size - array.shape[axis]
            if missing < 0:
                array = jax.lax.slice_in_dim(array, 0, size, axis=axis)
            elif missing > 0:
                widths = [(0, missing if i == axis else 0) for i in range(array.ndim)]
                array = jnp.pad(array, widths)
        return array

    def tensor(packed: PackedTensor, axis: int, size: int) -> PackedTensor:
        return dataclasses.replace(
            packed,
            data=resize(packed.data, {0: num_experts, axis: size}),
            inexact_groups=resize(packed.inexact_groups, {0: num_experts}),
        )

    bias13, bias2 = experts.w13_bias, experts.w2_bias
    rows = _ROW_BLOCKS * blocks
    return PackedExperts(
        tensor(experts.w13, 1, rows),
        tensor(experts.w2, 2, blocks),
        None if bias13 is None else resize(bias13, {0: num_experts, 1: rows}),
        None if bias2 is None else resize(bias2, {0: num_experts}),
    )


# --- around the op --------------------------------------------------------------------------------


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
    named = [("expert_axis", expert_axis), ("tensor_axis", tensor_axis)]
    model = [axis for _, axis in named if axis is not None]
    if not model:
        raise ValueError(
            "mesh, token_axes and exchange say how to spread a layer over expert_axis or"
            " tensor_axis; name one of these as well."
        )
    if len(set(model)) != len(model):
        raise ValueError(f"expert_axis and tensor_axis are both {model[0]!r}; name two axes.")
    if exchange is not None and exchange not in EXCHANGES:
        raise ValueError(f"exchange={exchange!r} is unknown; use one of {', '.join(EXCHANGES)}.")
    exchange = exchange or "partial_sums"
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
        return Placement(expert_axis, tensor_axis, tuple(token_axes), exchange), None

    mesh = mesh if mesh is not None else _mesh_around(around, experts)
    for name, axis in [*named, *(("token_axes", axis) for axis in token_axes or ())]:
        if axis is not None and axis not in mesh.axis_names:
            raise ValueError(_unknown_axis(name, axis, mesh.axis_names))
    if token_axes is None:
        token_axes = _spec_axes(x, mesh)
    placement = Placement(expert_axis, tensor_axis, tuple(token_axes), exchange)
    _check_sharded(experts, placement, mesh)
    parts = math.prod(mesh.shape[axis] for axis in placement.token_axes)
    if x.shape[0] % parts:
        raise ValueError(
            f"x: T={x.shape[0]} tokens cannot be spread over {parts} devices (token_axes="
            f"{placement.token_axes}); pad T to {round_up(x.shape[0], parts)} with ids of -1."
        )
    return placement, mesh


# --- un-annotated programs ------------------------------------------------------------------------


def is_partitioned(experts: PackedExperts) -> bool:
    """Whether XLA may spread these weights: traced, on an Auto mesh, outside any shard_map."""
    data = experts.w13.data if isinstance(experts, PackedExperts) else None
    if not isinstance(data, jax.core.Tracer) or varying.is_typed():
        return False
    mesh = jax.typeof(data).sharding.mesh
    return bool(mesh.size > 1 and AxisType.Explicit not in mesh.axis_types)


def partitioned(
    run: Callable[[Placement], Callable[[Tokens, PackedExperts], Array]],
    tokens: Tokens,
    experts: PackedExperts,
) -> Array:
    """Calls ``run(placement)`` as XLA's partitioner finds the weights to be spread.

    Raises:
      ValueError: by way of the compiler, weights that are spread in another way than
        :func:`expert_specs` says: XLA would have to gather them.
    """
    leaves, tree = jax.tree.flatten((tokens, experts))
    y: Array = _partitioned(run, tree)(*leaves)
    return y


# Dimensions that are spread alike have one letter: t tokens, e experts, c blocks of I, of which w13
# has x row blocks each.
_TOKENS: Any = ("t h", "t o", "t k", "t j")
_RECORDS: Any = ("e (c x) a b", "e n c d")
_BIASES: Any = ("e (c x) s", "e m")


def _rule(tokens: Tokens, experts: PackedExperts) -> str:
    """The dimensions of all arrays that are there, in the order of the tree's leaves."""
    there: Any = (d if a is not None else None for d, a in zip(_TOKENS, tokens, strict=True))
    own = Tokens(*there)
    unused: Any = [None] * 4
    each: Any = "e"
    w13, w2 = (PackedTensor(records, each, *unused) for records in _RECORDS)
    named = _like(experts, PackedExperts(w13, w2, *_BIASES))
    return ", ".join(jax.tree.leaves((own, named))) + " -> t h"


@functools.cache
def _partitioned(
    run: Callable[[Placement], Callable[[Tokens, PackedExperts], Array]], tree: Any
) -> Any:
    rule = _rule(*jax.tree.unflatten(tree, [True] * tree.num_leaves))
    letters = dict.fromkeys(re.findall("[a-z]", rule))  # the partitioner wants them in this order

    @custom_partitioning
    def whole(*leaves: Array) -> Array:
        alone = Placement(None, None, (), EXCHANGES[0])
        return run(alone)(*jax.tree.unflatten(tree, leaves))

    def partition(mesh: Any, arguments: Any, _: Any) -> Any:
        found = [argument.sharding for argument in arguments]
        tokens, experts = jax.tree.unflatten(tree, found)
        placement = _found(tokens.x.spec, experts.w13.data.spec, experts.w2.data.spec)
        rows = NamedSharding(mesh, P(placement.token_axes or None))
        wanted = expert_specs(placement.expert_axis, placement.tensor_axis)
        placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), _like(experts, wanted))
        asked = jax.tree.leaves((jax.tree.map(lambda _: rows, tokens), placed))

        def lower(*leaves: Array) -> Array:
            return run(placement)(*jax.tree.unflatten(tree, leaves))

        return mesh, lower, rows, tuple(asked)

    whole.def_partition(
        partition=partition,
        sharding_rule=rule,
        reduction_factors=tuple(letter for letter in letters if letter not in "thkjo"),
        need_replication_factors=tuple(letter for letter in letters if letter in "hkjo"),
        x=_ROW_BLOCKS,
    )
    return whole


def _found(x: P, w13: P, w2: P) -> Placement:
    """The placement that the partitioner's specs mean."""
    axes = [_axes_at(w13, 0), _axes_at(w13, 1)]
    if all(len(found) <= 1 for found in axes):
        expert, tensor = (found[0] if found else None for found in axes)
        wanted = expert_specs(expert, tensor)
        specs = ((w13, wanted.w13.data), (w2, wanted.w2.data))
        if all(_axes_at(one, d) == _axes_at(other, d) for one, other in specs for d in range(4)):  # type: ignore[arg-type]
            return Placement(expert, tensor, _axes_at(x, 0), EXCHANGES[0])
    raise ValueError(
        f"jax_w4moe.fused_moe: w13 is spread as {w13} and w2 as {w2}, so that weights would be"
        " gathered; place them with shard_experts, or name expert_axis and tensor_axis."
    )


def refuse_spread(experts: PackedExperts) -> None:
    """Refuses weights on several devices in a call that names no axis: XLA would gather them.

    Raises:
      ValueError: their sharding is known (eagerly, or on a mesh of explicit axes) and not trivial.
    """
    for name, array in (("w13", experts.w13.data), ("w2", experts.w2.data)):
        is_traced = isinstance(array, jax.core.Tracer)
        sharding = jax.typeof(array).sharding if is_traced else getattr(array, "sharding", None)
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
    sharding = NamedSharding(mesh, _rows(placement))
    tokens = jax.tree.map(lambda array: _resharded(array, sharding), tokens)
    y: Array = _mapped(op, placement, mesh)(tokens, experts)
    return y


def _rows(placement: Placement) -> P:
    return P(placement.token_axes or None)


@functools.cache
def _mapped(op: Callable[[Tokens, PackedExperts], Array], placement: Placement, mesh: Any) -> Any:
    rows = _rows(placement)
    specs = (rows, expert_specs(placement.expert_axis, placement.tensor_axis))
    return jax.jit(jax.shard_map(op, mesh=mesh, in_specs=specs, out_specs=rows))


def _resharded(array: Array, sharding: NamedSharding) -> Array:
    """Tokens as they are wanted; on an Auto mesh under jit XLA sees to it."""
    if not isinstance(array, jax.core.Tracer):
        return jax.device_put(array, sharding)
    if AxisType.Explicit in sharding.mesh.axis_types:
        return jax.sharding.reshard(array, sharding)
    return array


def _unknown_axis(name: str, axis: str, names: Sequence[str]) -> str:
    return f"{name}={axis!r} is not an axis of the mesh; its axes are {', '.join(names) or 'none'}."


def _mesh_around(around: Any, experts: PackedExperts) -> Any:
    """The mesh of the context, else of the weights."""
    if around.axis_names:
        return around
    data = experts.w13.data
    sharding = jax.typeof(data).sharding if isinstance(data, jax.core.Tracer) else data.sharding
    mesh = getattr(sharding, "mesh", None)
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
    if not isinstance(array, jax.core.Tracer):
        sharding = getattr(array, "sharding", None)
        return sharding.spec if isinstance(sharding, NamedSharding) else P()
    if AxisType.Explicit in mesh.axis_types:
        spec: P = jax.typeof(array).sharding.spec
        return spec
    return None


def _spec_axes(x: Array, mesh: Any) -> tuple[str, ...]:
    """The axes that rows are spread over already; none where that is unknown."""
    spec = _spec_of(x, mesh)
    return _axes_at(spec, 0) if spec is not None else ()


def _axes_at(spec: P, dimension: int) -> tuple[str, ...]:
    entry = spec[dimension] if dimension < len(spec) else None
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _check_sharded(experts: PackedExperts, placement: Placement, mesh: Any) -> None:
    """Global weights: of sizes that divide, and spread already, where that can be known."""
    checks.packed_shards(experts)
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
        if found is None:
            continue
        partition: Any = spec
        for dimension in range(len(partition)):
            if _axes_at(found, dimension) != _axes_at(partition, dimension):
                raise ValueError(
                    f"experts.{name}: spread as {found}, need {partition}; place the weights with"
                    f" shard_experts(experts, mesh, expert_axis={placement.expert_axis!r},"
                    f" tensor_axis={placement.tensor_axis!r})."
                )


def _check_local(experts: PackedExperts, placement: Placement) -> None:
    """Weights inside the caller's shard_map are this device's part."""
    checks.packed_shards(experts)
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


# --- inside a shard_map ---------------------------------------------------------------------------


def local_part(experts: PackedExperts, placement: Placement) -> PackedExperts:
    """This device's weights as a layer of their own: w2's bias on one of the tensor axis only."""
    held, blocks = experts.w13.data.shape[0], experts.w2.data.shape[2]
    hidden, intermediate = experts.hidden_size, experts.intermediate_size
    if blocks * BLOCK_K != round_up(intermediate, BLOCK_K):
        intermediate = blocks * BLOCK_K
    bias = experts.w2_bias
    if bias is not None and placement.tensor_axis:
        is_first = jax.lax.axis_index(placement.tensor_axis) == 0
        bias = jnp.where(is_first, bias, jnp.zeros_like(bias))
    w13_shape, w2_shape = (held, 2 * intermediate, hidden), (held, hidden, intermediate)
    return PackedExperts(
        dataclasses.replace(experts.w13, shape=w13_shape),
        dataclasses.replace(experts.w2, shape=w2_shape),
        experts.w13_bias,
        bias,
    )


def local_ids(topk_ids: Array, experts: PackedExperts, placement: Placement) -> Array:
    """Ids of the experts that this device holds, by their number among them; -1 for all others."""
    valid = (topk_ids >= 0) & (topk_ids < experts.num_experts)
    if placement.expert_axis is None:
        return jnp.where(valid, topk_ids, -1)
    held = experts.w13.data.shape[0]
    own = topk_ids - jax.lax.axis_index(placement.expert_axis) * held
    return jnp.where(valid & (own >= 0) & (own < held), own, -1)


def gather(rows: Any, placement: Placement) -> Any:
    """Rows of all devices that share these weights' tokens: one collective, of bytes.

    Args:
      rows: a tree of [T_local, n] arrays.
      placement: the layer's.

    Returns:
      The same tree of [T, n] arrays.
    """
    axes = placement.gathered_axes
    if not axes:
        return rows
    leaves, tree = jax.tree.flatten(rows)
    payload = jnp.concatenate([_bytes(leaf) for leaf in leaves], axis=1)
    payload = jax.lax.all_gather(payload, axes, tiled=True)
    ends = np.cumsum([leaf.shape[1] * leaf.dtype.itemsize for leaf in leaves])
    parts = jnp.split(payload, ends[:-1], axis=1)
    values = [_values(part, leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(tree, values)


def _bytes(array: Array) -> Array:
    """[T, n] of any dtype -> u8[T, n * itemsize]."""
    return jax.lax.bitcast_convert_type(array, jnp.uint8).reshape(array.shape[0], -1)


def _values(payload: Array, dtype: Any) -> Array:
    """The inverse of :func:`_bytes`."""
    size = jnp.dtype(dtype).itemsize
    shape = (payload.shape[0], -1) if size == 1 else (payload.shape[0], -1, size)
    return jax.lax.bitcast_convert_type(payload.reshape(shape), dtype)


def bring_home(parts: Array, placement: Placement) -> Array:
    """Adds what every device has of a row, in f32, from the first device to the last.

    Args:
      parts: [T, n], this device's part of all rows.
      placement: the layer's.

    Returns:
      [T_local, n]; the same on all devices of an axis that tokens are not spread over.
    """
    spread = placement.gathered_axes
    shared = tuple(axis for axis in placement.model_axes if axis not in spread)
    num_shared = math.prod(jax.lax.axis_size(axis) for axis in shared)
    num_spread = math.prod(jax.lax.axis_size(axis) for axis in spread)
    parts = varying.vary(parts, frozenset(placement.model_axes))
    num_rows, width = parts.shape[0] // num_spread, parts.shape[1]
    same = "invarying" if varying.is_typed() else "varying"
    stacked = _bits(parts).reshape(num_spread, num_rows, width)
    if spread:
        stacked = jax.lax.all_to_all(stacked, spread, 0, 0)
    if not shared:
        return _sum(stacked, parts.dtype)
    if num_rows < _SCATTERED_ROWS or num_rows % num_shared:
        everything = jax.lax.all_gather(stacked, shared, to=same)
        return _sum(everything.reshape(-1, num_rows, width), parts.dtype)
    # Each device of the shared axes adds its share of the rows: less to send, the same sums.
    shares = stacked.reshape(num_spread, num_shared, -1, width).swapaxes(0, 1)
    shares = jax.lax.all_to_all(shares, shared, 0, 0)
    own = _sum(shares.reshape(-1, num_rows // num_shared, width), parts.dtype)
    own = jax.lax.all_gather(_bits(own), shared, tiled=True, to=same)
    return jax.lax.bitcast_convert_type(own, parts.dtype)


def _bits(array: Array) -> Array:
    """As integers: what is sent is of this width, whatever XLA makes of conversions beside it."""
    width = jnp.uint16 if array.dtype == jnp.bfloat16 else jnp.uint32
    return jax.lax.bitcast_convert_type(array, width)


def _sum(bits: Array, dtype: Any) -> Array:
    parts = jax.lax.bitcast_convert_type(bits, dtype)
    total = parts[0].astype(jnp.float32)
    for part in parts[1:]:
        total = total + part.astype(jnp.float32)
    return total.astype(parts.dtype)


def as_slots(tokens: Tokens) -> Tokens:
    """Each (token, slot) pair as a token of its own, of weight one."""
    num_tokens, top_k = tokens.topk_ids.shape

    x, x_scale = jax.tree.map(
        lambda array: jnp.repeat(array, top_k, axis=0), (tokens.x, tokens.x_scale)
    )
    ids = tokens.topk_ids.reshape(-1, 1)
    return Tokens(x, x_scale, ids, jnp.ones((num_tokens * top_k, 1), jnp.float32))


def combine_slots(slots: Array, topk_ids: Array, topk_weights: Array, num_experts: int) -> Array:
    """R6: the weighted sum of bf16[T, k, H] slots, in slot order."""
    valid = (topk_ids >= 0) & (topk_ids < num_experts)
    total = jnp.zeros((slots.shape[0], slots.shape[2]), jnp.float32)
    for slot in range(topk_ids.shape[1]):
        row = topk_weights[:, slot, None] * slots[:, slot].astype(jnp.float32)
        total += jnp.where(valid[:, slot, None], row, 0.0)
    return total.astype(jnp.bfloat16)
