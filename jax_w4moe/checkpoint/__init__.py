"""Checkpoints on disk: their MoE layers as packed experts. Needs the ``checkpoint`` extra.

One module per on-disk format, one import here; :mod:`jax_w4moe.checkpoint.base` says what it takes.
"""

from jax_w4moe.checkpoint.base import MoEConfig
from jax_w4moe.checkpoint.gpt_oss import GPT_OSS
from jax_w4moe.checkpoint.gpt_oss_writer import MoELayer, save_gpt_oss
from jax_w4moe.checkpoint.loading import load_experts, load_router, moe_config

__all__ = [
    "GPT_OSS",
    "MoEConfig",
    "MoELayer",
    "load_experts",
    "load_router",
    "moe_config",
    "save_gpt_oss",
]
