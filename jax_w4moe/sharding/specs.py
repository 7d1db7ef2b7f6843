"""Packed weights on a mesh: their specs, and their placing."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_w4moe import checks
from jax_w4moe.formats.layout import BLOCK_K, round_up
from jax_w4moe.sharding.placement import check_in_mesh, check_model_axes, put
from jax_w4moe.types import PackedExperts, PackedTensor

ROW_BLOCKS = 4  # of w13, for a K-block of w2: 128 of I, gate and up, in blocks of 64 rows


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
      experts: packed experts, on one device or on another mesh, or abstract
        (``jax.ShapeDtypeStruct``), to restore into.
      mesh: the devices.
      expert_axis: the axis that experts are spread over, or None.
      tensor_axis: the axis that the intermediate size is spread over, in steps of 128, or None.

    Returns:
      The same experts, sharded as :func:`expert_specs` says.

    Raises:
      ValueError: an axis that is not in the mesh, or the same axis twice.
      TypeError: something other than packed experts.
    """
    check_in_mesh(mesh, expert_axis=expert_axis, tensor_axis=tensor_axis)
    check_model_axes(expert_axis, tensor_axis)
    checks.packed_shards(experts)
    num_experts = round_up(experts.num_experts, mesh.shape[expert_axis] if expert_axis else 1)
    blocks = round_up(
        -(-experts.intermediate_size // BLOCK_K), mesh.shape[tensor_axis] if tensor_axis else 1
    )
    resize = functools.partial(_resized, num_experts=num_experts, blocks=blocks)
    is_abstract = isinstance(experts.w13.data, jax.ShapeDtypeStruct)
    resized = jax.eval_shape(resize, experts) if is_abstract else resize(experts)
    specs = expert_specs(expert_axis, tensor_axis)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    return jax.tree.map(put, resized, like(resized, shardings))


def like(experts: PackedExperts, tree: PackedExperts) -> PackedExperts:
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
    rows = ROW_BLOCKS * blocks
    return PackedExperts(
        tensor(experts.w13, 1, rows),
        tensor(experts.w2, 2, blocks),
        None if bias13 is None else resize(bias13, {0: num_experts, 1: rows}),
        None if bias2 is None else resize(bias2, {0: num_experts}),
    )
