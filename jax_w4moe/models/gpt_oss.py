"""gpt-oss in Flax NNX: prompts and decoding steps over a cache, experts in 4 bits."""

import os
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_w4moe.checkpoint.files import CheckpointFiles
from jax_w4moe.flax import FusedMoE
from jax_w4moe.models import checks, loading
from jax_w4moe.models.attention import (
    Attention,
    RMSNorm,
    default_attention,
    precision,
    rotary,
)
from jax_w4moe.models.cache import Cache, empty_cache, write_lengths, write_prompts
from jax_w4moe.models.config import GptOssConfig
from jax_w4moe.sharding import put

_EMBEDDING_INIT = nnx.initializers.normal(1.0)
_HEAD_INIT = nnx.initializers.lecun_normal(in_axis=-1, out_axis=-2)

_Attend = Callable[[int, Attention, Array], Array]
"""(layer, its attention, its normalised input) -> its output."""


class Block(nnx.Module):
    """One layer; attributes are named as the tensors of the files."""

    def __init__(
        self,
        config: GptOssConfig,
        layer: int,
        *,
        dtype: Any,
        attention: str,
        moe: dict[str, Any],
        rngs: nnx.Rngs,
    ) -> None:
        self.input_layernorm = RMSNorm(config, dtype=dtype)
        self.self_attn = Attention(config, layer, dtype=dtype, implementation=attention, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config, dtype=dtype)
        self.mlp = FusedMoE(
            config.hidden_size,
            config.intermediate_size,
            num_experts=config.num_local_experts,
            top_k=config.num_experts_per_tok,
            scoring="topk_softmax",
            use_router_bias=True,
            use_expert_bias=True,
            rngs=rngs,
            **moe,
        )


