"""The same maths in jax.numpy, on the packed arrays: the oracle, and the path off Hopper GPUs.

Two modes. "exact" is f32 on the dequantised weights, with one rounding to bf16 at the very end.
"mirrored" has the kernels' rounding points, listed in ``docs/numerics.md``:

    R1 x -> E4M3, one f32 scale per token          R4 h -> E4M3, one f32 scale per row
    R2 GEMM1 accumulates in f32                    R5 GEMM2 accumulates in f32; slot -> bf16
    R3 activation in f32; h -> bf16                R6 weighted sum of slots in f32; y -> bf16

Rows are worked off expert by expert, in blocks of a fixed number of rows. So only one expert is
dequantised at a time, an expert without rows costs nothing, and every row goes through matrix
products of one shape whatever the batch: a token's result does not depend on the other tokens.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Float32, Int32

from jax_w4moe import varying
from jax_w4moe.activations import Activation, SwiGLU
from jax_w4moe.formats.layout import BLOCK_ROWS
from jax_w4moe.packing import canonical_rows, dequantize_expert, pack_experts
from jax_w4moe.quantization import (
    Per128,
    PerToken,
    ScaleRule,
    quantize,
    round_per_128,
    round_to_bf16,
)
from jax_w4moe.types import ExpertWeights, PackedExperts, PackedTensor

Mode = Literal["exact", "mirrored"]

_BLOCK = 16  # rows per matrix product; a constant, so that results cannot depend on the batch


@functools.partial(
    jax.jit, static_argnames=("activation", "act_dtype", "act_scale", "mode", "slot_dtype")
)
def fused_moe(
    x: Array,
    experts: PackedExperts | ExpertWeights,
    topk_ids: Array,
    topk_weights: Array,
    *,
    x_scale: Array | None = None,
    activation: Activation = SwiGLU(),  # noqa: B008 - frozen
    act_dtype: Any = jnp.float8_e4m3fn,
    act_scale: ScaleRule = PerToken(),  # noqa: B008 - frozen
    mode: Mode = "exact",
    slot_dtype: Any = jnp.bfloat16,
) -> Array:
    """An MoE layer after its router; the arrays are as in :func:`jax_w4moe.fused_moe`.

    Args:
      x: bf16[T, H], or float8_e4m3fn[T, H] with ``x_scale``; in "exact" mode f32[T, H] as well.
      experts: packed experts, or canonical ones (packed here).
      topk_ids: i32[T, k]; ids outside [0, E) mean no expert.
      topk_weights: f32[T, k].
      x_scale: f32[] or f32[T, 1], the scale of an E4M3 x.
      activation: the gated activation.
      act_dtype: float8_e4m3fn, or bfloat16 to leave out R1 and R4; "exact" mode ignores it.
      act_scale: the rule of FP8 scales.
      mode: "exact" or "mirrored".
      slot_dtype: of the result; float32 leaves the roundings of R5 and R6 to the caller, who has
        only a part of the slots or of K.

    Returns:
      [T, H] in slot_dtype.
    """
    experts = _packed(experts)
    if x.shape[0] == 0:
        return jnp.zeros(x.shape, slot_dtype)
    routes = _routes(topk_ids, experts.w13.data.shape[0])
    rounding = _Rounding(act_dtype, act_scale, mode, slot_dtype)
    values, scale = _activations(x, x_scale, rounding)

    def slots(expert: _Expert, token: Array) -> Array:
        return _mlp(expert, values[token], scale[token], activation, rounding)

    rows = _by_expert(experts, slots, routes.token, routes.groups)
    return _combine(rows, routes, topk_weights).astype(slot_dtype)


@functools.partial(jax.jit, static_argnames="activation")
def fused_moe_gradients(
    x: Array,
    experts: PackedExperts,
    topk_ids: Array,
    topk_weights: Array,
    x_scale: Array | None,
    cotangent: Array,
    activation: Activation,
) -> tuple[Array, Array]:
    """Gradients of the exact layer to x (f32[T, H]) and topk_weights (f32[T, k])."""
    if x.shape[0] == 0:
        return jnp.zeros(x.shape, jnp.float32), jnp.zeros(topk_weights.shape, jnp.float32)
    routes = _routes(topk_ids, experts.w13.data.shape[0])
    values, scale = _activations(x, x_scale, _EXACT)
    values, cotangent = values.astype(jnp.float32) * scale, cotangent.astype(jnp.float32)

    def gradients(expert: _Expert, rows: tuple[Array, Array]) -> tuple[Array, Array]:
        def weighted(x_rows: Array, weight: Array) -> Array:
            return weight[:, None] * _exact_mlp(expert, x_rows, activation)

        token, weight = rows
        return jax.vjp(weighted, values[token], weight)[1](cotangent[token])

    weight_rows = topk_weights.reshape(-1)[routes.order]
    dx_rows, dweight_rows = _by_expert(
        experts, gradients, (routes.token, weight_rows), routes.groups
    )
    dx = _combine(dx_rows, routes, jnp.ones(topk_weights.shape, jnp.float32))
    return dx, jnp.where(routes.valid, dweight_rows[routes.position], 0.0)


@functools.partial(jax.jit, static_argnames=("activation", "act_dtype", "act_scale", "mode"))
def expert_mlp(
    rows: Array,
    experts: PackedExperts | ExpertWeights,
    group_sizes: Array,
    *,
    x_scale: Array | None = None,
    activation: Activation = SwiGLU(),  # noqa: B008 - frozen
    act_dtype: Any = jnp.float8_e4m3fn,
    act_scale: ScaleRule = PerToken(),  # noqa: B008 - frozen
    mode: Mode = "exact",
) -> Array:
    """The experts without routing and combine; as :func:`jax_w4moe.expert_mlp`.

    Args:
      rows: [M, H] grouped by expert, or the masked layout [E, M_max, H].
      experts: packed experts, or canonical ones (packed here).
      group_sizes: i32[E], rows per expert.
      x_scale: f32[] or f32[..., 1] like rows, the scale of E4M3 rows.
      activation: the gated activation.
      act_dtype: float8_e4m3fn or bfloat16; "exact" mode ignores it.
      act_scale: the rule of FP8 scales.
      mode: "exact" or "mirrored".

    Returns:
      bf16, shaped like rows; rows of no group are zero.
    """
    experts = _packed(experts)
    if rows.size == 0:
        return jnp.zeros(rows.shape, jnp.bfloat16)
    rounding = _Rounding(act_dtype, act_scale, mode)
    values, scale = _activations(rows, x_scale, rounding)

    def block(expert: _Expert, inputs: tuple[Array, Array]) -> Array:
        return _mlp(expert, *inputs, activation, rounding)

    flat = (values.reshape(-1, values.shape[-1]), scale.reshape(-1, 1))
    out = _by_expert(experts, block, flat, _groups(rows, group_sizes))
    return out.reshape(rows.shape).astype(jnp.bfloat16)


@functools.partial(jax.jit, static_argnames="activation")
def expert_mlp_gradient(
    rows: Array,
    experts: PackedExperts,
    group_sizes: Array,
    x_scale: Array | None,
    cotangent: Array,
    activation: Activation,
) -> Array:
    """Gradient of the exact experts to their rows, f32."""
    if rows.size == 0:
        return jnp.zeros(rows.shape, jnp.float32)
    values, scale = _activations(rows, x_scale, _EXACT)
    values = (values.astype(jnp.float32) * scale).reshape(-1, rows.shape[-1])

    def gradient(expert: _Expert, inputs: tuple[Array, Array]) -> Array:
        x_rows, cotangent_rows = inputs
        mlp = functools.partial(_exact_mlp, expert, activation=activation)
        return jax.vjp(mlp, x_rows)[1](cotangent_rows)[0]

    flat = (values, cotangent.astype(jnp.float32).reshape(values.shape))
    out = _by_expert(experts, gradient, flat, _groups(rows, group_sizes))
    return out.reshape(rows.shape)


@functools.partial(jax.jit, static_argnames=("act_dtype", "act_scale", "mode"))
def grouped_matmul(
    lhs: Array,
    rhs: PackedTensor,
    group_sizes: Array,
    *,
    x_scale: Array | None = None,
    act_dtype: Any = jnp.float8_e4m3fn,
    act_scale: ScaleRule = PerToken(),  # noqa: B008 - frozen
    mode: Mode = "exact",
) -> Float32[Array, "M N"]:
    """Row groups times their expert's matrix, in f32; as :func:`jax_w4moe.grouped_matmul`."""
    if lhs.shape[0] == 0:
        return jnp.zeros((0, rhs.shape[1]), jnp.float32)

    def block(weights: Array, inputs: tuple[Array, Array]) -> Array:
        values, scale = inputs
        return _matmul(values, weights) * scale

    inputs = _activations(lhs, x_scale, _Rounding(act_dtype, act_scale, mode))
    return _by_expert(rhs, block, inputs, _groups(lhs, group_sizes))


