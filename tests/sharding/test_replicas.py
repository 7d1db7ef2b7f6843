"""Copies of hot experts: plans, ids, and that results do not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import jax_w4moe as w4
from tests.helpers import data
from tests.helpers.compare import assert_bitwise


def device_loads(plan: w4.Replicas, loads: np.ndarray, num_devices: int) -> np.ndarray:
    shares = (loads / plan.num_copies)[plan.physical_to_logical]
    return shares.reshape(num_devices, -1).sum(axis=1)


def test_plans_even_out_devices(rng: np.random.Generator) -> None:
    loads = 1000.0 / np.arange(1, 61) ** 1.2
    before = loads.reshape(4, 15).sum(axis=1)
    plan = w4.plan_replicas(loads, 72, 4)
    after = device_loads(plan, loads, 4)
    assert before.max() / before.mean() > 2.5
    assert after.max() / after.mean() < 1.05
    assert plan.num_copies.sum() == 72 and plan.num_copies.min() == 1
    assert np.argmax(plan.num_copies) == 0
    for expert in range(60):
        copies = np.flatnonzero(plan.physical_to_logical == expert)
        assert set(plan.logical_to_physical[expert]) == set(copies)
        assert plan.num_copies[expert] == copies.size


def test_no_room_is_left_and_none_is_missing() -> None:
    plan = w4.plan_replicas([0, 0, 0, 8], 8, 4)
    assert plan.num_copies.tolist() == [1, 1, 1, 5]
    assert sorted(plan.physical_to_logical.tolist()) == [0, 1, 2, 3, 3, 3, 3, 3]
    assert w4.plan_replicas([1, 2, 3], 3, 1).physical_to_logical.tolist() == [0, 1, 2]


def test_tokens_take_turns() -> None:
    plan = w4.plan_replicas([0, 9], 4, 2)
    ids = plan.physical_ids(jnp.asarray([[1, 0], [1, -1], [1, 2], [1, 0]], jnp.int32))
    copies = plan.logical_to_physical[1, :3]
    assert np.array_equal(ids[:, 0], copies[[0, 1, 2, 0]])
    cold = int(plan.logical_to_physical[0, 0])
    assert ids[:, 1].tolist() == [cold, -1, -1, cold]


def test_results_do_not_change(rng: np.random.Generator) -> None:
    experts = w4.pack_experts(data.expert_weights(rng, 5, 64, 96, bias=True))
    x, (ids, weights) = data.tokens(rng, 12, 64), data.routing(rng, "outside", 12, 5, 3)
    one = w4.fused_moe(x, experts, ids, weights)
    loads = np.bincount(np.asarray(ids)[(ids >= 0) & (ids < 5)], minlength=5)
    plan = w4.plan_replicas(loads, 8, 4)
    physical = w4.replicate_experts(experts, plan)
    assert physical.num_experts == 8
    assert_bitwise(w4.fused_moe(x, physical, plan.physical_ids(ids), weights), one)
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    placed = w4.shard_experts(physical, mesh, expert_axis="expert")

    @jax.jit
    def layer(x, experts, ids, weights):  # type: ignore[no-untyped-def]
        ids = plan.physical_ids(ids)
        return w4.fused_moe(x, experts, ids, weights, expert_axis="expert", exchange="slot_rows")

    assert_bitwise(layer(x, placed, ids, weights), one)


def test_refusals(rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match=r"num_physical=6 does not hold 5 .* multiple of 4 from 8"):
        w4.plan_replicas([1] * 5, 6, 4)
    with pytest.raises(ValueError, match=r"num_physical=4 does not hold 5 experts"):
        w4.plan_replicas([1] * 5, 4, 4)
    for loads in ([], [[1.0]], [float("nan")], [-1.0]):
        with pytest.raises(ValueError, match="loads: shape .* for each expert"):
            w4.plan_replicas(loads, 4, 4)
    experts = w4.pack_experts(data.expert_weights(rng, 2, 32, 32))
    with pytest.raises(ValueError, match="a plan for 3 experts, the weights hold E=2"):
        w4.replicate_experts(experts, w4.plan_replicas([1, 1, 1], 4, 2))
    with pytest.raises(ValueError, match=r"1026 copies, more than 1024"):
        w4.replicate_experts(experts, w4.plan_replicas([1, 1], 1026, 2))
