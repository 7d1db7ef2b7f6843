"""What explain and workspace_bytes say, and that they agree with the op."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_w4moe as w4
from jax_w4moe import _ffi, implementation, roofline
from jax_w4moe.ops import fused_moe as op
from jax_w4moe.ops import tiles
from tests.helpers import data

H, I, E, K = 128, 96, 8, 2  # noqa: E741


@pytest.fixture(scope="module")
def experts() -> w4.PackedExperts:
    return w4.pack_experts(data.expert_weights(np.random.default_rng(0), E, H, I))


def _lines(text: str) -> dict[str, str]:
    return {line[:17].strip(): line[17:].strip() for line in text.splitlines()}


def test_explain_counts_the_experts_that_ids_touch(experts: w4.PackedExperts) -> None:
    x = jnp.zeros((3, H), jnp.bfloat16)
    ids = jnp.asarray([[0, 5], [5, 0], [-1, 99]], jnp.int32)
    lines = _lines(w4.explain(x, experts, ids, jnp.ones((3, K))))
    assert lines["call"] == "3 tokens, 2 of 8 experts each"
    assert lines["weights read"] == f"{experts.nbytes * 2 / 8 / 1e6:,.0f} MB: 2 experts"
    assert lines["experts"].startswith("mxfp4, H=128, I=96, ")
    assert lines["experts"].endswith(" 0 inexact groups")
    floor = roofline.floor_us(experts.nbytes * 2 / 8, 6 * 3 * K * H * I)
    assert lines["floor on an H200"].startswith(f"{floor:.1f} us: ")
    assert w4.workspace_bytes(experts, 3, K) == op.workspace_bytes(3, K, experts)


def test_explain_needs_shapes_only(experts: w4.PackedExperts) -> None:
    x = jax.ShapeDtypeStruct((1000, H), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1000, K), jnp.int32)
    lines = _lines(w4.explain(x, experts, ids))
    assert lines["weights read"].endswith("8 experts, expected under uniform routing")
    widest = max(tiles.TILE_TOKENS)
    assert lines["tactic"].startswith(
        f"tiles of {widest} tokens at most, by the cost model; 250 rows per expert"
    )


def test_explain_says_where_the_tactic_is_from(experts: w4.PackedExperts) -> None:
    x, ids = jnp.zeros((2, H), jnp.bfloat16), jnp.zeros((2, K), jnp.int32)
    for tactic in w4.tactics(w4.Problem.of_layer("fused_moe", experts, ids.size)):
        lines = _lines(w4.explain(x, experts, ids, tactic=tactic))
        assert f"of {tactic.tile_tokens} tokens at most, by the argument;" in lines["tactic"]


def test_explain_says_which_implementation(
    experts: w4.PackedExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, ids = jnp.zeros((2, H), jnp.bfloat16), jnp.zeros((2, K), jnp.int32)
    assert _lines(w4.explain(x, experts, ids, implementation="xla"))["implementation"] == (
        "xla, as asked for"
    )
    monkeypatch.setattr(implementation, "choose", lambda *_: "both")
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert "elsewhere (as here)" in w4.explain(x, experts, ids)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "a Hopper GPU and the kernels are here" in w4.explain(x, experts, ids)
    monkeypatch.setattr(implementation, "choose", lambda *_: "xla")
    assert "no Hopper GPU here" in w4.explain(x, experts, ids)


def test_refusals(experts: w4.PackedExperts) -> None:
    x, ids = jnp.zeros((2, H), jnp.bfloat16), jnp.zeros((2, K), jnp.int32)
    with pytest.raises(ValueError, match=r"x: shape \(3, 128\), need \(2, 128\) for topk_ids of 2"):
        w4.explain(jnp.zeros((3, H), jnp.bfloat16), experts, ids)
    with pytest.raises(ValueError, match="k=9 is not in 1..8"):
        w4.workspace_bytes(experts, 4, 9)
    with pytest.raises(ValueError, match="num_tokens=-1 is below 0"):
        w4.workspace_bytes(experts, -1, K)
    if _ffi.why_unavailable():
        with pytest.raises(RuntimeError, match="cannot run here"):
            w4.explain(x, experts, ids, implementation="cuda_sm90")


def test_workspace_stops_growing(experts: w4.PackedExperts) -> None:
    sizes = [w4.workspace_bytes(experts, tokens, K) for tokens in (0, 1, 512, 32_768, 10**6)]
    assert sizes == sorted(sizes) and sizes[-2] == sizes[-1]


def test_floor() -> None:
    assert roofline.floor_us(4.57e6, 0) == pytest.approx(6.5)
    assert roofline.floor_us(0, 1450e6) == pytest.approx(6.5)
    assert roofline.expected_experts(1, 6, 256) == pytest.approx(6)
    assert roofline.expected_experts(10_000, 6, 256) == pytest.approx(256)
