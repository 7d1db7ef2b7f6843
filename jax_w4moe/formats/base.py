"""What a 4-bit weight format is, and the registry of the formats there are.

A format knows codes and scales; it knows nothing of tiles, kernels or files. Adding one is a module
beside this one (``docs/adding_a_format.md``).
"""

import abc
import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, Shaped, UInt8, UInt32


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFormat(abc.ABC):
    """A way of storing a weight matrix [N, K] in 4-bit codes with one scale per group of K.

    Attributes:
      name: the format's name in files, errors and build reports.
      group_size: how many neighbours along K share a scale.
      scale_dtype: the dtype canonical scales are stored in.
      code_dtype: the 4-bit dtype of an unpacked code.
      k_order: how the digits of a logical k inside its 128-block are permuted for the tensor core
        (see :mod:`jax_w4moe.formats.layout`).
      scale_words: 32-bit words that hold the scales of a row and 128 of K, 1 to 3.
      row_scales: scales of a whole row that come before those of its groups, 0 or 1.
    """

    name: str
    group_size: int
    scale_dtype: jnp.dtype
    code_dtype: jnp.dtype
    k_order: str
    scale_words: int
    row_scales: int = 0

    def num_scales(self, columns: int) -> int:
        """Canonical scales of a row of so many columns."""
        return self.row_scales + columns // self.group_size

    def takes(self, other: "WeightFormat") -> bool:
        """Whether another format's codes and scales can be packed as this one as they are."""
        return False

    @abc.abstractmethod
    def canonical_scales(self, scales: Shaped[Array, "*rest G"]) -> Shaped[Array, "*rest G"]:
        """Scales in any accepted dtype -> ``scale_dtype``.

        Raises:
          TypeError: a dtype this format does not store.
        """

    @abc.abstractmethod
    def quantize(
        self, weights: Float32[Array, "*rest K"]
    ) -> tuple[UInt8[Array, "*rest K"], Shaped[Array, "*rest G"]]:
        """Float weights -> (codes in 0..15, canonical scales). K: a multiple of the group."""

    @abc.abstractmethod
    def dequantize(
        self, codes: UInt8[Array, "*rest K"], scales: Shaped[Array, "*rest G"]
    ) -> Float32[Array, "*rest K"]:
        """Codes in 0..15 and canonical scales -> the exact weights in f32."""

    @abc.abstractmethod
    def words_from_scales(
        self, codes: UInt8[Array, "*rest K"], scales: Shaped[Array, "*rest G"]
    ) -> tuple[UInt32[Array, "*rest C W"], Int32[Array, "*rest C"]]:
        """The scale words of each 128 of K, and how many of its groups could not be exact."""

    @abc.abstractmethod
    def scales_from_words(self, words: UInt32[Array, "*rest C W"]) -> Shaped[Array, "*rest G"]:
        """The inverse of :meth:`words_from_scales`, up to the scales of all-zero groups."""

    @abc.abstractmethod
    def word_bytes(self, codes: UInt8[Array, "*rest 2 4"]) -> UInt8[Array, "*rest 4"]:
        """The word that the kernel decodes: eight codes of one row, as [half, byte]. Zeros of codes
        of zero weights, so that zero records are zero weights."""

    @abc.abstractmethod
    def codes_from_word_bytes(self, word: UInt8[Array, "*rest 4"]) -> UInt8[Array, "*rest 2 4"]:
        """The inverse of :meth:`word_bytes`."""

    @abc.abstractmethod
    def inexact_reason(self, scales: Sequence[int | float]) -> str:
        """Why the groups of one (row, 128 of K) cannot be packed exactly, as part of a sentence."""

    def __repr__(self) -> str:
        return self.name.upper()


_REGISTRY: dict[str, WeightFormat] = {}


def register(weight_format: WeightFormat) -> WeightFormat:
    """Makes a format known by name to files, tests and errors; returns it."""
    _REGISTRY[weight_format.name] = weight_format
    return weight_format


def formats() -> tuple[WeightFormat, ...]:
    """All registered formats, in order of registration."""
    return tuple(_REGISTRY.values())
