"""Mixture-of-Experts layers with 4-bit experts, for JAX on Hopper GPUs and any XLA device."""

import importlib
from typing import Any

from jax_w4moe import _ffi, reference
from jax_w4moe._ffi import build_info, is_available, why_unavailable
from jax_w4moe.activations import SiTU, SwiGLU
from jax_w4moe.explain import explain, workspace_bytes
from jax_w4moe.formats import INT4_G32, INT4_G128, MXFP4, MXFP4_WIDE, NVFP4, WeightFormat
from jax_w4moe.moe import expert_mlp, fused_moe, grouped_matmul, quantize_fp8
from jax_w4moe.packing import (
    dequantize_experts,
    pack,
    pack_experts,
    quantize_experts,
    unpack,
    unpack_experts,
)
from jax_w4moe.quantization import Per128, PerToken, Static
from jax_w4moe.replicas import Replicas, plan_replicas, replicate_experts
from jax_w4moe.routing import hash_routing, topk_routing
from jax_w4moe.sharding import expert_specs, shard_experts
from jax_w4moe.tuning import Problem, Tactic, autotune, load_tactics, tactics
from jax_w4moe.types import ExpertWeights, PackedExperts, PackedTensor, QuantizedTensor

__all__ = [
    "DISABLE_JAX_EXPORT_CHECKS",
    "INT4_G32",
    "INT4_G128",
    "MXFP4",
    "MXFP4_WIDE",
    "NVFP4",
    "ExpertWeights",
    "PackedExperts",
    "PackedTensor",
    "Per128",
    "PerToken",
    "Static",
    "Problem",
    "QuantizedTensor",
    "Replicas",
    "SiTU",
    "SwiGLU",
    "Tactic",
    "WeightFormat",
    "autotune",
    "build_info",
    "checkpoint",
    "dequantize_experts",
    "expert_mlp",
    "expert_specs",
    "explain",
    "flax",
    "fused_moe",
    "grouped_matmul",
    "hash_routing",
    "is_available",
    "load_tactics",
    "pack",
    "pack_experts",
    "plan_replicas",
    "quantize_experts",
    "quantize_fp8",
    "reference",
    "replicate_experts",
    "shard_experts",
    "tactics",
    "topk_routing",
    "unpack",
    "unpack_experts",
    "why_unavailable",
    "workspace_bytes",
]

DISABLE_JAX_EXPORT_CHECKS = _ffi.disable_export_checks()
"""For ``jax.export.export(..., disabled_checks=...)``: lets our custom calls be exported."""

# Registers the FFI targets now, so that an exported program finds them; touches no device.
_ffi.targets()


def __getattr__(name: str) -> Any:
    # These need the extras [flax] and [checkpoint]; the package itself imports without them.
    if name in ("checkpoint", "flax"):
        return importlib.import_module(f"jax_w4moe.{name}")
    raise AttributeError(f"module 'jax_w4moe' has no attribute {name!r}")
