"""4-bit weight formats and the packed layout they share. One module per format, one import here."""

from jax_w4moe.formats.base import WeightFormat, formats
from jax_w4moe.formats.int4 import INT4_G32, INT4_G128
from jax_w4moe.formats.layout import LAYOUT_VERSION
from jax_w4moe.formats.mxfp4 import MXFP4, MXFP4_WIDE
from jax_w4moe.formats.nvfp4 import NVFP4

__all__ = [
    "INT4_G32",
    "INT4_G128",
    "LAYOUT_VERSION",
    "MXFP4",
    "MXFP4_WIDE",
    "NVFP4",
    "WeightFormat",
    "formats",
]
