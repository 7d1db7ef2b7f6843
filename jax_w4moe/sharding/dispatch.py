"""Inside a shard_map: tokens sent only to the devices that hold one of their experts."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_w4moe import varying
from jax_w4moe.formats.layout import round_up
from jax_w4moe.sharding.exchange import as_bits, as_bytes, gather, reinterpret, to_owners
from jax_w4moe.sharding.placement import DISPATCH, Placement

_HEADROOM = 1.25  # over what balanced routing sends
# When it is chosen: within a host, and for few tokens, agreeing on it costs more than it saves.
_HOST_DEVICES = 8
LEAST_TOKENS = 128  # of a device
_WORTHWHILE = 0.6  # of all tokens, at most
_NO_EXPERT = 0xFFFFFFFF  # all bits of a row that holds no token: its ids are -1


def capacity(num_tokens: int, top_k: int, devices: int) -> int:
    """How many of a device's tokens another one is sent at most.

    A quarter more than a token has experts there when all are equally likely; never more than there
    are tokens.
    """
    likely = num_tokens * (1 - (1 - 1 / devices) ** top_k)
    return min(num_tokens, round_up(math.ceil(_HEADROOM * likely), 8))


def is_dispatched(placement: Placement, num_tokens: int, top_k: int) -> bool:
    """Whether tokens go only where they are needed: as was asked for, else by what is sent.

    Args:
      placement: the layer's.
      num_tokens: of this device.
      top_k: experts per token.
    """
    if placement.exchange is not None or not placement.can_dispatch:
        return placement.exchange == DISPATCH
    devices = jax.lax.axis_size(placement.expert_axis)
    few = capacity(num_tokens, top_k, devices)
    return (
        devices > _HOST_DEVICES and num_tokens >= LEAST_TOKENS and few <= _WORTHWHILE * num_tokens
    )


def dispatched(
    work: Callable[[Any], Array], tokens: Any, owners: Array, placement: Placement
) -> Array:
    """Runs ``work`` on the tokens that have an expert here, and returns their rows.

    The same bits as through :func:`gather` and :func:`to_owners`, which take over where routing is
    so uneven that some device would be sent more than the capacity.

    Args:
      work: maps a tree of tokens [n, ...] to rows [n, width].
      tokens: a tree of [T_local, n] arrays.
      owners: i32[T_local, k], the devices of the expert axis that a token needs.
      placement: the layer's.

    Returns:
      [devices, T_local, width] as integers, like :func:`to_owners`.
    """
    axis = placement.expert_axis
    devices = jax.lax.axis_size(axis)
    num_tokens, top_k = owners.shape
    few = capacity(num_tokens, top_k, devices)
    payload, values = as_bytes(tokens)

    numbers = jnp.arange(devices, dtype=jnp.int32)[:, None]
    is_wanted = (owners[None] == numbers[:, :, None]).any(axis=2)  # [devices, T_local]
    place = jnp.where(is_wanted, jnp.cumsum(is_wanted, axis=1, dtype=jnp.int32) - 1, few)
    token = jnp.full((devices, few), num_tokens, jnp.int32)
    every = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32), place.shape)
    token = token.at[numbers, place].set(every, mode="drop")

    def to_few() -> Array:
        # Rows are picked word by word, which takes a while: the wider the better.
        words = reinterpret(payload, jnp.uint32)
        sent = words.at[token].get(mode="fill", fill_value=_NO_EXPERT)
        received = jax.lax.all_to_all(reinterpret(sent, payload.dtype), axis, 0, 0)
        rows = as_bits(work(values(received.reshape(devices * few, -1))))
        returned = jax.lax.all_to_all(rows.reshape(devices, few, -1), axis, 0, 0)
        # A device that was not sent a token has nothing of it: zero, as through gather.
        own = reinterpret(returned, jnp.uint32).at[numbers, place].get(mode="fill", fill_value=0)
        return reinterpret(own, rows.dtype)

    def to_all() -> Array:
        return to_owners(work(gather(tokens, placement)), placement)

    if few == num_tokens:
        return to_few()
    most = jax.lax.pmax(is_wanted.sum(axis=1, dtype=jnp.int32).max(), placement.token_axes)
    axes = varying.axes_of((tokens, owners)) | frozenset(placement.model_axes)
    return jax.lax.cond(
        most <= few, lambda: varying.vary(to_few(), axes), lambda: varying.vary(to_all(), axes)
    )
