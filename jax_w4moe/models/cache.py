"""Keys and values of the tokens so far: preallocated, a ring where a layer sees a window only."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_w4moe.models.config import GptOssConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of a batch of sequences, each at a position of its own.

    The token at position p of a row lies at p modulo the layer's size: ``capacity``, or the sliding
    window where that is less. So what is valid is always the first ``min(length, size)`` entries.

    Attributes:
      keys: of every layer, [batch, size, kv_heads, head_dim], rotated.
      values: of every layer, the same.
      lengths: i32[batch], tokens of every row.
      capacity: how many tokens a row can hold.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    lengths: Array
    capacity: int = dataclasses.field(metadata={"static": True})

    @property
    def batch(self) -> int:
        """Rows."""
        return self.lengths.shape[0]

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def empty_cache(
    config: GptOssConfig,
    batch: int,
    capacity: int,
    dtype: Any,
    mesh: Mesh | None = None,
    heads_axis: str | None = None,
) -> Cache:
    """A cache of rows without tokens; on a mesh heads may be spread over one of its axes."""

    def zeros(shape: tuple[int, ...], dtype: Any, *axes: str | None) -> Array:
        sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(*axes))
        return jnp.zeros(shape, dtype, device=sharding)

    def of_layers() -> tuple[Array, ...]:
        heads = (config.num_key_value_heads, config.head_dim)
        windows = [config.window(layer) for layer in range(config.num_hidden_layers)]
        sizes = [min(capacity, window or capacity) for window in windows]
        return tuple(zeros((batch, size, *heads), dtype, None, None, heads_axis) for size in sizes)

    return Cache(of_layers(), of_layers(), zeros((batch,), jnp.int32), capacity)


def write_prompts(rows: Array, new: Array, slots: Array, lengths: Array) -> Array:
    """Replaces whole rows by prompts.

    Args:
      rows: [batch, size, kv_heads, head_dim].
      new: [B, S, kv_heads, head_dim], the prompts' keys or values from position 0 on.
      slots: i32[B], which row; outside [0, batch) nothing is written.
      lengths: i32[B], tokens of every prompt.

    Returns:
      rows; nothing of a row's former tokens is left, not even where nobody looks: there are copies
      of the prompt's first token.
    """
    size = rows.shape[1]
    last = (lengths - 1)[:, None]
    position = last - (last - jnp.arange(size, dtype=jnp.int32)[None]) % size
    kept = jnp.take_along_axis(new, jnp.maximum(position, 0)[:, :, None, None], axis=1)
    return rows.at[_dropped(slots, rows.shape[0])].set(kept, mode="drop")


def write_tokens(rows: Array, new: Array, lengths: Array, alive: Array) -> Array:
    """Appends one token to the rows that are alive.

    Args:
      rows: [batch, size, kv_heads, head_dim].
      new: [batch, kv_heads, head_dim].
      lengths: i32[batch], tokens so far: the position of the new one.
      alive: bool[batch]; other rows are left as they are.

    Returns:
      rows.
    """
    batch, size = rows.shape[:2]
    at = jnp.where(alive, lengths % size, size)
    return rows.at[jnp.arange(batch), at].set(new, mode="drop")


def write_lengths(lengths: Array, new: Array, slots: Array) -> Array:
    """Sets the lengths of the rows that prompts went to."""
    return lengths.at[_dropped(slots, lengths.shape[0])].set(new, mode="drop")


def _dropped(slots: Array, batch: int) -> Array:
    """Slots, those outside [0, batch) beyond its end: a negative index would count from there."""
    return jnp.where((slots >= 0) & (slots < batch), slots, batch)
