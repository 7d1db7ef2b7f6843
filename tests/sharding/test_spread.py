"""fused_moe on meshes of CPU devices, against one device and against sums of slices."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_w4moe as w4
from jax_w4moe.formats.layout import RECORD_BYTES
from tests.helpers import data
from tests.helpers.compare import assert_bitwise, relative_rms
from tests.helpers.meshes import AXES, make_mesh, named
from tests.helpers.slices import sum_of_slices

E, H, I, K, T = 6, 64, 256, 3, 16  # noqa: E741
PARTIAL_SUMS = 4e-3  # a row of each device is rounded to bf16
LOCAL_SCALES = 1e-2  # against the same slices; against one device FP8 scales of h differ
ONE_DEVICE = 2e-2

MESHES = [(2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (4, 2)]


@pytest.fixture(scope="module")
def weights() -> w4.ExpertWeights:
    return data.expert_weights(np.random.default_rng(0), E, H, I, bias=True)


@pytest.fixture(scope="module")
def experts(weights: w4.ExpertWeights) -> w4.PackedExperts:
    return w4.pack_experts(weights)


@pytest.fixture(scope="module")
def tokens() -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(1)
    ids, weights = data.routing(rng, "random", T, E, K)
    return data.tokens(rng, T, H), ids.at[3].set(-1).at[5, 1].set(E), weights


@pytest.fixture(scope="module")
def one_device(tokens: tuple[jax.Array, ...], experts: w4.PackedExperts) -> np.ndarray:
    x, ids, weights = tokens
    return np.asarray(w4.fused_moe(x, experts, ids, weights))


def spread(
    mesh: Mesh,
    experts: w4.PackedExperts,
    tokens: tuple[jax.Array, ...],
    token_axes: tuple[str, ...] = (),
    **options: Any,
) -> tuple[Callable[..., jax.Array], tuple[Any, ...]]:
    """A jitted layer and its placed operands."""
    axes = named(mesh)
    placed = w4.shard_experts(experts, mesh, **axes)
    rows = NamedSharding(mesh, P(token_axes or None))
    x, ids, weights = (jax.device_put(array, rows) for array in tokens)

    def layer(x: Any, experts: Any, ids: Any, weights: Any) -> jax.Array:
        return w4.fused_moe(x, experts, ids, weights, token_axes=token_axes, **axes, **options)

    return jax.jit(layer), (x, placed, ids, weights)


@pytest.mark.parametrize(
    ("shape", "kind", "where"),
    [
        *((shape, AxisType.Auto, "sharded") for shape in MESHES),
        *((shape, AxisType.Auto, "replicated") for shape in MESHES[1:5:2]),
        *((MESHES[4], AxisType.Explicit, where) for where in ("replicated", "sharded")),
    ],
    ids=str,
)
def test_every_mesh(
    shape: tuple[int, int],
    kind: AxisType,
    where: str,
    weights: w4.ExpertWeights,
    experts: w4.PackedExperts,
    tokens: tuple[jax.Array, ...],
    one_device: np.ndarray,
) -> None:
    """E = 6 on 4 and 8 devices has empty experts, and devices without any."""
    mesh = make_mesh(shape, kind)
    token_axes = () if where == "replicated" else tuple(a for a in AXES if mesh.shape[a] > 1)
    layer, operands = spread(mesh, experts, tokens, token_axes)
    y = layer(*operands)
    assert y.dtype == jnp.bfloat16
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(token_axes or None)), 2)
    if shape[1] == 1:
        assert relative_rms(y, one_device) < PARTIAL_SUMS
    else:
        assert relative_rms(y, sum_of_slices(weights, tokens, shape[1])) < LOCAL_SCALES
        assert relative_rms(y, one_device) < ONE_DEVICE


@pytest.mark.parametrize("token_axes", [(), ("expert",)], ids=["replicated", "sharded"])
@pytest.mark.parametrize("routing", ["random", "one_expert", "no_expert", "outside"])
def test_slot_rows_are_bitwise_one_device(
    routing: str, token_axes: tuple[str, ...], experts: w4.PackedExperts
) -> None:
    rng = np.random.default_rng(2)
    tokens = (data.tokens(rng, T, H), *data.routing(rng, routing, T, E, K))
    mesh = make_mesh((4, 1))
    layer, operands = spread(mesh, experts, tokens, token_axes, exchange="slot_rows")
    x, ids, weights = tokens
    assert_bitwise(layer(*operands), w4.fused_moe(x, experts, ids, weights))


def test_tokens_over_data_axes(
    experts: w4.PackedExperts, tokens: tuple[jax.Array, ...], one_device: np.ndarray
) -> None:
    """Weights are the same on all devices of an axis that only tokens are spread over."""
    mesh = make_mesh((2, 4), axes=("data", "expert"))
    placed = w4.shard_experts(experts, mesh, expert_axis="expert")
    x, ids, weights = tokens
    for token_axes in (("data",), ("data", "expert"), "expert"):
        y = w4.fused_moe(
            x,
            placed,
            ids,
            weights,
            expert_axis="expert",
            token_axes=token_axes,
            exchange="slot_rows",
        )
        assert_bitwise(y, one_device)


def test_many_rows_wanted_everywhere_are_the_same_sums(experts: w4.PackedExperts) -> None:
    """From 256 rows on, devices add a share each; a row's bits do not depend on it."""
    rng = np.random.default_rng(3)
    tokens = (data.tokens(rng, 256, H), *data.routing(rng, "random", 256, E, K))
    layer, operands = spread(make_mesh((2, 2)), experts, tokens)
    many = np.asarray(layer(*operands))
    few_layer, few_operands = spread(make_mesh((2, 2)), experts, tuple(a[:255] for a in tokens))
    assert_bitwise(few_layer(*few_operands), many[:255])


