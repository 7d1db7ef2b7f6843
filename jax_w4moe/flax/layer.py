"""The NNX layer that holds packed 4-bit experts, and its router."""

from collections.abc import Sequence
from typing import Any, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_w4moe import checks, reference
from jax_w4moe import implementation as implementations
from jax_w4moe.activations import Activation, SwiGLU
from jax_w4moe.flax.initializers import EXPERT_INIT, random_experts
from jax_w4moe.flax.router import Router
from jax_w4moe.formats import LAYOUT_VERSION, MXFP4, WeightFormat
from jax_w4moe.moe import fused_moe
from jax_w4moe.packing import pack_experts, quantize_experts
from jax_w4moe.quantization import PerToken, ScaleRule
from jax_w4moe.sharding import put, shard_experts
from jax_w4moe.types import ExpertWeights, PackedExperts, PackedTensor


class PackedWeight(nnx.Variable):
    """A packed weight or what belongs to it: no nnx.Param, so gradients and optimisers skip it."""


class FusedMoE(nnx.Module):
    """A Mixture-of-Experts layer: a float router and packed 4-bit experts.

    ``FusedMoE(...)`` makes random weights; :meth:`from_kernels`, :meth:`from_experts` and
    :meth:`from_checkpoint` take given ones. The router is an ``nnx.Linear`` in f32; the experts are
    ``PackedWeight`` variables (``w13``, ``w2``, their biases, and what a restore checks).

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from jax_w4moe.flax import FusedMoE
    >>> layer = FusedMoE(64, 32, num_experts=4, top_k=2, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((3, 64), jnp.bfloat16)).shape
    (3, 64)
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        num_experts: int,
        top_k: int,
        format: WeightFormat = MXFP4,
        activation: Activation = SwiGLU(),  # noqa: B008 - frozen
        scoring: str = "softmax",
        renormalize: bool = True,
        routed_scale: float = 1.0,
        num_groups: int = 1,
        top_groups: int | None = None,
        router_size: int | None = None,
        use_router_bias: bool = False,
        use_selection_bias: bool = False,
        table_size: int | None = None,
        use_expert_bias: bool = False,
        act_dtype: Any = jnp.float8_e4m3fn,
        act_scale: ScaleRule = PerToken(),  # noqa: B008 - frozen
        dtype: Any = jnp.bfloat16,
        param_dtype: Any = jnp.float32,
        kernel_init: Any = EXPERT_INIT,
        router_kernel_init: Any = nnx.initializers.lecun_normal(),  # noqa: B008 - a pure function
        implementation: str | None = None,
        expert_axis: str | None = None,
        tensor_axis: str | None = None,
        token_axes: str | Sequence[str] | None = None,
        exchange: str | None = None,
        rngs: nnx.Rngs,
    ):
        """Makes a layer with random weights, quantised expert by expert.

        Args:
          hidden_size: H.
          intermediate_size: I, of one expert.
          num_experts: E.
          top_k: experts per token.
          format: the weight format of the experts.
          activation: the gated activation.
          scoring, renormalize, routed_scale, num_groups, top_groups: as in
            :func:`jax_w4moe.topk_routing`, where ``routed_scale`` is called ``scale``.
          router_size: of what the router sees; None: H.
          use_router_bias: whether the router adds a bias to its logits.
          use_selection_bias: whether it adds one for the choice of experts only (zero at first).
          table_size: V of :func:`jax_w4moe.hash_routing`'s table (zero at first), None for none.
          use_expert_bias: whether the experts have biases (zero at first).
          act_dtype: what activations are rounded to before each projection; float32: they are not,
            and the experts run as :func:`jax_w4moe.reference.fused_moe` in its exact mode.
          act_scale: the rule of the FP8 scales.
          dtype: of the result.
          param_dtype: of the router's parameters.
          kernel_init: initialiser of an expert's [I, H] and [H, I] kernels.
          router_kernel_init: initialiser of the router's [H, E] kernel.
          implementation: as in :func:`jax_w4moe.fused_moe`.
          expert_axis, tensor_axis, token_axes, exchange: how the layer is spread over a mesh, as in
            :func:`jax_w4moe.fused_moe`; :meth:`shard` places the weights.
          rngs: the key streams; "params" is used.

        Raises:
          ValueError: H or I not a multiple of 32 and of the format's group, or k not in 1..E.
        """
        checks.layer_sizes(hidden_size, intermediate_size, num_experts, top_k, format.group_size)
        experts = random_experts(
            rngs.params(),
            (num_experts, hidden_size, intermediate_size),
            format,
            use_expert_bias,
            kernel_init,
        )
        self.router = Router(
            hidden_size if router_size is None else router_size,
            num_experts,
            top_k=top_k,
            scoring=scoring,
            renormalize=renormalize,
            routed_scale=routed_scale,
            num_groups=num_groups,
            top_groups=top_groups,
            use_bias=use_router_bias,
            use_selection_bias=use_selection_bias,
            table_size=table_size,
            param_dtype=param_dtype,
            kernel_init=router_kernel_init,
            rngs=rngs,
        )
        self.activation = activation
        self.act_dtype = jnp.dtype(act_dtype)
        self.act_scale = act_scale
        self.dtype = jnp.dtype(dtype)
        self.implementation = implementation
        self.expert_axis = expert_axis
        self.tensor_axis = tensor_axis
        self.token_axes = (token_axes,) if isinstance(token_axes, str) else token_axes
        self.exchange = exchange
        self._set_experts(experts)

    @classmethod
    def from_experts(
        cls,
        experts: ExpertWeights | PackedExperts,
        *,
        top_k: int,
        router_kernel: Array,
        router_bias: Array | None = None,
        selection_bias: Array | None = None,
        table: Array | None = None,
        **options: Any,
    ) -> Self:
        """A layer around given experts.

        Args:
          experts: canonical (packed here) or packed.
          top_k: experts per token.
          router_kernel: float[H, E]; [R, E] for a router that sees R.
          router_bias: float[E], added to the logits, or None.
          selection_bias: float[E], added for the choice of experts only, or None.
          table: int[V, k], the experts of every token id, or None.
          **options: keywords of the constructor, from ``activation`` on.

        Returns:
          The layer.

        Raises:
          ValueError, TypeError: parts that do not fit together; weights that do not pack exactly.
        """
        if isinstance(experts, ExpertWeights):
            experts = pack_experts(experts)
        is_spread = options.get("expert_axis") or options.get("tensor_axis")
        (checks.packed_shards if is_spread else checks.packed_experts)(experts)
        num_experts, hidden = experts.num_experts, experts.hidden_size
        router_size = options.pop("router_size", hidden)
        checks.router(router_kernel, router_bias, router_size, num_experts)
        checks.routing_parts(selection_bias, table, num_experts, top_k)

        def build() -> FusedMoE:
            return cls(
                hidden,
                experts.intermediate_size,
                num_experts=num_experts,
                top_k=top_k,
                format=experts.format,
                router_size=router_size,
                use_router_bias=router_bias is not None,
                use_selection_bias=selection_bias is not None,
                table_size=None if table is None else table.shape[0],
                use_expert_bias=experts.w13_bias is not None or experts.w2_bias is not None,
                rngs=nnx.Rngs(0),
                **options,
            )

        # No random weights are made only to be thrown away.
        layer: Any = nnx.eval_shape(build)
        param_dtype = layer.router.kernel.get_value().dtype
        layer.router.kernel.set_value(jnp.asarray(router_kernel, param_dtype))
        if router_bias is not None:
            layer.router.bias.set_value(jnp.asarray(router_bias, param_dtype))
        if selection_bias is not None:
            layer.router.selection_bias.set_value(jnp.asarray(selection_bias, jnp.float32))
        if table is not None:
            layer.router.table.set_value(jnp.asarray(table, jnp.int32))
        layer._set_experts(experts)
        return cast(Self, layer)

    @classmethod
    def from_kernels(
        cls,
        w_gate: Array,
        w_up: Array,
        w_down: Array,
        *,
        format: WeightFormat = MXFP4,
        **options: Any,
    ) -> Self:
        """A layer from float kernels, quantised here.

        Args:
          w_gate: float[E, I, H].
          w_up: float[E, I, H].
          w_down: float[E, H, I].
          format: the weight format.
          **options: keywords of :meth:`from_experts`.

        Returns:
          The layer.
        """
        return cls.from_experts(quantize_experts(w_gate, w_up, w_down, format), **options)

    @classmethod
    def from_checkpoint(
        cls,
        path: Any,
        layer: int,
        *,
        mesh: Mesh | None = None,
        quantize: WeightFormat | None = None,
        **options: Any,
    ) -> Self:
        """The routed experts and the router of one MoE layer of a checkpoint folder.

        :meth:`MoEBlock.from_pretrained` takes what else the layer has, shared experts above all.

        Args:
          path: the folder, as in :func:`jax_w4moe.checkpoint.load_experts`.
          layer: the number of the transformer layer.
          mesh: the devices to load onto, spread as ``expert_axis`` and ``tensor_axis`` say; None:
            the default device.
          quantize: the format to round float experts (bf16, FP8) to; MXFP4_WIDE also for MXFP4 ones
            whose scales lie too far apart, which are not rounded; else None.
          **options: keywords of the constructor; those that are the model's own need not be given.

        Returns:
          The layer.

        Raises:
          ValueError, TypeError: a checkpoint that is incomplete, damaged or not exact.
          NotImplementedError: a format or a model that this version does not know.
        """
        from jax_w4moe import checkpoint  # needs the extra [checkpoint], the rest does not

        with checkpoint.opened(path) as files:
            config = checkpoint.moe_config(files, quantize=quantize)
            router = checkpoint.load_router(files, layer)
            model: dict[str, Any] = {
                "activation": config.activation,
                "scoring": config.scoring,
                "renormalize": config.renormalize,
                "routed_scale": config.routed_scale,
                "num_groups": config.num_groups,
                "top_groups": config.top_groups,
                "router_size": router.weight.shape[1],
            }
            if act_scale := checkpoint.load_act_scale(files, layer):
                model["act_scale"] = act_scale
            axes = {name: options.get(name) for name in ("expert_axis", "tensor_axis")}
            experts = checkpoint.load_experts(files, layer, quantize=quantize, mesh=mesh, **axes)
        made = cls.from_experts(
            experts,
            top_k=config.top_k,
            router_kernel=router.weight.T,
            router_bias=router.bias,
            selection_bias=router.selection_bias,
            table=router.table,
            **model | options,
        )
        if mesh is not None:
            made.shard(mesh)
        return made

    def __call__(
        self,
        x: Array,
        active: Array | None = None,
        *,
        token_ids: Array | None = None,
        router_input: Array | None = None,
    ) -> Array:
        """Routes tokens and runs their experts.

        Args:
          x: float[..., H]; the experts see it in bf16 (in f32 with that ``act_dtype``).
          active: bool[...], which tokens have experts at all; the others cost nothing, and their
            rows of the result are zero. None: all.
          token_ids: int[...], the vocabulary's, for a router with a table.
          router_input: float[..., R], what the router sees, in f32; None: x.

        Returns:
          [..., H] in ``dtype``.

        Raises:
          ValueError: a router with a table without token ids.
        """
        self.check_restored()
        seen = x if router_input is None else router_input
        ids, weights = self.router.route(
            seen.reshape(-1, seen.shape[-1]),
            None if token_ids is None else token_ids.reshape(-1),
        )
        if active is not None:
            ids = jnp.where(active.reshape(-1, 1), ids, -1)
        run = self._exact if self.act_dtype == jnp.float32 else self._fused
        return (
            run(x.reshape(-1, self.hidden_size), ids, weights).reshape(x.shape).astype(self.dtype)
        )

    def _fused(self, x: Array, ids: Array, weights: Array) -> Array:
        return fused_moe(
            x.astype(jnp.bfloat16),
            self.experts,
            ids,
            weights,
            activation=self.activation,
            act_dtype=self.act_dtype,
            act_scale=self.act_scale,
            implementation=self.implementation,
            expert_axis=self.expert_axis,
            tensor_axis=self.tensor_axis,
            token_axes=self.token_axes,
            exchange=self.exchange,
        )

    def _exact(self, x: Array, ids: Array, weights: Array) -> Array:
        """Nothing is rounded, and nothing of it is a kernel: refused where one is asked for."""
        implementations.choose("FusedMoE", self.implementation, "act_dtype=float32")
        if self.expert_axis is not None or self.tensor_axis is not None:
            raise NotImplementedError(
                "FusedMoE: act_dtype=float32 runs on one device; leave expert_axis and tensor_axis"
                " out, or take bfloat16."
            )
        return reference.fused_moe(
            x.astype(jnp.float32),
            self.experts,
            ids,
            weights,
            activation=self.activation,
            mode="exact",
            slot_dtype=jnp.float32,
        )

    def shard(self, mesh: Mesh) -> None:
        """Places the experts on a mesh by the layer's axes, and the router on all of its devices.

        Args:
          mesh: the devices; it has the axes that the layer was made with.

        Raises:
          ValueError: it has not.
        """
        self._set_experts(
            shard_experts(
                self.experts, mesh, expert_axis=self.expert_axis, tensor_axis=self.tensor_axis
            )
        )
        everywhere = NamedSharding(mesh, PartitionSpec())
        router = nnx.state(self.router)
        nnx.update(self.router, jax.tree.map(lambda array: put(array, everywhere), router))
        self.layout.set_value(put(self.layout.get_value(), everywhere))

    @property
    def experts(self) -> PackedExperts:
        """The packed experts, for the functional ops."""
        num_experts, hidden, intermediate = self.sizes
        w13 = PackedTensor(
            self.w13.get_value(),
            self.w13_inexact_groups.get_value(),
            self.format,
            (num_experts, 2 * intermediate, hidden),
            "gate_up",
            LAYOUT_VERSION,
        )
        w2 = PackedTensor(
            self.w2.get_value(),
            self.w2_inexact_groups.get_value(),
            self.format,
            (num_experts, hidden, intermediate),
            "canonical",
            LAYOUT_VERSION,
        )
        return PackedExperts(w13, w2, _value(self.w13_bias), _value(self.w2_bias))

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.sizes[1]

    def check_restored(self) -> None:
        """Checks weights that came from a file: their layout version, their sizes, exactness.

        Called by :func:`restore`, and by every call of the layer outside ``jit``.

        Raises:
          ValueError: the weights are another layer's, or were packed with another layout version,
            or not exactly.
        """
        layout = self.layout.get_value()
        if isinstance(layout, jax.core.Tracer | jax.ShapeDtypeStruct):
            return
        checks.layout("FusedMoE", np.asarray(layout).tolist(), self.sizes)
        groups = (self.w13_inexact_groups, self.w2_inexact_groups)
        checks.exact("FusedMoE", sum(int(np.sum(counts.get_value())) for counts in groups))

    def _set_experts(self, experts: PackedExperts) -> None:
        self.format = experts.format
        self.sizes = (experts.num_experts, experts.hidden_size, experts.intermediate_size)
        self.w13 = PackedWeight(experts.w13.data)
        self.w2 = PackedWeight(experts.w2.data)
        self.w13_bias = _variable(experts.w13_bias)
        self.w2_bias = _variable(experts.w2_bias)
        self.w13_inexact_groups = PackedWeight(experts.w13.inexact_groups)
        self.w2_inexact_groups = PackedWeight(experts.w2.inexact_groups)
        self.layout = PackedWeight(jnp.asarray([experts.w13.layout_version, *self.sizes]))


def _variable(array: Array | None) -> PackedWeight | None:
    return None if array is None else PackedWeight(array)


def _value(variable: PackedWeight | None) -> Array | None:
    return None if variable is None else variable.get_value()
