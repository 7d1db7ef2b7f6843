"""Small gpt-oss models."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_w4moe.models import GptOss, GptOssConfig, Runner, Yarn

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


def logits_along(model: GptOss, tokens: np.ndarray, prompt: int) -> np.ndarray:
    """f32[B, 1 + S - prompt, V] of i32[B, S]: after the prompt, then after every step."""
    rows, size = tokens.shape
    runner = Runner(model)
    cache = runner.init_cache(rows, size)
    lengths = jnp.full(rows, prompt, jnp.int32)
    logits, cache = runner.prefill(cache, jnp.asarray(tokens[:, :prompt]), lengths)
    parts = [logits]
    for step in range(prompt, size):
        logits, cache = runner.decode(cache, jnp.asarray(tokens[:, step]))
        parts.append(logits)
    return np.stack(parts, axis=1)


def greedy_choices(actual: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the best tokens are the same, and where the margin of the expected one is clear."""
    best_two = np.sort(expected, axis=-1)[..., -2:]
    clear = best_two[..., 1] - best_two[..., 0] > 10 * np.sqrt(np.mean((actual - expected) ** 2))
    return actual.argmax(-1) == expected.argmax(-1), clear
