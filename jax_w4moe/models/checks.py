"""Preconditions of a model's methods, and the one sentence of each; reads no data."""

from typing import Any

import jax.numpy as jnp

from jax_w4moe import implementation as implementations
from jax_w4moe.models.cache import Cache

_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))
_ACT_DTYPES = (jnp.dtype(jnp.float8_e4m3fn), *_DTYPES)


def options(
    dtype: Any,
    act_dtype: Any,
    attention: str | None,
    implementation: str | None,
    expert_axis: str | None,
    tensor_axis: str | None,
) -> None:
    """Of a model."""
    if jnp.dtype(dtype) not in _DTYPES:
        raise TypeError(f"dtype={jnp.dtype(dtype)}: use jnp.bfloat16 or jnp.float32.")
    if jnp.dtype(act_dtype) not in _ACT_DTYPES:
        names = ", ".join(str(legal) for legal in _ACT_DTYPES)
        raise TypeError(f"act_dtype={jnp.dtype(act_dtype)}: use one of {names}.")
    if attention not in (None, "xla", "cudnn"):
        raise ValueError(f'attention={attention!r} is unknown; use "xla", "cudnn" or None.')
    if attention == "cudnn" and jnp.dtype(dtype) != jnp.bfloat16:
        raise ValueError('attention="cudnn" computes in bfloat16 only; use "xla" for float32.')
    if jnp.dtype(act_dtype) == jnp.float32:
        implementations.choose("FusedMoE", implementation, "act_dtype=float32")
        if expert_axis is not None or tensor_axis is not None:
            raise NotImplementedError(
                "act_dtype=float32 runs on one device; leave expert_axis and tensor_axis out, or"
                " take bfloat16."
            )


def placement(mesh: Any, expert_axis: str | None, tensor_axis: str | None) -> None:
    """Of loading onto a mesh."""
    has_axis = expert_axis is not None or tensor_axis is not None
    if mesh is None and has_axis:
        raise ValueError(
            f"expert_axis={expert_axis!r} and tensor_axis={tensor_axis!r} without a mesh; pass"
            " mesh= as well."
        )
    if mesh is not None and not has_axis:
        raise ValueError(
            f"a mesh of {', '.join(mesh.axis_names)} without expert_axis and tensor_axis; name the"
            " axis that experts are spread over."
        )


def cache_sizes(batch: int, capacity: int, longest: int) -> None:
    """Of ``init_cache``."""
    if batch < 1:
        raise ValueError(f"batch={batch} is below 1; pass how many rows there are.")
    if not 1 <= capacity <= longest:
        raise ValueError(
            f"capacity={capacity} is not in 1..{longest} (the model's max_position_embeddings);"
            " lower it."
        )


def prompts(tokens: Any, lengths: Any) -> None:
    """Of right-padded sequences."""
    _integers("tokens", tokens, (None, None))
    if tokens.shape[1] < 1:
        raise ValueError(f"tokens: shape {tuple(tokens.shape)} has no token; pad to S >= 1.")
    _integers("lengths", lengths, tokens.shape[:1])


def prefill(cache: Cache, tokens: Any, lengths: Any, slots: Any) -> None:
    """Of ``prefill``."""
    prompts(tokens, lengths)
    num_prompts, size = tokens.shape
    if size > cache.capacity:
        raise ValueError(
            f"tokens: S={size} is more than the cache's capacity={cache.capacity}; make a larger"
            " cache."
        )
    if slots is not None:
        _integers("slots", slots, (num_prompts,))
    elif num_prompts > cache.batch:
        raise ValueError(
            f"tokens: {num_prompts} prompts for a cache of {cache.batch} rows; make a larger cache."
        )


def decode(cache: Cache, tokens: Any, active: Any) -> None:
    """Of ``decode``."""
    _integers("tokens", tokens, (cache.batch,))
    if active is not None and (active.shape != (cache.batch,) or active.dtype != jnp.bool_):
        raise ValueError(
            f"active: {active.dtype}{list(active.shape)}, need bool[{cache.batch}]: which rows of"
            " the cache take part."
        )


def _integers(name: str, value: Any, shape: tuple[int | None, ...]) -> None:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(f"{name}: got {type(value).__name__}, need an i32 array.")
    fits = len(value.shape) == len(shape) and all(
        size in (None, own) for size, own in zip(shape, value.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: shape {tuple(value.shape)}, need [{wanted}]; reshape it.")
    if value.dtype != jnp.int32:
        raise TypeError(f"{name}: dtype {value.dtype}, need int32; cast it.")
