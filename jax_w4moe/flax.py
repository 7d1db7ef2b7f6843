"""Flax NNX layers holding packed 4-bit experts."""

import functools
import os
from collections.abc import Sequence
from typing import Any, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_w4moe import checks, reference
from jax_w4moe import implementation as implementations
from jax_w4moe.activations import Activation, SwiGLU
from jax_w4moe.formats import LAYOUT_VERSION, MXFP4, WeightFormat
from jax_w4moe.formats.layout import BLOCK_ROWS
from jax_w4moe.moe import fused_moe
from jax_w4moe.packing import pack_experts, quantize_experts
from jax_w4moe.quantization import PerToken, ScaleRule
from jax_w4moe.routing import topk_routing
from jax_w4moe.sharding import put, shard_experts
from jax_w4moe.types import ExpertWeights, PackedExperts, PackedTensor

_KERNEL_INIT = nnx.initializers.lecun_normal()
_EXPERT_INIT = nnx.initializers.lecun_normal(in_axis=-1, out_axis=-2)


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
        use_router_bias: bool = False,
        use_expert_bias: bool = False,
        act_dtype: Any = jnp.float8_e4m3fn,
        act_scale: ScaleRule = PerToken(),  # noqa: B008 - frozen
        dtype: Any = jnp.bfloat16,
        param_dtype: Any = jnp.float32,
        kernel_init: Any = _EXPERT_INIT,
        router_kernel_init: Any = _KERNEL_INIT,
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
          scoring, renormalize, routed_scale: as in :func:`jax_w4moe.topk_routing`.
          use_router_bias: whether the router adds a bias to its logits.
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
        experts = _random_experts(
            rngs.params(),
            (num_experts, hidden_size, intermediate_size),
            format,
            use_expert_bias,
            kernel_init,
        )
        self.router = nnx.Linear(
            hidden_size,
            num_experts,
            use_bias=use_router_bias,
            dtype=jnp.float32,
            param_dtype=param_dtype,
            precision=jax.lax.Precision.HIGHEST,
            kernel_init=router_kernel_init,
            rngs=rngs,
        )
        self.top_k = top_k
        self.activation = activation
        self.scoring = scoring
        self.renormalize = renormalize
        self.routed_scale = routed_scale
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
        **options: Any,
    ) -> Self:
        """A layer around given experts.

        Args:
          experts: canonical (packed here) or packed.
          top_k: experts per token.
          router_kernel: float[H, E].
          router_bias: float[E], added to the logits, or None.
          **options: keywords of the constructor, from ``activation`` on.

        Returns:
          The layer.

        Raises:
          ValueError, TypeError: parts that do not fit together; weights that do not pack exactly.
        """
        if isinstance(experts, ExpertWeights):
            experts = pack_experts(experts)
        checks.packed_experts(experts)
        num_experts, hidden = experts.num_experts, experts.hidden_size
        checks.router(router_kernel, router_bias, hidden, num_experts)

        def build() -> FusedMoE:
            return cls(
                hidden,
                experts.intermediate_size,
                num_experts=num_experts,
                top_k=top_k,
                format=experts.format,
                use_router_bias=router_bias is not None,
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
    def from_checkpoint(cls, path: str | os.PathLike[str], layer: int, **options: Any) -> Self:
        """One MoE layer of a checkpoint folder, its router included.

        Args:
          path: the folder (or .safetensors file); the format is detected.
          layer: the number of the transformer layer.
          **options: keywords of the constructor that are not the model's own, e.g.
            ``implementation``.

        Returns:
          The layer.

        Raises:
          ValueError, TypeError: a checkpoint that is incomplete, damaged or not exact.
        """
        from jax_w4moe import checkpoint  # needs the extra [checkpoint], the rest does not

        config = checkpoint.moe_config(path)
        weight, bias = checkpoint.load_router(path, layer)
        options = {"activation": config.activation, "scoring": config.scoring, **options}
        return cls.from_experts(
            checkpoint.load_experts(path, layer),
            top_k=config.top_k,
            router_kernel=weight.T,
            router_bias=bias,
            **options,
        )

    def __call__(self, x: Array, active: Array | None = None) -> Array:
        """Routes tokens and runs their experts.

        Args:
          x: float[..., H]; the router sees it in f32, the experts in bf16 (in f32 with that
            ``act_dtype``).
          active: bool[...], which tokens have experts at all; the others cost nothing, and their
            rows of the result are zero. None: all.

        Returns:
          [..., H] in ``dtype``.
        """
        self.check_restored()
        hidden = self.hidden_size
        ids, weights = topk_routing(
            self.router(x.reshape(-1, hidden)),
            self.top_k,
            scoring=self.scoring,
            renormalize=self.renormalize,
            scale=self.routed_scale,
        )
        if active is not None:
            ids = jnp.where(active.reshape(-1, 1), ids, -1)
        run = self._exact if self.act_dtype == jnp.float32 else self._fused
        return run(x.reshape(-1, hidden), ids, weights).reshape(x.shape).astype(self.dtype)

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


def save(path: str | os.PathLike[str], module: nnx.Module) -> None:
    """Writes a module's state, packed weights as they are, with Orbax.

    Args:
      path: a folder that does not exist yet.
      module: any NNX module, of which FusedMoE layers may be parts.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(os.path.abspath(path), nnx.to_pure_dict(nnx.state(module)))


def restore(path: str | os.PathLike[str], module: nnx.Module) -> None:
    """Reads what :func:`save` wrote into a module of the same structure, in place.

    Packed weights restore onto any mesh, whichever they were saved from: what was appended for one
    is dropped, what the other one needs is appended. With an abstract module every process reads
    the parts of its own devices only::

        model = nnx.eval_shape(lambda: Model(...))
        for layer in model.layers:
            layer.moe.shard(mesh)
        restore(path, model)

    Args:
      path: the folder.
      module: the module, possibly abstract (``nnx.eval_shape``); its arrays' shardings are kept.

    Raises:
      ValueError: an array has another shape, or a layer's weights are another layer's, or were
        packed with another layout version, or not exactly. The module is then left as it was.
    """
    state = nnx.state(module)
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(os.path.abspath(path)).item_metadata
        _check_shapes(saved.tree, state)
        # Not strict: arrays are cut, or filled up with zeros, to the shapes of the module.
        restored = checkpointer.restore(
            os.path.abspath(path), nnx.to_pure_dict(state), strict=False
        )
    graphdef = nnx.graphdef(module)
    nnx.replace_by_pure_dict(state, restored)
    for _, part in nnx.iter_graph(nnx.merge(graphdef, state)):
        if isinstance(part, FusedMoE):
            part.check_restored()
    nnx.update(module, state)


def _check_shapes(saved: Any, state: nnx.State) -> None:
    """Only packed weights may be cut or filled up; ``check_restored`` sees to those."""
    for path, variable in nnx.to_flat_state(state):
        if not isinstance(variable, PackedWeight):
            found: Any = functools.reduce(lambda tree, key: tree[str(key)], path, saved)
            own = variable.get_value()
            if tuple(found.shape) != own.shape:
                raise ValueError(
                    f"{'.'.join(map(str, path))}: shape {tuple(found.shape)} in the checkpoint,"
                    f" {own.shape} in the module; make the module of the checkpoint's sizes."
                )


def _variable(array: Array | None) -> PackedWeight | None:
    return None if array is None else PackedWeight(array)


def _value(variable: PackedWeight | None) -> Array | None:
    return None if variable is None else variable.get_value()


def _random_experts(
    key: Array,
    sizes: tuple[int, int, int],
    format: WeightFormat,
    use_bias: bool,
    kernel_init: Any,
) -> PackedExperts:
    num_experts, hidden, intermediate = sizes

    def one(key: Array) -> tuple[Array, Array]:
        shapes = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
        gate, up, down = (
            kernel_init(k, shape, jnp.float32)[None]
            for k, shape in zip(jax.random.split(key, 3), shapes, strict=True)
        )
        packed = pack_experts(quantize_experts(gate, up, down, format))
        return packed.w13.data[0], packed.w2.data[0]

    @jax.jit
    def all_of_them(key: Array) -> PackedExperts:
        # One expert at a time: all kernels in f32 would be eight times the packed weights.
        w13, w2 = jax.lax.map(one, jax.random.split(key, num_experts))
        exact = jnp.zeros(num_experts, jnp.int32)
        w13_shape = (num_experts, 2 * intermediate, hidden)
        w2_shape = (num_experts, hidden, intermediate)
        w13_bias = jnp.zeros((*w13.shape[:2], BLOCK_ROWS), jnp.float32) if use_bias else None
        w2_bias = jnp.zeros((num_experts, hidden), jnp.float32) if use_bias else None
        return PackedExperts(
            PackedTensor(w13, exact, format, w13_shape, "gate_up", LAYOUT_VERSION),
            PackedTensor(w2, exact, format, w2_shape, "canonical", LAYOUT_VERSION),
            w13_bias,
            w2_bias,
        )

    return all_of_them(key)
