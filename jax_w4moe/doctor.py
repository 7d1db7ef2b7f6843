"""``python -m jax_w4moe doctor``: what is installed, what runs here, and why not the rest."""

import importlib.metadata
import platform
from typing import Any

import jax
from rich.table import Table
from rich.text import Text

from jax_w4moe import _ffi, implementation
from jax_w4moe.bench.shapes import SHAPES
from jax_w4moe.bench.sweep import sweep

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
    shape = SHAPES["flash_ep8"]
    return [
        (
            f"fused_moe, T={row.num_tokens}",
            f"{row.time_us:.1f} us, floor {row.floor_us:.1f} us, ratio {row.ratio:.2f}"
            f" (H={shape.hidden_size}, I={shape.intermediate_size}, {row.touched:.0f} of"
            f" {shape.num_experts} experts)",
        )
        for row in sweep([shape], (1, 16, 4096), ("balanced",))
    ]


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
