"""Routing against plain numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

import jax_w4moe as w4


def _softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def _expected(
    logits: np.ndarray, k: int, scoring: str, bias: np.ndarray, renormalize: bool, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    scores = _softmax(logits) if scoring == "softmax" else logits
    ids = np.argsort(-(scores + bias), axis=-1, kind="stable")[..., :k]
    weights = np.take_along_axis(scores, ids, axis=-1)
    if scoring == "topk_softmax":
        weights = _softmax(weights)
    elif renormalize:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return ids, weights * scale


@pytest.mark.parametrize("scoring", ["softmax", "topk_softmax"])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(9, 16), (2, 3, 5), (0, 4)])
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
