"""fused_moe on meshes of CPU devices, against one device and against sums of slices."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_w4moe as w4
from jax_w4moe import sharding
from jax_w4moe.sharding import dispatch
from tests.helpers import data
from tests.helpers import spread as spreads
from tests.helpers.compare import assert_bitwise, relative_rms
from tests.helpers.meshes import AXES, make_mesh
from tests.helpers.spread import (
    CASES,
    PARTIAL_SUMS,
    Case,
    E,
    H,
    K,
    T,
    check,
    collectives,
    kinds,
    packed,
    spread,
)

ONE_DEVICE = 2e-2  # of FP8 slices, whose scales of h are their own


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if is_always else pytest.mark.matrix, id=str(case))
        for case, is_always in CASES.items()
    ],
)
def test_every_case(case: Case) -> None:
    """E = 6 on 4 and 8 devices has empty experts, and devices without any."""
    check(case)


@pytest.fixture(scope="module")
def experts() -> w4.PackedExperts:
    return packed()


@pytest.fixture(scope="module")
def tokens() -> tuple[jax.Array, ...]:
    return spreads.tokens()


@pytest.fixture(scope="module")
def one_device() -> np.ndarray:
    return spreads.one_device()


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


def test_scales_per_128_values(experts: w4.PackedExperts, tokens: tuple[jax.Array, ...]) -> None:
    """Tokens travel as bf16; a slice of h has the scales that it has on one device, and only sums
    of slices are rounded once more."""
    x, ids, weights = tokens
    rule = w4.Per128()
    expected = w4.fused_moe(x, experts, ids, weights, act_scale=rule)
    for shape, exchange in (((4, 1), "slot_rows"), ((1, 2), "partial_sums")):
        layer, operands = spread(
            make_mesh(shape), experts, tokens, exchange=exchange, act_scale=rule
        )
        assert relative_rms(layer(*operands), expected) <= (0 if shape[1] == 1 else 5e-3)


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


@pytest.mark.parametrize("routing", ["random", "outside", "one_expert"])
def test_dispatch_gives_the_bits_of_partial_sums(routing: str, experts: w4.PackedExperts) -> None:
    """32 tokens a device, of which another is sent 24 at most: one expert is too many."""
    rng = np.random.default_rng(5)
    tokens = (data.tokens(rng, 128, H), *data.routing(rng, routing, 128, E, 2))
    mesh = make_mesh((4, 1))
    partial_sums, operands = spread(mesh, experts, tokens, ("expert",), exchange="partial_sums")
    dispatched, _ = spread(mesh, experts, tokens, ("expert",), exchange="dispatch")
    assert_bitwise(dispatched(*operands), partial_sums(*operands))
    if routing == "random":
        fallback = ["all-gather u8", "all-to-all u16"]
        assert sorted(kinds(dispatched.lower(*operands).compile())) == sorted(
            ["all-reduce s32", "all-to-all u8", "all-to-all u16", *fallback]
        )


@pytest.mark.parametrize(("most", "num_rows"), [(16, 4 * 16), (17, 4 * 32)])
def test_tokens_go_to_few_devices_or_to_all(most: int, num_rows: int) -> None:
    """A device that is sent more than the capacity, 16 of 32, makes all take the other way."""
    mesh = make_mesh((4, 1))
    placement = sharding.Placement("expert", None, ("expert",))
    x = np.arange(1.0, 129.0, dtype=np.float32).reshape(128, 1)
    owners = np.full((128, 1), -1, np.int32)
    owners[32 : 32 + most] = 2

    def work(x: jax.Array) -> jax.Array:
        assert dispatch.capacity(32, 1, 4) == 16
        return jnp.concatenate([x, jnp.full_like(x, x.shape[0])], axis=1)

    def layer(x: jax.Array, owners: jax.Array) -> jax.Array:
        parts = sharding.dispatched(work, x, owners, placement)
        return jax.lax.bitcast_convert_type(parts, jnp.float32)

    specs = (P("expert"), P("expert"))
    mapped = jax.jit(jax.shard_map(layer, mesh=mesh, in_specs=specs, out_specs=P(None, "expert")))
    parts = np.asarray(mapped(x, owners))  # [devices, T, 2]
    sent = parts[2, 32 : 32 + most]
    assert_bitwise(
        sent, np.concatenate([x[32 : 32 + most], np.full((most, 1), num_rows)], 1, dtype=np.float32)
    )
    if most == 16:
        assert np.count_nonzero(parts) == sent.size


def test_tokens_are_dispatched_where_that_sends_less() -> None:
    few, many = dispatch.capacity(1024, 6, 4), dispatch.capacity(1024, 8, 32)
    assert (few, many) == (1024, 288)

    def choice(devices: int, num_tokens: int, **options: Any) -> bool:
        placement = sharding.Placement("expert", None, ("expert",), **options)
        mesh = jax.sharding.AbstractMesh((devices,), ("expert",))
        found: list[bool] = []

        def note() -> jax.Array:
            found.append(sharding.is_dispatched(placement, num_tokens, 8))
            return jnp.zeros(1)

        jax.eval_shape(jax.shard_map(note, mesh=mesh, in_specs=(), out_specs=P()))
        return found[0]

    assert choice(32, 1024) and choice(32, 128)
    assert not choice(8, 8192) and not choice(32, 127) and not choice(12, 8192)
    assert not choice(32, 1024, exchange="partial_sums")
    assert choice(4, 8, exchange="dispatch")


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
    programs = [f.lower(*operands).compile() for f in (layer, named_layer)]
    assert collectives(programs[0]) == collectives(programs[1])
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


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda k: k.name)
def test_placing_in_a_jitted_program(kind: AxisType, experts: w4.PackedExperts) -> None:
    mesh = make_mesh((2, 2), kind)
    place = functools.partial(
        w4.shard_experts, mesh=mesh, expert_axis="expert", tensor_axis="tensor"
    )
    with jax.set_mesh(mesh):
        both = map(jax.tree.leaves, (jax.jit(place)(experts), place(experts)))
    for one, other in zip(*both, strict=True):
        assert_bitwise(one, other)
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


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
    refused(r"token_axes=\(\) it cannot: .* or take 'partial_sums'", exchange="dispatch", **both)
    refused(r"w13: spread as .*shard_experts", expert_axis="expert")
    refused(r"lie on one device.*shard_experts", experts=experts, expert_axis="expert")
    refused(r"T=15 .* over 4 devices.*pad T to 16", x=x[:15], token_axes=AXES, **both)
    refused(r"E=6 cannot be spread over 4 devices of 'expert'.*up to 8", experts=experts,
            mesh=make_mesh((4, 1)), expert_axis="expert")  # fmt: skip
    refused(r"I=256 is 2 blocks of 128, .* over 4 devices.*up to 4", experts=experts,
            mesh=make_mesh((1, 4)), tensor_axis="tensor")  # fmt: skip
    refused(r"w13: spread over devices as .* names no axis")
    refused(r"E=6, N=512, K=128 as packed; name expert_axis", experts=_padded(experts))
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
