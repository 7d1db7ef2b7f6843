"""Writes MoE layers as a gpt-oss checkpoint in MXFP4 that this library and transformers read.

Only routers and experts are written: a reader that wants a whole model finds attention, embeddings
and norms missing. Meant for tests, demos and for handing layers to another implementation.
"""

import concurrent.futures
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors.numpy import save_file

from jax_w4moe import checks
from jax_w4moe.checkpoint.families import DEFAULT_LIMIT
from jax_w4moe.checkpoint.files import CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from jax_w4moe.checkpoint.gpt_oss import MODEL_TYPE, PREFIX
from jax_w4moe.formats import MXFP4
from jax_w4moe.types import ExpertWeights, QuantizedTensor

_NAN_SCALE = 255
# What transformers needs for a module outside the MoE layers; its values mean nothing here.
_REST_OF_THE_MODEL = {
    "vocab_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "hidden_act": "silu",
}
_TENSORS_PER_LAYER = 8
_METADATA = {"format": "pt"}  # transformers refuses files without it
QUANTIZATION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
"""Of config.json: what is stored in 4 bits."""


class MoELayer(NamedTuple):
    """What :func:`save_gpt_oss` writes of one layer.

    Attributes:
      experts: canonical MXFP4 weights; biases of None are written as zeros.
      router_weight: float[E, H], stored as BF16.
      router_bias: float[E], stored as BF16.
    """

    experts: ExpertWeights
    router_weight: Array
    router_bias: Array


def save_gpt_oss(
    path: str | os.PathLike[str],
    layers: Sequence[MoELayer | tuple[ExpertWeights, Array, Array]],
    *,
    top_k: int,
    shards: int = 2,
    swiglu_limit: float = DEFAULT_LIMIT,
) -> None:
    """Writes layers 0, 1, ... of a gpt-oss checkpoint, with its config.json.

    Args:
      path: a folder, made if it is missing, without a checkpoint in it.
      layers: experts, router weight and router bias of every layer, all of one size.
      top_k: experts per token, for config.json.
      shards: safetensors files to spread the tensors over; 1 writes no index.
      swiglu_limit: the clamp of the activation, for config.json.

    Raises:
      ValueError, TypeError: layers that do not fit together, a weight format other than MXFP4, or
        scales that are NaN.
      FileExistsError: there is a checkpoint in the folder.
    """
    folder = Path(path)
    _check(folder, layers, top_k, shards)
    tensors: dict[str, np.ndarray] = {}
    for number, layer in enumerate(layers):
        tensors.update(_layer_tensors(PREFIX.format(layer=number), *layer))
    _, two_i, hidden = checks.quantized("w13", layers[0][0].w13)
    config = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": MODEL_TYPE,
        "num_hidden_layers": len(layers),
        "hidden_size": hidden,
        "intermediate_size": two_i // 2,
        "num_local_experts": layers[0][1].shape[0],
        "num_experts_per_tok": top_k,
        "swiglu_limit": swiglu_limit,
        "quantization_config": QUANTIZATION,
        **_REST_OF_THE_MODEL,
    }
    folder.mkdir(parents=True, exist_ok=True)
    # NOTE: runs of names, so that the tensors of one layer may lie in two shards, as they do in
    # checkpoints that people have.
    runs = [run.tolist() for run in np.array_split(np.array(list(tensors)), shards)]
    write_shards(folder, runs, tensors.__getitem__)
    # Last, so that a write that was broken off is not mistaken for a checkpoint.
    write_json(folder / CONFIG_FILE, config)


def _check(folder: Path, layers: Sequence[Any], top_k: int, shards: int) -> None:
    if not layers:
        raise ValueError("layers: got none, need at least one (experts, weight, bias).")
    for number, (experts, weight, bias) in enumerate(layers):
        checks.expert_weights(experts)
        if experts.w13.format != MXFP4:
            raise NotImplementedError(
                f"layer {number}: format {experts.w13.format}, a gpt-oss checkpoint holds MXFP4;"
                " quantise with format=MXFP4."
            )
        num_experts, _, hidden = checks.quantized("w13", experts.w13)
        for name, array, shape in (
            ("router_weight", weight, (num_experts, hidden)),
            ("router_bias", bias, (num_experts,)),
        ):
            if array.shape != shape:
                raise ValueError(
                    f"layer {number}: {name} has shape {array.shape}, need {shape} for experts of"
                    f" E={num_experts}, H={hidden}."
                )
        if experts.w13.codes.shape != layers[0][0].w13.codes.shape:
            raise ValueError(
                f"layer {number}: w13 codes have shape {experts.w13.codes.shape}, layer 0 has"
                f" {layers[0][0].w13.codes.shape}; one config.json describes layers of one size."
            )
    if not 1 <= top_k <= min(checks.MAX_TOP_K, num_experts):
        raise ValueError(
            f"top_k={top_k} is not in 1..{min(checks.MAX_TOP_K, num_experts)}; the layers have"
            f" {num_experts} experts."
        )
    num_tensors = len(layers) * _TENSORS_PER_LAYER
    if not 1 <= shards <= num_tensors:
        raise ValueError(f"shards={shards} is not in 1..{num_tensors}, the tensors to write.")
    require_empty(folder)


