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


@dataclasses.dataclass(frozen=True)
class SiTU:
    """``b1 * tanh(gate / b1) * sigmoid(gate) * b2 * tanh(up / b2)``, as in Kimi K3.

    Attributes:
      gate_bound: b1, which the gate's factor stays below.
      up_bound: b2, which the up projection's stays below.
    """

    gate_bound: float = 4.0
    up_bound: float = 25.0

    def __call__(
        self, gate: Float32[Array, "*rows I"], up: Float32[Array, "*rows I"]
    ) -> Float32[Array, "*rows I"]:
        """Applies the activation in f32."""
        bounded_gate = self.gate_bound * jnp.tanh(gate / self.gate_bound)
        return bounded_gate * jax.nn.sigmoid(gate) * (self.up_bound * jnp.tanh(up / self.up_bound))


Activation = SwiGLU | SiTU
"""All that there are."""