@jax.jit
def grouped_matmul_gradient(
    rhs: PackedTensor, group_sizes: Array, cotangent: Array
) -> Float32[Array, "M K"]:
    """Gradient of :func:`grouped_matmul` to lhs."""
    if cotangent.shape[0] == 0:
        return jnp.zeros((0, rhs.shape[2]), jnp.float32)
    cotangent = cotangent.astype(jnp.float32)

    def block(weights: Array, rows: Array) -> Array:
        return _matmul(rows, weights.T)

    return _by_expert(rhs, block, cotangent, _groups(cotangent, group_sizes))


class _Rounding(NamedTuple):
    """Which of the rounding points there are, and to what; static."""

    act_dtype: Any
    act_scale: ScaleRule
    mode: Mode
    slot_dtype: Any = jnp.bfloat16

    @property
    def is_fp8(self) -> bool:
        """Whether activations are quantised."""
        return self.mode == "mirrored" and jnp.dtype(self.act_dtype) == jnp.float8_e4m3fn

    def __call__(
        self, rows: Float[Array, "*rows H"], before: Literal["w13", "w2"]
    ) -> tuple[Float[Array, "*rows H"], Float32[Array, "*rows 1"]]:
        """R1 and R4: bf16 values as a matrix product sees them, and what scales its rows."""
        one = jnp.ones((*rows.shape[:-1], 1), jnp.float32)
        if not self.is_fp8:
            return rows, one
        if isinstance(self.act_scale, Per128):
            return round_per_128(rows), one
        return quantize(rows, self.act_scale, before)


