"""From router logits to the experts and weights of every token. Pure JAX, f32."""

import jax
import jax.numpy as jnp
from jax import Array

from jax_w4moe import checks


def topk_routing(
    logits: Array,
    k: int,
    *,
    scoring: str = "softmax",
    bias: Array | None = None,
    renormalize: bool = True,
    scale: float = 1.0,
) -> tuple[Array, Array]:
    """Chooses k experts per token and their weights.

    Args:
      logits: float[..., E], computed in f32 whatever their dtype. Ties go to the lower expert.
      k: experts per token, 1 <= k <= E.
      scoring: "softmax" takes the softmax over all experts, then the k largest (Qwen3-MoE);
        "topk_softmax" takes the k largest logits, then the softmax over these k (gpt-oss).
      bias: f32[E] added to the scores for the choice only, never to the weights; or None.
      renormalize: divide the k weights by their sum ("topk_softmax" weights always sum to one).
      scale: the model's routed_scaling_factor, multiplied into the weights, here and nowhere else.

    Returns:
      (topk_ids i32[..., k], topk_weights f32[..., k]), by falling score.

    Raises:
      ValueError: k is not in 1..E, the scoring is unknown, or the bias has the wrong shape.
      TypeError: logits are not floating point.
    """
    checks.routing(logits, k, scoring, bias)
    scores = logits.astype(jnp.float32)
    if scoring == "softmax":
        scores = jax.nn.softmax(scores, axis=-1)
    selection = scores
    if bias is not None:
        selection = scores + jnp.broadcast_to(bias.astype(jnp.float32), scores.shape)
    _, ids = jax.lax.top_k(selection, k)
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if scoring == "topk_softmax":
        weights = jax.nn.softmax(weights, axis=-1)
    elif renormalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return ids, weights * jnp.float32(scale)
