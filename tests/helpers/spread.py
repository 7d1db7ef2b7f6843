"""A small layer over meshes: the cases, what docs/sharding.md says of each, and their check."""

import functools
import itertools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_w4moe as w4
from jax_w4moe.formats import formats
from jax_w4moe.formats.layout import record_bytes
from tests.helpers import data
from tests.helpers.compare import assert_bitwise, relative_rms
from tests.helpers.meshes import AXES, make_mesh, named
from tests.helpers.slices import sum_of_slices

E, H, I, K, T = 6, 128, 256, 3, 16  # noqa: E741

MESHES = [(2, 1), (4, 1), (8, 1), (1, 2), (1, 4), (2, 2), (4, 2)]

PARTIAL_SUMS = 4e-3  # a row of each device is rounded to bf16
LATE_ROUNDING = 1e-3  # of slots, after their sum in f32: a bit of some values
BF16_SLICES = 5e-3  # rows of slices, rounded to bf16
LOCAL_SCALES = 1e-2  # against the same slices; against one device FP8 scales of h differ

FP8, BF16 = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.bfloat16)


class Case(NamedTuple):
    """A mesh (experts, tensor), its kind, the axes of tokens, and options of the layer."""

    shape: tuple[int, int]
    kind: AxisType = AxisType.Auto
    token_axes: tuple[str, ...] = ()
    exchange: str = "partial_sums"
    act_dtype: Any = FP8
    format: w4.WeightFormat = w4.MXFP4

    def __str__(self) -> str:
        tokens = "+".join(self.token_axes) or "replicated"
        rest = (self.kind.name, tokens, self.exchange, self.act_dtype.name, self.format.name)
        return "-".join(("x".join(map(str, self.shape)), *rest))

    @property
    def model_axes(self) -> tuple[str, ...]:
        """The axes that weights are spread over."""
        return tuple(axis for axis, size in zip(AXES, self.shape, strict=True) if size > 1)

    @property
    def has_slices(self) -> bool:
        """Whether I is spread."""
        return self.shape[1] > 1

    @property
    def collectives(self) -> list[str]:
        """Kinds and dtypes in order, as docs/sharding.md lists them."""
        is_late = self.exchange == "slot_rows" and self.has_slices and self.act_dtype == BF16
        rows = "u32" if is_late else "u16"
        dispatch = ["all-to-all u8" if self.exchange == "dispatch" else "all-gather u8"]
        there = [*dispatch, f"all-to-all {rows}"] if self.token_axes else []
        shared = [axis for axis in self.model_axes if axis not in self.token_axes]
        return [*there, f"all-gather {rows}"] if shared else there


def _cases() -> dict[Case, bool]:
    """Every case, and whether it is among the few that are always tested."""
    auto = AxisType.Auto
    few = {
        *(Case(shape, token_axes=Case(shape).model_axes) for shape in MESHES),
        *(Case(shape) for shape in ((4, 1), (2, 2))),
        *(Case((2, 2), AxisType.Explicit, axes) for axes in ((), AXES)),
        *(Case((2, 2), token_axes=AXES, format=format) for format in formats()),
        Case((4, 1), auto, ("expert",), "slot_rows"),
        Case((2, 2), auto, ("expert",), "dispatch"),
        Case((2, 2), auto, ("expert",), "slot_rows", BF16),
        Case((1, 2), exchange="partial_sums", act_dtype=BF16),
    }
    cases = {}
    for shape, kind, exchange, act_dtype, format in itertools.product(
        MESHES,
        (AxisType.Auto, AxisType.Explicit),
        ("partial_sums", "slot_rows", "dispatch"),
        (FP8, BF16),
        formats(),
    ):
        axes = Case(shape).model_axes
        for token_axes in dict.fromkeys(((), axes[:1], axes)):
            case = Case(shape, kind, token_axes, exchange, act_dtype, format)
            if exchange != "dispatch" or token_axes == ("expert",):
                cases[case] = case in few
    assert few <= set(cases)
    return cases


CASES = _cases()


@functools.cache
def weights(format: w4.WeightFormat = w4.MXFP4) -> w4.ExpertWeights:
    """Canonical, with biases."""
    return data.expert_weights(np.random.default_rng(0), E, H, I, bias=True, format=format)


