"""Experts that compressed-tensors has packed: INT4 (Kimi K2) and MXFP4 (Kimi K3).

Per projection, ``pack-quantized`` with 4 bits and symmetric groups of 32 or 128:

    weight_packed  I32       [N, K/8]; nibble i of a word is k = 8 word + i, stored as code + 8
    weight_scale   BF16/F32  [N, K/group]
    weight_shape   I32/I64   [2], (N, K); not needed

and ``mxfp4-pack-quantized``:

    weight_packed  U8  [N, K/2], E2M1, low nibble first
    weight_scale   U8  [N, K/32], E8M0
"""

from typing import Any, ClassVar

import numpy as np

from jax_w4moe.checkpoint.base import register
from jax_w4moe.checkpoint.per_expert import PerExpert
from jax_w4moe.formats import INT4_G32, INT4_G128, MXFP4, WeightFormat

_OFFSETS = 0x88  # 8 in both nibbles: offset binary is two's complement with the top bit flipped


class PackQuantized(PerExpert):
    """INT4 in words of eight."""

    name = "compressed-tensors INT4"
    codes = ("weight_packed", ("I32",))
    scales = ("weight_scale", ("BF16", "F32"))
    codes_per_item = 8
    group_sizes = (32, 128)
    other_parts = ("weight_shape",)
    refused_parts: ClassVar = {
        "weight_zero_point": "has zero points; only symmetric weights are read: quantise again"
        " with symmetric=true",
        "weight_g_idx": "reorders the columns (actorder=group), which is not read; quantise again"
        " without it",
    }

    def weight_format(self, group_size: int) -> WeightFormat:
        """INT4_G32 or INT4_G128."""
        return INT4_G32 if group_size == INT4_G32.group_size else INT4_G128

    def canonical(self, codes: np.ndarray, scales: np.ndarray, *numbers: Any) -> tuple[Any, Any]:
        """The words' bytes with their top bits flipped."""
        return codes.view(np.uint8) ^ np.uint8(_OFFSETS), scales


class Mxfp4PackQuantized(PerExpert):
    """MXFP4."""

    name = "compressed-tensors MXFP4"
    codes = ("weight_packed", ("U8",))
    scales = ("weight_scale", ("U8", "F8_E8M0"))

    def weight_format(self, group_size: int) -> WeightFormat:
        """MXFP4."""
        return MXFP4

    def canonical(self, codes: np.ndarray, scales: np.ndarray, *numbers: Any) -> tuple[Any, Any]:
        """The same bytes."""
        return codes, scales.view(np.uint8)


PACK_QUANTIZED = register(PackQuantized())
MXFP4_PACK_QUANTIZED = register(Mxfp4PackQuantized())