def collectives(layer: Any, operands: Any) -> list[tuple[str, str]]:
    """The collectives of a compiled program: names and types of results."""
    hlo = layer.lower(*operands).compile().as_text()
    names = (
        "all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute|collective-broadcast"
    )
    found = re.findall(rf"= (\S.*?) ({names})(?:-start)?\(", hlo)
    return [(name, re.sub(r"\{[^}]*\}", "", types)) for types, name in found]


@pytest.mark.parametrize(
    ("shape", "token_axes", "expected"),
    [
        ((4, 1), (), ["all-gather u16"]),
        ((4, 1), ("expert",), ["all-gather u8", "all-to-all u16"]),
        ((1, 2), (), ["all-gather u16"]),
        ((2, 2), (), ["all-gather u16"]),
        ((2, 2), ("expert",), ["all-gather u8", "all-to-all u16", "all-gather u16"]),
        ((2, 2), ("expert", "tensor"), ["all-gather u8", "all-to-all u16"]),
    ],
    ids=str,
)
def test_collectives(
    shape: tuple[int, int],
    token_axes: tuple[str, ...],
    expected: list[str],
    experts: w4.PackedExperts,
    tokens: tuple[jax.Array, ...],
) -> None:
    """Exactly those that docs/sharding.md lists; none of them of records."""
    exchange = "slot_rows" if shape == (4, 1) else "partial_sums"
    layer, operands = spread(make_mesh(shape), experts, tokens, token_axes, exchange=exchange)
    found = collectives(layer, operands)
    assert [f"{name} {types.strip('(').split('[')[0]}" for name, types in found] == expected
    assert not any(str(RECORD_BYTES) in types for _, types in found)
    if found[0][0] == "all-gather" and token_axes:
        payload = H + 4 + 4 * K + 4 * K  # FP8 tokens with their scale, ids and weights
        assert found[0][1] == f"u8[{T},{payload}]"


