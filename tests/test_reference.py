"""The reference against float64 numpy, its batch invariance, and its memory."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_w4moe as w4
from jax_w4moe import reference
from tests.helpers import data, oracle
from tests.helpers.compare import (
    EXACT_RMS,
    MIRRORED_RMS,
    as_float64,
    assert_bitwise,
    relative_rms,
)

BOUNDS = {"exact": EXACT_RMS, "mirrored": MIRRORED_RMS}
ACTIVATIONS = (
    w4.SwiGLU(),
    w4.SwiGLU(alpha=1.702, beta=1.0, limit=7.0),
    w4.SwiGLU(limit=10.0),
    w4.SwiGLU(alpha=0.5, beta=0.0, limit=1.0),
)
# (E, H, I, k, T): few, so that 200 cases share their compilations. T is large enough for an
# RMS of FP8 rounding errors to mean something; single tokens are the same bits (see below).
SHAPES = (
    (5, 96, 32, 3, 65),
    (4, 256, 128, 2, 33),
    (11, 64, 96, 4, 65),
    (1, 32, 288, 1, 100),
    (3, 160, 64, 3, 64),
)


def _oracle_weights(weights: w4.ExpertWeights) -> tuple[np.ndarray, ...]:
    parts = [
        oracle.dequantize_mxfp4(np.asarray(q.codes), np.asarray(q.scales))
        for q in (weights.w13, weights.w2)
    ]
    biases = [None if b is None else as_float64(b) for b in (weights.w13_bias, weights.w2_bias)]
    return (*parts, *biases)


def _case(seed: int) -> Any:
    # Cases of one shape share their compilations, so one test process runs them all.
    marks = [pytest.mark.xdist_group(f"shape{seed % len(SHAPES)}")]
    if seed >= 100:  # in `make test-all`
        marks.append(pytest.mark.matrix)
    return pytest.param(seed, marks=marks)


@pytest.mark.parametrize("seed", [_case(seed) for seed in range(200)])
def test_random_cases_against_the_oracle(seed: int) -> None:
    """200 cases of shape, activation, bias, scale of x and (hostile) routing."""
    rng = np.random.default_rng(seed)
    num_experts, hidden, intermediate, k, num_tokens = SHAPES[seed % len(SHAPES)]
    variant = seed // len(SHAPES) % len(ACTIVATIONS)
    activation, bias = ACTIVATIONS[variant], bool(variant % 2)
    kind = data.ROUTINGS[rng.integers(len(data.ROUTINGS))]
    weights = data.expert_weights(rng, num_experts, hidden, intermediate, bias=bias)
    x = data.tokens(rng, num_tokens, hidden) * jnp.bfloat16(rng.choice([0.1, 1, 10]))
    ids, topk_weights = data.routing(rng, kind, num_tokens, num_experts, k)

    w13, w2, w13_bias, w2_bias = _oracle_weights(weights)
    expected = oracle.moe(
        as_float64(x), w13, w2, np.asarray(ids), as_float64(topk_weights),
        activation, w13_bias, w2_bias,
    )  # fmt: skip
    experts = w4.pack_experts(weights)
    for mode, bound in BOUNDS.items():
        actual = reference.fused_moe(
            x, experts, ids, topk_weights, activation=activation, mode=mode
        )
        assert actual.dtype == jnp.bfloat16
        assert relative_rms(actual, expected) <= bound, (mode, kind)


@pytest.mark.parametrize("format", [w4.INT4_G128, w4.INT4_G32], ids=lambda f: f.name)
@pytest.mark.parametrize("act_dtype", [jnp.float8_e4m3fn, jnp.bfloat16], ids=["fp8", "bf16"])
def test_other_formats_activations_and_scale_rules(
    rng: np.random.Generator, act_dtype: jnp.dtype, format: w4.WeightFormat
) -> None:
    """INT4 with SiTU, and scales that are powers of two, or one for all tokens."""
    weights = data.expert_weights(rng, 4, 256, 128, bias=True, format=format)
    x, (ids, topk_weights) = data.tokens(rng, 65, 256), data.routing(rng, "random", 65, 4, 2)
    w13, w2 = (
        oracle.dequantize_int4(np.asarray(q.codes), np.asarray(q.scales))
        for q in (weights.w13, weights.w2)
    )
    activation = w4.SiTU(gate_bound=2.0, up_bound=3.0)
    expected = oracle.moe(
        as_float64(x), w13, w2, np.asarray(ids), as_float64(topk_weights), activation,
        as_float64(weights.w13_bias), as_float64(weights.w2_bias),
    )  # fmt: skip
    experts = w4.pack_experts(weights)
    run = functools.partial(w4.fused_moe, x, experts, ids, topk_weights, activation=activation)
    exact = reference.fused_moe(x, experts, ids, topk_weights, activation=activation)
    assert relative_rms(exact, expected) <= EXACT_RMS
    rules = (w4.PerToken(), w4.PerToken(pow2=True), w4.Static(0.01, 0.05), w4.Per128())
    results = [run(act_dtype=act_dtype, act_scale=rule) for rule in rules]
    bound = MIRRORED_RMS if act_dtype == jnp.float8_e4m3fn else 5e-3
    for result in results:
        assert relative_rms(result, expected) <= bound
    for other in results[1:]:
        assert bool((results[0] != other).any()) == (act_dtype == jnp.float8_e4m3fn)
    # Powers of two round alike, per token and per 128, but for values that are subnormal in one.
    assert relative_rms(results[3], results[1]) <= 5e-3


@pytest.mark.parametrize("mode", ["exact", "mirrored"])
@pytest.mark.parametrize(
    "shape",
    [(5, 96, 32, 3), pytest.param((8, 256, 160, 4), marks=pytest.mark.matrix)],
    ids=str,
)
def test_a_token_is_bitwise_the_same_alone_and_among_others(
    rng: np.random.Generator, mode: reference.Mode, shape: tuple[int, int, int, int]
) -> None:
    num_experts, hidden, intermediate, k = shape
    experts = w4.pack_experts(
        data.expert_weights(rng, num_experts, hidden, intermediate, bias=True)
    )
    x = data.tokens(rng, 129, hidden)
    ids, weights = data.routing(rng, "random", 129, num_experts, k)

    def run(rows: np.ndarray) -> jax.Array:
        return reference.fused_moe(x[rows], experts, ids[rows], weights[rows], mode=mode)

    everything = np.asarray(run(np.arange(129)))
    for num_tokens in (1, 17):
        rows = rng.permutation(129)[:num_tokens]
        assert_bitwise(run(rows), everything[rows])


@pytest.mark.parametrize("mode", ["exact", "mirrored"])
def test_other_tokens_may_be_nan(rng: np.random.Generator, mode: reference.Mode) -> None:
    experts = w4.pack_experts(data.expert_weights(rng, 4, 64, 32))
    x = data.tokens(rng, 20, 64)
    ids, weights = data.routing(rng, "random", 20, 4, 2)
    clean = np.asarray(reference.fused_moe(x, experts, ids, weights, mode=mode))
    dirty = reference.fused_moe(x.at[3].set(jnp.nan), experts, ids, weights, mode=mode)
    keep = np.arange(20) != 3
    assert_bitwise(np.asarray(dirty)[keep], clean[keep])
    assert np.isnan(as_float64(dirty)[3]).all()


def test_a_slot_without_expert_adds_nothing_even_where_its_weight_is_nan(
    rng: np.random.Generator,
) -> None:
    experts = w4.pack_experts(data.expert_weights(rng, 4, 64, 32))
    x = data.tokens(rng, 3, 64)
    ids = jnp.asarray([[1, -1], [4, 2], [-1, -1]], jnp.int32)
    weights = jnp.asarray([[0.5, np.nan], [np.inf, 0.25], [np.nan, np.nan]], jnp.float32)
    y = reference.fused_moe(x, experts, ids, weights)
    clean = jnp.where(jnp.isfinite(weights), weights, 0.0)
    assert_bitwise(y, reference.fused_moe(x, experts, ids, clean))
    assert not as_float64(y)[2].any()


def test_bfloat16_activations_round_less(rng: np.random.Generator) -> None:
    weights = data.expert_weights(rng, 4, 256, 128, bias=True)
    x = data.tokens(rng, 33, 256)
    ids, topk_weights = data.routing(rng, "random", 33, 4, 2)
    args = (x, w4.pack_experts(weights), ids, topk_weights)
    exact = reference.fused_moe(*args, mode="exact")
    bf16 = reference.fused_moe(*args, act_dtype=jnp.bfloat16, mode="mirrored")
    fp8 = reference.fused_moe(*args, mode="mirrored")
    assert relative_rms(bf16, exact) < 6e-3
    assert 1e-2 < relative_rms(fp8, exact) < MIRRORED_RMS


def test_canonical_weights_are_packed_on_the_way(rng: np.random.Generator) -> None:
    weights = data.expert_weights(rng, 3, 64, 32)
    x, (ids, w) = data.tokens(rng, 5, 64), data.routing(rng, "random", 5, 3, 2)
    packed = reference.fused_moe(x, w4.pack_experts(weights), ids, w)
    assert_bitwise(reference.fused_moe(x, weights, ids, w), packed)


@pytest.mark.parametrize("mode", ["exact", "mirrored"])
def test_at_most_two_experts_are_dequantised_at_a_time(mode: reference.Mode) -> None:
    """The compiled program's temporary memory: two f32 experts, whatever the number of experts."""
    hidden, intermediate = 512, 256
    one_expert = 3 * hidden * intermediate * 4

    def temporary_bytes(num_experts: int) -> int:
        weights = data.expert_weights(np.random.default_rng(0), 1, hidden, intermediate)
        experts = jax.eval_shape(w4.pack_experts, weights)

        def widen(s: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((num_experts, *s.shape[1:]), s.dtype)

        experts = jax.tree.map(widen, experts)
        for name in ("w13", "w2"):
            tensor = getattr(experts, name)
            tensor = dataclasses.replace(tensor, shape=(num_experts, *tensor.shape[1:]))
            experts = dataclasses.replace(experts, **{name: tensor})
        x = jax.ShapeDtypeStruct((4, hidden), jnp.bfloat16)
        ids = jax.ShapeDtypeStruct((4, 2), jnp.int32)
        w = jax.ShapeDtypeStruct((4, 2), jnp.float32)
        program = reference.fused_moe.lower(x, experts, ids, w, mode=mode).compile()
        return int(program.memory_analysis().temp_size_in_bytes)

    few, many = temporary_bytes(4), temporary_bytes(64)
    assert few <= 2 * one_expert + (1 << 20)
    assert many - few < 1 << 16


@pytest.mark.parametrize("mode", ["exact", "mirrored"])
def test_expert_mlp_in_both_layouts(rng: np.random.Generator, mode: reference.Mode) -> None:
    weights = data.expert_weights(rng, 4, 96, 64, bias=True)
    experts, activation = w4.pack_experts(weights), ACTIVATIONS[1]
    w13, w2, w13_bias, w2_bias = _oracle_weights(weights)
    sizes, longest = np.array([3, 0, 21, 1]), 24
    masked = data.tokens(rng, 4, longest, 96)
    live = np.arange(longest) < sizes[:, None]
    expected = np.stack(
        [oracle.mlp(as_float64(masked[e]), e, w13, w2, activation, w13_bias, w2_bias)
         for e in range(4)]
    )  # fmt: skip
    expected[~live] = 0
    group_sizes = jnp.asarray(sizes, jnp.int32)
    options = {"activation": activation, "mode": mode}
    out = reference.expert_mlp(masked, experts, group_sizes, **options)
    assert relative_rms(out, expected) <= BOUNDS[mode]
    assert not as_float64(out)[~live].any()

    rows = jnp.concatenate([masked[live], data.tokens(rng, 5, 96)])
    grouped = reference.expert_mlp(rows, experts, group_sizes, **options)
    assert_bitwise(grouped[:25], np.asarray(out)[live])
    assert not as_float64(grouped)[25:].any()
    counts = jnp.asarray([3, -7, 10_000, 5], jnp.int32)  # clipped to the rows there are
    clipped = reference.expert_mlp(rows, experts, counts, **options)
    assert_bitwise(clipped[:3], np.asarray(grouped)[:3])
    assert np.isfinite(as_float64(clipped)).all()


@pytest.mark.parametrize("gate_up", [False, True])
def test_grouped_matmul_against_the_oracle(rng: np.random.Generator, gate_up: bool) -> None:
    q = data.quantized(rng, (3, 192, 160))
    rhs = w4.pack(q, row_order="gate_up" if gate_up else "canonical")
    matrix = oracle.dequantize_mxfp4(np.asarray(q.codes), np.asarray(q.scales))
    lhs, sizes = data.tokens(rng, 40, 160), np.array([17, 0, 20])
    expert = np.repeat([0, 1, 2], sizes)
    expected = np.zeros((40, 192))
    expected[:37] = np.einsum("mk,mnk->mn", as_float64(lhs)[:37], matrix[expert])
    group_sizes = jnp.asarray(sizes, jnp.int32)
    exact = reference.grouped_matmul(lhs, rhs, group_sizes, mode="exact")
    assert exact.dtype == jnp.float32
    assert relative_rms(exact, expected) < 1e-6
    assert not np.asarray(exact)[37:].any()
    mirrored = reference.grouped_matmul(lhs, rhs, group_sizes, mode="mirrored")
    assert relative_rms(mirrored, expected) < MIRRORED_RMS


def test_one_hot_rows_give_back_the_weights() -> None:
    """448 times each weight, bit for bit, for all codes and every spread of scales up to 14."""
    codes = np.tile(np.arange(16, dtype=np.uint8), (32, 8))
    scales = np.stack([np.array([120, 120 + s % 15, 120, 121]) for s in range(32)])
    q = w4.QuantizedTensor(
        jnp.asarray(codes[:, ::2] | codes[:, 1::2] << 4)[None],
        jnp.asarray(np.clip(scales, 120, 134).astype(np.uint8))[None],
        w4.MXFP4,
    )
    lhs = (jnp.eye(128) * 448).astype(jnp.float8_e4m3fn)
    out = reference.grouped_matmul(
        lhs, w4.pack(q), jnp.asarray([128], jnp.int32), x_scale=jnp.float32(1), mode="mirrored"
    )
    expected = 448 * oracle.dequantize_mxfp4(np.asarray(q.codes), np.asarray(q.scales))[0].T
    np.testing.assert_array_equal(np.asarray(out), expected.astype(np.float32))
