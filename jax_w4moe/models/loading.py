"""A gpt-oss folder of the Hugging Face layout: what must be in it, and reading all but experts."""

import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jax_w4moe.checkpoint import families
from jax_w4moe.checkpoint.base import detect
from jax_w4moe.checkpoint.files import CheckpointFiles
from jax_w4moe.checkpoint.float_experts import FLOATS
from jax_w4moe.checkpoint.gpt_oss import GPT_OSS, PREFIX
from jax_w4moe.checkpoint.loading import free_bytes
from jax_w4moe.models.config import GptOssConfig

LAYER = "model.layers.{layer}."
EMBEDDING, NORM, LM_HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")

_EXPERTS = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\..*")


def tensor_shapes(config: GptOssConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model but its experts', by its name in the files."""
    hidden = config.hidden_size
    width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    rows = dict(zip(PROJECTIONS, (width, kv_width, kv_width, hidden), strict=True))
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = LAYER.format(layer=layer)
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        for name, size in rows.items():
            columns = width if name == "o_proj" else hidden
            shapes[f"{prefix}self_attn.{name}.weight"] = (size, columns)
            if config.attention_bias:
                shapes[f"{prefix}self_attn.{name}.bias"] = (size,)
        shapes[prefix + "self_attn.sinks"] = (config.num_attention_heads,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        router = PREFIX.format(layer=layer) + "router."
        shapes[router + "weight"] = (config.num_local_experts, hidden)
        shapes[router + "bias"] = (config.num_local_experts,)
    shapes[NORM] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    return shapes


def check(files: CheckpointFiles, config: GptOssConfig) -> None:
    """Checks the headers of a whole model; reads no data.

    Raises:
      ValueError, TypeError: a tensor is missing, unknown, or not of its dtype or shape.
      NotImplementedError: the experts are stored in another format.
    """
    disk_format = detect(files)
    if disk_format.source(files) is not GPT_OSS:  # stored so, or converted from that
        raise NotImplementedError(
            f"{files.path}: the experts are stored as {disk_format.name}, a gpt-oss model's as"
            f" {GPT_OSS.name}; load another checkpoint."
        )
    expected = tensor_shapes(config)
    for name, shape in expected.items():
        info = files.info(name)
        if info.dtype not in FLOATS:
            raise TypeError(
                f"{info.file}: {name} has dtype {info.dtype}, need {' or '.join(FLOATS)}; load a"
                " checkpoint in which only experts are quantised."
            )
        if info.shape != shape:
            raise ValueError(
                f"{info.file}: {name} has shape {info.shape}, need {shape} by config.json; take"
                " both from the same checkpoint."
            )
    stored, wanted = disk_format.layers(files), range(config.num_hidden_layers)
    if stored != tuple(wanted):
        raise ValueError(
            f"{files.path} holds the experts of {len(stored)} layers, {stored[0]} to {stored[-1]},"
            f" config.json says num_hidden_layers={len(wanted)}; take both from the same"
            " checkpoint."
        )
    experts = [disk_format.layer(files, layer) for layer in wanted]
    families.moe_config(files, stored, experts[0], GPT_OSS.model_type)
    if unknown := next(_unknown(files, expected), None):
        raise ValueError(
            f"{files.names[unknown]}: {unknown} is no tensor of a gpt-oss model of this"
            " config.json, and would be ignored; take both from the same checkpoint."
        )


def check_memory(model: Any) -> None:
    """Refuses an abstract model that a device of this process has no room for.

    Raises:
      MemoryError: it has not.
    """
    needed: dict[jax.Device | None, int] = {}
    for leaf in jax.tree.leaves(model):
        sharding = leaf.sharding
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        devices = [None] if sharding is None else sharding.addressable_devices
        for device in devices:
            nbytes = math.prod(shape) * leaf.dtype.itemsize
            needed[device] = needed.get(device, 0) + nbytes
    for device, nbytes in needed.items():
        own = device or jnp.zeros(()).devices().pop()
        free = free_bytes(own)
        if free is not None and nbytes > free:
            raise MemoryError(
                f"the model needs {nbytes} bytes on {own}, {free} are free; spread it over more"
                " devices (mesh, expert_axis, tensor_axis), or free some memory."
            )


def _unknown(files: CheckpointFiles, expected: dict[str, tuple[int, ...]]) -> Iterator[str]:
    # An output projection beside a tied embedding is a copy of it.
    return (
        name
        for name in files.names
        if name not in expected and name != LM_HEAD and not _EXPERTS.fullmatch(name)
    )
