"""A whole MoE block: routed experts, shared experts, and the projections around latent ones."""

from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_w4moe.activations import Activation
from jax_w4moe.flax.layer import FusedMoE
from jax_w4moe.formats import WeightFormat
from jax_w4moe.sharding import put


class SharedExpert(nnx.Module):
    """The expert that every token has: a gated MLP in its own dtype, summed in f32."""

    def __init__(self, w_gate: Array, w_up: Array, w_down: Array, activation: Activation):
        """Takes given weights.

        Args:
          w_gate: float[S, H].
          w_up: float[S, H].
          w_down: float[H, S].
          activation: the gated activation, with its own clamp.
        """
        self.gate = nnx.Param(jnp.asarray(w_gate).T)
        self.up = nnx.Param(jnp.asarray(w_up).T)
        self.down = nnx.Param(jnp.asarray(w_down).T)
        self.activation = activation

    def __call__(self, x: Array) -> Array:
        """float[..., H] -> f32[..., H]."""
        gate, up = _dot(x, self.gate), _dot(x, self.up)
        return _dot(self.activation(gate, up), self.down)


class LatentProjection(nnx.Module):
    """What lies around experts that see a latent of L numbers instead of H (Kimi K3)."""

    def __init__(self, down: Array, norm: Array | None, up: Array, epsilon: float):
        """Takes given weights.

        Args:
          down: float[L, H], before the experts.
          norm: float[L], the weight of an RMSNorm of their sum, or None.
          up: float[H, L], after it.
          epsilon: of the norm.
        """
        self.down = nnx.Param(jnp.asarray(down).T)
        self.norm = None if norm is None else _norm(norm, epsilon)
        self.up = nnx.Param(jnp.asarray(up).T)

    def encode(self, x: Array) -> Array:
        """[..., H] -> f32[..., L]."""
        return _dot(x, self.down)

    def decode(self, y: Array) -> Array:
        """[..., L] -> f32[..., H]."""
        return _dot(y if self.norm is None else self.norm(y), self.up)


class MoEBlock(nnx.Module):
    """The MoE block of a model: ``routed(x) + shared(x)``, in the families that have both.

    The shared expert is added once and never scaled; the routed experts may see a latent of x.
    """

    def __init__(
        self,
        routed: FusedMoE,
        shared: SharedExpert | None = None,
        latent: LatentProjection | None = None,
    ):
        """Takes given parts.

        Args:
          routed: the router and its experts.
          shared: the shared expert, or None.
          latent: the projections around the routed experts, or None.
        """
        self.routed = routed
        self.shared = shared
        self.latent = latent

    @classmethod
    def from_pretrained(
        cls,
        path: Any,
        layer: int,
        *,
        mesh: Mesh | None = None,
        quantize: WeightFormat | None = None,
        **options: Any,
    ) -> Self:
        """One MoE layer of a checkpoint folder, whole.

        Args:
          path: the folder, as in :func:`jax_w4moe.checkpoint.load_experts`; format and model family
            are detected.
          layer: the number of the transformer layer.
          mesh: the devices to load onto; the experts are spread over ``expert_axis`` and
            ``tensor_axis``, all else is on each. None: the default device.
          quantize: the format to round float experts (bf16, FP8) to; MXFP4_WIDE also for MXFP4 ones
            whose scales lie too far apart, which are not rounded; else None.
          **options: keywords of :class:`FusedMoE` that are not the model's own.

        Returns:
          The block.

        Raises:
          ValueError, TypeError: a checkpoint that is incomplete, damaged or not exact.
          NotImplementedError: a format or a model that this version does not know.
        """
        from jax_w4moe import checkpoint  # needs the extra [checkpoint], the rest does not

        with checkpoint.opened(path) as files:
            latent = checkpoint.load_latent(files, layer)
            shared = checkpoint.load_shared_expert(files, layer)
            routed = FusedMoE.from_checkpoint(files, layer, mesh=mesh, quantize=quantize, **options)
        block = cls(
            routed,
            None if shared is None else SharedExpert(*shared, routed.activation),
            None if latent is None else LatentProjection(*latent),
        )
        if mesh is not None:
            block.shard(mesh)
        return block

    def __call__(
        self, x: Array, active: Array | None = None, *, token_ids: Array | None = None
    ) -> Array:
        """Runs the block.

        Args:
          x: float[..., H].
          active: bool[...], which tokens have routed experts; None: all.
          token_ids: int[...], the vocabulary's, for a router with a table.

        Returns:
          [..., H] in the routed experts' ``dtype``.

        Raises:
          ValueError: a router with a table without token ids.
        """
        seen = x if self.latent is None else self.latent.encode(x)
        y = self.routed(seen, active, token_ids=token_ids, router_input=x)
        if self.latent is not None:
            y = self.latent.decode(y)
        if self.shared is not None:
            y = y.astype(jnp.float32) + self.shared(x)
        return y.astype(self.routed.dtype)

    def shard(self, mesh: Mesh) -> None:
        """Places the experts on a mesh by their axes, and all else on all of its devices.

        Args:
          mesh: the devices.

        Raises:
          ValueError: it has not the axes that the experts were made with.
        """
        self.routed.shard(mesh)
        everywhere = NamedSharding(mesh, PartitionSpec())
        for part in (self.shared, self.latent):
            if part is not None:
                nnx.update(part, jax.tree.map(lambda a: put(a, everywhere), nnx.state(part)))


def _dot(x: Array, kernel: Any) -> Array:
    """In the kernel's dtype, summed in f32."""
    weights = kernel.get_value()
    return jnp.dot(x.astype(weights.dtype), weights, preferred_element_type=jnp.float32)


def _norm(scale: Array, epsilon: float) -> nnx.RMSNorm:
    scale = jnp.asarray(scale)
    norm = nnx.RMSNorm(scale.shape[0], epsilon=epsilon, dtype=jnp.float32, rngs=nnx.Rngs(0))
    norm.scale = nnx.Param(scale)
    return norm
