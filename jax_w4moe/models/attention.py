"""Attention with learned sinks, grouped queries, rotary embeddings and sliding windows.

A sink is a logit per head that takes part in the softmax and has no value. Beside a softmax over
the keys alone, whose logsumexp is L, it scales the result by ``sigmoid(L - sink)``: so any
attention that returns L will do, here ``jax.nn.dot_product_attention``.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec

from jax_w4moe.models.cache import write_tokens
from jax_w4moe.models.config import GptOssConfig


class RMSNorm(nnx.Module):
    """x over the root of its mean square, times a weight, all in f32."""

    def __init__(self, config: GptOssConfig, *, dtype: Any) -> None:
        self.weight = nnx.Param(jnp.ones(config.hidden_size, jnp.float32))
        self.eps = config.rms_norm_eps
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: Array) -> Array:
        """[..., H] in any dtype to [..., H] in ``dtype``."""
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        weight = self.weight.get_value()
        return (x * jnp.broadcast_to(weight, x.shape)).astype(self.dtype)


class Attention(nnx.Module):
    """The attention of one layer."""

    def __init__(
        self,
        config: GptOssConfig,
        layer: int,
        *,
        dtype: Any,
        implementation: str,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes it with random weights.

        Args:
          config: the model's settings.
          layer: the layer's number.
          dtype: of weights, activations and results.
          implementation: of ``jax.nn.dot_product_attention``: "xla" or "cudnn".
          rngs: the key streams; "params" is used.
        """
        self.dtype = jnp.dtype(dtype)
        self.head_dim = config.head_dim
        self.window = config.window(layer)
        self.implementation = implementation

        def linear(columns: int, rows: int) -> nnx.Linear:
            return nnx.Linear(
                columns,
                rows,
                use_bias=config.attention_bias,
                dtype=dtype,
                param_dtype=dtype,
                precision=precision(dtype),
                rngs=rngs,
            )

        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = linear(config.hidden_size, width)
        self.k_proj = linear(config.hidden_size, kv_width)
        self.v_proj = linear(config.hidden_size, kv_width)
        self.o_proj = linear(width, config.hidden_size)
        self.sinks = nnx.Param(jnp.zeros(config.num_attention_heads, jnp.float32))

    def prompt(self, x: Array, rope: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        """Attends within sequences that begin here.

        Args:
          x: [B, S, H].
          rope: cosines and sines, f32[B, S, head_dim / 2].

        Returns:
          (y [B, S, H], keys and values [B, S, kv_heads, head_dim]).
        """
        q, k, v = self._project(x, rope)
        window = None if self.window is None else (self.window - 1, 0)
        y = self._attend(q, k, v, is_causal=True, local_window_size=window)
        return y, k, v

    def step(
        self,
        x: Array,
        rope: tuple[Array, Array],
        keys: Array,
        values: Array,
        lengths: Array,
        alive: Array,
    ) -> tuple[Array, Array, Array]:
        """Attends from one more token of every sequence.

        Args:
          x: [batch, 1, H].
          rope: cosines and sines, f32[batch, 1, head_dim / 2].
          keys, values: the cache, [batch, size, kv_heads, head_dim].
          lengths: i32[batch], tokens in it.
          alive: bool[batch]; the token of other rows is not written.

        Returns:
          (y [batch, 1, H], keys, values).
        """
        q, k, v = self._project(x, rope)
        keys = write_tokens(keys, k[:, 0], lengths, alive)
        values = write_tokens(values, v[:, 0], lengths, alive)
        valid = jnp.minimum(lengths + 1, keys.shape[1])
        y = self._attend(q, keys, values, key_value_seq_lengths=valid)
        return y, keys, values

    def specs(self, axis: str) -> Iterator[tuple[nnx.Param, PartitionSpec]]:
        """The variables that have heads, and how these are spread over an axis of a mesh."""
        for linear in (self.q_proj, self.k_proj, self.v_proj):
            yield linear.kernel, PartitionSpec(None, axis)
            if linear.bias is not None:
                yield linear.bias, PartitionSpec(axis)
        yield self.o_proj.kernel, PartitionSpec(axis)
        yield self.sinks, PartitionSpec(axis)

    def _project(self, x: Array, rope: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        def heads(rows: Array) -> Array:
            return rows.reshape(*rows.shape[:2], -1, self.head_dim)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        return _rotate(q, rope), _rotate(k, rope), v

    def _attend(self, q: Array, k: Array, v: Array, **which: Any) -> Array:
        implementation: Any = self.implementation
        exact = "highest" if self.dtype == jnp.float32 else None
        # NOTE: JAX's own code promotes implicitly here, which is an error where users forbid it.
        with jax.default_matmul_precision(exact), jax.numpy_dtype_promotion("standard"):
            y, logsumexp = jax.nn.dot_product_attention(
                q, k, v, implementation=implementation, return_residual=True, **which
            )
        sinks = jnp.broadcast_to(self.sinks.get_value(), logsumexp.shape)
        share = jax.nn.sigmoid(logsumexp.astype(jnp.float32) - sinks)
        y = (y.astype(jnp.float32) * share[..., None]).astype(self.dtype)
        return self.o_proj(y.reshape(*y.shape[:2], -1))


_CUDNN_HEAD_DIM = 128  # at most, and a multiple of 8


def default_attention(config: GptOssConfig, dtype: Any) -> str:
    """The ``implementation`` that is fastest on the default backend."""
    fits = config.head_dim <= _CUDNN_HEAD_DIM and config.head_dim % 8 == 0
    on_gpu = jax.default_backend() == "gpu"
    return "cudnn" if on_gpu and fits and jnp.dtype(dtype) == jnp.bfloat16 else "xla"


def rotary(positions: Array, config: GptOssConfig) -> tuple[Array, Array]:
    """Cosines and sines, f32[..., head_dim / 2], of positions i32[...]."""
    frequencies, factor = config.rope_frequencies()
    angles = positions[..., None].astype(jnp.float32) * jnp.expand_dims(
        frequencies, tuple(range(positions.ndim))
    )
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def precision(dtype: Any) -> jax.lax.Precision | None:
    """Of matrix products: f32 means f32, not TF32."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def _rotate(x: Array, rope: tuple[Array, Array]) -> Array:
    """Turns the pairs (i, i + head_dim / 2) of [B, S, heads, head_dim], in f32."""
    cos, sin = (part[:, :, None] for part in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
