"""What is spread over which axes of a mesh: the static half of every call."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from jax import Array
from jax.sharding import PartitionSpec as P

EXCHANGES = ("partial_sums", "slot_rows")


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


def axes_at(spec: P, dimension: int) -> tuple[str, ...]:
    entry = spec[dimension] if dimension < len(spec) else None
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def rows_spec(placement: Placement) -> P:
    return P(placement.token_axes or None)


def unknown_axis(name: str, axis: str, names: Sequence[str]) -> str:
    return f"{name}={axis!r} is not an axis of the mesh; its axes are {', '.join(names) or 'none'}."
