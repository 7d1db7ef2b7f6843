"""Small gpt-oss models."""

import dataclasses
from typing import Any

from jax_w4moe.models import GptOssConfig, Yarn

CONFIG = GptOssConfig(
    vocab_size=48,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_local_experts=5,
    num_experts_per_tok=2,
    layer_types=("sliding_attention", "full_attention"),
    sliding_window=4,
    max_position_embeddings=64,
    rope_theta=10000.0,
    yarn=Yarn(4.0, 16, beta_fast=2.0, beta_slow=0.1),
)


def config(**changes: Any) -> GptOssConfig:
    return dataclasses.replace(CONFIG, **changes)
