"""Random packed experts, quantised one at a time."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jax_w4moe.formats import LAYOUT_VERSION, WeightFormat
from jax_w4moe.formats.layout import BLOCK_ROWS
from jax_w4moe.packing import pack_experts, quantize_experts
from jax_w4moe.types import PackedExperts, PackedTensor

EXPERT_INIT = nnx.initializers.lecun_normal(in_axis=-1, out_axis=-2)


def random_experts(
    key: Array,
    sizes: tuple[int, int, int],
    format: WeightFormat,
    use_bias: bool,
    kernel_init: Any,
) -> PackedExperts:
    """Packed experts of sizes (E, H, I), with biases of zero or none."""
    num_experts, hidden, intermediate = sizes

    def one(key: Array) -> tuple[Array, Array]:
        shapes = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
        gate, up, down = (
            kernel_init(k, shape, jnp.float32)[None]
            for k, shape in zip(jax.random.split(key, 3), shapes, strict=True)
        )
        packed = pack_experts(quantize_experts(gate, up, down, format))
        return packed.w13.data[0], packed.w2.data[0]

    @jax.jit
    def all_of_them(key: Array) -> PackedExperts:
        # One expert at a time: all kernels in f32 would be eight times the packed weights.
        w13, w2 = jax.lax.map(one, jax.random.split(key, num_experts))
        exact = jnp.zeros(num_experts, jnp.int32)
        w13_shape = (num_experts, 2 * intermediate, hidden)
        w2_shape = (num_experts, hidden, intermediate)
        w13_bias = jnp.zeros((*w13.shape[:2], BLOCK_ROWS), jnp.float32) if use_bias else None
        w2_bias = jnp.zeros((num_experts, hidden), jnp.float32) if use_bias else None
        return PackedExperts(
            PackedTensor(w13, exact, format, w13_shape, "gate_up", LAYOUT_VERSION),
            PackedTensor(w2, exact, format, w2_shape, "canonical", LAYOUT_VERSION),
            w13_bias,
            w2_bias,
        )

    return all_of_them(key)
