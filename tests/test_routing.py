"""Routing against plain numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_w4moe as w4


def _softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


SCORES = {
    "softmax": _softmax,
    "topk_softmax": lambda x: x,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "sqrtsoftplus": lambda x: np.sqrt(np.log1p(np.exp(x))),
}


def _expected(
    logits: np.ndarray, k: int, scoring: str, bias: np.ndarray, renormalize: bool, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    scores = SCORES[scoring](logits)
    ids = np.argsort(-(scores + bias), axis=-1, kind="stable")[..., :k]
    weights = np.take_along_axis(scores, ids, axis=-1)
    if scoring == "topk_softmax":
        weights = _softmax(weights)
    elif renormalize:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return ids, weights * scale


@pytest.mark.parametrize("scoring", SCORES)
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(
    ("shape", "with_bias"), [((9, 16), True), ((9, 16), False), ((2, 3, 5), True), ((0, 4), False)]
)
def test_against_numpy(
    rng: np.random.Generator,
    scoring: str,
    renormalize: bool,
    with_bias: bool,
    shape: tuple[int, ...],
) -> None:
    logits = rng.standard_normal(shape).astype(np.float32) * 3
    bias = rng.standard_normal(shape[-1]).astype(np.float32) * with_bias
    ids, weights = w4.topk_routing(
        jnp.asarray(logits),
        3,
        scoring=scoring,
        bias=jnp.asarray(bias) if with_bias else None,
        renormalize=renormalize,
        scale=2.5,
    )
    expected_ids, expected = _expected(
        logits.astype(np.float64), 3, scoring, bias, renormalize, 2.5
    )
    assert ids.dtype == jnp.int32 and weights.dtype == jnp.float32
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, expected, rtol=2e-6)


@pytest.mark.parametrize(("num_groups", "top_groups"), [(4, 2), (8, 4), (4, 1), (4, 4), (1, 1)])
def test_groups_against_numpy(rng: np.random.Generator, num_groups: int, top_groups: int) -> None:
    """By the sum of a group's two best scores with the bias; group by group, expert by expert."""
    logits = rng.standard_normal((33, 32)).astype(np.float32)
    bias = rng.standard_normal(32).astype(np.float32) * 0.1
    ids, weights = w4.topk_routing(
        jnp.asarray(logits),
        5,
        scoring="sigmoid",
        bias=jnp.asarray(bias),
        num_groups=num_groups,
        top_groups=top_groups,
        scale=2.5,
    )
    size = 32 // num_groups
    for row, own_ids, own_weights in zip(logits, np.asarray(ids), np.asarray(weights), strict=True):
        scores = 1 / (1 + np.exp(-row.astype(np.float64)))
        selection = scores + bias
        sums = [sum(sorted(selection[g * size : (g + 1) * size])[-2:]) for g in range(num_groups)]
        groups = sorted(range(num_groups), key=lambda g: -sums[g])[:top_groups]
        allowed = [e for e in range(32) if e // size in groups]
        chosen = sorted(allowed, key=lambda e: -selection[e])[:5]
        assert own_ids.tolist() == chosen
        expected = 2.5 * scores[chosen] / scores[chosen].sum()
        np.testing.assert_allclose(own_weights, expected, rtol=2e-6)


@pytest.mark.parametrize("scoring", ["sqrtsoftplus", "sigmoid", "softmax"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_hash_routing(rng: np.random.Generator, scoring: str, renormalize: bool) -> None:
    """Experts from a table; a token or an entry that is out of range has none."""
    logits = rng.standard_normal((2, 9, 8)).astype(np.float32)
    table = rng.integers(0, 8, (64, 3))
    table[5, 1], table[6, 2] = -1, 8
    tokens = rng.integers(0, 64, (2, 9))
    tokens[0, :4] = (5, 6, 64, -1)
    route = functools.partial(w4.hash_routing, scoring=scoring, renormalize=renormalize, scale=1.5)
    ids, weights = jax.jit(route)(
        jnp.asarray(logits), jnp.asarray(tokens, jnp.int32), jnp.asarray(table, jnp.int32)
    )
    scores = SCORES[scoring](logits.astype(np.float64))
    for where in np.ndindex(2, 9):
        own = table[tokens[where]] if 0 <= tokens[where] < 64 else np.full(3, -1)
        valid = (own >= 0) & (own < 8)
        expected = np.where(valid, scores[where][np.where(valid, own, 0)], 0)
        if renormalize and valid.any():
            expected = expected / expected.sum()
        assert np.asarray(ids)[where].tolist() == np.where(valid, own, -1).tolist()
        np.testing.assert_allclose(np.asarray(weights)[where], 1.5 * expected, rtol=3e-6)


def test_ties_go_to_the_lower_expert() -> None:
    ids, weights = w4.topk_routing(jnp.zeros((2, 8)), 3)
    assert np.asarray(ids).tolist() == [[0, 1, 2]] * 2
    np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)


def test_bf16_logits_are_routed_in_f32(rng: np.random.Generator) -> None:
    logits = jnp.asarray(rng.standard_normal((4, 16)), jnp.bfloat16)
    _, weights = w4.topk_routing(logits, 4)
    _, expected = w4.topk_routing(logits.astype(jnp.float32), 4)
    np.testing.assert_array_equal(weights, expected)


def test_refusals() -> None:
    logits = jnp.zeros((2, 4))
    for k in (0, 5):
        with pytest.raises(ValueError, match=rf"k={k} is not in 1\.\.4 \(the experts in logits\)"):
            w4.topk_routing(logits, k)
    with pytest.raises(ValueError, match="scoring='tanh' is unknown; use one of softmax, topk_"):
        w4.topk_routing(logits, 2, scoring="tanh")
    with pytest.raises(TypeError, match="logits: dtype int32 is not floating point"):
        w4.topk_routing(jnp.zeros((2, 4), jnp.int32), 2)
    with pytest.raises(ValueError, match=r"bias: shape \(3,\), need \(4,\)"):
        w4.topk_routing(logits, 2, bias=jnp.zeros(3))
    with pytest.raises(ValueError, match="num_groups=3 does not divide the 4 experts in logits"):
        w4.topk_routing(logits, 2, num_groups=3)
    with pytest.raises(ValueError, match="top_groups=2 of num_groups=4 with 1 experts each: need"):
        w4.topk_routing(logits, 2, num_groups=4, top_groups=2)
    with pytest.raises(ValueError, match="k=3 experts are more than top_groups=1 groups of 2 hold"):
        w4.topk_routing(logits, 3, num_groups=2, top_groups=1)
    ids, table = jnp.zeros(2, jnp.int32), jnp.zeros((9, 2), jnp.int32)
    with pytest.raises(ValueError, match="scoring='topk_softmax' is not for tables"):
        w4.hash_routing(logits, ids, table, scoring="topk_softmax")
    with pytest.raises(TypeError, match="token_ids: dtype float32 is not an integer; pass ids"):
        w4.hash_routing(logits, jnp.zeros(2), table)
    with pytest.raises(ValueError, match=r"token_ids: shape \(3,\), need \(2,\): one token per"):
        w4.hash_routing(logits, jnp.zeros(3, jnp.int32), table)
