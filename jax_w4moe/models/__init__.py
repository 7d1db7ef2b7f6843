"""Whole models around the MoE layers. Needs the extras ``flax`` and ``checkpoint``."""

from jax_w4moe.models.cache import Cache
from jax_w4moe.models.config import TINY_GPT_OSS, GptOssConfig, Yarn
from jax_w4moe.models.gpt_oss import GptOss
from jax_w4moe.models.placement import spread_over
from jax_w4moe.models.random_weights import save_random_gpt_oss
from jax_w4moe.models.runner import Runner

__all__ = [
    "TINY_GPT_OSS",
    "Cache",
    "GptOss",
    "GptOssConfig",
    "Runner",
    "Yarn",
    "save_random_gpt_oss",
    "spread_over",
]
