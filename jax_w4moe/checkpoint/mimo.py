"""MiMo's MXFP4 experts.

model.layers.{L}.mlp.experts.{e}.{gate,up,down}_proj.weight        U8  [N, K/2], E2M1
model.layers.{L}.mlp.experts.{e}.{gate,up,down}_proj.weight_scale  U8  [N, K/32], E8M0
"""

from typing import Any

import numpy as np

from jax_w4moe.checkpoint.base import register
from jax_w4moe.checkpoint.per_expert import PerExpert
from jax_w4moe.formats import MXFP4, WeightFormat


class Mimo(PerExpert):
    """The layout above."""

    name = "MiMo MXFP4"
    codes = ("weight", ("U8",))
    scales = ("weight_scale", ("U8",))

    def weight_format(self, group_size: int) -> WeightFormat:
        """MXFP4."""
        return MXFP4

    def canonical(self, codes: np.ndarray, scales: np.ndarray, *numbers: Any) -> tuple[Any, Any]:
        """As they are."""
        return codes, scales


MIMO = register(Mimo())
