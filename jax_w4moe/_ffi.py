"""The only door to the compiled extension ``jax_w4moe._sm90``.

Importing this module never fails and never touches a device: the extension is loaded at the first
use, its handlers are registered with XLA for the platform "CUDA", and whatever went wrong is kept
as one sentence for ``why_unavailable``.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import json
import pathlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.export
import numpy as np

from jax_w4moe.formats.layout import LAYOUT_VERSION

OPS = ("expert_mlp", "fused_moe", "grouped_matmul", "quantize_fp8")
"""Every op of this version, compiled in or not."""

COMPUTE_CAPABILITY = "9.0"

_INSTALL = "run JAX_W4MOE_CUDA=ON pip install . to build it or to see what is missing"


def target_name(op: str) -> str:
    """The FFI target of an op; a change of the layout version changes it."""
    return f"jax_w4moe_{op}_v{LAYOUT_VERSION}"


@dataclasses.dataclass(frozen=True)
class _Extension:
    """What loading the extension gave: a module, or the sentence that says why not."""

    module: ModuleType | None = None
    targets: frozenset[str] = frozenset()
    error: str | None = None


def _build_config() -> dict[str, str] | None:
    """What the build wrote; None in a source tree that was not installed."""
    # NOTE: an editable install has two folders, and the file is in the second.
    for folder in importlib.import_module("jax_w4moe").__path__:
        path = pathlib.Path(folder) / "_build_config.json"
        if path.is_file():
            config: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
            return config
    return None


def _missing_extension() -> str:
    config = _build_config()
    if config is None:
        folder = pathlib.Path(__file__).parent
        return (
            f"jax_w4moe is imported from {folder}, a source tree that was not installed, so it has"
            " no CUDA extension; run pip install . there."
        )
    if config["cuda"] == "ON":
        return (
            "The CUDA extension of jax_w4moe was built but its file is gone; reinstall jax_w4moe."
        )
    return f"jax_w4moe has no CUDA extension, since {config['reason']}; {_INSTALL}."


def _check_layout_version(version: int) -> None:
    if version != LAYOUT_VERSION:
        raise ImportError(
            f"The CUDA extension was built for layout version {version}, the package has"
            f" {LAYOUT_VERSION}; reinstall jax_w4moe."
        )


@functools.cache
def _extension() -> _Extension:
    try:
        module = importlib.import_module("jax_w4moe._sm90")
    except ModuleNotFoundError as error:
        if error.name != "jax_w4moe._sm90":
            return _Extension(error=f"The CUDA extension could not be imported: {error}.")
        return _Extension(error=_missing_extension())
    except ImportError as error:
        return _Extension(
            error=f"The CUDA extension could not be imported: {error}; reinstall jax_w4moe."
        )
    try:
        _check_layout_version(module.build_info()["layout_version"])
    except ImportError as error:
        return _Extension(error=str(error))
    registrations = module.registrations()
    for target, stages in registrations.items():
        try:
            jax.ffi.register_ffi_target(target, stages, platform="CUDA")
        except Exception as error:  # whatever XLA raises, the user must be able to read it
            return _Extension(error=f"XLA refused the FFI target {target}: {error}.")
    compiled = frozenset(op for op in OPS if target_name(op) in registrations)
    return _Extension(module=module, targets=compiled)


def targets() -> frozenset[str]:
    """The ops that are compiled in and registered; empty without the extension."""
    return _extension().targets


def extension_error() -> str | None:
    """Why there is no extension, as a sentence; None if it is loaded. Touches no device."""
    return _extension().error


def why_unavailable() -> str | None:
    """Why the CUDA kernels cannot run in this process.

    Returns:
      None if they can; else a sentence with the cause and the remedy.
    """
    if (error := extension_error()) is not None:
        return error
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError as error:
        return (
            f"No CUDA device is visible to JAX ({error}); install jax[cuda13] and check nvidia-smi,"
            ' or use implementation="xla".'
        )
    for device in devices:
        if device.compute_capability != COMPUTE_CAPABILITY:
            return (
                f"{device} ({device.device_kind}) has compute capability"
                f" {device.compute_capability}, the kernels need {COMPUTE_CAPABILITY} (Hopper);"
                ' use implementation="xla".'
            )
    return None


def is_available() -> bool:
    """Whether the CUDA kernels can run in this process."""
    return why_unavailable() is None


def _canonical(value: Any) -> Any:
    """Gives an attribute the one width that the C++ side decodes.

    JAX turns a Python float into f64 and hashes attributes by value, so a mix of widths would find
    the wrong executable in its cache.
    """
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return np.int64(value)
    if isinstance(value, float | np.floating):
        return np.float32(value)
    if isinstance(value, str):
        return value
    raise TypeError(
        f"FFI attribute {value!r} has type {type(value).__name__}, need bool, int, float or str;"
        " pass an array as an operand instead."
    )


def call(
    op: str,
    result_types: Sequence[jax.ShapeDtypeStruct] | jax.ShapeDtypeStruct,
    *operands: jax.Array,
    **attrs: bool | int | float | str,
) -> Any:
    """Calls an op of the extension; the caller has checked the operands.

    Tracing and lowering need no extension, so that a program can be exported for a GPU elsewhere;
    running it does.

    Args:
      op: a name from ``OPS``.
      result_types: one type, or a sequence of them, as ``jax.ffi.ffi_call`` takes it.
      *operands: arrays, row-major.
      **attrs: static values; ints become i64, floats f32.

    Returns:
      One array, or a list of them.

    Raises:
      ValueError: the op is unknown, or the extension was compiled without it.
      TypeError: an attribute has a type that C++ cannot decode.
    """
    if op not in OPS:
        raise ValueError(f"op={op!r} is unknown; use one of {', '.join(OPS)}.")
    if extension_error() is None and op not in targets():
        raise ValueError(f"op={op!r} is not in the compiled extension; reinstall jax_w4moe.")
    canonical = {name: _canonical(value) for name, value in attrs.items()}
    return jax.ffi.ffi_call(target_name(op), result_types)(*operands, **canonical)


def call_count(op: str) -> int:
    """How often the op's handler has run in this process; replaying a CUDA graph does not run it.

    Raises:
      RuntimeError: there is no extension.
      KeyError: the extension has no such op.
    """
    module = _extension().module
    if module is None:
        raise RuntimeError(extension_error())
    count: int = module.call_count(op)
    return count


def _version() -> str | None:
    try:
        return importlib.metadata.version("jax_w4moe")
    except importlib.metadata.PackageNotFoundError:  # a source tree that was not installed
        return None


def build_info() -> dict[str, Any]:
    """Versions of the package and of its extension, for bug reports; touches no device."""
    extension = _extension()
    info: dict[str, Any] = {
        "version": _version(),
        "layout_version": LAYOUT_VERSION,
        "extension": None if extension.module is None else extension.module.__file__,
        "extension_error": extension.error,
        "build_config": _build_config(),
    }
    if extension.module is not None:
        info["extension_build_info"] = extension.module.build_info()
    return info


def disable_export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """What ``jax.export.export(disabled_checks=...)`` needs to accept our custom calls."""
    return [jax.export.DisabledSafetyCheck.custom_call(target_name(op)) for op in OPS]
