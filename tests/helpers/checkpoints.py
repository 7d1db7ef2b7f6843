"""Checkpoints of every on-disk format in miniature, and what they hold in float64.

Written with numpy from the formats' definitions alone; no code shared with the package.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jax_w4moe import Static
from tests.helpers.oracle import dequantize_int4, dequantize_mxfp4, dequantize_nvfp4

Tensors = dict[str, np.ndarray]
BF16 = ml_dtypes.bfloat16
E4M3 = ml_dtypes.float8_e4m3fn
E8M0 = ml_dtypes.float8_e8m0fnu


@dataclasses.dataclass
class Fixture:
    """One MoE layer as a checkpoint.

    Attributes:
      layer: its number.
      tensors: by name.
      config: the config.json.
      w13: float64[E, 2I, H], what the tensors mean.
      w2: float64[E, H, I].
      top_k: experts per token.
      router: the router's weight, float64[E, H of the tokens].
      selection_bias: float64[E], or None.
      table: int[V, k], or None.
      shared: the shared expert's gate, up and down in float64, or None.
      latent: the latent's down, norm and up in float64, or None.
      act_scale: of the activations, or None.
      apart: names that lie in a file of their own, and that file.
    """

    layer: int
    tensors: Tensors
    config: dict[str, Any]
    w13: np.ndarray
    w2: np.ndarray
    top_k: int
    router: np.ndarray
    selection_bias: np.ndarray | None = None
    table: np.ndarray | None = None
    shared: tuple[np.ndarray, ...] | None = None
    latent: tuple[np.ndarray, ...] | None = None
    act_scale: Static | None = None
    apart: dict[str, str] = dataclasses.field(default_factory=dict)

    def write(self, folder: Path, shards: int = 2) -> Path:
        """Writes files, index and config; the tensors of an expert lie in different shards."""
        weight_map = {
            name: self.apart.get(name, f"model-{i % shards + 1:05}-of-{shards:05}.safetensors")
            for i, name in enumerate(self.tensors)
        }
        for file in set(weight_map.values()):
            own = {name: self.tensors[name] for name in weight_map if weight_map[name] == file}
            save_file(own, folder / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps(self.config))
        return folder


def _round(array: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """As stored, and what that is in float64."""
    stored = array.astype(dtype)
    return stored, stored.astype(np.float64)


def _mxfp4(rng: np.random.Generator, rows: int, columns: int) -> tuple[np.ndarray, ...]:
    codes = rng.integers(0, 256, (rows, columns // 2), dtype=np.uint8)
    scales = rng.integers(117, 123, (rows, columns // 32), dtype=np.uint8)
    return codes, scales, dequantize_mxfp4(codes, scales)


def _int4(
    rng: np.random.Generator, rows: int, columns: int, group: int, dtype: Any
) -> tuple[np.ndarray, ...]:
    codes = rng.integers(0, 256, (rows, columns // 2), dtype=np.uint8)
    scales = (rng.uniform(0.5, 2, (rows, columns // group)) / 128).astype(dtype)
    return codes, scales, dequantize_int4(codes, scales)


Projection = Callable[[np.random.Generator, str, int, int], tuple[Tensors, np.ndarray]]
"""(random numbers, name, rows, columns) -> (tensors, weights in float64)."""


def _deepseek_v4(rng: np.random.Generator, name: str, rows: int, columns: int) -> Any:
    codes, scales, values = _mxfp4(rng, rows, columns)
    return {f"{name}.weight": codes.view(np.int8), f"{name}.scale": scales.view(E8M0)}, values


def _mimo(rng: np.random.Generator, name: str, rows: int, columns: int) -> Any:
    codes, scales, values = _mxfp4(rng, rows, columns)
    return {f"{name}.weight": codes, f"{name}.weight_scale": scales}, values


def _k3(rng: np.random.Generator, name: str, rows: int, columns: int) -> Any:
    codes, scales, values = _mxfp4(rng, rows, columns)
    return {f"{name}.weight_packed": codes, f"{name}.weight_scale": scales}, values


def _w4afp8(rng: np.random.Generator, name: str, rows: int, columns: int) -> Any:
    codes, scales, values = _int4(rng, rows, columns, 128, np.float32)
    return {f"{name}.weight": codes.view(np.int8), f"{name}.weight_scale_inv": scales}, values


def _kimi(rng: np.random.Generator, name: str, rows: int, columns: int) -> Any:
    codes, scales, values = _int4(rng, rows, columns, 32, BF16)
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(rows, -1)
    offset = (((nibbles + 8) & 15).astype(np.uint32)).reshape(rows, -1, 8)
    words = (offset << (4 * np.arange(8, dtype=np.uint32))).sum(axis=-1, dtype=np.uint32)
    tensors = {
        f"{name}.weight_packed": words.view(np.int32),
        f"{name}.weight_scale": scales,
        f"{name}.weight_shape": np.array([rows, columns], np.int32),
    }
    return tensors, values


def _modelopt(
    rng: np.random.Generator, name: str, rows: int, columns: int, number: Any = None
) -> Any:
    codes = rng.integers(0, 256, (rows, columns // 2), dtype=np.uint8)
    scales = (rng.uniform(0.5, 2, (rows, columns // 16)) * 16).astype(E4M3)
    number = np.float32(rng.uniform(0.5, 1) / 2048) if number is None else number
    every = np.concatenate([np.broadcast_to(number, (rows, 1)), scales.astype(np.float32)], axis=1)
    tensors = {
        f"{name}.weight": codes,
        f"{name}.weight_scale": scales,
        f"{name}.weight_scale_2": np.array(number),
        f"{name}.input_scale": np.array(np.float32(0.5)),
    }
    return tensors, dequantize_nvfp4(codes, every)


def _nvfp4_packed(rng: np.random.Generator, name: str, rows: int, columns: int) -> Any:
    tensors, values = _modelopt(rng, name, rows, columns, number=np.float32(2.0**-12))
    named = {
        f"{name}.weight_packed": tensors[f"{name}.weight"],
        f"{name}.weight_scale": tensors[f"{name}.weight_scale"],
        f"{name}.weight_global_scale": np.array([2.0**12], np.float32),
    }
    return named, values


def _bf16(rng: np.random.Generator, name: str, rows: int, columns: int) -> Any:
    stored, values = _round(rng.standard_normal((rows, columns)) * columns**-0.5, BF16)
    return {f"{name}.weight": stored}, values


def _fp8(block: tuple[int, int], scale: str = "weight_scale_inv") -> Projection:
    """E4M3 with a power-of-two scale per block, as F8_E8M0 (".scale") or F32."""

    def projection(rng: np.random.Generator, name: str, rows: int, columns: int) -> Any:
        stored, values = _round(rng.standard_normal((rows, columns)), E4M3)
        grid = (-(-rows // block[0]), -(-columns // block[1]))
        dtype = E8M0 if scale == "scale" else np.float32
        scales = np.exp2(rng.integers(-6, -2, grid)).astype(dtype)
        repeated = scales.astype(np.float64).repeat(block[0], axis=0).repeat(block[1], axis=1)
        tensors = {f"{name}.weight": stored, f"{name}.{scale}": scales}
        return tensors, values * repeated[:rows, :columns]

    return projection


def _fixture(
    rng: np.random.Generator,
    prefix: str,
    sizes: tuple[int, int, int, int],
    config: dict[str, Any],
    projection: Projection,
    *,
    layer: int = 1,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    shared: Projection | None = None,
    shared_size: int = 0,
    tokens: int | None = None,
    bias_name: str | None = "gate.e_score_correction_bias",
) -> Fixture:
    """A layer of (E, H, I, k): experts, a router, shared experts; ``tokens``: H of the tokens."""
    num_experts, hidden, intermediate, top_k = sizes
    tokens = hidden if tokens is None else tokens
    shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    tensors: Tensors = {}
    weights = []
    for expert in range(num_experts):
        values = []
        for name, shape in zip(names, shapes, strict=True):
            more, value = projection(rng, f"{prefix}experts.{expert}.{name}", *shape)
            tensors |= more
            values.append(value)
        weights.append(values)
    gate, up, down = (np.stack(part) for part in zip(*weights, strict=True))
    stored, router = _round(rng.standard_normal((num_experts, tokens)) * tokens**-0.5, BF16)
    tensors[prefix + "gate.weight"] = stored
    bias = None
    if bias_name is not None:
        stored, bias = _round(rng.standard_normal(num_experts) / 4, np.float32)
        tensors[prefix + bias_name] = stored
    parts = None
    if shared is not None:
        wide = ((shared_size, tokens), (shared_size, tokens), (tokens, shared_size))
        parts = []
        for name, shape in zip(names, wide, strict=True):
            more, value = shared(rng, f"{prefix}shared_experts.{name}", *shape)
            tensors |= more
            parts.append(value)
    return Fixture(
        layer,
        tensors,
        config,
        np.concatenate([gate, up], axis=1),
        down,
        top_k,
        router,
        selection_bias=bias,
        shared=None if parts is None else tuple(parts),
    )


_W = ("w1", "w3", "w2")


def deepseek_v4(rng: np.random.Generator) -> Fixture:
    """F1: FP4 experts, an FP8 shared expert, a selection bias."""
    config = {
        "model_type": "deepseek_v4",
        "hidden_size": 256,
        "moe_intermediate_size": 128,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "swiglu_limit": 10.0,
        "hidden_act": "silu",
        "expert_dtype": "fp4",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    return _fixture(
        rng,
        "layers.1.ffn.",
        (4, 256, 128, 2),
        config,
        _deepseek_v4,
        names=_W,
        shared=_fp8((128, 128), "scale"),
        shared_size=128,
        bias_name="gate.bias",
    )


def deepseek_v4_hash(rng: np.random.Generator, dtype: Any = np.int64) -> Fixture:
    """F2: layer 0, whose experts a table of 64 token ids chooses."""
    made = deepseek_v4(rng)
    tensors = {name.replace("layers.1.", "layers.0."): t for name, t in made.tensors.items()}
    del tensors["layers.0.ffn.gate.bias"]
    table = rng.permuted(np.tile(np.arange(4), (64, 1)), axis=1)[:, :2]
    tensors["layers.0.ffn.gate.tid2eid"] = table.astype(dtype)
    return dataclasses.replace(made, layer=0, tensors=tensors, selection_bias=None, table=table)


def deepseek_v41(rng: np.random.Generator) -> Fixture:
    """F3: I of nine groups, twelve experts, a nested config, shared scales per 32 by 32."""
    text = {
        "model_type": "deepseek_v41",
        "hidden_size": 256,
        "moe_intermediate_size": 288,
        "n_routed_experts": 12,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 10.0,
    }
    quantization = {"expert_dtype": "fp4", "weight_block_size": [32, 32]}
    made = _fixture(
        rng,
        "layers.1.ffn.",
        (12, 256, 288, 3),
        {"model_type": "vision", "text_config": text, "quantization_config": quantization},
        _deepseek_v4,
        names=_W,
        shared=_fp8((32, 32), "scale"),
        shared_size=288,
        bias_name="gate.bias",
    )
    made.tensors["layers.1.ffn.gate.bias_vl"] = np.zeros(12, np.float32)
    return made


_V3 = {
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "n_group": 1,
    "topk_group": 1,
}


def _sizes(sizes: tuple[int, int, int, int]) -> dict[str, int]:
    keys = "n_routed_experts", "hidden_size", "moe_intermediate_size", "num_experts_per_tok"
    return dict(zip(keys, sizes, strict=True))


def w4afp8(rng: np.random.Generator, scales: bool = True) -> Fixture:
    """F5: INT4 with scales per 128, activation scales in a file of their own, groups of experts."""
    sizes = (4, 256, 256, 2)
    made = _fixture(
        rng,
        "model.layers.3.mlp.",
        sizes,
        _V3 | _sizes(sizes) | {"n_group": 2, "topk_group": 1},
        _w4afp8,
        layer=3,
        shared=_fp8((128, 128)),
        shared_size=256,
    )
    if not scales:
        return made
    stored = {}
    for expert in range(4):
        x_scale, h_scale = (rng.uniform(0.8, 1, 2) * (10, 80) / 448).astype(np.float32)
        if expert == 1:  # neither the first nor the last one has the largest
            x_scale, h_scale = x_scale * np.float32(1.25), h_scale * np.float32(1.25)
        for name, scale in (("w1", x_scale), ("w2", h_scale), ("w3", x_scale)):
            key = f"model.layers.3.mlp.experts.{expert}.{name}.input_scale"
            stored[key] = np.array([scale], np.float32)
    largest = [max(float(s[0]) for n, s in stored.items() if f".{w}." in n) for w in ("w1", "w2")]
    return dataclasses.replace(
        made,
        tensors=made.tensors | stored,
        act_scale=Static(*largest),
        apart=dict.fromkeys(stored, "act_scales.safetensors"),
    )


def kimi_k2(rng: np.random.Generator, prefix: str = "") -> Fixture:
    """F6: INT4 with scales per 32, offset binary in words; eleven experts."""
    sizes = (11, 128, 64, 2)
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    config: dict[str, Any] = _V3 | _sizes(sizes) | {"model_type": "kimi_k2"}
    if prefix:
        config = {"model_type": "kimi_k25", "text_config": config}
    config["quantization_config"] = quantization
    return _fixture(
        rng, f"{prefix}model.layers.1.mlp.", sizes, config, _kimi, shared=_bf16, shared_size=64
    )


def kimi_k25(rng: np.random.Generator) -> Fixture:
    """F6 with the prefix of a model of text and images."""
    return kimi_k2(rng, "language_model.")


def kimi_k3(rng: np.random.Generator) -> Fixture:
    """F7: MXFP4, a latent of 64 for tokens of 128, SiTU."""
    config = {
        "model_type": "kimi_k3",
        "hidden_size": 128,
        "routed_expert_hidden_size": 64,
        "moe_intermediate_size": 64,
        "num_experts": 6,
        "num_experts_per_token": 2,
        "num_shared_experts": 2,
        "num_expert_group": 1,
        "topk_group": 1,
        "moe_renormalize": True,
        "moe_router_activation_func": "sigmoid",
        "routed_scaling_factor": 1.0,
        "hidden_act": "situ",
        "activation_situ_beta": 4.0,
        "activation_situ_linear_beta": 25.0,
        "rms_norm_eps": 1e-5,
    }
    prefix = "language_model.model.layers.1.block_sparse_moe."
    made = _fixture(
        rng,
        prefix,
        (6, 64, 64, 2),
        {"model_type": "kimi_k3", "text_config": config},
        _k3,
        names=_W,
        shared=_bf16,
        shared_size=128,
        tokens=128,
    )
    for old, new in zip(_W, ("gate_proj", "up_proj", "down_proj"), strict=True):
        name = f"{prefix}shared_experts.{{}}.weight"
        made.tensors[name.format(new)] = made.tensors.pop(name.format(old))
    parts = []
    for name, shape in (("down_proj", (64, 128)), ("norm", (64,)), ("up_proj", (128, 64))):
        scale, offset = (0.1, 1.0) if name == "norm" else (shape[-1] ** -0.5, 0.0)
        stored, values = _round(rng.standard_normal(shape) * scale + offset, BF16)
        made.tensors[f"{prefix}routed_expert_{name}.weight"] = stored
        parts.append(values)
    return dataclasses.replace(made, latent=tuple(parts))


def mimo(rng: np.random.Generator) -> Fixture:
    """F8: codes and scales in U8."""
    sizes = (4, 64, 64, 2)
    config = _V3 | _sizes(sizes) | {"model_type": "mimo_v2_flash", "store_dtype": "mxfp4"}
    return _fixture(rng, "model.layers.1.mlp.", sizes, config, _mimo)


def glm_nvfp4(rng: np.random.Generator) -> Fixture:
    """modelopt's NVFP4; every matrix has a scale of its own."""
    sizes = (4, 128, 96, 2)
    config = _V3 | _sizes(sizes) | {"model_type": "glm4_moe"}
    prefix = "model.layers.1.mlp."
    return _fixture(rng, prefix, sizes, config, _modelopt, shared=_bf16, shared_size=64)


