"""Checkpoints on disk: their MoE layers as packed experts. Needs the ``checkpoint`` extra.

One module per on-disk format, one import here; :mod:`jax_w4moe.checkpoint.base` says what it takes.
Formats are tried in the order of their imports.
"""

from jax_w4moe.checkpoint.packed import PACKED  # isort: skip
from jax_w4moe.checkpoint.block import Latent, Router, SharedExpert
from jax_w4moe.checkpoint.compressed_tensors import MXFP4_PACK_QUANTIZED, PACK_QUANTIZED
from jax_w4moe.checkpoint.convert import convert
from jax_w4moe.checkpoint.deepseek_v4 import DEEPSEEK_V4
from jax_w4moe.checkpoint.deepseek_w4afp8 import DEEPSEEK_W4AFP8
from jax_w4moe.checkpoint.families import MoEConfig
from jax_w4moe.checkpoint.files import CheckpointFiles, opened
from jax_w4moe.checkpoint.float_experts import FLOAT_EXPERTS
from jax_w4moe.checkpoint.gpt_oss import GPT_OSS, GPT_OSS_ORIGINAL
from jax_w4moe.checkpoint.gpt_oss_writer import MoELayer, save_gpt_oss
from jax_w4moe.checkpoint.loading import (
    load_act_scale,
    load_experts,
    load_latent,
    load_router,
    load_shared_expert,
    moe_config,
)
from jax_w4moe.checkpoint.mimo import MIMO
from jax_w4moe.checkpoint.nvfp4 import MODELOPT, NVFP4_PACK_QUANTIZED

__all__ = [
    "DEEPSEEK_V4",
    "DEEPSEEK_W4AFP8",
    "FLOAT_EXPERTS",
    "GPT_OSS",
    "GPT_OSS_ORIGINAL",
    "MIMO",
    "MXFP4_PACK_QUANTIZED",
    "MODELOPT",
    "NVFP4_PACK_QUANTIZED",
    "PACKED",
    "PACK_QUANTIZED",
    "CheckpointFiles",
    "Latent",
    "MoEConfig",
    "MoELayer",
    "Router",
    "SharedExpert",
    "convert",
    "load_act_scale",
    "load_experts",
    "load_latent",
    "load_router",
    "load_shared_expert",
    "moe_config",
    "opened",
    "save_gpt_oss",
]
