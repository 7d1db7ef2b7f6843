"""From router logits to the experts and weights of every token. Pure JAX, f32."""

import jax
import jax.numpy as jnp
from jax import Array

from jax_w4moe import checks

_LEAST_SUM = 1e-20  # of weights that are divided by their sum, as Hugging Face has it


def topk_routing(
    logits: Array,
    k: int,
    *,
    scoring: str = "softmax",
    bias: Array | None = None,
    num_groups: int = 1,
    top_groups: int | None = None,
    renormalize: bool = True,
    scale: float = 1.0,
) -> tuple[Array, Array]:
    """Chooses k experts per token and their weights.

    Args:
      logits: float[..., E], computed in f32 whatever their dtype. Ties go to the lower expert.
      k: experts per token, 1 <= k <= E.
      scoring: "softmax" takes the softmax over all experts, then the k largest (Qwen3-MoE);
        "topk_softmax" takes the k largest logits, then the softmax over these k (gpt-oss);
        "sigmoid" (DeepSeek-V3, Kimi K2, GLM) and "sqrtsoftplus", the root of softplus
        (DeepSeek-V4), score every expert by itself.
      bias: f32[E] added to the scores for the choice only, never to the weights
        (``e_score_correction_bias``); or None.
      num_groups: neighbouring experts are divided into so many groups of one size (``n_group``).
      top_groups: only experts of so many groups are chosen, those whose two best have the largest
        sum (``topk_group``); None: of all.
      renormalize: divide the k weights by their sum ("topk_softmax" weights always sum to one).
      scale: the model's routed_scaling_factor, multiplied into the weights, here and nowhere else.

    Returns:
      (topk_ids i32[..., k], topk_weights f32[..., k]), by falling score.

    Raises:
      ValueError: k is not in 1..E or more than the groups hold, the scoring is unknown, or the bias
        has the wrong shape.
      TypeError: logits are not floating point.
    """
    checks.routing(logits, k, scoring, bias)
    checks.routing_groups(logits.shape[-1], k, num_groups, top_groups)
    scores = _scores(logits, scoring)
    selection = scores
    if bias is not None:
        selection = scores + jnp.broadcast_to(bias.astype(jnp.float32), scores.shape)
    if top_groups is not None and top_groups < num_groups:
        selection = jnp.where(
            _in_top_groups(selection, num_groups, top_groups), selection, -jnp.inf
        )
    _, ids = jax.lax.top_k(selection, k)
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if scoring == "topk_softmax":
        weights = jax.nn.softmax(weights, axis=-1)
    elif renormalize:
        weights = _renormalized(weights)
    return ids, weights * jnp.float32(scale)


def hash_routing(
    logits: Array,
    token_ids: Array,
    table: Array,
    *,
    scoring: str = "sqrtsoftplus",
    renormalize: bool = True,
    scale: float = 1.0,
) -> tuple[Array, Array]:
    """Experts by token id, from a table; only their weights come from the router (DeepSeek-V4).

    Args:
      logits: float[..., E], computed in f32.
      token_ids: int[...], the vocabulary's. A token outside the table has no expert.
      table: int[V, k], the experts of every token id (``tid2eid``); none where outside [0, E).
      scoring, renormalize, scale: as in :func:`topk_routing`; "topk_softmax" is not for tables.

    Returns:
      (topk_ids i32[..., k], topk_weights f32[..., k]); -1 with weight 0 for no expert.

    Raises:
      ValueError: shapes that do not fit, or the scoring is unknown.
      TypeError: logits are not floating point, or ids are not integers.
    """
    checks.hash_routing(logits, token_ids, table, scoring)
    known = (token_ids >= 0) & (token_ids < table.shape[0])
    ids = jnp.where(known[..., None], table.astype(jnp.int32)[jnp.where(known, token_ids, 0)], -1)
    valid = (ids >= 0) & (ids < logits.shape[-1])
    weights = jnp.take_along_axis(_scores(logits, scoring), jnp.where(valid, ids, 0), axis=-1)
    weights = jnp.where(valid, weights, 0.0)
    if renormalize:
        weights = _renormalized(weights)
    return jnp.where(valid, ids, -1), weights * jnp.float32(scale)


def _scores(logits: Array, scoring: str) -> Array:
    scores = logits.astype(jnp.float32)
    if scoring == "softmax":
        return jax.nn.softmax(scores, axis=-1)
    if scoring == "sigmoid":
        return jax.nn.sigmoid(scores)
    if scoring == "sqrtsoftplus":
        return jnp.sqrt(jax.nn.softplus(scores))
    return scores  # of the k largest later


def _in_top_groups(selection: Array, num_groups: int, top_groups: int) -> Array:
    """bool[..., E]: whether an expert's group is among the best, by the sum of its two best."""
    groups = selection.reshape(*selection.shape[:-1], num_groups, -1)
    best_two, _ = jax.lax.top_k(groups, 2)
    _, best = jax.lax.top_k(jnp.sum(best_two, axis=-1), top_groups)
    chosen = jnp.any(jax.nn.one_hot(best, num_groups, dtype=jnp.bool_), axis=-2)
    return jnp.repeat(chosen, groups.shape[-1], axis=-1)


def _renormalized(weights: Array) -> Array:
    return weights / (jnp.sum(weights, axis=-1, keepdims=True) + _LEAST_SUM)
