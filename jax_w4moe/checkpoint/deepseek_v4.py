"""DeepSeek-V4's FP4 experts, in the names DeepSeek publishes them under.

    layers.{L}.ffn.experts.{e}.w{1,2,3}.weight    I8       [N, K/2], E2M1, low nibble first
    layers.{L}.ffn.experts.{e}.w{1,2,3}.scale     F8_E8M0  [N, K/32]

The draft layers under ``mtp.`` are left alone.
"""

from typing import Any

import numpy as np

from jax_w4moe.checkpoint.base import register
from jax_w4moe.checkpoint.per_expert import PerExpert
from jax_w4moe.formats import MXFP4, WeightFormat


class DeepseekV4(PerExpert):
    """The layout above."""

    name = "DeepSeek-V4 FP4"
    codes = ("weight", ("I8",))
    scales = ("scale", ("F8_E8M0",))

    def weight_format(self, group_size: int) -> WeightFormat:
        """MXFP4."""
        return MXFP4

    def canonical(self, codes: np.ndarray, scales: np.ndarray, *numbers: Any) -> tuple[Any, Any]:
        """The same bytes."""
        return codes.view(np.uint8), scales.view(np.uint8)


DEEPSEEK_V4 = register(DeepseekV4())
