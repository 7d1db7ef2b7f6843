"""FP8 activation quantisation in jax.numpy: the rule that the CUDA op repeats bit for bit."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float8e4m3fn, Float32, Int32

E4M3_MAX = 448.0
SMALLEST_AMAX = 2.0**-100
"""A row whose largest magnitude is below this is scaled as if it were this: no division by zero."""

# 7 / m for the 128 mantissas 1 <= m < 2 of bf16, correctly rounded; 448 is 7 * 2**6.
_SEVEN_OVER_MANTISSA = (7 / (1 + np.arange(128) / 128)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class PerToken:
    """One f32 scale per token, taken from its largest magnitude.

    Attributes:
      pow2: the scale is rounded up to a power of two (UE8M0), as DeepSeek-V4's is.
    """

    pow2: bool = False


@dataclasses.dataclass(frozen=True)
class Static:
    """One scale for all tokens before each projection, as W4AFP8 checkpoints store them.

    Attributes:
      x_scale: of what w13 multiplies; for ``grouped_matmul`` the only one.
      h_scale: of what w2 multiplies.

    Raises:
      ValueError: a scale that is not in 2**-100 to 2**100.
    """

    x_scale: float
    h_scale: float = 1.0

    def __post_init__(self) -> None:
        for name, scale in (("x_scale", self.x_scale), ("h_scale", self.h_scale)):
            if not SMALLEST_AMAX <= scale <= 1 / SMALLEST_AMAX:
                raise ValueError(
                    f"Static: {name}={scale} is not in 2**-100 to 2**100; pass the positive"
                    " input_scale of the checkpoint."
                )


@dataclasses.dataclass(frozen=True)
class Per128:
    """One scale per token and 128 values, a power of two (UE8M0), as DeepSeek's models have them.

    The kernels carry values that were quantised so as bf16, which holds them exactly.
    """


ScaleRule = PerToken | Static | Per128
"""How bf16 activations get their FP8 scales."""


def operand_dtype(act_dtype: Any, rule: ScaleRule) -> jnp.dtype:
    """The dtype that a kernel is given activations in, after they were quantised by a rule."""
    return jnp.dtype(jnp.bfloat16 if isinstance(rule, Per128) else act_dtype)


def quantize(
    x: Float[Array, "*rows H"], rule: PerToken | Static, before: Literal["w13", "w2"] = "w13"
) -> tuple[Float8e4m3fn[Array, "*rows H"], Float32[Array, "*rows 1"]]:
    """Quantises rows to E4M3, saturating, by a rule.

    With a scale s of :class:`Static` that is ``e4m3(x * f32(1/s))``; an infinity saturates like
    any large value.

    Args:
      x: rows to quantise, bf16 or f32 that holds bf16 values.
      rule: the rule.
      before: which projection multiplies them.

    Returns:
      (x_fp8, x_scale).
    """
    if isinstance(rule, PerToken):
        return quantize_per_token(x, rule)
    scale = np.float32(rule.x_scale if before == "w13" else rule.h_scale)
    scaled = x.astype(jnp.float32) * (np.float32(1) / scale)
    return _to_e4m3(scaled), jnp.full((*x.shape[:-1], 1), scale)


def quantize_per_token(
    x: Float[Array, "*rows H"], rule: PerToken = PerToken()
) -> tuple[Float8e4m3fn[Array, "*rows H"], Float32[Array, "*rows 1"]]:
    """Quantises rows to E4M3, saturating, one scale per row.

    ``x_scale = amax * f32(1/448)`` and ``x_fp8 = e4m3(x * (448 / amax))``, each operation rounded
    once in f32, then to nearest even in E4M3. The row's amax is an integer maximum of the bits of
    ``|x|``: independent of order, and NaN wins. A NaN makes its row NaN; an infinity makes itself
    NaN and the rest of its row zero, with an infinite scale. With ``rule.pow2`` the scale is the
    least power of two that is not below ``amax / 448``, and the division is exact.

    Args:
      x: rows to quantise, bf16 or f32 that holds bf16 values; H may be 0.
      rule: whether scales are powers of two.

    Returns:
      (x_fp8, x_scale).
    """
    values = x.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(jnp.abs(values), jnp.int32)
    smallest = jnp.float32(SMALLEST_AMAX).view(jnp.int32)
    amax_bits = jnp.max(bits, axis=-1, keepdims=True, initial=smallest)
    amax = jax.lax.bitcast_convert_type(amax_bits, jnp.float32)
    scale, inverse = amax * jnp.float32(1.0 / E4M3_MAX), _inverse(amax_bits)
    if rule.pow2:
        # 448 is 1.75 * 2**8: up to a mantissa of 1.75 amax / 448 is at most 2**(e - 8).
        is_above = (amax_bits & 0x7FFFFF) > 0x600000
        exponent = (amax_bits >> 23) - 8 + is_above.astype(jnp.int32)
        is_finite = amax_bits < 0x7F800000
        scale = jnp.where(is_finite, _power_of_two(exponent), amax)
        inverse = jnp.where(is_finite, _power_of_two(254 - exponent), inverse)
    return _to_e4m3(values * inverse), scale


def round_per_128(x: Float[Array, "*rows H"]) -> Float32[Array, "*rows H"]:
    """Rounds to E4M3 under a scale per 128 values, as :class:`Per128` says, and scales back.

    Every 128 values are quantised as a row of :class:`PerToken` with ``pow2=True`` is. A NaN or an
    infinity makes its 128 values NaN.

    Args:
      x: rows, bf16 or f32 that holds bf16 values; the last group may be shorter.

    Returns:
      The rounded values, which bf16 holds exactly.
    """
    width = x.shape[-1]
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -width % 128)])
    groups = padded.reshape(*x.shape[:-1], -1, 128)
    x_fp8, scale = quantize_per_token(groups, PerToken(pow2=True))
    return (x_fp8.astype(jnp.float32) * scale).reshape(padded.shape)[..., :width]


def fold_scales(
    x: Float8e4m3fn[Array, "*rows H"], x_scale: Float32[Array, "*rows C"]
) -> tuple[Float8e4m3fn[Array, "*rows H"], Float32[Array, "*rows 1"]]:
    """E4M3 rows with a scale per 128 values as rows with one scale, their largest.

    Exact where the scales of a row are powers of two and no value becomes smaller than E4M3 holds;
    else values are rounded to nearest even once more.

    Args:
      x: rows; the last scale may be of fewer than 128 values.
      x_scale: at least 0; C is H / 128, rounded up.

    Returns:
      (rows, scales).
    """
    largest = jnp.max(x_scale, axis=-1, keepdims=True)
    ratio = jnp.where(largest == 0, 0.0, x_scale / jnp.where(largest == 0, 1.0, largest))
    return _to_e4m3(x.astype(jnp.float32) * per_value(ratio, x.shape[-1])), largest


def per_value(scales: Float32[Array, "*rows C"], width: int) -> Float32[Array, "*rows H"]:
    """Scales per 128 values, the last of which may be of fewer, for each of ``width`` values."""
    return jnp.repeat(scales, 128, axis=-1)[..., :width]


def round_to_bf16(values: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Rounds to bf16, staying in f32. XLA drops a conversion there and back; this it must keep."""
    return jax.lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)


