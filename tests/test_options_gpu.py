"""Activations and rules of FP8 scales that are options: the kernels against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_w4moe as w4
from jax_w4moe import reference
from jax_w4moe.quantization import ScaleRule, quantize, round_per_128
from tests.helpers import data
from tests.helpers.compare import assert_bitwise_or_nan, relative_rms

pytestmark = pytest.mark.gpu

RULES = (w4.PerToken(), w4.PerToken(pow2=True), w4.Static(0.01, 0.25))
EVERY_RULE = (*RULES, w4.Per128())
BF16_ROUNDING = 3e-3


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rows_are_quantised_as_the_rule_says(rng: np.random.Generator, rule: ScaleRule) -> None:
    """Bitwise what the same rows give, quantised before; amax of every mantissa, zeros, NaN."""
    x = np.array(data.tokens(rng, 300, 256))
    x[:128, 7] = 8 * (1 + np.arange(128) / 128)
    x[128], x[129, 3] = 0, np.nan
    x[130] *= 2.0**-60
    packed = w4.pack(data.quantized(rng, (2, 64, 256)))
    sizes = jnp.asarray([130, 170], jnp.int32)
    kernel = functools.partial(
        w4.grouped_matmul, implementation="cuda_sm90", preferred_element_type=jnp.float32
    )
    x_fp8, x_scale = jax.jit(quantize, static_argnums=1)(jnp.asarray(x), rule)
    expected = np.asarray(kernel(x_fp8, packed, sizes, x_scale=x_scale))
    actual = np.asarray(kernel(jnp.asarray(x), packed, sizes, act_scale=rule))
    assert_bitwise_or_nan(actual, expected)


def test_rows_are_rounded_per_128_values(rng: np.random.Generator) -> None:
    """Bitwise what the same rows give with bf16 activations, rounded before."""
    x = np.array(data.tokens(rng, 300, 320))
    x[:128, 7] = 8 * (1 + np.arange(128) / 128)
    x[128], x[129, 3], x[130, 200] = 0, np.nan, np.inf
    x[131] *= 2.0**-60
    x[132, :128] *= 2.0**-12
    packed = w4.pack(data.quantized(rng, (2, 64, 320)))
    sizes = jnp.asarray([130, 170], jnp.int32)
    kernel = functools.partial(
        w4.grouped_matmul, implementation="cuda_sm90", preferred_element_type=jnp.float32
    )
    rounded = jax.jit(round_per_128)(jnp.asarray(x)).astype(jnp.bfloat16)
    expected = np.asarray(kernel(rounded, packed, sizes, act_dtype=jnp.bfloat16))
    actual = np.asarray(kernel(jnp.asarray(x), packed, sizes, act_scale=w4.Per128()))
    assert_bitwise_or_nan(actual, expected)


@pytest.mark.parametrize("rule", EVERY_RULE, ids=str)
@pytest.mark.parametrize(
    "activation", [w4.SwiGLU(limit=10.0), w4.SiTU(), w4.SiTU(1.5, 2.0)], ids=str
)
def test_layer_against_the_reference(
    rng: np.random.Generator, rule: ScaleRule, activation: w4.SwiGLU | w4.SiTU
) -> None:
    hidden, intermediate, num_experts, top_k = 384, 640, 5, 3
    experts = data.packed_experts((hidden, intermediate, num_experts, top_k), bias=True)
    x = data.tokens(rng, 70, hidden)
    ids, weights = data.routing(rng, "random", 70, num_experts, top_k)
    for act_dtype, bound in ((jnp.float8_e4m3fn, 1e-2), (jnp.bfloat16, BF16_ROUNDING)):
        options = {"act_dtype": act_dtype, "act_scale": rule, "activation": activation}
        y = w4.fused_moe(x, experts, ids, weights, implementation="cuda_sm90", **options)
        expected = reference.fused_moe(x, experts, ids, weights, mode="mirrored", **options)
        assert relative_rms(y, expected) <= bound
        sizes = jnp.asarray([10, 0, 40, 15, 5], jnp.int32)
        out = w4.expert_mlp(x, experts, sizes, implementation="cuda_sm90", **options)
        expected = reference.expert_mlp(x, experts, sizes, mode="mirrored", **options)
        assert relative_rms(out, expected) <= bound
