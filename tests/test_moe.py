"""The public ops: what they compute, how they transform, and every refusal with its sentence."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_w4moe as w4
from jax_w4moe import implementation as implementations
from jax_w4moe import reference
from tests.helpers import data
from tests.helpers.compare import as_float64, assert_bitwise, relative_rms

E, H, I, K, T = 5, 96, 32, 3, 9  # noqa: E741


@pytest.fixture(scope="module")
def layer() -> tuple[w4.PackedExperts, jax.Array, jax.Array, jax.Array]:
    """(experts, x, topk_ids, topk_weights) of one small layer with biases."""
    rng = np.random.default_rng(0)
    experts = w4.pack_experts(data.expert_weights(rng, E, H, I, bias=True))
    return experts, data.tokens(rng, T, H), *data.routing(rng, "random", T, E, K)


Layer = tuple[w4.PackedExperts, jax.Array, jax.Array, jax.Array]


# --- values -------------------------------------------------------------------------------------


def test_fused_moe_is_the_mirrored_reference(layer: Layer) -> None:
    experts, x, ids, weights = layer
    activation = w4.SwiGLU(alpha=1.702, beta=1.0, limit=7.0)
    expected = reference.fused_moe(x, experts, ids, weights, activation=activation, mode="mirrored")
    for implementation in (None, "xla"):
        y = w4.fused_moe(
            x, experts, ids, weights, activation=activation, implementation=implementation
        )
        assert y.shape == (T, H) and y.dtype == jnp.bfloat16
        assert_bitwise(y, expected)


def test_fused_moe_is_its_parts(layer: Layer) -> None:
    """Permute, expert_mlp and combine by hand give the same bits."""
    experts, x, ids, weights = layer
    flat = np.asarray(ids).reshape(-1)
    order = np.argsort(flat, kind="stable")
    sizes = jnp.asarray(np.bincount(flat, minlength=E), jnp.int32)
    rows = np.asarray(w4.expert_mlp(x[order // K], experts, sizes)).astype(np.float32)
    slots = np.empty((T * K, H), np.float32)
    slots[order] = rows
    y = np.zeros((T, H), np.float32)
    for slot in range(K):
        y += np.asarray(weights)[:, slot, None] * slots.reshape(T, K, H)[:, slot]
    assert relative_rms(w4.fused_moe(x, experts, ids, weights), y) < 3e-3  # the bf16 rounding


def test_expert_mlp_is_its_parts(layer: Layer) -> None:
    """Two grouped_matmuls with the activation between them."""
    experts, x, _, _ = layer
    experts = dataclasses.replace(experts, w13_bias=None, w2_bias=None)
    sizes = jnp.asarray([2, 0, 4, 1, 2], jnp.int32)
    f32 = jnp.float32
    gate, up = jnp.split(
        w4.grouped_matmul(x, experts.w13, sizes, preferred_element_type=f32), 2, axis=1
    )
    h = w4.SwiGLU()(gate, up).astype(jnp.bfloat16)
    out = w4.grouped_matmul(h, experts.w2, sizes)
    assert out.dtype == jnp.bfloat16
    assert_bitwise(w4.expert_mlp(x, experts, sizes), out)


def test_fp8_tokens_with_their_scale_give_the_same_bits(layer: Layer) -> None:
    experts, x, ids, weights = layer
    expected = w4.fused_moe(x, experts, ids, weights)
    x_fp8, x_scale = w4.quantize_fp8(x)
    assert_bitwise(w4.fused_moe(x_fp8, experts, ids, weights, x_scale=x_scale), expected)
    one = jnp.float32(0.25)
    per_row = w4.fused_moe(x_fp8, experts, ids, weights, x_scale=jnp.full((T, 1), one))
    assert_bitwise(w4.fused_moe(x_fp8, experts, ids, weights, x_scale=one), per_row)
    assert_bitwise(w4.fused_moe(x_fp8, experts, ids, weights, x_scale=0.25), per_row)


def test_fp8_tokens_with_a_scale_per_128_values(rng: np.random.Generator) -> None:
    """A dispatch that quantises so; powers of two fold exactly."""
    experts = w4.pack_experts(data.expert_weights(rng, 3, 256, 128))
    ids, weights = data.routing(rng, "random", 7, 3, 2)
    x = jnp.asarray(rng.uniform(1, 8, (7, 256)), jnp.float8_e4m3fn)
    scales = jnp.asarray([[1.0, 0.25]] * 7, jnp.float32)
    y = w4.fused_moe(x, experts, ids, weights, x_scale=scales)
    quartered = x.at[:, 128:].set((x[:, 128:].astype(jnp.float32) / 4).astype(x.dtype))
    assert_bitwise(y, w4.fused_moe(quartered, experts, ids, weights, x_scale=1.0))
    masked = w4.expert_mlp(
        x[None, :6].reshape(3, 2, 256), experts, jnp.full(3, 2, jnp.int32),
        x_scale=scales[:6].reshape(3, 2, 2),
    )  # fmt: skip
    assert masked.shape == (3, 2, 256)
    # As they are: rounding again by the same rule changes nothing.
    bf16 = (x.astype(jnp.float32) * jnp.repeat(scales, 128, axis=1)).astype(jnp.bfloat16)
    rule = w4.Per128()
    y = w4.fused_moe(x, experts, ids, weights, x_scale=scales, act_scale=rule)
    assert_bitwise(y, w4.fused_moe(bf16, experts, ids, weights, act_scale=rule))
    y = w4.fused_moe(x, experts, ids, weights, x_scale=0.25, act_scale=rule)
    quarter = jnp.full((7, 1), 0.25)
    assert_bitwise(y, w4.fused_moe(x, experts, ids, weights, x_scale=quarter, act_scale=rule))


def test_numpy_arrays_are_accepted(layer: Layer) -> None:
    experts, x, ids, weights = layer
    y = w4.fused_moe(np.asarray(x), experts, np.asarray(ids), np.asarray(weights))
    assert_bitwise(y, w4.fused_moe(x, experts, ids, weights))
    canonical = jax.tree.map(np.asarray, w4.unpack_experts(experts))
    jax.tree.map(assert_bitwise, w4.pack_experts(canonical).w13, experts.w13)


@pytest.mark.parametrize("kind", data.ROUTINGS)
def test_hostile_routings_are_finite_and_only_live_slots_count(
    layer: Layer, rng: np.random.Generator, kind: str
) -> None:
    experts, x, _, _ = layer
    ids, weights = data.routing(rng, kind, T, E, K)
    y = as_float64(w4.fused_moe(x, experts, ids, weights))
    assert np.isfinite(y).all()
    live = (np.asarray(ids) >= 0) & (np.asarray(ids) < E)
    assert (y[~live.any(axis=1)] == 0).all()
    assert (np.abs(y[live.any(axis=1)]).sum(axis=1) > 0).all()


def test_no_tokens(layer: Layer) -> None:
    experts, x, ids, weights = layer
    y = w4.fused_moe(x[:0], experts, ids[:0], weights[:0])
    assert y.shape == (0, H) and y.dtype == jnp.bfloat16
    sizes = jnp.zeros(E, jnp.int32)
    assert w4.expert_mlp(x[:0], experts, sizes).shape == (0, H)
    assert w4.expert_mlp(jnp.zeros((E, 0, H), jnp.bfloat16), experts, sizes).shape == (E, 0, H)
    assert w4.grouped_matmul(x[:0], experts.w13, sizes).shape == (0, 2 * I)
    assert w4.quantize_fp8(x[:0])[1].shape == (0, 1)


# --- transformations ----------------------------------------------------------------------------


def _loss(experts: w4.PackedExperts, ids: jax.Array) -> Callable[..., jax.Array]:
    def loss(x: jax.Array, weights: jax.Array) -> jax.Array:
        y = w4.fused_moe(x, experts, ids, weights).astype(jnp.float32)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

    return loss


def test_jit(layer: Layer) -> None:
    experts, x, ids, weights = layer
    eager = w4.fused_moe(x, experts, ids, weights)
    assert_bitwise(jax.jit(w4.fused_moe)(x, experts, ids, weights), eager)


def test_vmap_folds_into_tokens(layer: Layer) -> None:
    experts, x, ids, weights = layer
    xs = jnp.stack([x, -x])
    expected = [w4.fused_moe(row, experts, ids, weights) for row in xs]
    mapped = jax.vmap(lambda row: w4.fused_moe(row, experts, ids, weights))(xs)
    assert_bitwise(mapped, jnp.stack(expected))
    all_mapped = jax.vmap(w4.fused_moe, (0, None, 0, 0))
    repeated = (jnp.stack([ids, ids[::-1]]), jnp.stack([weights, weights]))
    mapped = jax.jit(all_mapped)(xs, experts, *repeated)
    assert_bitwise(mapped[0], expected[0])
    nested = jax.vmap(jax.vmap(lambda row: w4.fused_moe(row, experts, ids, weights)))(xs[None])
    assert_bitwise(nested[0], jnp.stack(expected))


def test_gradients_are_those_of_the_float_layer(layer: Layer) -> None:
    """Against jax.grad of the same layer written with dense f32 kernels."""
    experts, x, ids, weights = layer
    canonical = w4.unpack_experts(experts)
    w_gate, w_up, w_down = w4.dequantize_experts(canonical)
    w13 = jnp.concatenate([w_gate, w_up], axis=1)

    def dense(x: jax.Array, weights: jax.Array) -> jax.Array:
        gate, up = jnp.split(
            jnp.einsum("th,tknh->tkn", x, w13[ids]) + canonical.w13_bias[ids], 2, axis=-1
        )
        h = jax.nn.silu(gate) * up
        rows = jnp.einsum("tki,tkhi->tkh", h, w_down[ids]) + canonical.w2_bias[ids]
        y = jnp.sum(weights[..., None] * rows, axis=1)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

    expected = jax.grad(dense, (0, 1))(x.astype(jnp.float32), weights)
    for function in (jax.grad, lambda *a: jax.jit(jax.grad(*a))):
        dx, dweights = function(_loss(experts, ids), (0, 1))(x, weights)
        assert dx.dtype == jnp.bfloat16 and dweights.dtype == jnp.float32
        assert relative_rms(dx, expected[0]) < 4e-3  # rounded to bf16, as is the cotangent
        assert relative_rms(dweights, expected[1]) < 4e-3


def test_gradients_of_slots_without_expert_are_zero(layer: Layer) -> None:
    experts, x, ids, weights = layer
    ids = ids.at[0].set(-1).at[1, 1].set(E)
    dx, dweights = jax.grad(_loss(experts, ids), (0, 1))(x, weights)
    assert not as_float64(dx)[0].any()
    assert not np.asarray(dweights)[0].any() and np.asarray(dweights)[1, 1] == 0
    assert np.asarray(dweights)[1, 0] != 0


def test_vmap_of_grad_and_remat(layer: Layer) -> None:
    experts, x, ids, weights = layer
    gradient = jax.grad(_loss(experts, ids))
    expected = gradient(x, weights)
    mapped = jax.vmap(gradient, (0, None))(jnp.stack([x, x]), weights)
    assert relative_rms(mapped[1], expected) < 4e-3
    remat = jax.grad(jax.checkpoint(_loss(experts, ids)))
    assert_bitwise(remat(x, weights), expected)


def test_gradients_of_the_grouped_ops(layer: Layer) -> None:
    experts, x, _, _ = layer
    sizes = jnp.asarray([2, 0, 4, 1, 1], jnp.int32)

    def by_hand(rows: jax.Array) -> jax.Array:
        canonical = w4.unpack_experts(experts)
        expert = np.repeat(np.arange(E), np.asarray(sizes))
        w_gate, w_up, w_down = (w[expert] for w in w4.dequantize_experts(canonical))
        kernels = jnp.concatenate([w_gate, w_up], axis=1)
        gate_up = jnp.einsum("mh,mnh->mn", rows[:8], kernels) + canonical.w13_bias[expert]
        gate, up = jnp.split(gate_up, 2, axis=1)
        out = jnp.einsum("mi,mhi->mh", jax.nn.silu(gate) * up, w_down)
        return jnp.sum(out + canonical.w2_bias[expert])

    expected = jax.grad(by_hand)(x.astype(jnp.float32))
    actual = jax.grad(lambda r: w4.expert_mlp(r, experts, sizes).astype(jnp.float32).sum())(x)
    assert relative_rms(actual, expected) < 4e-3
    assert not as_float64(actual)[8].any()

    dlhs = jax.grad(lambda r: w4.grouped_matmul(r, experts.w13, sizes).astype(jnp.float32).sum())(x)
    w_gate, w_up, _ = w4.dequantize_experts(w4.unpack_experts(experts))
    column_sums = np.asarray(w_gate).sum(axis=1) + np.asarray(w_up).sum(axis=1)
    rows = column_sums[np.repeat(np.arange(E), np.asarray(sizes))]
    assert relative_rms(dlhs[:8], rows) < 4e-3


REFUSED_TRANSFORMS: dict[str, tuple[Callable[..., Any], str]] = {
    "jvp": (
        lambda f, x, p, i, w: jax.jvp(lambda x: f(x, p, i, w), (x,), (x,)),
        "fused_moe: forward mode",
    ),
    "jacfwd": (
        lambda f, x, p, i, w: jax.jacfwd(lambda x: f(x, p, i, w))(x),
        "fused_moe: forward mode",
    ),
    "vmap over weights": (
        lambda f, x, p, i, w: jax.vmap(f, (None, 0, None, None))(
            x, jax.tree.map(lambda a: a[None], p), i, w
        ),
        "fused_moe: vmap over weights or group sizes is not supported",
    ),
    "gradient to a bias": (
        lambda f, x, p, i, w: jax.grad(
            lambda b: f(x, dataclasses.replace(p, w2_bias=b), i, w).astype(jnp.float32).sum()
        )(p.w2_bias),
        "fused_moe: no gradient to packed weights or their biases",
    ),
    "gradient to x_scale": (
        lambda f, x, p, i, w: jax.grad(
            lambda s: f(*_fp8(x), p, i, w, x_scale=s).astype(jnp.float32).sum()
        )(jnp.float32(1)),
        "fused_moe: no gradient to x_scale; differentiable: x, topk_weights",
    ),
    "gradient to an fp8 x": (
        lambda f, x, p, i, w: jax.vjp(lambda x: f(x, p, i, w, x_scale=jnp.float32(1)), *_fp8(x)),
        "fused_moe: no gradient to a float8_e4m3fn x; pass it as bfloat16",
    ),
}


def _fp8(x: jax.Array) -> tuple[jax.Array]:
    return (x.astype(jnp.float8_e4m3fn),)


@pytest.mark.parametrize("name", REFUSED_TRANSFORMS)
def test_refused_transforms(layer: Layer, name: str) -> None:
    experts, x, ids, weights = layer
    transform, sentence = REFUSED_TRANSFORMS[name]
    with pytest.raises(NotImplementedError, match=re.escape(sentence)):
        transform(w4.fused_moe, x, experts, ids, weights)


def test_vmap_of_grouped_ops_is_refused(layer: Layer) -> None:
    experts, x, _, _ = layer
    sizes = jnp.full(E, 1, jnp.int32)
    with pytest.raises(
        NotImplementedError, match="expert_mlp: vmap is not supported; put all rows"
    ):
        jax.vmap(lambda r: w4.expert_mlp(r, experts, sizes))(x[None])


# --- lowering -----------------------------------------------------------------------------------


def test_lowering_to_cuda_holds_our_custom_call() -> None:
    x = jax.ShapeDtypeStruct((4, 96), jnp.bfloat16)
    traced = jax.jit(w4.quantize_fp8).trace(x)
    target = f"jax_w4moe_quantize_fp8_v{w4.formats.LAYOUT_VERSION}"
    assert target in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize("op", ["quantize_fp8", "fused_moe"])
def test_export_for_cpu_and_cuda(layer: Layer, op: str) -> None:
    """One artefact for both platforms, made and (on the CPU) run on a machine without a GPU."""
    experts, x, ids, weights = layer
    args = (x,) if op == "quantize_fp8" else (x, experts, ids, weights)
    function = getattr(w4, op)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
    exported = jax.export.export(
        jax.jit(function),
        platforms=("cpu", "cuda"),
        disabled_checks=w4.DISABLE_JAX_EXPORT_CHECKS,
    )(*shapes)
    assert set(exported.platforms) == {"cpu", "cuda"}
    jax.tree.map(assert_bitwise, exported.call(*args), function(*args))
    if op == "quantize_fp8":
        with pytest.raises(ValueError, match="jax_w4moe_quantize_fp8"):
            jax.export.export(jax.jit(function), platforms=("cuda",))(*shapes)


# --- refusals -----------------------------------------------------------------------------------

BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank of x": (
        {"x": jnp.zeros((1, T, H), jnp.bfloat16)},
        ValueError,
        "x: shape (1, 9, 96) has rank 3, need [T, H]; reshape it.",
    ),
    "size of x": (
        {"x": jnp.zeros((T, 64), jnp.bfloat16)},
        ValueError,
        "x: shape (9, 64) ends in 64, the weights contract over 96;",
    ),
    "dtype of x": (
        {"x": jnp.zeros((T, H))},
        TypeError,
        "x: dtype float32, need bfloat16 (or float8_e4m3fn with x_scale); use",
    ),
    "list for x": ({"x": [1.0]}, TypeError, "x: got list, need an array [T, H]."),
    "fp8 without scale": (
        {"x": jnp.zeros((T, H), jnp.float8_e4m3fn)},
        ValueError,
        "x is float8_e4m3fn but x_scale is None; pass its scale",
    ),
    "scale without fp8": (
        {"x_scale": jnp.float32(1)},
        ValueError,
        "x_scale was given but x is bfloat16;",
    ),
    "shape of x_scale": (
        {"x": jnp.zeros((T, H), jnp.float8_e4m3fn), "x_scale": jnp.ones((T, 3))},
        ValueError,
        "x_scale: shape (9, 3), need () or (9, 1)",
    ),
    "dtype of x_scale": (
        {"x": jnp.zeros((T, H), jnp.float8_e4m3fn), "x_scale": jnp.ones((), jnp.bfloat16)},
        TypeError,
        "x_scale: dtype bfloat16, need float32",
    ),
    "float ids": (
        {"topk_ids": jnp.zeros((T, K))},
        TypeError,
        "topk_ids: dtype float32, need int32 expert numbers; use topk_ids.astype(jnp.int32).",
    ),
    "rank of ids": (
        {"topk_ids": jnp.zeros(T, jnp.int32)},
        ValueError,
        "topk_ids: shape (9,) has rank 1, need i32[T, k]; reshape it.",
    ),
    "rows of ids": (
        {"topk_ids": jnp.zeros((T + 1, K), jnp.int32)},
        ValueError,
        "topk_ids: shape (10, 3), need (9, 3): x has T=9 tokens.",
    ),
    "k > E": (
        {
            "topk_ids": jnp.zeros((T, E + 1), jnp.int32),
            "topk_weights": jnp.zeros((T, E + 1)),
        },
        ValueError,
        "topk_ids: k=6 is not in 1..5 (at most 32, and the weights hold E=5 experts); lower k.",
    ),
    "dtype of weights": (
        {"topk_weights": jnp.zeros((T, K), jnp.bfloat16)},
        TypeError,
        "topk_weights: dtype bfloat16, need float32;",
    ),
    "shape of weights": (
        {"topk_weights": jnp.zeros((T, 2))},
        ValueError,
        "topk_weights: shape (9, 2), need (9, 3): one weight per id in topk_ids.",
    ),
    "experts not packed": (
        {"experts": "weights"},
        TypeError,
        "experts: got str, need PackedExperts; call pack_experts().",
    ),
    "activation": (
        {"activation": "silu"},
        NotImplementedError,
        "activation='silu': only SwiGLU(...) and SiTU(...) exist.",
    ),
    "act_dtype": ({"act_dtype": jnp.int8}, TypeError, "act_dtype=int8: use jnp.float8_e4m3fn or"),
    "act_scale": (
        {"act_scale": 1.0},
        NotImplementedError,
        "act_scale=1.0: only PerToken(...), Per128() and Static(...) exist.",
    ),
    "implementation": (
        {"implementation": "triton"},
        ValueError,
        'implementation=\'triton\' is unknown; use None, "xla" or "cuda_sm90".',
    ),
    "type of tactic": (
        {"tactic": 64},
        TypeError,
        "tactic: got int, need a Tactic; tactics() lists them.",
    ),
    "tactic that is not compiled": (
        {"tactic": w4.Tactic(tile_tokens=24)},
        ValueError,
        "Tactic(tile_tokens=24) is not compiled; use one of Tactic(tile_tokens=",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_fused_moe_refuses(layer: Layer, name: str, jit: bool) -> None:
    experts, x, ids, weights = layer
    changes, error, sentence = BAD_CALLS[name]
    arrays = {"x": x, "experts": experts, "topk_ids": ids, "topk_weights": weights, **changes}
    static = {k: v for k, v in arrays.items() if not jax.tree.leaves(v) or not _is_array_tree(v)}
    dynamic = {k: v for k, v in arrays.items() if k not in static}

    def call(dynamic: dict[str, Any]) -> jax.Array:
        return w4.fused_moe(**dynamic, **static)

    with pytest.raises(error, match=re.escape(sentence)):
        (jax.jit(call) if jit else call)(dynamic)


def _is_array_tree(value: Any) -> bool:
    return all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value))


def test_what_has_no_kernel() -> None:
    fp8, bf16, unsupported = jnp.float8_e4m3fn, jnp.bfloat16, implementations.unsupported
    for x_dtype, act_dtype in ((bf16, fp8), (bf16, bf16), (fp8, fp8)):
        assert unsupported(x_dtype, act_dtype) is None
    assert unsupported(fp8, bf16) == "act_dtype=bfloat16 for x of float8_e4m3fn"
    assert implementations.choose("fused_moe", None, "something") == "xla"
    assert implementations.without_kernel("fused_moe", "both", "something") == "xla"
    with pytest.raises(NotImplementedError, match="fused_moe: something has no SM90 kernel; pass"):
        implementations.without_kernel("fused_moe", "cuda_sm90", "something")


def test_another_layout_version_is_refused(layer: Layer) -> None:
    experts, x, ids, weights = layer
    old = dataclasses.replace(experts, w13=dataclasses.replace(experts.w13, layout_version=0))
    sentence = "experts.w13: packed with layout version 0, this library reads version 1; pack the"
    with pytest.raises(ValueError, match=sentence):
        w4.fused_moe(x, old, ids, weights)


def test_arrays_that_are_not_what_their_type_says_are_refused(layer: Layer) -> None:
    """A shard, a cut array or mismatched parts: the kernels must never read out of bounds."""
    experts, x, ids, weights = layer
    w13, w2 = experts.w13, experts.w2
    fewer = dataclasses.replace(w2, data=w2.data[:3])
    other = dataclasses.replace(w2, data=w2.data[:3], shape=(3, H, I))
    canonical = w4.pack(w4.unpack(w13))
    assert experts.w13_bias is not None
    cases = {
        "experts.w2.data: shape (3, 2, 1, 4352), need (5, 2, 1, 4352): E=5, N=96, K=32": {
            "w2": fewer
        },
        "experts.w13.data: shape (5, 3, 1, 4352), need (5, 4, 1, 4352)": {
            "w13": dataclasses.replace(w13, data=w13.data[:, :3])
        },
        "experts: w13 is [5, 64, 96] with gate_up rows and w2 is [3, 96, 32]; need": {"w2": other},
        "experts: w13 is [5, 64, 96] with canonical rows": {"w13": canonical},
        "experts.w13_bias: shape (5, 3, 64), need (5, 4, 64)": {
            "w13_bias": experts.w13_bias[:, :3]
        },
        "experts.w2_bias: shape (96,), need (5, 96)": {"w2_bias": jnp.zeros(H)},
    }
    for sentence, changes in cases.items():
        with pytest.raises(ValueError, match=re.escape(sentence)):
            w4.fused_moe(x, dataclasses.replace(experts, **changes), ids, weights)


@pytest.mark.parametrize("op", ["fused_moe", "expert_mlp", "grouped_matmul", "quantize_fp8"])
def test_forcing_the_kernels_without_a_hopper_gpu_is_refused(layer: Layer, op: str) -> None:
    if w4.is_available():
        pytest.skip("a Hopper GPU and the extension are here")
    experts, x, ids, weights = layer
    sizes = jnp.ones(E, jnp.int32)
    calls: dict[str, tuple[Any, ...]] = {
        "fused_moe": (x, experts, ids, weights),
        "expert_mlp": (x, experts, sizes),
        "grouped_matmul": (x, experts.w13, sizes),
        "quantize_fp8": (x,),
    }
    reason = w4.why_unavailable()
    assert reason
    sentence = f'{op}: implementation="cuda_sm90" cannot run here: {reason}'
    with pytest.raises(RuntimeError, match=re.escape(sentence)):
        getattr(w4, op)(*calls[op], implementation="cuda_sm90")


BAD_GROUPS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank of rows": (
        {"rows": jnp.zeros(H, jnp.bfloat16)},
        ValueError,
        "rows: shape (96,) has rank 1, need [M, H] or [E, M_max, H]; reshape it.",
    ),
    "experts of the masked layout": (
        {"rows": jnp.zeros((E + 1, 4, H), jnp.bfloat16)},
        ValueError,
        "rows: shape (6, 4, 96) holds 6 experts, the weights hold E=5; pass [E, M_max, H].",
    ),
    "dtype of sizes": (
        {"group_sizes": jnp.ones(E)},
        TypeError,
        "group_sizes: dtype float32, need int32; cast it.",
    ),
    "number of sizes": (
        {"group_sizes": jnp.ones(E - 1, jnp.int32)},
        ValueError,
        "group_sizes: shape (4,), need (5,): one count per expert of the weights.",
    ),
}


@pytest.mark.parametrize("name", BAD_GROUPS)
def test_expert_mlp_refuses(layer: Layer, name: str) -> None:
    experts, x, _, _ = layer
    changes, error, sentence = BAD_GROUPS[name]
    call = {"rows": x, "group_sizes": jnp.ones(E, jnp.int32), **changes}
    with pytest.raises(error, match=re.escape(sentence)):
        w4.expert_mlp(call["rows"], experts, call["group_sizes"])


def test_grouped_matmul_refuses(layer: Layer) -> None:
    experts, x, _, _ = layer
    sizes = jnp.ones(E, jnp.int32)
    with pytest.raises(TypeError, match="rhs: got PackedExperts, need a PackedTensor; call pack"):
        w4.grouped_matmul(x, experts, sizes)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="preferred_element_type=float16: use jnp.bfloat16 or"):
        w4.grouped_matmul(x, experts.w13, sizes, preferred_element_type=jnp.float16)
    with pytest.raises(ValueError, match="x: shape .* ends in 96, the weights contract over 32"):
        w4.grouped_matmul(x, experts.w2, sizes)
