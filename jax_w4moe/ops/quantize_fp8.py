"""FP8 quantisation of token rows on the GPU; the rule is ``quantization.quantize_per_token``'s."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float8e4m3fn, Float32

from jax_w4moe import _ffi


def quantize_fp8_cuda(
    x: BFloat16[Array, "T H"],
) -> tuple[Float8e4m3fn[Array, "T H"], Float32[Array, "T 1"]]:
    """Quantises rows to E4M3 with one f32 scale per row, in one pass over memory.

    Args:
      x: rows, row-major; T and H may be 0. Not checked here.

    Returns:
      (x_fp8, x_scale), bitwise equal to ``quantize_per_token(x)`` up to the sign of a NaN.
    """
    # Types made from x's keep the axes over which it varies inside shard_map.
    x_type = jax.typeof(x)
    x_fp8, x_scale = _ffi.call(
        "quantize_fp8",
        [
            x_type.update(dtype=jnp.float8_e4m3fn),
            x_type.update(shape=(x.shape[0], 1), dtype=jnp.float32),
        ],
        x,
    )
    return x_fp8, x_scale
