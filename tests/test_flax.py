"""The NNX layer: values, what gradients and optimisers see, splitting, and saving."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_w4moe as w4
from tests.helpers import data, oracle
from tests.helpers.compare import assert_bitwise, relative_rms

nnx = pytest.importorskip("flax.nnx", reason="needs the extra [flax]")
from jax_w4moe import flax as w4flax  # noqa: E402

E, H, I, K = 5, 96, 64, 3  # noqa: E741


def _layer(seed: int = 0, **options: Any) -> w4flax.FusedMoE:
    options = {"use_router_bias": True, "use_expert_bias": True, **options}
    return w4flax.FusedMoE(H, I, num_experts=E, top_k=K, rngs=nnx.Rngs(seed), **options)


@pytest.fixture
def x(rng: np.random.Generator) -> jax.Array:
    """[2, 7, H] bf16."""
    return data.tokens(rng, 2, 7, H)


def test_layer_is_router_plus_fused_moe(x: jax.Array) -> None:
    activation = w4.SwiGLU(alpha=1.702, beta=1.0, limit=7.0)
    rule = w4.PerToken(pow2=True)
    layer = _layer(activation=activation, scoring="topk_softmax", routed_scale=2.5, act_scale=rule)
    flat = x.reshape(-1, H)
    logits = flat.astype(jnp.float32) @ layer.router.kernel[...]
    logits = logits + jnp.broadcast_to(layer.router.bias[...], logits.shape)
    ids, weights = w4.topk_routing(logits, K, scoring="topk_softmax", scale=2.5)
    expected = w4.fused_moe(
        flat, layer.experts, ids, weights, activation=activation, act_scale=rule
    )
    y = layer(x)
    assert y.shape == x.shape and y.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(y, np.float32), np.asarray(expected.reshape(x.shape), np.float32), rtol=1e-2
    )
    assert layer(x[0, 0]).shape == (H,)
    assert _layer(dtype=jnp.float32)(x).dtype == jnp.float32


def test_tokens_that_are_not_active_have_no_expert(x: jax.Array) -> None:
    layer = _layer()
    active = jnp.arange(14).reshape(2, 7) % 3 > 0
    every, some = (np.asarray(layer(x, mask)) for mask in (None, active))
    assert_bitwise(some[active], every[active])
    assert not some[~active].any() and every[~active].any()


def test_exact_activations(x: jax.Array) -> None:
    """x is not rounded on its way to the experts, nor is anything else."""
    layer = _layer(act_dtype=jnp.float32, dtype=jnp.float32)
    x = x.astype(jnp.float32) * 1.001
    y = layer(x).reshape(-1, H)
    flat = x.reshape(-1, H)
    ids, weights = w4.topk_routing(layer.router(flat), K)
    w_gate, w_up, w_down = w4.dequantize_experts(w4.unpack_experts(layer.experts))
    w13 = np.concatenate([w_gate, w_up], axis=1).astype(np.float64)
    expected = oracle.moe(
        np.asarray(flat, np.float64),
        w13,
        np.asarray(w_down, np.float64),
        np.asarray(ids),
        np.asarray(weights, np.float64),
        layer.activation,
    )
    assert relative_rms(y, expected) < 1e-6
    for option, match in (
        ({"implementation": "cuda_sm90"}, "cuda_sm90"),
        ({"expert_axis": "x"}, "act_dtype=float32 runs on one device"),
    ):
        refusing = _layer(act_dtype=jnp.float32, **option)
        with pytest.raises((RuntimeError, NotImplementedError), match=match):
            refusing(x)


def test_random_weights_are_of_the_initialiser(x: jax.Array) -> None:
    layer = _layer(kernel_init=lambda key, shape, dtype: jnp.full(shape, 0.75, dtype))
    for kernel in w4.dequantize_experts(w4.unpack_experts(layer.experts)):
        assert (np.asarray(kernel) == 0.75).all()
    kernels = w4.dequantize_experts(w4.unpack_experts(_layer().experts))
    assert len({float(kernel[e].sum()) for kernel in kernels for e in range(E)}) == 3 * E
    assert np.std(np.asarray(kernels[0])) == pytest.approx(H**-0.5, rel=0.1)


def test_jit_split_and_merge(x: jax.Array) -> None:
    layer = _layer()
    expected = layer(x)
    assert_bitwise(nnx.jit(lambda m, x: m(x))(layer, x), expected)
    assert_bitwise(jax.jit(lambda m, x: m(x))(layer, x), expected)
    graphdef, params, packed = nnx.split(layer, nnx.Param, w4flax.PackedWeight)
    assert set(params) == {"router"}
    assert set(packed) >= {"w13", "w2", "w13_bias", "w2_bias", "layout"}
    call = jax.jit(lambda p, q, x: nnx.merge(graphdef, p, q)(x))
    assert_bitwise(call(params, packed, x), expected)


def test_gradients_and_optimisers_skip_packed_weights(x: jax.Array) -> None:
    optax = pytest.importorskip("optax")
    layer = _layer()
    before = jax.tree.map(np.asarray, layer.experts)

    def loss(layer: w4flax.FusedMoE) -> jax.Array:
        return jnp.sum(layer(x).astype(jnp.float32) ** 2)

    gradients = nnx.jit(nnx.grad(loss))(layer)
    assert set(gradients) == {"router"}
    assert np.abs(np.asarray(gradients["router"]["kernel"][...])).sum() > 0
    optimizer = nnx.Optimizer(layer, optax.sgd(0.1), wrt=nnx.Param)
    kernel = np.asarray(layer.router.kernel[...])
    optimizer.update(layer, gradients)
    assert (np.asarray(layer.router.kernel[...]) != kernel).any()
    jax.tree.map(assert_bitwise, layer.experts, before)


def test_from_kernels_and_from_experts_agree(rng: np.random.Generator, x: jax.Array) -> None:
    shapes = ((E, I, H), (E, I, H), (E, H, I))
    kernels = [jnp.asarray(rng.standard_normal(s) * 0.1, jnp.bfloat16) for s in shapes]
    options = {
        "top_k": K,
        "router_kernel": jnp.asarray(rng.standard_normal((H, E)), jnp.float32),
        "router_bias": jnp.asarray(rng.standard_normal(E), jnp.float32),
    }
    layer = w4flax.FusedMoE.from_kernels(*kernels, **options)
    canonical = w4.quantize_experts(*kernels)
    for experts in (canonical, w4.pack_experts(canonical)):
        other = w4flax.FusedMoE.from_experts(experts, **options)
        assert_bitwise(other(x), layer(x))
    assert_bitwise(layer.router.bias[...], options["router_bias"])


def test_save_and_restore(tmp_path: pathlib.Path, x: jax.Array) -> None:
    layer = _layer()
    w4flax.save(tmp_path / "layer", layer)
    other = _layer(seed=1)
    assert (np.asarray(other(x)) != np.asarray(layer(x))).any()
    w4flax.restore(tmp_path / "layer", other)
    assert_bitwise(other(x), layer(x))
    abstract = nnx.eval_shape(_layer)
    w4flax.restore(tmp_path / "layer", abstract)
    assert_bitwise(abstract(x), layer(x))


def test_restore_refuses_another_layout_version(tmp_path: pathlib.Path, x: jax.Array) -> None:
    old, layer = _layer(), _layer(seed=1)
    expected = layer(x)
    old.layout.set_value(old.layout[...].at[0].set(7))
    w4flax.save(tmp_path / "old", old)
    sentence = "FusedMoE: packed with layout version 7, this library reads version 1; pack the"
    with pytest.raises(ValueError, match=sentence):
        w4flax.restore(tmp_path / "old", layer)
    assert_bitwise(layer(x), expected)  # left as it was
    with pytest.raises(ValueError, match=sentence):
        old(x)


def test_restore_refuses_inexact_weights(tmp_path: pathlib.Path) -> None:
    layer = _layer()
    layer.w2_inexact_groups.set_value(layer.w2_inexact_groups[...].at[2].set(3))
    w4flax.save(tmp_path / "inexact", layer)
    with pytest.raises(ValueError, match="3 scale groups were packed inexactly, need 0; pack"):
        w4flax.restore(tmp_path / "inexact", _layer())


def test_layers_inside_a_model_are_restored_and_checked(
    tmp_path: pathlib.Path, x: jax.Array
) -> None:
    class Model(nnx.Module):
        def __init__(self, seed: int) -> None:
            self.blocks = nnx.List([_layer(seed), _layer(seed + 1)])

        def __call__(self, x: jax.Array) -> jax.Array:
            for block in self.blocks:
                x = x + block(x)
            return x

    model, other = Model(0), Model(2)
    w4flax.save(tmp_path / "model", model)
    w4flax.restore(tmp_path / "model", other)
    assert_bitwise(other(x), model(x))
    layout = model.blocks[1].layout
    layout.set_value(layout[...].at[0].set(7))
    w4flax.save(tmp_path / "old", model)
    with pytest.raises(ValueError, match="layout version 7"):
        w4flax.restore(tmp_path / "old", other)


def test_layer_on_a_mesh(x: jax.Array) -> None:
    """Five experts on four devices give the bits of one device where slots are exchanged."""
    layer = _layer(expert_axis="expert", exchange="slot_rows")
    mesh = jax.make_mesh(
        (4,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
    )
    for forward in (lambda layer, x: layer(x), nnx.jit(lambda layer, x: layer(x))):
        with pytest.raises(ValueError, match="they lie on one device, .* place them with"):
            forward(layer, x)
    layer.shard(mesh)
    assert layer.w13[...].shape[0] == 8
    forward = nnx.jit(lambda layer, x: layer(x))
    assert_bitwise(forward(layer, x), forward(_layer(), x))


def _mesh(size: int) -> jax.sharding.Mesh:
    return jax.make_mesh(
        (size,), ("model",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:size]
    )


def test_weights_restore_onto_any_mesh(tmp_path: pathlib.Path) -> None:
    """gpt-oss's I = 2880 is 23 blocks of 128, on four devices 24; five experts are eight there."""

    def make(**axes: str) -> w4flax.FusedMoE:
        options = {"num_experts": E, "top_k": K, "use_expert_bias": True, **axes}
        return w4flax.FusedMoE(64, 2880, rngs=nnx.Rngs(0), **options)

    one = make()
    one.w2_bias.set_value(one.w2_bias[...] + 1)
    w4flax.save(tmp_path / "one", one)
    for axis, shape in (("tensor_axis", (E, 1, 24)), ("expert_axis", (8, 1, 23))):
        many = nnx.eval_shape(lambda axis=axis: make(**{axis: "model"}))
        many.shard(_mesh(4))
        w4flax.restore(tmp_path / "one", many)
        assert many.w2[...].shape[:3] == shape
        placed = w4.shard_experts(one.experts, _mesh(4), **{axis: "model"})
        jax.tree.map(assert_bitwise, many.experts, placed)
        assert jax.tree.map(lambda a: a.sharding, many.experts) == jax.tree.map(
            lambda a: a.sharding, placed
        )
        w4flax.save(tmp_path / axis, many)
        two = make(**{axis: "model"})
        two.shard(_mesh(2))
        w4flax.restore(tmp_path / axis, two)
        jax.tree.map(
            assert_bitwise,
            two.experts,
            w4.shard_experts(one.experts, _mesh(2), **{axis: "model"}),
        )
        back = make()
        w4flax.restore(tmp_path / axis, back)
        jax.tree.map(assert_bitwise, back.experts, one.experts)


