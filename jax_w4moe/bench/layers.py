"""Random weights of a layer, and the calls that rotate in a benchmark's program.

There is one set of weights per layer, and several routings take turns on it, each with its own
tokens: 8 of them up to T = 64, 4 up to 1,024, 2 above. That is how the peers were measured, and it
reads the weights from HBM within bounded memory: what the routings touch between them is three
times the L2 cache and more. Where it would be less (one expert for all tokens), more of them take
turns.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_w4moe import roofline
from jax_w4moe.bench.shapes import Shape
from jax_w4moe.formats import LAYOUT_VERSION, MXFP4, WeightFormat
from jax_w4moe.formats.layout import BLOCK_K, BLOCK_ROWS, CODE_BYTES, record_bytes, record_grid
from jax_w4moe.moe import fused_moe
from jax_w4moe.types import PackedExperts, PackedTensor, RowOrder

ROUTINGS = ("balanced", "zipf", "one")

COLD_BYTES = 180e6  # three times the largest L2 of a Hopper GPU
MAX_CALLS = 32

_ZIPF_EXPONENT = 1.2


class Call(NamedTuple):
    """The arguments of one call beside the experts: bf16[T, H], i32[T, k], f32[T, k]."""

    x: jax.Array
    topk_ids: jax.Array
    topk_weights: jax.Array


def layer(call: Call, experts: PackedExperts, act_dtype: Any = jnp.float8_e4m3fn) -> jax.Array:
    """What is measured."""
    return fused_moe(call.x, experts, call.topk_ids, call.topk_weights, act_dtype=act_dtype)


def row_scale_words(format: WeightFormat) -> np.ndarray:
    """What a row of a record has beside its codes, for one scale: u32[format.scale_words]."""
    groups = format.num_scales(BLOCK_K)
    dtype = jnp.float32 if format.scale_dtype == jnp.uint8 else format.scale_dtype
    with jax.ensure_compile_time_eval():
        scales = format.canonical_scales(jnp.full((1, groups), 2.0**-9, dtype))
        words, _ = format.words_from_scales(jnp.ones((1, BLOCK_K), jnp.uint8), scales)
        return np.asarray(words).view(np.uint32).reshape(-1)


@functools.partial(jax.jit, static_argnames=("shape", "format"))
def random_experts(key: jax.Array, shape: Shape, format: WeightFormat = MXFP4) -> PackedExperts:
    """Random codes under one scale: what the kernels do does not depend on the values."""
    word = row_scale_words(format).view(np.uint8)

    def tensor(key: jax.Array, rows: int, columns: int, order: RowOrder) -> PackedTensor:
        grid = record_grid(rows, columns, 2 if order == "gate_up" else 1)
        nbytes = record_bytes(format.scale_words)
        data = jax.random.bits(key, (shape.num_experts, *grid, nbytes), jnp.uint8)
        scales = jnp.asarray(np.tile(word, BLOCK_ROWS))
        data = data.at[..., CODE_BYTES:].set(scales.reshape(1, 1, 1, -1))
        exact = jnp.zeros(shape.num_experts, jnp.int32)
        full = (shape.num_experts, rows, columns)
        return PackedTensor(data, exact, format, full, order, LAYOUT_VERSION)

    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    keys = jax.random.split(key)
    return PackedExperts(
        tensor(keys[0], 2 * intermediate, hidden, "gate_up"),
        tensor(keys[1], hidden, intermediate, "canonical"),
    )


def topk_ids(routing: str, number: int, num_tokens: int, shape: Shape) -> np.ndarray:
    """The ids of one routing.

    Args:
      routing: "balanced" draws a token's k distinct experts uniformly; "zipf" draws them in
        proportion to rank**-1.2, with other ranks for every ``number``; "one" sends all tokens to
        one expert and leaves the other slots at -1.
      number: which of the routings that take turns.
      num_tokens: T.
      shape: the layer.

    Returns:
      i32[T, k].
    """
    if routing == "one":
        ids = np.full((num_tokens, shape.top_k), -1, np.int32)
        ids[:, 0] = number % shape.num_experts
        return ids
    rng = np.random.default_rng([number, num_tokens])
    exponent = _ZIPF_EXPONENT if routing == "zipf" else 0.0
    shares = rng.permutation(np.arange(1.0, shape.num_experts + 1) ** -exponent)
    # The k largest of log(share) + Gumbel noise are k draws without replacement.
    noisy = np.log(shares) + rng.gumbel(size=(num_tokens, shape.num_experts))
    return np.argsort(-noisy, axis=1)[:, : shape.top_k].astype(np.int32)


def calls(experts: PackedExperts, routing: str, num_tokens: int, shape: Shape) -> list[Call]:
    """The calls that take turns: see the head of this module.

    Args:
      experts: the layer's weights; only their size counts.
      routing: one of ``ROUTINGS``.
      num_tokens: T.
      shape: the layer.
    """
    least = 8 if num_tokens <= 64 else 4 if num_tokens <= 1024 else 2
    # A layer that fits into L2 stays there, however many routings rotate.
    cold_bytes = COLD_BYTES if experts.nbytes > COLD_BYTES else 0
    made: list[Call] = []
    nbytes = 0.0
    while len(made) < least or (nbytes < cold_bytes and len(made) < MAX_CALLS):
        ids = topk_ids(routing, len(made), num_tokens, shape)
        weights = np.random.default_rng(len(made)).uniform(0.1, 1, ids.shape)
        weights /= weights.sum(axis=1, keepdims=True)
        x = jax.random.normal(
            jax.random.key(len(made)), (num_tokens, shape.hidden_size), jnp.bfloat16
        )
        made.append(Call(x, jnp.asarray(ids), jnp.asarray(weights, jnp.float32)))
        touched = roofline.touched_experts(ids, shape.num_experts)
        nbytes += experts.nbytes * touched / shape.num_experts + x.nbytes
    return made
