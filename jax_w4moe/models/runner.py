"""A model's functions, compiled."""

from typing import Any

import jax
from jax import Array

from jax_w4moe.models.cache import Cache
from jax_w4moe.models.gpt_oss import GptOss


class Runner:
    """Prefill and decode of a model under ``jit``; a cache that goes in is donated.

    The weights are flattened here, once: a step costs the host little, and sees the weights as they
    were. ``decode`` is compiled once per cache size, ``prefill`` once per [B, S] as well: pad
    prompts to a few sizes.

    Attributes:
      model: the model.
    """

    def __init__(self, model: GptOss) -> None:
        self.model = model
        self._weights, structure = jax.tree.flatten(model)

        def prefill(weights: list[Array], cache: Cache, *prompts: Any) -> tuple[Array, Cache]:
            module: GptOss = jax.tree.unflatten(structure, weights)
            return module.prefill(cache, *prompts)

        def decode(weights: list[Array], cache: Cache, *tokens: Any) -> tuple[Array, Cache]:
            module: GptOss = jax.tree.unflatten(structure, weights)
            return module.decode(cache, *tokens)

        self._prefill = jax.jit(prefill, donate_argnums=1)
        self._decode = jax.jit(decode, donate_argnums=1)

    def init_cache(self, batch: int, capacity: int) -> Cache:
        """As :meth:`jax_w4moe.models.GptOss.init_cache`."""
        return self.model.init_cache(batch, capacity)

    def prefill(
        self, cache: Cache, tokens: Array, lengths: Array, slots: Array | None = None
    ) -> tuple[Array, Cache]:
        """As :meth:`jax_w4moe.models.GptOss.prefill`; the cache that is passed is gone."""
        logits, cache = self._prefill(self._weights, cache, tokens, lengths, slots)
        return logits, cache

    def decode(
        self, cache: Cache, tokens: Array, active: Array | None = None
    ) -> tuple[Array, Cache]:
        """As :meth:`jax_w4moe.models.GptOss.decode`; the cache that is passed is gone."""
        logits, cache = self._decode(self._weights, cache, tokens, active)
        return logits, cache
