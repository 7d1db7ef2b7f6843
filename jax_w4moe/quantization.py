"""FP8 activation quantisation in jax.numpy: the rule that the CUDA op repeats bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn, Float32

E4M3_MAX = 448.0
SMALLEST_AMAX = 2.0**-100
"""A row whose largest magnitude is below this is scaled as if it were this: no division by zero."""


@dataclasses.dataclass(frozen=True)
class PerToken:
    """One f32 scale per token, taken from its largest magnitude."""


def quantize_per_token(
    x: Float[Array, "*rows H"],
) -> tuple[Float8e4m3fn[Array, "*rows H"], Float32[Array, "*rows 1"]]:
    """Quantises rows to E4M3, saturating, one scale per row.

    ``x_scale = amax * f32(1/448)`` and ``x_fp8 = e4m3(x * (448 / amax))``, each operation rounded
    once in f32, then to nearest even in E4M3. The row's amax is an integer maximum of the bits of
    ``|x|``: independent of order, and NaN wins. A NaN anywhere makes its whole row NaN.

    Args:
      x: rows to quantise; H may be 0.

    Returns:
      (x_fp8, x_scale).
    """
    values = x.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(jnp.abs(values), jnp.int32)
    smallest = jnp.float32(SMALLEST_AMAX).view(jnp.int32)
    amax_bits = jnp.max(bits, axis=-1, keepdims=True, initial=smallest)
    amax = jax.lax.bitcast_convert_type(amax_bits, jnp.float32)
    scaled = values * (jnp.float32(E4M3_MAX) / amax)
    x_fp8 = jnp.clip(scaled, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)
    return x_fp8, amax * jnp.float32(1.0 / E4M3_MAX)