def _layer_tensors(
    prefix: str, experts: ExpertWeights, router_weight: Array, router_bias: Array
) -> dict[str, np.ndarray]:
    gate_up = _blocks_and_scales(experts.w13)
    num_experts, num_rows = gate_up[0].shape[:2]
    w13_bias, w2_bias = experts.w13_bias, experts.w2_bias
    if w13_bias is None:
        w13_bias = jnp.zeros((num_experts, num_rows))
    if w2_bias is None:
        w2_bias = jnp.zeros((num_experts, experts.w2.codes.shape[1]))
    down_blocks, down_scales = _blocks_and_scales(experts.w2)
    tensors = {
        "router.weight": router_weight.astype(jnp.bfloat16),
        "router.bias": router_bias.astype(jnp.bfloat16),
        "experts.gate_up_proj_blocks": _interleave(gate_up[0]),
        "experts.gate_up_proj_scales": _interleave(gate_up[1]),
        "experts.gate_up_proj_bias": _interleave(w13_bias.astype(jnp.bfloat16)),
        "experts.down_proj_blocks": down_blocks,
        "experts.down_proj_scales": down_scales,
        "experts.down_proj_bias": w2_bias.astype(jnp.bfloat16),
    }
    for name in ("experts.gate_up_proj_scales", "experts.down_proj_scales"):
        if (tensors[name] == _NAN_SCALE).any():
            raise ValueError(
                f"{prefix}{name}: a scale is NaN (E8M0 byte 255) or no power of two; quantise these"
                " weights again."
            )
    # A copy, since save_file writes the memory of an array whatever its strides.
    return {prefix + name: np.array(tensor, order="C") for name, tensor in tensors.items()}


def _interleave(rows: Array) -> Array:
    return einops.rearrange(rows, "e (half i) ... -> e (i half) ...", half=2)


def _blocks_and_scales(q: QuantizedTensor) -> tuple[Array, Array]:
    codes = q.codes
    if codes.dtype == jnp.float4_e2m1fn:
        pairs = codes.reshape(*codes.shape[:-1], -1, 2)
        codes = jax.lax.bitcast_convert_type(pairs, jnp.uint8)
    blocks = einops.rearrange(codes, "e n (g byte) -> e n g byte", byte=MXFP4.group_size // 2)
    return blocks, MXFP4.canonical_scales(q.scales)


def require_empty(folder: Path) -> None:
    """Refuses a folder that holds a checkpoint."""
    if (folder / SINGLE_FILE).exists() or (folder / INDEX_FILE).exists():
        raise FileExistsError(f"{folder} holds a checkpoint already; pass an empty folder.")


def write_shards(
    folder: Path, runs: Sequence[Sequence[str]], tensor: Callable[[str], np.ndarray]
) -> None:
    """Writes a safetensors file per run of names, and the index of several; holds one at a time.

    ``tensor`` is called by several threads.
    """
    weight_map, total_size = {}, 0
    for number, run in enumerate(runs, start=1):
        several = len(runs) > 1
        file = f"model-{number:05}-of-{len(runs):05}.safetensors" if several else SINGLE_FILE
        total_size += _write_shard(folder / file, run, tensor)
        weight_map.update(dict.fromkeys(run, file))
    if len(runs) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_json(folder / INDEX_FILE, index)


def _write_shard(file: Path, names: Sequence[str], tensor: Callable[[str], np.ndarray]) -> int:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        tensors = dict(zip(names, pool.map(tensor, names), strict=True))
    save_file(tensors, file, metadata=_METADATA)
    return sum(array.nbytes for array in tensors.values())


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Writes it as people read it."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
