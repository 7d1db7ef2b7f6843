"""Over which axes of ``shard_map`` an array varies from device to device, in JAX's types."""

from typing import Any

import jax


def axes_of(tree: Any) -> frozenset[str]:
    """The axes over which any array of a tree varies; none outside shard_map, or unchecked."""
    axes: frozenset[str] = frozenset()
    for leaf in jax.tree.leaves(tree):
        axes |= jax.typeof(leaf).manual_axis_type.varying
    return axes


def is_typed() -> bool:
    """Whether this is the inside of a shard_map; the partitioner's callbacks have no such types."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def vary(tree: Any, axes: frozenset[str]) -> Any:
    """The same arrays, typed as varying over at least these axes."""
    if not is_typed():
        return tree

    def cast(leaf: Any) -> Any:
        missing = axes - jax.typeof(leaf).manual_axis_type.varying
        return jax.lax.pcast(leaf, tuple(sorted(missing)), to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def alike(tree: Any) -> Any:
    """The same arrays, each typed as varying wherever one of them does.

    A custom call's results are typed after one operand, the branches of a conditional must have one
    type, and so must what a loop carries before and after: for all three every operand is.
    """
    return vary(tree, axes_of(tree))
