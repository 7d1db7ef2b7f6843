"""Layers to write, and ways of damaging what was written."""

import json
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from jax_w4moe.checkpoint import MoELayer, save_gpt_oss
from tests.helpers.data import expert_weights

__all__ = ["EXPERTS", "moe_layer", "rewrite", "save_gpt_oss", "set_config"]

EXPERTS = "model.layers.0.mlp.experts."


def moe_layer(
    rng: np.random.Generator, num_experts: int = 4, hidden: int = 64, intermediate: int = 96
) -> MoELayer:
    weights = expert_weights(rng, num_experts, hidden, intermediate, bias=True)
    router = [rng.standard_normal(shape) for shape in ((num_experts, hidden), (num_experts,))]
    return MoELayer(weights, *(jnp.asarray(part, jnp.bfloat16) for part in router))


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Changes the tensors of a one-file checkpoint."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def set_config(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
