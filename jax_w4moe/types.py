"""The weights, canonical (as checkpoints store them) and packed (as kernels read them), as pytrees.

T tokens, E experts, k top-k, H hidden size, I intermediate size; a projection is [E, N, K] with the
contraction along K. Nothing here checks anything: pytrees are rebuilt with specs, shapes and
tracers in place of arrays. ``checks`` does, where a user's call enters.
"""

import dataclasses
import typing
from collections.abc import Callable
from typing import Literal

import jax
from jax import Array

from jax_w4moe.formats import WeightFormat

RowOrder = Literal["canonical", "gate_up"]
"""How rows lie in records: as they are, or (w13) row g of a warp gate j and row g + 8 up j."""


@typing.dataclass_transform(frozen_default=True)
def _pytree(*meta_fields: str) -> Callable[[type], type]:
    """Registers a frozen dataclass as a pytree whose named fields are static."""

    def register(cls: type) -> type:
        cls = dataclasses.dataclass(frozen=True)(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        data_fields = [name for name in names if name not in meta_fields]
        jax.tree_util.register_dataclass(cls, data_fields, list(meta_fields))
        return cls

    return register


@_pytree("format")
class QuantizedTensor:
    """One projection of all experts in 4 bits, in the canonical layout.

    Attributes:
      codes: u8[E, N, K/2], row-major; the low nibble is the even k. float4_e2m1fn[E, N, K] is
        accepted too.
      scales: [E, N, K/group_size]. For MXFP4: E8M0 bytes as uint8 or float8_e8m0fnu, or float32
        powers of two. For NVFP4: f32[E, N, 1 + K/16], the row's own before those of its groups.
      format: the weight format.
    """

    codes: Array
    scales: Array
    format: WeightFormat


@_pytree()
class ExpertWeights:
    """Both projections of an MoE layer, canonical.

    Attributes:
      w13: [E, 2I, H]; rows [0, I) are the gate, [I, 2I) the up projection.
      w2: [E, H, I], the down projection.
      w13_bias: float[E, 2I] in the order of w13's rows, or None.
      w2_bias: float[E, H], or None.
    """

    w13: QuantizedTensor
    w2: QuantizedTensor
    w13_bias: Array | None = None
    w2_bias: Array | None = None


@_pytree("format", "shape", "row_order", "layout_version")
class PackedTensor:
    """One projection of all experts as records in the kernels' order (``docs/layout.md``).

    Attributes:
      data: u8[E, row_blocks, K_blocks, record bytes]. May hold a shard of the experts or blocks.
      inexact_groups: i32[E], how many scale groups could not be packed exactly (eager packing
        raises instead).
      format: the weight format.
      shape: the global logical (E, N, K), before padding and sharding.
      row_order: how rows lie in the records.
      layout_version: the version of the byte map.
    """

    data: Array
    inexact_groups: Array
    format: WeightFormat
    shape: tuple[int, int, int]
    row_order: RowOrder
    layout_version: int


@_pytree()
class PackedExperts:
    """Both projections of an MoE layer, packed.

    Attributes:
      w13: packed with row order "gate_up"; I padded to a multiple of 128.
      w2: packed with row order "canonical".
      w13_bias: f32[E, row_blocks, 64] in the order of w13's records, or None.
      w2_bias: f32[E, H], or None.
    """

    w13: PackedTensor
    w2: PackedTensor
    w13_bias: Array | None = None
    w2_bias: Array | None = None

    @property
    def format(self) -> WeightFormat:
        """The weight format."""
        return self.w13.format

    @property
    def num_experts(self) -> int:
        """E, over all shards."""
        return self.w13.shape[0]

    @property
    def hidden_size(self) -> int:
        """H, before padding."""
        return self.w2.shape[1]

    @property
    def intermediate_size(self) -> int:
        """I, before padding, over all shards."""
        return self.w2.shape[2]

    @property
    def inexact_groups(self) -> Array:
        """i32[E]: scale groups of either projection that are not exact."""
        return self.w13.inexact_groups + self.w2.inexact_groups

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights and biases."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))