@pytest.mark.parametrize(
    ("shape", "token_axes"),
    [((4, 1), ()), ((2, 2), ("expert",)), ((1, 2), ("expert", "tensor"))],
    ids=str,
)
def test_programs_that_name_no_axis(
    shape: tuple[int, int],
    token_axes: tuple[str, ...],
    experts: w4.PackedExperts,
    tokens: tuple[jax.Array, ...],
) -> None:
    """XLA's partitioner finds the axes: the same collectives, the same bits."""
    named_layer, operands = spread(make_mesh(shape), experts, tokens, token_axes)
    layer = jax.jit(w4.fused_moe)
    y = layer(*operands)
    assert_bitwise(y, named_layer(*operands))
    assert collectives(layer, operands) == collectives(named_layer, operands)
    if shape != (4, 1):
        return
    x, placed, ids, weights = operands
    fold = jax.jit(lambda *a: jax.vmap(lambda x, i, w: w4.fused_moe(x, a[0], i, w))(*a[1:]))
    pairs = (array.reshape(2, T // 2, -1) for array in (x, ids, weights))
    assert relative_rms(fold(placed, *pairs).reshape(T, H), y) < PARTIAL_SUMS


def test_programs_that_would_gather_weights_are_refused(
    experts: w4.PackedExperts, tokens: tuple[jax.Array, ...]
) -> None:
    mesh = make_mesh((2, 2))
    x, ids, weights = tokens
    placed = w4.shard_experts(experts, mesh, expert_axis="expert")

    def refused(projection: str, *spec: str | None) -> None:
        tensor = getattr(placed, projection)
        moved = jax.device_put(tensor.data, NamedSharding(mesh, P(*spec)))
        bad = dataclasses.replace(placed, **{projection: dataclasses.replace(tensor, data=moved)})
        with pytest.raises(Exception, match="so that weights would be gathered; place them with"):
            jax.jit(w4.fused_moe)(x, bad, ids, weights)

    refused("w2", "tensor")
    refused("w2", None, None, "expert")
    refused("w2")
    refused("w13", None, None, None, "expert")
    with pytest.raises(NotImplementedError, match="without expert_axis .* no gradient to x"):
        jax.jit(jax.grad(lambda x, e: w4.fused_moe(x, e, ids, weights).sum()))(x, placed)


def test_bf16_activations(experts: w4.PackedExperts, tokens: tuple[jax.Array, ...]) -> None:
    """No FP8 scales of h that depend on the split: what is left is the rounding of a row."""
    x, ids, weights = tokens
    expected = w4.fused_moe(x, experts, ids, weights, act_dtype=jnp.bfloat16)
    for shape, token_axes in (((2, 2), ("expert",)), ((1, 2), ())):
        layer, operands = spread(
            make_mesh(shape), experts, tokens, token_axes, act_dtype=jnp.bfloat16
        )
        assert relative_rms(layer(*operands), expected) < 5e-3


@pytest.mark.parametrize("token_axes", [(), ("expert",)], ids=["replicated", "sharded"])
def test_gradients(
    token_axes: tuple[str, ...], experts: w4.PackedExperts, tokens: tuple[jax.Array, ...]
) -> None:
    x, ids, weights = tokens

    def loss(layer: Any, x: Any, weights: Any, experts: Any) -> jax.Array:
        y = layer(x, experts, ids, weights).astype(jnp.float32)
        return jnp.sum(y * jnp.arange(H, dtype=jnp.float32)[None])

    layer, (_, placed, _, _) = spread(make_mesh((2, 2)), experts, tokens, token_axes)
    actual = jax.jit(jax.grad(lambda x, w, e: loss(layer, x, w, e), (0, 1)))(x, weights, placed)
    expected = jax.grad(lambda x, w: loss(w4.fused_moe, x, w, experts), (0, 1))(x, weights)
    for one, other in zip(actual, expected, strict=True):
        assert relative_rms(one, other) < PARTIAL_SUMS


def test_vmap_folds_into_tokens(
    experts: w4.PackedExperts, tokens: tuple[jax.Array, ...], one_device: np.ndarray
) -> None:
    placed = w4.shard_experts(experts, make_mesh((4, 1)), expert_axis="expert")
    x, ids, weights = (array.reshape(2, T // 2, -1) for array in tokens)

    def layer(x: Any, ids: Any, weights: Any) -> jax.Array:
        return w4.fused_moe(x, placed, ids, weights, expert_axis="expert", exchange="slot_rows")

    assert_bitwise(jax.vmap(layer)(x, ids, weights).reshape(T, H), one_device)


def test_inside_the_callers_shard_map(
    experts: w4.PackedExperts, tokens: tuple[jax.Array, ...], one_device: np.ndarray
) -> None:
    mesh = make_mesh((2, 2))
    placed = w4.shard_experts(experts, mesh, expert_axis="expert", tensor_axis="tensor")
    specs = w4.expert_specs("expert", "tensor")
    x, ids, weights = tokens

    def layer(x: Any, experts: Any, ids: Any, weights: Any) -> jax.Array:
        return w4.fused_moe(x, experts, ids, weights, expert_axis="expert", tensor_axis="tensor")

    def mapped(rows: P, out: P, experts_spec: Any = specs) -> Any:
        in_specs = (rows, experts_spec, rows, rows)
        return jax.jit(jax.shard_map(layer, mesh=mesh, in_specs=in_specs, out_specs=out))

    for rows in (P(), P("expert"), P(("expert", "tensor"))):
        y = mapped(rows, rows)(x, placed, ids, weights)
        assert relative_rms(y, one_device) < ONE_DEVICE
    with pytest.raises(ValueError, match="out_specs"):
        mapped(P("expert"), P())(x, placed, ids, weights)
    with pytest.raises(ValueError, match=r"the same on all devices of 'expert'.*expert_specs"):
        mapped(P(), P(), P())(x, experts, ids, weights)


def test_weights_from_one_mesh_go_to_another(
    experts: w4.PackedExperts, tokens: tuple[jax.Array, ...], one_device: np.ndarray
) -> None:
    """Records are not made anew: what one mesh appended is dropped for the next."""
    wide = w4.shard_experts(experts, make_mesh((4, 2)), expert_axis="expert", tensor_axis="tensor")
    assert wide.w13.data.shape[0] == 8
    back = w4.shard_experts(wide, make_mesh((1, 1)))
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(experts), strict=True):
        assert_bitwise(one, other)
    x, ids, weights = tokens
    again = w4.shard_experts(wide, make_mesh((2, 1)), expert_axis="expert")
    y = w4.fused_moe(x, again, ids, weights, expert_axis="expert", exchange="slot_rows")
    assert_bitwise(y, one_device)


def test_blocks_that_do_not_divide() -> None:
    """I = 160 is two blocks of 128; on four devices two hold nothing."""
    rng = np.random.default_rng(4)
    experts = w4.pack_experts(data.expert_weights(rng, 2, 96, 160, bias=True))
    mesh = make_mesh((1, 4))
    placed = w4.shard_experts(experts, mesh, tensor_axis="tensor")
    assert placed.w2.data.shape[2] == 4 and placed.w13.data.shape[1] == 16
    x, (ids, weights) = data.tokens(rng, 5, 96), data.routing(rng, "random", 5, 2, 2)
    y = w4.fused_moe(x, placed, ids, weights, tensor_axis="tensor")
    assert relative_rms(y, w4.fused_moe(x, experts, ids, weights)) < ONE_DEVICE


def test_bad_input(experts: w4.PackedExperts, tokens: tuple[jax.Array, ...]) -> None:
    x, ids, weights = tokens
    mesh = make_mesh((2, 2))
    placed = w4.shard_experts(experts, mesh, expert_axis="expert", tensor_axis="tensor")

    def refused(message: str, experts: Any = placed, x: Any = x, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            w4.fused_moe(x, experts, ids[: x.shape[0]], weights[: x.shape[0]], **options)

    both = {"expert_axis": "expert", "tensor_axis": "tensor"}
    refused(r"expert_axis='q' is not an axis of the mesh; its axes are expert, t", expert_axis="q")
    refused(r"token_axes='q' is not an axis", token_axes=("q",), **both)
    refused(r"both 'expert'", expert_axis="expert", tensor_axis="expert")
    refused(r"name one of these as well", mesh=mesh)
    refused(r"exchange='x' is unknown; use one of partial_sums", exchange="x", **both)
    refused(r"w13: spread as .*shard_experts", expert_axis="expert")
    refused(r"lie on one device.*shard_experts", experts=experts, expert_axis="expert")
    refused(r"T=15 .* over 4 devices.*pad T to 16", x=x[:15], token_axes=AXES, **both)
    refused(r"E=6 cannot be spread over 4 devices of 'expert'.*up to 8", experts=experts,
            mesh=make_mesh((4, 1)), expert_axis="expert")  # fmt: skip
    refused(r"I=256 is 2 blocks of 128, .* over 4 devices.*up to 4", experts=experts,
            mesh=make_mesh((1, 4)), tensor_axis="tensor")  # fmt: skip
    refused(r"w13: spread over devices as .* names no axis")
    refused(r"E=6, N=512, K=64 as packed; name expert_axis", experts=_padded(experts))
    with pytest.raises(ValueError, match="tensor_axis='q' is not an axis"):
        w4.shard_experts(experts, mesh, tensor_axis="q")
    with pytest.raises(ValueError, match="both 'expert'"):
        w4.shard_experts(experts, mesh, expert_axis="expert", tensor_axis="expert")

    def inside(x: Any, experts: Any, ids: Any, weights: Any) -> jax.Array:
        return w4.fused_moe(x, experts, ids, weights, expert_axis="expert", token_axes=())

    whole = jax.shard_map(
        inside, mesh=mesh, in_specs=(P(), P(), P(), P()), out_specs=P(), check_vma=False
    )
    with pytest.raises(ValueError, match=r"E=6 inside a shard_map over 2 devices, need 3 of 6"):
        jax.jit(whole)(x, experts, ids, weights)


def _padded(experts: w4.PackedExperts) -> w4.PackedExperts:
    return jax.tree.map(
        np.asarray, w4.shard_experts(experts, make_mesh((4, 1)), expert_axis="expert")
    )