def round_to_e4m3(values: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Rounds to E4M3, to nearest even and saturating, staying in f32, as :func:`round_to_bf16`."""
    clipped = jnp.clip(values, -E4M3_MAX, E4M3_MAX)
    normal = jax.lax.reduce_precision(clipped, exponent_bits=8, mantissa_bits=3)
    subnormal = jnp.round(clipped * 2.0**9) * 2.0**-9
    return jnp.where(jnp.abs(clipped) < 2.0**-6, subnormal, normal)


def _to_e4m3(values: Float32[Array, "*shape"]) -> Float8e4m3fn[Array, "*shape"]:
    """Rounds in f32 first: XLA drops the conversion where one back to f32 follows."""
    return round_to_e4m3(values).astype(jnp.float8_e4m3fn)


def _power_of_two(exponent: Int32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """2**(exponent - 127)."""
    return jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)


def _inverse(amax_bits: Int32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """448 / amax of a bf16 value, correctly rounded everywhere: XLA's division is not, on GPUs."""
    quotient = jnp.asarray(_SEVEN_OVER_MANTISSA)[amax_bits >> 16 & 127]
    exponent = amax_bits >> 23
    power = jax.lax.bitcast_convert_type((260 - exponent) << 23, jnp.float32)  # 2**6 / 2**exponent
    amax = jax.lax.bitcast_convert_type(amax_bits, jnp.float32)
    return jnp.where(exponent == 255, E4M3_MAX / amax, quotient * power)  # of inf: 0, of NaN: NaN
