"""Inside a shard_map: this device's part of a layer, and what is sent between devices."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_w4moe import varying
from jax_w4moe.formats.layout import BLOCK_K, round_up
from jax_w4moe.quantization import round_to_bf16
from jax_w4moe.sharding.placement import Placement, Tokens
from jax_w4moe.types import PackedExperts

_SCATTERED_ROWS = 256  # so many that are wanted everywhere are summed in parts, then gathered


def local_part(experts: PackedExperts, placement: Placement) -> PackedExperts:
    """This device's weights as a layer of their own: w2's bias on one of the tensor axis only."""
    held, blocks = experts.w13.data.shape[0], experts.w2.data.shape[2]
    hidden, intermediate = experts.hidden_size, experts.intermediate_size
    if blocks * BLOCK_K != round_up(intermediate, BLOCK_K):
        intermediate = blocks * BLOCK_K
    bias = experts.w2_bias
    if bias is not None and placement.tensor_axis:
        is_first = jax.lax.axis_index(placement.tensor_axis) == 0
        bias = jnp.where(is_first, bias, jnp.zeros_like(bias))
    w13_shape, w2_shape = (held, 2 * intermediate, hidden), (held, hidden, intermediate)
    return PackedExperts(
        dataclasses.replace(experts.w13, shape=w13_shape),
        dataclasses.replace(experts.w2, shape=w2_shape),
        experts.w13_bias,
        bias,
    )


def is_expert(topk_ids: Array, experts: PackedExperts) -> Array:
    """Whether an id is an expert's, of all devices."""
    return (topk_ids >= 0) & (topk_ids < experts.num_experts)


def owners(topk_ids: Array, experts: PackedExperts) -> Array:
    """The device of the expert axis that holds an id's expert; -1 for what is none."""
    held = experts.w13.data.shape[0]
    return jnp.where(is_expert(topk_ids, experts), topk_ids // held, -1)


def local_ids(topk_ids: Array, experts: PackedExperts, placement: Placement) -> Array:
    """Ids of the experts that this device holds, by their number among them; -1 for all others."""
    valid = is_expert(topk_ids, experts)
    if placement.expert_axis is None:
        return jnp.where(valid, topk_ids, -1)
    held = experts.w13.data.shape[0]
    own = topk_ids - jax.lax.axis_index(placement.expert_axis) * held
    return jnp.where(valid & (own >= 0) & (own < held), own, -1)


def gather(rows: Any, placement: Placement) -> Any:
    """Rows of all devices that share these weights' tokens: one collective, of bytes.

    Args:
      rows: a tree of [T_local, n] arrays.
      placement: the layer's.

    Returns:
      The same tree of [T, n] arrays.
    """
    if not placement.gathered_axes:
        return rows
    payload, values = as_bytes(rows)
    return values(jax.lax.all_gather(payload, placement.gathered_axes, tiled=True))


def as_bytes(rows: Any) -> tuple[Array, Callable[[Array], Any]]:
    """A tree of [T, n] arrays as u8[T, bytes], and the way back from any number of rows."""
    leaves, tree = jax.tree.flatten(rows)
    ends = np.cumsum([leaf.shape[1] * leaf.dtype.itemsize for leaf in leaves])

    def values(payload: Array) -> Any:
        parts = jnp.split(payload, ends[:-1], axis=1)
        own = [reinterpret(part, leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
        return jax.tree.unflatten(tree, own)

    return jnp.concatenate([reinterpret(leaf, jnp.uint8) for leaf in leaves], axis=1), values


def reinterpret(array: Array, dtype: Any) -> Array:
    """The bytes of the last axis as another dtype: [..., n] -> [..., n * itemsize / its]."""
    own, its = array.dtype.itemsize, jnp.dtype(dtype).itemsize
    shape = (*array.shape[:-1], array.shape[-1] * own // its)
    if own < its:
        array = array.reshape(*shape, its // own)
    return jax.lax.bitcast_convert_type(array, dtype).reshape(shape)


def to_owners(parts: Array, placement: Placement) -> Array:
    """What devices have of rows, to the devices whose rows they are: one collective, if any.

    Args:
      parts: [T, n], this device's part of all rows.
      placement: the layer's.

    Returns:
      [devices, T_local, n] as integers: the parts of the rows of this device.
    """
    axes = placement.gathered_axes
    devices = math.prod(jax.lax.axis_size(axis) for axis in axes)
    parts = varying.vary(parts, frozenset(placement.model_axes))
    stacked = as_bits(parts).reshape(devices, -1, parts.shape[1])
    return jax.lax.all_to_all(stacked, axes, 0, 0) if axes else stacked


def add(stacked: Array, dtype: Any, placement: Placement) -> Array:
    """Adds what devices have of a row, in f32, from the first device to the last.

    Args:
      stacked: the result of :func:`to_owners`.
      dtype: what its integers are.
      placement: the layer's.

    Returns:
      [T_local, n]; the same on all devices of an axis that tokens are not spread over.
    """
    shared = tuple(a for a in placement.model_axes if a not in placement.gathered_axes)
    if not shared:
        return _sum(stacked, dtype)
    devices = math.prod(jax.lax.axis_size(axis) for axis in shared)
    num_spread, num_rows, width = stacked.shape
    same = "invarying" if varying.is_typed() else "varying"
    if num_rows < _SCATTERED_ROWS or num_rows % devices:
        everything = jax.lax.all_gather(stacked, shared, to=same)
        return _sum(everything.reshape(-1, num_rows, width), dtype)
    # Each device of the shared axes adds its share of the rows: less to send, the same sums.
    shares = stacked.reshape(num_spread, devices, -1, width).swapaxes(0, 1)
    shares = jax.lax.all_to_all(shares, shared, 0, 0)
    own = _sum(shares.reshape(-1, num_rows // devices, width), dtype)
    own = jax.lax.all_gather(as_bits(own), shared, tiled=True, to=same)
    return jax.lax.bitcast_convert_type(own, dtype)


def bring_home(parts: Array, placement: Placement) -> Array:
    """What every device has of a row, added where the row belongs: [T, n] -> [T_local, n]."""
    return add(to_owners(parts, placement), parts.dtype, placement)


def as_bits(array: Array) -> Array:
    """As integers: what is sent is of this width, whatever XLA makes of conversions beside it."""
    width = jnp.uint16 if array.dtype == jnp.bfloat16 else jnp.uint32
    return jax.lax.bitcast_convert_type(array, width)


def _sum(bits: Array, dtype: Any) -> Array:
    parts = jax.lax.bitcast_convert_type(bits, dtype)
    total = parts[0].astype(jnp.float32)
    for part in parts[1:]:
        total = total + part.astype(jnp.float32)
    if dtype == jnp.bfloat16:
        total = round_to_bf16(total)  # whatever XLA makes of it with what follows
    return total.astype(dtype)


def as_slots(tokens: Tokens) -> Tokens:
    """Each (token, slot) pair as a token of its own, of weight one."""
    num_tokens, top_k = tokens.topk_ids.shape

    x, x_scale = jax.tree.map(
        lambda array: jnp.repeat(array, top_k, axis=0), (tokens.x, tokens.x_scale)
    )
    ids = tokens.topk_ids.reshape(-1, 1)
    return Tokens(x, x_scale, ids, jnp.ones((num_tokens * top_k, 1), jnp.float32))
