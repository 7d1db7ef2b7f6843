"""4-bit weight formats and the packed layout they share. One module per format, one import here."""

from jax_w4moe.formats.base import WeightFormat, formats
from jax_w4moe.formats.layout import LAYOUT_VERSION
from jax_w4moe.formats.mxfp4 import MXFP4

__all__ = ["LAYOUT_VERSION", "MXFP4", "WeightFormat", "formats"]