def kimi_nvfp4(rng: np.random.Generator) -> Fixture:
    """compressed-tensors' NVFP4."""
    sizes = (3, 64, 64, 2)
    config = _V3 | _sizes(sizes) | {"model_type": "kimi_k2"}
    return _fixture(rng, "model.layers.1.mlp.", sizes, config, _nvfp4_packed)


def qwen3(rng: np.random.Generator) -> Fixture:
    """bf16 experts, softmax over all."""
    config = {
        "model_type": "qwen3_moe",
        "hidden_size": 128,
        "intermediate_size": 512,
        "moe_intermediate_size": 64,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "hidden_act": "silu",
    }
    prefix = "model.layers.1.mlp."
    return _fixture(rng, prefix, (5, 128, 64, 2), config, _bf16, bias_name=None)


def deepseek_v3_fp8(rng: np.random.Generator) -> Fixture:
    """FP8 experts with a scale per block of 128 by 128."""
    sizes = (4, 256, 160, 2)
    config = _V3 | _sizes(sizes)
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    prefix = "model.layers.1.mlp."
    return _fixture(rng, prefix, sizes, config, _fp8((128, 128)), shared=_bf16, shared_size=64)


FIXTURES: dict[str, Callable[[np.random.Generator], Fixture]] = {
    "deepseek_v4": deepseek_v4,
    "deepseek_v4_hash": deepseek_v4_hash,
    "deepseek_v41": deepseek_v41,
    "w4afp8": w4afp8,
    "kimi_k2": kimi_k2,
    "kimi_k25": kimi_k25,
    "kimi_k3": kimi_k3,
    "mimo": mimo,
    "glm_nvfp4": glm_nvfp4,
    "kimi_nvfp4": kimi_nvfp4,
}
"""Those of 4 bits."""

FLOAT_FIXTURES = {"qwen3": qwen3, "deepseek_v3_fp8": deepseek_v3_fp8}
"""Those that are quantised while they are loaded."""
