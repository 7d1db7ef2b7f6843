"""Routers against transformers' own, on the same weights."""
# ruff: noqa: E402 - without the judge's packages the rest need not be imported

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the judge needs torch: pip install '.[judge]'")
transformers = pytest.importorskip(
    "transformers", reason="the judge needs transformers: pip install '.[judge]'"
)

from transformers import DeepseekV3Config, DeepseekV4Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4SparseMoeBlock

from jax_w4moe import hash_routing, topk_routing

pytestmark = pytest.mark.judge

E, H, K, T, VOCABULARY = 16, 64, 4, 65, 50
SIZES: dict[str, Any] = {
    "hidden_size": H,
    "moe_intermediate_size": 32,
    "n_routed_experts": E,
    "num_experts_per_tok": K,
    "num_hidden_layers": 1,
}


def _captured(block: Any, *arguments: Any) -> tuple[np.ndarray, np.ndarray]:
    """The ids and weights that a block hands to its experts."""
    seen: list[Any] = []

    def experts(hidden: Any, ids: Any, weights: Any) -> Any:
        seen.extend([ids, weights])
        return torch.zeros_like(hidden)

    block.experts.forward = experts
    with torch.no_grad():
        block(*arguments)
    ids, weights = (np.asarray(value).reshape(T, K) for value in seen)
    return ids, weights


def _assert_same(actual: Any, expected: tuple[np.ndarray, np.ndarray]) -> None:
    """As sets: transformers does not sort them."""
    for (ids, weights), (own_ids, own_weights) in zip(
        zip(*map(np.asarray, actual), strict=True), zip(*expected, strict=True), strict=True
    ):
        order, own_order = np.argsort(ids, kind="stable"), np.argsort(own_ids, kind="stable")
        np.testing.assert_array_equal(ids[order], own_ids[own_order])
        np.testing.assert_allclose(weights[order], own_weights[own_order], rtol=1e-5)


def _inputs(rng: np.random.Generator, block: Any) -> tuple[Any, Any, Any]:
    """Tokens, and the router's weight and bias, in which no two experts tie."""
    x = rng.standard_normal((1, T, H)).astype(np.float32)
    kernel = rng.standard_normal((E, H)).astype(np.float32) / H**0.5
    bias = rng.standard_normal(E).astype(np.float32) / 4
    block.gate.weight.data = torch.from_numpy(kernel)
    if hasattr(block.gate, "e_score_correction_bias"):
        block.gate.e_score_correction_bias.data = torch.from_numpy(bias)
    return torch.from_numpy(x), jnp.asarray(x[0] @ kernel.T), jnp.asarray(bias)


@pytest.mark.parametrize(("num_groups", "top_groups"), [(4, 2), (1, 1)])
def test_deepseek_v3(rng: np.random.Generator, num_groups: int, top_groups: int) -> None:
    config = DeepseekV3Config(
        **SIZES,
        n_group=num_groups,
        topk_group=top_groups,
        n_shared_experts=1,
        first_k_dense_replace=0,
        routed_scaling_factor=2.5,
    )
    block = DeepseekV3MoE(config)
    x, logits, bias = _inputs(rng, block)
    actual = topk_routing(
        logits,
        K,
        scoring="sigmoid",
        bias=bias,
        num_groups=num_groups,
        top_groups=top_groups,
        scale=2.5,
    )
    _assert_same(actual, _captured(block, x))


@pytest.mark.parametrize("kind", ["moe", "hash_moe"])
def test_deepseek_v4(rng: np.random.Generator, kind: str) -> None:
    config = DeepseekV4Config(
        **SIZES,
        vocab_size=VOCABULARY,
        mlp_layer_types=[kind],
        layer_types=["sliding_attention"],
        num_attention_heads=4,
        head_dim=16,
        q_lora_rank=16,
        routed_scaling_factor=1.5,
    )
    block = DeepseekV4SparseMoeBlock(config, 0)
    x, logits, bias = _inputs(rng, block)
    tokens = rng.integers(0, VOCABULARY, (1, T))
    if kind == "moe":
        actual = topk_routing(logits, K, scoring="sqrtsoftplus", bias=bias, scale=1.5)
    else:
        table = rng.permuted(np.tile(np.arange(E), (VOCABULARY, 1)), axis=1)[:, :K]
        block.gate.tid2eid.data = torch.from_numpy(table.astype(np.int64))
        ids = jnp.asarray(tokens[0], jnp.int32)
        actual = hash_routing(logits, ids, jnp.asarray(table, jnp.int32), scale=1.5)
    _assert_same(actual, _captured(block, x, torch.from_numpy(tokens)))