def test_restore_refuses_another_layer(tmp_path: pathlib.Path) -> None:
    w4flax.save(tmp_path / "layer", _layer())
    larger = w4flax.FusedMoE(H, I + 32, num_experts=E, top_k=K, use_router_bias=True,
                             use_expert_bias=True, rngs=nnx.Rngs(0))  # fmt: skip
    with pytest.raises(ValueError, match="have E=5 H=96 I=64, the layer has E=5 H=96 I=96; make"):
        w4flax.restore(tmp_path / "layer", larger)
    more = w4flax.FusedMoE(H, I, num_experts=E + 1, top_k=K, use_router_bias=True,
                           use_expert_bias=True, rngs=nnx.Rngs(0))  # fmt: skip
    with pytest.raises(ValueError, match=r"router.bias: shape \(5,\) in the checkpoint, \(6,\) in"):
        w4flax.restore(tmp_path / "layer", more)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="hidden_size=100 is not a positive multiple of 32"):
        w4flax.FusedMoE(100, I, num_experts=E, top_k=K, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"top_k=6 is not in 1\.\.5 \(E=5\); lower top_k"):
        w4flax.FusedMoE(H, I, num_experts=E, top_k=6, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"num_experts=2000 is not in 1\.\.1024"):
        w4flax.FusedMoE(H, I, num_experts=2000, top_k=6, rngs=nnx.Rngs(0))
    experts = _layer().experts
    with pytest.raises(ValueError, match=r"router_kernel: shape \(5, 96\), need \(96, 5\)"):
        w4flax.FusedMoE.from_experts(experts, top_k=K, router_kernel=jnp.zeros((E, H)))
    with pytest.raises(ValueError, match=r"router_bias: shape \(6,\), need \(5,\)"):
        w4flax.FusedMoE.from_experts(
            experts, top_k=K, router_kernel=jnp.zeros((H, E)), router_bias=jnp.zeros(6)
        )