@functools.cache
def packed(format: w4.WeightFormat = w4.MXFP4) -> w4.PackedExperts:
    """The same, packed."""
    return w4.pack_experts(weights(format))


@functools.cache
def tokens() -> tuple[jax.Array, ...]:
    """x, ids and weights; some ids lead to no expert."""
    rng = np.random.default_rng(1)
    ids, routing_weights = data.routing(rng, "random", T, E, K)
    return data.tokens(rng, T, H), ids.at[3].set(-1).at[5, 1].set(E), routing_weights


@functools.cache
def one_device(act_dtype: Any = FP8, format: w4.WeightFormat = w4.MXFP4) -> np.ndarray:
    """What one device gives."""
    x, ids, routing_weights = tokens()
    return np.asarray(w4.fused_moe(x, packed(format), ids, routing_weights, act_dtype=act_dtype))


@functools.cache
def slices(count: int, format: w4.WeightFormat) -> np.ndarray:
    """The sum of what slices of I give, with FP8 scales of their own."""
    return sum_of_slices(weights(format), tokens(), count)


def spread(
    mesh: Mesh,
    experts: w4.PackedExperts,
    tokens: tuple[jax.Array, ...],
    token_axes: tuple[str, ...] = (),
    **options: Any,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A jitted layer and its placed operands."""
    axes = named(mesh)
    placed = w4.shard_experts(experts, mesh, **axes)
    rows = NamedSharding(mesh, P(token_axes or None))
    x, ids, routing_weights = (jax.device_put(np.asarray(array), rows) for array in tokens)

    def layer(x: Any, experts: Any, ids: Any, weights: Any) -> jax.Array:
        return w4.fused_moe(x, experts, ids, weights, token_axes=token_axes, **axes, **options)

    return jax.jit(layer), (x, placed, ids, routing_weights)


def collectives(compiled: Any) -> list[tuple[str, str]]:
    """The collectives of a compiled program: names and types of results."""
    names = (
        "all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute|collective-broadcast"
    )
    found = re.findall(rf"= (\S.*?) ({names})(?:-start)?\(", compiled.as_text())
    return [(name, re.sub(r"\{[^}]*\}", "", types)) for types, name in found]


def kinds(compiled: Any) -> list[str]:
    """The same, each as its name and dtype."""
    found = collectives(compiled)
    return [f"{name} {types.strip('(').split('[')[0]}" for name, types in found]


def compare(y: jax.Array, expected: np.ndarray, bound: float) -> None:
    """Compares the rows that this process holds: bitwise, if the bound is zero."""
    for shard in y.addressable_shards:
        if bound:
            assert relative_rms(shard.data, expected[shard.index]) < bound
        else:
            assert_bitwise(shard.data, expected[shard.index])


def check(case: Case) -> None:
    """Runs a case and compares it; its collectives are exactly those of the docs."""
    mesh = make_mesh(case.shape, case.kind)
    options = {"exchange": case.exchange, "act_dtype": case.act_dtype}
    experts = packed(case.format)
    layer, operands = spread(mesh, experts, tokens(), case.token_axes, **options)
    compiled = layer.lower(*operands).compile()
    y = compiled(*operands)
    assert y.dtype == jnp.bfloat16
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(case.token_axes or None)), 2)

    expected = one_device(case.act_dtype, case.format)
    is_slots = case.exchange == "slot_rows"
    if not case.has_slices:
        bound = 0.0 if is_slots else PARTIAL_SUMS
    elif case.act_dtype == BF16:
        bound = LATE_ROUNDING if is_slots else BF16_SLICES
    else:
        expected, bound = slices(case.shape[1], case.format), LOCAL_SCALES
    compare(y, expected, bound)

    found = collectives(compiled)
    if jax.default_backend() == "cpu":  # XLA for GPUs may order and nest them otherwise
        assert kinds(compiled) == case.collectives
    assert sorted(kinds(compiled)) == sorted(case.collectives)
    assert not any(str(record_bytes(case.format.scale_words)) in types for _, types in found)
    if case.token_axes and case.exchange != "dispatch":
        value = H + 4 if case.act_dtype == FP8 else 2 * H  # FP8 values have a scale
        assert any(f"u8[{T},{value + 4 * K + 4 * K}]" in types for _, types in found)
