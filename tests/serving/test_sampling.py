"""Draws against sorting in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("prometheus_client", reason="needs the extra [serve]")

from jax_w4moe.serving.sampling import sample

V = 40
DRAWS = 4000


def draw(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """Many draws of one row, of one seed at many positions; i32[DRAWS]."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32)[None], (DRAWS, logits.size))
    ids = jax.jit(sample)(
        rows,
        jnp.full(DRAWS, 3, jnp.uint32),
        jnp.arange(DRAWS, dtype=jnp.int32),
        jnp.full(DRAWS, temperature, jnp.float32),
        jnp.full(DRAWS, top_p, jnp.float32),
    )
    return np.asarray(ids)


def probabilities(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    return p / p.sum()


def test_frequencies(rng: np.random.Generator) -> None:
    """Within five standard deviations of what they should be, and never outside of the nucleus."""
    logits = rng.normal(size=V) * 2
    for temperature, top_p in ((1.0, 1.0), (0.7, 0.8), (2.0, 0.95), (1.0, 1e-6)):
        expected = probabilities(logits, temperature, top_p)
        counts = np.bincount(draw(logits, temperature, top_p), minlength=V)
        assert not counts[expected == 0].any()
        deviation = np.sqrt(DRAWS * expected * (1 - expected))
        assert (np.abs(counts - DRAWS * expected) <= 5 * deviation + 1).all()


def test_extremes() -> None:
    """Greedy, temperatures near 0, logits that are -inf or NaN."""
    logits = np.array([10.0, 13.0, 12.99, -np.inf])
    for temperature in (0.0, 1e-5, 2e-38):
        assert (draw(logits, temperature, 1.0) == 1).all()
        assert (draw(logits, temperature, 0.5) == 1).all()
    assert set(draw(logits, 1.0, 1.0).tolist()) == {0, 1, 2}
    for temperature in (0.0, 1.0):
        assert (draw(np.array([1.0, np.nan]), temperature, 1.0) == -1).all()


def test_a_draw_is_of_its_seed_and_position(rng: np.random.Generator) -> None:
    """Whatever the rows around it do: greedy, other top_p, or none."""
    logits = jnp.asarray(rng.normal(size=(3, V)), jnp.float32)
    compiled = jax.jit(sample)

    def middle(position: int, others: tuple[int, int, float, float]) -> int:
        own = (jnp.uint32(5), jnp.int32(position), jnp.float32(1.0), jnp.float32(1.0))
        columns = []
        for value, other in zip(own, others, strict=True):
            around = jnp.asarray(other, value.dtype)
            columns.append(jnp.stack([around, value, around]))
        return int(compiled(logits, *columns)[1])

    drawn = {
        tuple(middle(position, others) for position in range(20))
        for others in ((1, 1, 0.0, 1.0), (9, 2, 2.0, 0.3), (5, 7, 1.0, 1.0))
    }
    assert len(drawn) == 1
    ids = [
        np.asarray(
            jax.jit(sample)(
                jnp.broadcast_to(logits[:1], (50, V)), seeds, positions, *[jnp.ones(50)] * 2
            )
        ).tolist()
        for seeds, positions in (
            (jnp.arange(50, dtype=jnp.uint32), jnp.full(50, 7, jnp.int32)),
            (jnp.full(50, 5, jnp.uint32), jnp.arange(50, dtype=jnp.int32)),
        )
    ]
    assert all(len(set(drawn)) > 5 for drawn in ids)
