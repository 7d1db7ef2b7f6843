"""The router of an MoE layer, in f32."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jax_w4moe.routing import hash_routing, topk_routing


class RoutingBuffer(nnx.Variable):
    """What steers routing and is not trained by gradients: a selection bias, a table."""


class Router(nnx.Linear):
    """A linear layer whose result are the logits of the experts, and the choice after it."""

    def __init__(
        self,
        size: int,
        num_experts: int,
        *,
        top_k: int,
        scoring: str,
        renormalize: bool,
        routed_scale: float,
        num_groups: int,
        top_groups: int | None,
        use_bias: bool,
        use_selection_bias: bool,
        table_size: int | None,
        param_dtype: Any,
        kernel_init: Any,
        rngs: nnx.Rngs,
    ):
        """Makes random weights; the arguments are those of :class:`jax_w4moe.flax.FusedMoE`."""
        super().__init__(
            size,
            num_experts,
            use_bias=use_bias,
            dtype=jnp.float32,
            param_dtype=param_dtype,
            precision=jax.lax.Precision.HIGHEST,
            kernel_init=kernel_init,
            rngs=rngs,
        )
        self.top_k = top_k
        self.scoring = scoring
        self.renormalize = renormalize
        self.routed_scale = routed_scale
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.selection_bias = RoutingBuffer(jnp.zeros(num_experts)) if use_selection_bias else None
        has_table = table_size is not None
        self.table = RoutingBuffer(jnp.zeros((table_size, top_k), jnp.int32)) if has_table else None

    def route(self, x: Array, token_ids: Array | None = None) -> tuple[Array, Array]:
        """Chooses the experts of tokens.

        Args:
          x: float[T, size].
          token_ids: int[T], for a router with a table.

        Returns:
          (topk_ids i32[T, k], topk_weights f32[T, k]).

        Raises:
          ValueError: a router with a table without token ids.
        """
        logits = self(x)
        if self.table is not None:
            if token_ids is None:
                raise ValueError(
                    "token_ids=None, but this router takes experts from a table by token id; pass"
                    " the vocabulary's ids of x's tokens."
                )
            return hash_routing(
                logits,
                token_ids,
                self.table.get_value(),
                scoring=self.scoring,
                renormalize=self.renormalize,
                scale=self.routed_scale,
            )
        bias = self.selection_bias
        return topk_routing(
            logits,
            self.top_k,
            scoring=self.scoring,
            bias=None if bias is None else bias.get_value(),
            num_groups=self.num_groups,
            top_groups=self.top_groups,
            renormalize=self.renormalize,
            scale=self.routed_scale,
        )
