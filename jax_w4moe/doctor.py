"""``python -m jax_w4moe doctor``: what is installed, what runs here, and why not the rest."""

import functools
import importlib.metadata
import platform
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table
from rich.text import Text

from jax_w4moe import _ffi, implementation, roofline
from jax_w4moe.formats import MXFP4
from jax_w4moe.moe import fused_moe
from jax_w4moe.packing import pack_experts
from jax_w4moe.routing import topk_routing
from jax_w4moe.timing import median_us
from jax_w4moe.types import ExpertWeights, PackedExperts, QuantizedTensor

_EXTRAS = {"flax": ("flax", "orbax-checkpoint"), "checkpoint": ("safetensors",)}


def table() -> Table:
    """A table of two columns that answers a bug report's first questions; never raises."""
    result = Table(title="jax_w4moe doctor", show_header=False, title_justify="left")
    result.add_column(style="bold", no_wrap=True)
    result.add_column(overflow="fold")
    for name, value in rows():
        result.add_row(Text(name), Text(value))  # Text: jax[cuda13] is no markup
    return result


def rows() -> list[tuple[str, str]]:
    """The lines of :func:`table`."""
    return [
        ("python", platform.python_version()),
        *((name, _version(name) or "not installed") for name in ("jax", "jaxlib", "jax_w4moe")),
        ("devices", _devices()),
        ("extension", _ffi.extension_error() or str(_ffi.build_info()["extension"])),
        ("ops with kernels", ", ".join(sorted(_ffi.targets())) or "none"),
        ("fused_moe runs as", _fused_moe()),
        ("the kernels", _ffi.why_unavailable() or "can run here."),
        *measurements(),
        *((f"extra [{name}]", _extra(name)) for name in _EXTRAS),
    ]


def measurements() -> list[tuple[str, str]]:
    """Times of a layer of 32 experts, where the kernels can run; else nothing."""
    if _ffi.why_unavailable():
        return []
    num_experts, hidden, intermediate, top_k = 32, 4096, 2048, 6
    keys = jax.random.split(jax.random.key(0), 6)
    sets = [
        pack_experts(
            ExpertWeights(
                _random(keys[2 * i], num_experts, 2 * intermediate, hidden),
                _random(keys[2 * i + 1], num_experts, hidden, intermediate),
            )
        )
        for i in range(2)  # together far larger than L2
    ]
    result = []
    for num_tokens in (1, 16, 4096):
        x = jax.random.normal(keys[4], (num_tokens, hidden), jnp.bfloat16)
        logits = jax.random.normal(keys[5], (num_tokens, num_experts))
        ids, weights = topk_routing(logits, top_k)
        call = functools.partial(_call, x, ids, weights)
        time_us = median_us(call, sets, repeats=9)
        touched = roofline.touched_experts(ids, num_experts)
        floor_us = roofline.floor_us(*roofline.layer_work(sets[0], ids.size, touched))
        result.append(
            (
                f"fused_moe, T={num_tokens}",
                f"{time_us:.1f} us, floor {floor_us:.1f} us, ratio {time_us / floor_us:.2f}"
                f" (H={hidden}, I={intermediate}, {touched} of {num_experts} experts)",
            )
        )
    return result


def _call(x: jax.Array, ids: jax.Array, weights: jax.Array, experts: PackedExperts) -> jax.Array:
    return fused_moe(x, experts, ids, weights)


def _random(key: jax.Array, num_experts: int, rows: int, columns: int) -> QuantizedTensor:
    """Random codes under one scale: the time does not depend on the values."""
    codes = jax.random.bits(key, (num_experts, rows, columns // 2), jnp.uint8)
    scales = jnp.full((num_experts, rows, columns // MXFP4.group_size), 118, jnp.uint8)
    return QuantizedTensor(codes, scales, MXFP4)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> str:
    try:
        devices = jax.devices()
    except RuntimeError as error:  # the backend that JAX_PLATFORMS names is not there
        return f"none: {error}"
    return "\n".join(_device(device) for device in devices)


def _device(device: Any) -> str:
    capability = getattr(device, "compute_capability", None)
    suffix = f", compute capability {capability}" if capability else ""
    return f"{device}: {device.device_kind}{suffix}"


def _fused_moe() -> str:
    try:
        choice = implementation.choose("fused_moe", None)
    except (NotImplementedError, RuntimeError) as error:
        return f"nothing unless you choose: {error}"
    if choice == "xla":
        return f"xla (plain XLA on {jax.default_backend()})."
    return "cuda_sm90 on a Hopper GPU, xla elsewhere."


def _extra(name: str) -> str:
    versions = {package: _version(package) for package in _EXTRAS[name]}
    if all(versions.values()):
        return ", ".join(f"{package} {version}" for package, version in versions.items())
    missing = ", ".join(package for package, version in versions.items() if version is None)
    return f"{missing} not installed; run pip install 'jax_w4moe[{name}]'."
