"""What is spread over which axes of a mesh: the static half of every call."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

PARTIAL_SUMS, SLOT_ROWS, DISPATCH = EXCHANGES = ("partial_sums", "slot_rows", "dispatch")


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
      exchange: one of ``EXCHANGES``, or None: DISPATCH where that sends less, else PARTIAL_SUMS.
    """

    expert_axis: str | None = None
    tensor_axis: str | None = None
    token_axes: tuple[str, ...] = ()
    exchange: str | None = None

    @property
    def model_axes(self) -> tuple[str, ...]:
        """The axes that weights are spread over."""
        return tuple(axis for axis in (self.expert_axis, self.tensor_axis) if axis)

    @property
    def gathered_axes(self) -> tuple[str, ...]:
        """Those of them that tokens are spread over as well."""
        return tuple(axis for axis in self.token_axes if axis in self.model_axes)

    @property
    def can_dispatch(self) -> bool:
        """Whether a token may be sent to some devices only: those that hold its experts."""
        return self.expert_axis is not None and self.gathered_axes == (self.expert_axis,)


def axes_at(spec: P, dimension: int) -> tuple[str, ...]:
    """The mesh axes that a dimension is spread over."""
    entry = spec[dimension] if dimension < len(spec) else None
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def is_alike(one: Any, other: Any) -> bool:
    """Whether two specs spread all dimensions over the same axes."""
    dimensions = range(max(len(one), len(other)))
    return all(axes_at(one, d) == axes_at(other, d) for d in dimensions)


def rows_spec(placement: Placement) -> P:
    """Of arrays with a row per token."""
    return P(placement.token_axes or None)


def sharding_of(array: Array) -> Any:
    """What JAX knows of an array's sharding: its type's, while it is traced."""
    if isinstance(array, jax.core.Tracer):
        return jax.typeof(array).sharding
    return getattr(array, "sharding", None)


def put(array: Any, sharding: NamedSharding) -> Any:
    """The array, sharded so: at once, in a traced program, or as the type of one to come."""
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
    # Traced, device_put would only be a hint.
    if not isinstance(array, jax.core.Tracer):
        return jax.device_put(array, sharding)
    if AxisType.Explicit in sharding.mesh.axis_types:
        return jax.sharding.reshard(array, sharding)
    return jax.lax.with_sharding_constraint(array, sharding)


def check_model_axes(expert_axis: str | None, tensor_axis: str | None) -> None:
    """Refuses one axis under both names."""
    if expert_axis is not None and expert_axis == tensor_axis:
        raise ValueError(
            f"expert_axis and tensor_axis are both {expert_axis!r}; name two axes of the mesh, or"
            " leave one out."
        )


def check_in_mesh(mesh: Any, **axes: str | Sequence[str] | None) -> None:
    """Refuses axes that a mesh does not have."""
    for name, value in axes.items():
        for axis in (value,) if isinstance(value, str) else value or ():
            if axis not in mesh.axis_names:
                own = ", ".join(mesh.axis_names) or "none"
                raise ValueError(f"{name}={axis!r} is not an axis of the mesh; its axes are {own}.")
