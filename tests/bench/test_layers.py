"""Routings, the calls that rotate, and that every backend computes the same layer."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_w4moe as w4
from jax_w4moe import roofline
from jax_w4moe.bench import backends, layers
from jax_w4moe.bench.shapes import SHAPES, TINY
from tests.helpers.compare import EXACT_RMS, relative_rms


@pytest.fixture(scope="module")
def experts() -> w4.PackedExperts:
    return layers.random_experts(jax.random.key(0), TINY)


@pytest.mark.parametrize("routing", ["balanced", "zipf"])
def test_ids_are_distinct_and_in_range(routing: str) -> None:
    shape = SHAPES["flash"]
    ids = layers.topk_ids(routing, 0, 300, shape)
    assert ids.shape == (300, 6) and ids.dtype == np.int32
    assert ids.min() >= 0 and ids.max() < 256
    assert all(len(set(row)) == 6 for row in ids)
    assert not np.array_equal(ids, layers.topk_ids(routing, 1, 300, shape))


def test_shares_of_the_routings() -> None:
    """Balanced is flat; with zipf the most popular expert has about its share of the draws."""
    shape = SHAPES["flash"]
    flat = np.bincount(layers.topk_ids("balanced", 0, 8192, shape).ravel())
    assert flat.max() / flat.mean() < 1.5
    steep = np.sort(np.bincount(layers.topk_ids("zipf", 0, 8192, shape).ravel()))[::-1]
    assert steep[0] > 0.7 * 8192  # a quarter of each draw, six draws
    assert steep[10] < steep[0] / 3


def test_one_expert_takes_all() -> None:
    ids = layers.topk_ids("one", 3, 5, TINY)
    assert (ids[:, 0] == 3).all() and (ids[:, 1:] == -1).all()


@pytest.mark.parametrize(("num_tokens", "count"), [(1, 8), (64, 8), (65, 4), (1024, 4), (1025, 2)])
def test_calls_rotate(experts: w4.PackedExperts, num_tokens: int, count: int) -> None:
    made = layers.calls(experts, "balanced", num_tokens, TINY)
    assert len(made) == count
    for call in made:
        assert call.x.shape == (num_tokens, TINY.hidden_size) and call.x.dtype == jnp.bfloat16
        assert call.topk_weights.dtype == jnp.float32
        np.testing.assert_allclose(np.asarray(call.topk_weights).sum(1), 1, rtol=1e-6)
    assert not np.array_equal(made[0].x, made[1].x)


def test_more_calls_where_few_would_stay_in_the_cache(
    experts: w4.PackedExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "COLD_BYTES", experts.nbytes - 1)
    per_expert = experts.nbytes / TINY.num_experts
    made = layers.calls(experts, "one", 1, TINY)
    assert 8 <= len(made) == -(-layers.COLD_BYTES // (per_expert + made[0].x.nbytes))
    monkeypatch.setattr(layers, "COLD_BYTES", experts.nbytes)
    assert len(layers.calls(experts, "one", 1, TINY)) == 8


@pytest.mark.parametrize("name", backends.BACKENDS)
@pytest.mark.parametrize("routing", layers.ROUTINGS)
def test_backends_compute_the_layer(experts: w4.PackedExperts, name: str, routing: str) -> None:
    loaded = backends.load([name], lambda _: None)
    if not loaded:
        pytest.skip(f"{name} cannot be imported")
    x, ids, weights = layers.calls(experts, routing, 9, TINY)[0]
    backend = loaded[name]
    y = backend.run(backend.prepare(experts), x, ids, weights)
    expected = w4.reference.fused_moe(x, experts, ids, weights, mode="exact")
    assert y.shape == x.shape and y.dtype == jnp.bfloat16
    assert relative_rms(y, expected) < 2 * EXACT_RMS  # h is bf16, too


def test_every_backend_file_is_registered() -> None:
    folder = Path(backends.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert files == set(backends.BACKENDS)


def test_work_of_a_layer(experts: w4.PackedExperts) -> None:
    hidden, intermediate = TINY.hidden_size, TINY.intermediate_size
    nbytes, flops = roofline.layer_work(experts, 10, 4)
    assert (nbytes, flops) == (experts.nbytes / 2, 60 * hidden * intermediate)
    moved = roofline.activation_bytes(experts, 5, 10)
    assert moved == 5 * 4 * hidden + 10 * (6 * hidden + 6 * intermediate)