_EXACT = _Rounding(None, PerToken(), "exact")


class _Expert(NamedTuple):
    """One expert, dequantised, in canonical order."""

    w13: Float32[Array, "2I H"]
    w2: Float32[Array, "H I"]
    w13_bias: Float32[Array, "1 2I"]
    w2_bias: Float32[Array, "1 H"]


class _Groups(NamedTuple):
    """Expert e owns rows [starts[e], starts[e] + sizes[e])."""

    starts: Int32[Array, "E"]
    sizes: Int32[Array, "E"]


class _Routes(NamedTuple):
    """The (token, slot) pairs sorted by (expert, token, slot); pairs without expert come last."""

    order: Int32[Array, "M"]  # sorted row -> pair number t * k + slot
    token: Int32[Array, "M"]  # sorted row -> token
    position: Int32[Array, "T k"]  # pair -> sorted row
    valid: Bool[Array, "T k"]
    groups: _Groups


def _packed(experts: PackedExperts | ExpertWeights) -> PackedExperts:
    return pack_experts(experts) if isinstance(experts, ExpertWeights) else experts


def _routes(topk_ids: Int32[Array, "T k"], num_experts: int) -> _Routes:
    valid = (topk_ids >= 0) & (topk_ids < num_experts)
    key = jnp.where(valid, topk_ids, num_experts).reshape(-1)
    order = jnp.argsort(key, stable=True).astype(jnp.int32)
    rows = jnp.arange(key.size, dtype=jnp.int32)
    position = jnp.zeros(key.size, jnp.int32).at[order].set(rows)
    sizes = jnp.zeros(num_experts, jnp.int32).at[key].add(1, mode="drop")
    groups = _Groups(jnp.cumsum(sizes) - sizes, sizes)
    token = order // topk_ids.shape[1]
    return _Routes(order, token, position.reshape(topk_ids.shape), valid, groups)


def _groups(rows: Array, group_sizes: Int32[Array, "E"]) -> _Groups:
    """Groups of contiguous rows [M, H] or of the masked layout [E, M_max, H], kept inside rows."""
    sizes = jnp.maximum(group_sizes, 0)
    if rows.ndim == 3:
        starts = jnp.arange(rows.shape[0], dtype=jnp.int32) * rows.shape[1]
        return _Groups(starts, jnp.minimum(sizes, rows.shape[1]))
    ends = jnp.minimum(jnp.cumsum(sizes), rows.shape[0])
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    return _Groups(starts, ends - starts)


def _activations(
    x: Array, x_scale: Array | None, rounding: _Rounding
) -> tuple[Float[Array, "*rows H"], Float32[Array, "*rows 1"]]:
    """The activations as GEMM1 sees them, and their scale per row."""
    if x_scale is None:
        return rounding(x, "w13")
    return x, jnp.broadcast_to(x_scale, (*x.shape[:-1], 1))


def _matmul(rows: Array, weights: Float32[Array, "N K"]) -> Float32[Array, "B N"]:
    return jax.lax.dot_general(
        rows.astype(jnp.float32),
        weights,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
    )


def _mlp(
    expert: _Expert,
    x: Float[Array, "B H"],
    x_scale: Float32[Array, "B 1"],
    activation: Activation,
    rounding: _Rounding,
) -> Float[Array, "B H"]:
    gate, up = jnp.split(_matmul(x, expert.w13) * x_scale + expert.w13_bias, 2, axis=-1)  # R2
    h = activation(gate, up)
    if rounding.mode == "exact":
        return _matmul(h, expert.w2) + expert.w2_bias
    h, h_scale = rounding(round_to_bf16(h), "w2")  # R3, R4
    return (_matmul(h, expert.w2) * h_scale + expert.w2_bias).astype(rounding.slot_dtype)  # R5