class GptOss(nnx.Module):
    """A gpt-oss language model.

    ``GptOss(config, rngs=...)`` makes random weights, :meth:`from_pretrained` loads a checkpoint.
    The methods are pure, for use inside ``jit``; :class:`jax_w4moe.models.Runner` has them compiled
    with the cache donated.

    A row's result does not depend on what is in other rows of the batch. (Its bits may depend on
    the size of the batch: matrix products outside the experts are XLA's, which may choose another
    algorithm for another size.)
    """

    def __init__(
        self,
        config: GptOssConfig,
        *,
        dtype: Any = jnp.bfloat16,
        act_dtype: Any = jnp.float8_e4m3fn,
        implementation: str | None = None,
        attention: str | None = None,
        expert_axis: str | None = None,
        tensor_axis: str | None = None,
        exchange: str | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes a model with random weights.

        Args:
          config: its settings.
          dtype: of weights and activations outside the experts: bfloat16 or float32.
          act_dtype: what activations of the experts are rounded to: float8_e4m3fn, bfloat16, or
            float32 for no rounding at all (without kernels, on one device).
          implementation: of the experts, as in :func:`jax_w4moe.fused_moe`.
          attention: "xla", which holds a prompt's S x S scores of every head in f32; or "cudnn",
            on a GPU in bfloat16, faster in prompts and in decoding. None: the latter where it can.
          expert_axis, tensor_axis, exchange: how the experts are spread over a mesh, as in
            :func:`jax_w4moe.fused_moe`; :meth:`shard` places the weights.
          rngs: the key streams; "params" is used.

        Raises:
          ValueError, TypeError, NotImplementedError: options that do not exist or fit together.
        """
        checks.options(dtype, act_dtype, attention, implementation, expert_axis, tensor_axis)
        attention = attention or default_attention(config, dtype)
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.tensor_axis = tensor_axis
        self.mesh: Mesh | None = None
        moe = {
            "activation": config.activation,
            "act_dtype": act_dtype,
            "dtype": dtype,
            "implementation": implementation,
            "expert_axis": expert_axis,
            "tensor_axis": tensor_axis,
            "exchange": exchange,
        }
        vocabulary = (config.vocab_size, config.hidden_size)
        self.embed_tokens = nnx.Param(_EMBEDDING_INIT(rngs.params(), vocabulary, self.dtype))
        self.layers = nnx.List(
            Block(config, layer, dtype=dtype, attention=attention, moe=moe, rngs=rngs)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config, dtype=dtype)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nnx.Param(_HEAD_INIT(rngs.params(), vocabulary, self.dtype))
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        mesh: Mesh | None = None,
        expert_axis: str | None = None,
        tensor_axis: str | None = None,
        progress: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> Self:
        """Loads a folder of the Hugging Face layout with its experts in MXFP4.

        Names, dtypes, shapes and memory of the whole model are checked before any data is read.
        Layers are read one after the other, experts to the devices that hold them: beside what is
        loaded there is one tensor, or a few experts, on the host.

        Args:
          path: the folder, with config.json.
          mesh: the devices; None means the default one.
          expert_axis, tensor_axis: the axes of the mesh that experts are spread over; at least one
            of them with a mesh.
          progress: called with (layers done, layers in all) after every layer.
          **options: keywords of the constructor: ``dtype``, ``act_dtype``, ``implementation``,
            ``attention``, ``exchange``.

        Returns:
          The model.

        Raises:
          FileNotFoundError: there is no such folder, or a file of it is missing.
          ValueError, TypeError, NotImplementedError: files or settings that are damaged, do not fit
            together, or ask for something that this version does not do.
          MemoryError: a device has too little memory left for its part.
        """
        checks.placement(mesh, expert_axis, tensor_axis)
        options |= {"expert_axis": expert_axis, "tensor_axis": tensor_axis}
        config = GptOssConfig.from_pretrained(path)
        # No random weights are made only to be thrown away.
        model: Any = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0), **options))
        with CheckpointFiles(path) as files:
            loading.check(files, config)
            if mesh is not None:
                model.shard(mesh)
            loading.check_memory(model)
            for name, variable, is_transposed in _stored(model):
                stored = files.read(name)
                _fill(variable, stored.T if is_transposed else stored)
            for number, block in enumerate(model.layers):
                block.mlp = _load_experts(files, number, block.mlp, mesh)
                if progress is not None:
                    progress(number + 1, config.num_hidden_layers)
        return model

    def shard(self, mesh: Mesh) -> None:
        """Places the weights on a mesh by the model's axes.

        Experts are spread as :meth:`jax_w4moe.flax.FusedMoE.shard` does, heads of attention over
        the tensor axis where its size divides those of keys and values (and the mesh has no
        explicit axes); the rest is everywhere.

        Args:
          mesh: the devices.

        Raises:
          ValueError: it has not the axes that the model was made with.
        """
        self.mesh = mesh
        everywhere = NamedSharding(mesh, PartitionSpec())
        for block in self.layers:
            block.mlp.shard(mesh)
        for _, variable, _ in _stored(self):
            variable.set_value(put(variable.get_value(), everywhere))
        if (axis := self._heads_axis()) is not None:
            for block in self.layers:
                for variable, spec in block.self_attn.specs(axis):
                    sharding = NamedSharding(mesh, spec)
                    variable.set_value(put(variable.get_value(), sharding))

    def init_cache(self, batch: int, capacity: int) -> Cache:
        """Allocates a cache.

        Args:
          batch: rows, the sequences that are decoded together.
          capacity: tokens that a row can hold. Sliding layers hold the window only.

        Returns:
          The cache; all rows are empty.

        Raises:
          ValueError: a number below 1, or a capacity beyond the model's longest context.
        """
        checks.cache_sizes(batch, capacity, self.config.max_position_embeddings)
        return empty_cache(self.config, batch, capacity, self.dtype, self.mesh, self._heads_axis())

    def __call__(self, tokens: Array, lengths: Array | None = None) -> Array:
        """Logits at every position of whole sequences, without a cache.

        Args:
          tokens: i32[B, S], padded on the right.
          lengths: i32[B], tokens of every row; None: S.

        Returns:
          f32[B, S, V]; NaN for rows with a token outside the vocabulary, and those at padding mean
          nothing.
        """
        if lengths is None:
            lengths = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
        checks.prompts(tokens, lengths)
        x, alive, _, _ = self._prompts(tokens, lengths)
        return _where(alive, self._logits(x))

    def prefill(
        self, cache: Cache, tokens: Array, lengths: Array, slots: Array | None = None
    ) -> tuple[Array, Cache]:
        """Begins sequences with prompts.

        Args:
          cache: where they go; what its rows held before is lost.
          tokens: i32[B, S], padded on the right by anything; S at most the cache's capacity.
          lengths: i32[B], tokens of every prompt.
          slots: i32[B], the cache's row of every prompt, each another; outside [0, batch) means
            that the prompt is not there. None: rows 0 to B - 1.

        Returns:
          (logits f32[B, V] after the last token of every prompt, cache). A prompt that is not
          there, has a length outside [1, S] or a token outside the vocabulary gives NaN, and its
          row is left as it was.

        Raises:
          ValueError, TypeError: shapes or dtypes that do not fit.
        """
        checks.prefill(cache, tokens, lengths, slots)
        if slots is None:
            slots = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        lengths = jnp.where((slots >= 0) & (slots < cache.batch), lengths, 0)
        x, alive, new_keys, new_values = self._prompts(tokens, lengths)
        slots = jnp.where(alive, slots, -1)
        keys, values = (
            tuple(write_prompts(row, n, slots, lengths) for row, n in zip(rows, new, strict=True))
            for rows, new in ((cache.keys, new_keys), (cache.values, new_values))
        )
        cache = Cache(keys, values, write_lengths(cache.lengths, lengths, slots), cache.capacity)
        last = jnp.maximum(lengths - 1, 0)[:, None, None]
        x = jnp.take_along_axis(x, last, axis=1, mode="clip")[:, 0]
        return _where(alive, self._logits(x)), cache

    def decode(
        self, cache: Cache, tokens: Array, active: Array | None = None
    ) -> tuple[Array, Cache]:
        """Appends one token to every active row.

        Args:
          cache: the rows so far.
          tokens: i32[batch], the next token of every row.
          active: bool[batch], which rows take part; None: all.

        Returns:
          (logits f32[batch, V] after these tokens, cache). A row that is not active, is full
          already or gets a token outside the vocabulary gives NaN, and is left as it was.

        Raises:
          ValueError, TypeError: shapes or dtypes that do not fit.
        """
        checks.decode(cache, tokens, active)
        alive = (cache.lengths < cache.capacity) & self._known(tokens)
        if active is not None:
            alive = alive & active
        keys, values = list(cache.keys), list(cache.values)
        rope = rotary(cache.lengths[:, None], self.config)

        def attend(number: int, attention: Attention, x: Array) -> Array:
            y, keys[number], values[number] = attention.step(
                x, rope, keys[number], values[number], cache.lengths, alive
            )
            return y

        x = self._through(tokens[:, None], alive[:, None], attend)
        lengths = cache.lengths + alive.astype(jnp.int32)
        cache = Cache(tuple(keys), tuple(values), lengths, cache.capacity)
        return _where(alive, self._logits(x[:, 0])), cache

    def _prompts(
        self, tokens: Array, lengths: Array
    ) -> tuple[Array, Array, list[Array], list[Array]]:
        """Sequences from position 0 on: states [B, S, H], which are alive, keys and values."""
        batch, size = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32)[None], (batch, size))
        is_token = positions < lengths[:, None]
        alive = jnp.all(self._known(tokens) | ~is_token, axis=1)
        alive = alive & (lengths >= 1) & (lengths <= size)
        keys: list[Array] = []
        values: list[Array] = []
        rope = rotary(positions, self.config)

        def attend(number: int, attention: Attention, x: Array) -> Array:
            y, k, v = attention.prompt(x, rope)
            keys.append(k)
            values.append(v)
            return y

        x = self._through(tokens, is_token & alive[:, None], attend)
        return x, alive, keys, values

    def _through(self, tokens: Array, is_token: Array, attend: _Attend) -> Array:
        """From tokens [B, S] through all layers, [B, S, H]; only what is a token sees experts."""
        embedding = self.embed_tokens.get_value()
        x = embedding[jnp.where(is_token, tokens, 0)]
        for number, block in enumerate(self.layers):
            x = x + attend(number, block.self_attn, block.input_layernorm(x))
            x = x + block.mlp(block.post_attention_layernorm(x), is_token)
        return x

    def _logits(self, x: Array) -> Array:
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return jax.lax.dot_general(
            self.norm(x),
            head.get_value(),
            (((x.ndim - 1,), (1,)), ((), ())),
            precision=precision(self.dtype),
            preferred_element_type=jnp.float32,
        )

    def _known(self, tokens: Array) -> Array:
        return (tokens >= 0) & (tokens < self.config.vocab_size)

    def _heads_axis(self) -> str | None:
        """The mesh axis that heads are spread over, by XLA's partitioner."""
        mesh, axis = self.mesh, self.tensor_axis
        if mesh is None or axis is None or AxisType.Explicit in mesh.axis_types:
            return None
        return None if self.config.num_key_value_heads % mesh.shape[axis] else axis


def _where(alive: Array, logits: Array) -> Array:
    """Logits of the rows that are alive, NaN in the others."""
    return jnp.where(alive.reshape(-1, *[1] * (logits.ndim - 1)), logits, jnp.nan)


def _stored(model: GptOss) -> Iterator[tuple[str, nnx.Param, bool]]:
    """Names in the files, the variables they fill, and whether transposed; all but the MoE."""
    yield loading.EMBEDDING, model.embed_tokens, False
    for number, block in enumerate(model.layers):
        prefix = loading.LAYER.format(layer=number)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{name}.weight", getattr(block, name).weight, False
        yield prefix + "self_attn.sinks", block.self_attn.sinks, False
        for name in loading.PROJECTIONS:
            linear = getattr(block.self_attn, name)
            yield f"{prefix}self_attn.{name}.weight", linear.kernel, True
            if linear.bias is not None:
                yield f"{prefix}self_attn.{name}.bias", linear.bias, False
    yield loading.NORM, model.norm.weight, False
    if model.lm_head is not None:
        yield loading.LM_HEAD, model.lm_head, False


def _fill(variable: nnx.Param, stored: np.ndarray) -> None:
    """Gives an abstract variable its value, in its own dtype, where it is to lie."""
    abstract = variable.get_value()
    variable.set_value(jax.device_put(stored.astype(abstract.dtype), abstract.sharding))


def _load_experts(
    files: CheckpointFiles, number: int, abstract: FusedMoE, mesh: Mesh | None
) -> FusedMoE:
    """A layer's router and experts, with the options of an abstract one."""
    names = ("act_dtype", "dtype", "implementation", "expert_axis", "tensor_axis", "exchange")
    options = {name: getattr(abstract, name) for name in ("activation", *names)}
    return FusedMoE.from_checkpoint(files, number, mesh=mesh, **options)
