"""Random weights, activations and routings, hostile ones included."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jax_w4moe import (
    ExpertWeights,
    PackedExperts,
    QuantizedTensor,
    WeightFormat,
    formats,
    pack_experts,
)


def quantized(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    format: WeightFormat = formats.MXFP4,
    low: int = 117,
    high: int = 123,
) -> QuantizedTensor:
    """Every code, and scales of a moderate range: weights of about 0.01 to 0.1 in magnitude.

    Args:
      rng: random numbers.
      shape: E, N, K; K is a multiple of the format's group.
      format: the format.
      low, high: the range of E8M0 bytes, the upper end not included; float scales are such powers
        of two times anything between a half and one, some of them negative.
    """
    num_experts, rows, columns = shape
    codes = rng.integers(0, 256, (num_experts, rows, columns // 2), dtype=np.uint8)
    grid = (num_experts, rows, columns // format.group_size)
    exponents = rng.integers(low, high, grid)
    if format.scale_dtype == jnp.uint8:
        scales = jnp.asarray(exponents, jnp.uint8)
    elif format.row_scales:  # E4M3 numbers from 2**-3 to 2**3 or so, and what makes up for them
        own = rng.uniform(0.5, 1, grid) * 2.0 ** rng.integers(-2, 4, grid)
        own = own.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        row = rng.uniform(0.5, 1, (*grid[:2], 1)) * 2.0 ** (exponents[..., :1] - 128)
        scales = jnp.asarray(np.concatenate([row.astype(np.float32), own], axis=-1))
    else:
        fractions = rng.uniform(0.5, 1, grid) * rng.choice([1, 1, 1, -1], grid)
        scales = jnp.asarray(np.ldexp(fractions, exponents - 127), format.scale_dtype)
    return QuantizedTensor(jnp.asarray(codes), scales, format)


def expert_weights(
    rng: np.random.Generator,
    num_experts: int,
    hidden: int,
    intermediate: int,
    *,
    bias: bool = False,
    format: WeightFormat = formats.MXFP4,
) -> ExpertWeights:
    """Canonical weights of a whole layer; scales kept so that outputs are of order one."""
    w13 = quantized(rng, (num_experts, 2 * intermediate, hidden), format)
    w2 = quantized(rng, (num_experts, hidden, intermediate), format)
    if not bias:
        return ExpertWeights(w13, w2)
    biases = [rng.standard_normal((num_experts, n)) for n in (2 * intermediate, hidden)]
    w13_bias, w2_bias = (jnp.asarray(b, jnp.bfloat16) for b in biases)
    return ExpertWeights(w13, w2, w13_bias, w2_bias)


def packed_experts(
    shape: tuple[int, int, int, int],
    *,
    bias: bool = False,
    format: WeightFormat = formats.MXFP4,
) -> PackedExperts:
    """Random packed weights of (H, I, E, k), made expert by expert."""
    hidden, intermediate, num_experts, _ = shape
    parts = []
    for seed in range(num_experts):
        rng = np.random.default_rng(seed)
        weights = expert_weights(rng, 1, hidden, intermediate, bias=bias, format=format)
        parts.append(pack_experts(weights))
    leaves = [jnp.concatenate(arrays) for arrays in zip(*map(jax.tree.leaves, parts), strict=True)]
    packed: PackedExperts = jax.tree.unflatten(jax.tree.structure(parts[0]), leaves)
    shapes = ((num_experts, 2 * intermediate, hidden), (num_experts, hidden, intermediate))
    w13, w2 = (
        dataclasses.replace(tensor, shape=whole)
        for tensor, whole in zip((packed.w13, packed.w2), shapes, strict=True)
    )
    return dataclasses.replace(packed, w13=w13, w2=w2)


def tokens(rng: np.random.Generator, *shape: int) -> jnp.ndarray:
    """Gaussian bf16."""
    return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)


ROUTINGS = ("random", "duplicates", "one_expert", "outside", "no_expert", "sparse")


def routing(
    rng: np.random.Generator, kind: str, num_tokens: int, num_experts: int, k: int
) -> tuple[jnp.ndarray, jnp.ndarray]:
    """topk_ids i32[T, k] and topk_weights f32[T, k] of one of ``ROUTINGS``."""
    shape = (num_tokens, k)
    if kind == "random":
        order = rng.permuted(np.tile(np.arange(num_experts), (num_tokens, 1)), axis=1)
        ids = order[:, :k]
    elif kind == "duplicates":
        ids = rng.integers(0, num_experts, shape)
    elif kind == "one_expert":
        ids = np.full(shape, num_experts - 1)
    elif kind == "outside":
        ids = rng.choice([-(2**31), -1, 0, num_experts - 1, num_experts, 2**31 - 1], shape)
    elif kind == "no_expert":
        ids = np.full(shape, -1)
    else:
        ids = rng.choice([0, num_experts - 1], shape)
    weights = rng.uniform(0.1, 1, shape)
    return jnp.asarray(ids, jnp.int32), jnp.asarray(weights, jnp.float32)