def _exact_mlp(expert: _Expert, x: Float32[Array, "B H"], activation: Activation) -> Array:
    return _mlp(expert, x, jnp.ones((x.shape[0], 1), jnp.float32), activation, _EXACT)


def _combine(
    rows: Float[Array, "M H"], routes: _Routes, weights: Float32[Array, "T k"]
) -> Float32[Array, "T H"]:
    return combine(lambda slot: rows[routes.position[:, slot]], routes.valid, weights)


def combine(
    slot_rows: Callable[[int], Float[Array, "T H"]],
    valid: Bool[Array, "T k"],
    weights: Float32[Array, "T k"],
) -> Float32[Array, "T H"]:
    """R6: the weighted sum of each token's slots, in slot order."""
    total = jnp.zeros((), jnp.float32)
    for slot in range(weights.shape[1]):
        row = slot_rows(slot).astype(jnp.float32)
        # A select, not a product: a pair without expert may point at anything.
        total = total + jnp.where(valid[:, slot, None], weights[:, slot, None] * row, 0.0)
    return total


def _dequantize(weights: PackedExperts | PackedTensor, expert: Array) -> Any:
    """One expert of the packed weights, in f32."""
    if isinstance(weights, PackedTensor):
        return dequantize_expert(weights, expert)

    def bias_row(bias: Array | None, size: int) -> Float32[Array, "1 N"]:
        if bias is None:
            return jnp.zeros((1, size), jnp.float32)
        return jax.lax.dynamic_index_in_dim(bias, expert).reshape(1, -1)

    w13 = weights.w13
    padded = w13.data.shape[1] * BLOCK_ROWS
    return _Expert(
        dequantize_expert(w13, expert),
        dequantize_expert(weights.w2, expert),
        canonical_rows(w13, bias_row(weights.w13_bias, padded)),
        bias_row(weights.w2_bias, weights.hidden_size),
    )


def _by_expert(
    weights: PackedExperts | PackedTensor,
    block: Callable[[Any, Any], Any],
    rows: Any,
    groups: _Groups,
) -> Any:
    """Runs ``block(dequantised expert, rows of that expert)`` over all groups of rows.

    Args:
      weights: packed weights of E experts.
      block: maps a pytree of [16, ...] rows to a pytree of [16, ...] result rows; rows beyond the
        group's end are computed and thrown away.
      rows: pytree of [M, ...] arrays.
      groups: which rows belong to which expert.

    Returns:
      A pytree of [M, ...] results; rows of no group are zero.
    """
    weights, rows, groups = varying.alike((weights, rows, groups))
    num_rows = jax.tree.leaves(rows)[0].shape[0]

    def at_least_a_block(array: Array) -> Array:
        return jnp.pad(array, [(0, _BLOCK)] + [(0, 0)] * (array.ndim - 1))

    rows = jax.tree.map(at_least_a_block, rows)

    def run_block(expert: Any, start: Array) -> Any:
        part = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, _BLOCK), rows)
        return block(expert, part)

    def run_expert(number: Array, out: Any) -> Any:
        start, size = groups.starts[number], groups.sizes[number]
        expert = _dequantize(weights, number)

        def step(i: Array, out: Any) -> Any:
            at = start + i * _BLOCK
            live = jnp.arange(_BLOCK) < size - i * _BLOCK

            def write(old: Array, new: Array) -> Array:
                keep = jax.lax.dynamic_slice_in_dim(old, at, _BLOCK)
                mask = live.reshape(_BLOCK, *[1] * (new.ndim - 1))
                return jax.lax.dynamic_update_slice_in_dim(old, jnp.where(mask, new, keep), at, 0)

            return jax.tree.map(write, out, run_block(expert, at))

        return jax.lax.fori_loop(0, (size + _BLOCK - 1) // _BLOCK, step, out)

    shapes = jax.eval_shape(
        lambda: run_block(_dequantize(weights, jnp.int32(0)), jnp.int32(0)),
    )
    out = jax.tree.map(lambda s: jnp.zeros((num_rows + _BLOCK, *s.shape[1:]), s.dtype), shapes)
    out = varying.vary(out, varying.axes_of(groups))

    def visit(number: Array, out: Any) -> Any:
        return jax.lax.cond(groups.sizes[number] > 0, lambda: run_expert(number, out), lambda: out)

    out = jax.lax.fori_loop(0, groups.sizes.shape[0], visit, out)
    return jax.tree.map(lambda a: a[:num_rows], out)
