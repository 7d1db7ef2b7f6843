"""Programs that name no axis: XLA's partitioner says how the weights are spread."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_w4moe import varying
from jax_w4moe.sharding.placement import (
    Placement,
    Tokens,
    axes_at,
    is_alike,
    rows_spec,
    sharding_of,
)
from jax_w4moe.sharding.specs import ROW_BLOCKS, expert_specs, like
from jax_w4moe.types import PackedExperts, PackedTensor


def is_partitioned(experts: PackedExperts) -> bool:
    """Whether XLA may spread these weights: traced, on an Auto mesh, outside any shard_map."""
    data = experts.w13.data if isinstance(experts, PackedExperts) else None
    if not isinstance(data, jax.core.Tracer) or varying.is_typed():
        return False
    mesh = sharding_of(data).mesh
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
    named = like(experts, PackedExperts(w13, w2, *_BIASES))
    return ", ".join(jax.tree.leaves((own, named))) + " -> t h"


@functools.cache
def _partitioned(
    run: Callable[[Placement], Callable[[Tokens, PackedExperts], Array]], tree: Any
) -> Any:
    rule = _rule(*jax.tree.unflatten(tree, [True] * tree.num_leaves))
    letters = dict.fromkeys(re.findall("[a-z]", rule))  # the partitioner wants them in this order

    @custom_partitioning
    def whole(*leaves: Array) -> Array:
        return run(Placement())(*jax.tree.unflatten(tree, leaves))

    def partition(mesh: Any, arguments: Any, _: Any) -> Any:
        found = [argument.sharding for argument in arguments]
        tokens, experts = jax.tree.unflatten(tree, found)
        placement = _found(tokens.x.spec, experts.w13.data.spec, experts.w2.data.spec)
        rows = NamedSharding(mesh, rows_spec(placement))
        wanted = expert_specs(placement.expert_axis, placement.tensor_axis)
        placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), like(experts, wanted))
        asked = jax.tree.leaves((jax.tree.map(lambda _: rows, tokens), placed))

        def lower(*leaves: Array) -> Array:
            return run(placement)(*jax.tree.unflatten(tree, leaves))

        return mesh, lower, rows, tuple(asked)

    whole.def_partition(
        partition=partition,
        sharding_rule=rule,
        reduction_factors=tuple(letter for letter in letters if letter not in "thkjo"),
        need_replication_factors=tuple(letter for letter in letters if letter in "hkjo"),
        x=ROW_BLOCKS,
    )
    return whole


def _found(x: P, w13: P, w2: P) -> Placement:
    """The placement that the partitioner's specs mean."""
    axes = [axes_at(w13, 0), axes_at(w13, 1)]
    if all(len(found) <= 1 for found in axes):
        expert, tensor = (found[0] if found else None for found in axes)
        wanted = expert_specs(expert, tensor)
        if is_alike(w13, wanted.w13.data) and is_alike(w2, wanted.w2.data):
            return Placement(expert, tensor, axes_at(x, 0))
    raise ValueError(
        f"jax_w4moe.fused_moe: w13 is spread as {w13} and w2 as {w2}, so that weights would be"
        " gathered; place them with shard_experts, or name expert_axis and tensor_axis."
    )
