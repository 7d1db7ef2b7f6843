"""Which implementation an op takes: chosen at trace time, never a slow path in silence."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jax_w4moe import _ffi, varying

Choice = Literal["xla", "cuda_sm90", "both"]


def choose(
    op: str,
    requested: str | None,
    unsupported: str | None = None,
) -> Choice:
    """Chooses how an op runs.

    Args:
      op: the op's name, e.g. "fused_moe".
      requested: the caller's ``implementation``: None, "xla" or "cuda_sm90".
      unsupported: what the call asks for that has no kernel, as :func:`unsupported` says.

    Returns:
      "xla"; "cuda_sm90"; or "both", when the platform that the program is lowered for decides
      (``jax.lax.platform_dependent``). Where a CUDA device other than Hopper is visible, None
      means "xla".

    Raises:
      ValueError: an unknown name.
      RuntimeError: the kernels are asked for, or a Hopper GPU is there, but they cannot run here.
      NotImplementedError: the same, but this op has no kernel in this version.
    """
    if requested not in (None, "xla", "cuda_sm90"):
        raise ValueError(
            f'implementation={requested!r} is unknown; use None, "xla" or "cuda_sm90".'
        )
    if requested == "xla":
        return "xla"
    if requested == "cuda_sm90":
        reason = _ffi.why_unavailable()
        if reason:
            raise RuntimeError(f'{op}: implementation="cuda_sm90" cannot run here: {reason}')
        _require_kernel(op, unsupported)
        return "cuda_sm90"
    capabilities = {_capability(device) for device in _cuda_devices()}
    if not capabilities:
        return "both" if op in _ffi.OPS and not unsupported else "xla"
    if capabilities != {_ffi.COMPUTE_CAPABILITY}:
        return "xla"
    reason = _ffi.extension_error()
    if reason:
        raise RuntimeError(
            f"{op}: a Hopper GPU is here but its kernels are not: {reason} Or pass"
            ' implementation="xla", which is slow.'
        )
    _require_kernel(op, unsupported)
    return "both"


def unsupported(x_dtype: Any, act_dtype: Any) -> str | None:
    """What of a call has no kernel, in words; None if all has."""
    if jnp.dtype(act_dtype) == jnp.bfloat16 and jnp.dtype(x_dtype) != jnp.bfloat16:
        return f"act_dtype=bfloat16 for x of {jnp.dtype(x_dtype)}"
    return None


def without_kernel(op: str, choice: Choice, unsupported: str) -> Choice:
    """The choice for something that has no kernel: plain XLA, where no Hopper GPU is asked for.

    Raises:
      NotImplementedError: one is, or is here.
    """
    if choice == "cuda_sm90" or (choice == "both" and _cuda_devices()):
        _require_kernel(op, unsupported)
    return "xla"


def run(choice: Choice, cuda: Any, xla: Any, *operands: Any) -> Any:
    """Calls the chosen one of two functions of the same operands and results."""
    operands = varying.alike(operands)
    if choice == "xla":
        return xla(*operands)
    if choice == "cuda_sm90":
        return cuda(*operands)
    return jax.lax.platform_dependent(*operands, cuda=cuda, default=xla)


def device_kind() -> str | None:
    """The kind of this process's CUDA devices, e.g. "NVIDIA H200"; None without one."""
    devices = _cuda_devices()
    return str(devices[0].device_kind) if devices else None


def _require_kernel(op: str, unsupported: str | None) -> None:
    if op not in _ffi.OPS:
        raise NotImplementedError(
            f"{op}: this version has SM90 kernels for {', '.join(sorted(_ffi.OPS))} only; pass"
            ' implementation="xla" to run it as plain XLA, which is slow.'
        )
    if unsupported:
        raise NotImplementedError(
            f'{op}: {unsupported} has no SM90 kernel; pass implementation="xla", which is slow.'
        )


def _cuda_devices() -> list[Any]:
    try:
        return jax.local_devices(backend="cuda")
    except RuntimeError:  # no CUDA backend in this process
        return []


def _capability(device: Any) -> str:
    return str(getattr(device, "compute_capability", "unknown"))
