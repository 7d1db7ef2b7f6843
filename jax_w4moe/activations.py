"""Gated activations between the two projections. One dataclass each; its fields are constants."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32


@dataclasses.dataclass(frozen=True)
class SwiGLU:
    """``g * sigmoid(alpha * g) * (u + beta)`` of g = min(gate, limit), u = clip(up, ±limit).

    The defaults are plain SiLU(gate) * up (DeepSeek-V3, Qwen3, Kimi K2). DeepSeek-V4 is
    ``SwiGLU(limit=10.0)``, gpt-oss ``SwiGLU(alpha=1.702, beta=1.0, limit=7.0)``.

    Attributes:
      alpha: the slope inside the sigmoid.
      beta: added to the up projection.
      limit: bound of the clamp, or None for no clamp; the gate is only bounded from above.
    """

    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None

    def __call__(
        self, gate: Float32[Array, "*rows I"], up: Float32[Array, "*rows I"]
    ) -> Float32[Array, "*rows I"]:
        """Applies the activation in f32."""
        if self.limit is not None:
            gate = jnp.minimum(gate, self.limit)
            up = jnp.clip(up, -self.limit, self.limit)
        return gate * jax.nn.sigmoid(self.alpha * gate) * (up + self.beta)
