"""NVFP4 experts, as modelopt and as compressed-tensors store them.

    weight               weight_packed         U8       [N, K/2], E2M1, low nibble first
    weight_scale         weight_scale          F8_E4M3  [N, K/16]
    weight_scale_2       weight_global_scale   F32      one number; multiplies, or divides

``input_scale`` is of FP4 activations and is not needed. Gate and up keep scales of their own.
"""

from typing import Any

import numpy as np

from jax_w4moe.checkpoint.base import register
from jax_w4moe.checkpoint.per_expert import PerExpert
from jax_w4moe.formats import NVFP4, WeightFormat


class Modelopt(PerExpert):
    """The first column."""

    name = "modelopt NVFP4"
    codes = ("weight", ("U8",))
    scales = ("weight_scale", ("F8_E4M3",))
    numbers = ("weight_scale_2",)
    group_sizes = (16,)
    other_parts = ("input_scale",)

    def weight_format(self, group_size: int) -> WeightFormat:
        """NVFP4."""
        return NVFP4

    def canonical(self, codes: np.ndarray, scales: np.ndarray, *numbers: Any) -> tuple[Any, Any]:
        """The matrix's scale for every row, then those of its groups."""
        row = np.broadcast_to(self.row_scale(numbers[0]), (len(scales), 1))
        return codes, np.concatenate([row, scales.astype(np.float32)], axis=1)

    def row_scale(self, number: np.float32) -> np.float32:
        """What multiplies the scales of groups."""
        return number


class Nvfp4PackQuantized(Modelopt):
    """The second column."""

    name = "compressed-tensors NVFP4"
    codes = ("weight_packed", ("U8",))
    numbers = ("weight_global_scale",)
    other_parts = ("input_global_scale",)

    def row_scale(self, number: np.float32) -> np.float32:
        """Stored as what divides them."""
        return np.float32(1) / number


MODELOPT = register(Modelopt())
NVFP4_PACK_QUANTIZED = register(Nvfp4PackQuantized())
