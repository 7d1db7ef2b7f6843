"""The public ops: validate, choose the implementation, tune, run (lowering.py)."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
from jax import Array

from jax_w4moe import checks, lowering, sharding, tuning
from jax_w4moe import implementation as implementations
from jax_w4moe.activations import Activation, SwiGLU
from jax_w4moe.quantization import (
    Per128,
    PerToken,
    ScaleRule,
    fold_scales,
    operand_dtype,
    per_value,
)
from jax_w4moe.sharding import Tokens
from jax_w4moe.tuning import Problem, Tactic
from jax_w4moe.types import PackedExperts, PackedTensor

_SWIGLU = SwiGLU()
_PER_TOKEN = PerToken()


def fused_moe(
    x: Array,
    experts: PackedExperts,
    topk_ids: Array,
    topk_weights: Array,
    *,
    activation: Activation = _SWIGLU,
    act_dtype: Any = jnp.float8_e4m3fn,
    act_scale: ScaleRule = _PER_TOKEN,
    x_scale: Array | float | None = None,
    expert_axis: str | None = None,
    tensor_axis: str | None = None,
    token_axes: Any = None,
    mesh: Any = None,
    exchange: Any = None,
    implementation: str | None = None,
    tactic: Tactic | None = None,
) -> Array:
    """A Mixture-of-Experts layer after its router, on packed 4-bit weights.

    ``y[t] = sum over slots s of topk_weights[t, s] * mlp_e(x[t])`` with ``e = topk_ids[t, s]`` and
    ``mlp_e(x) = w2[e] @ activation(w13[e] @ x + w13_bias[e]) + w2_bias[e]``. Matrix products and
    the weighted sum accumulate in f32; the rounding points are listed in ``docs/numerics.md``. A
    token's result does not depend on the other tokens.

    Legal under jit, grad (to x and topk_weights, by the dequantised weights in f32) and vmap over
    tokens. Nothing is dereferenced by an id outside [0, E): such a slot contributes zero. Duplicate
    ids in a row, empty experts and T = 0 are legal.

    Args:
      x: bf16[T, H], or float8_e4m3fn[T, H] together with ``x_scale``.
      experts: the packed weights of E experts (:func:`jax_w4moe.pack_experts`).
      topk_ids: i32[T, k], 1 <= k <= min(32, E).
      topk_weights: f32[T, k], applied after w2 and its bias.
      activation: the gated activation between the projections.
      act_dtype: what activations are rounded to before each projection: jnp.float8_e4m3fn, or
        jnp.bfloat16 (no quantisation).
      act_scale: the rule of the FP8 scales, ``PerToken``, ``Per128`` or ``Static``.
      x_scale: a number, f32[] or f32[T, 1]: x is ``x_fp8 * x_scale``; or f32[T, H / 128], a scale
        per 128 values, which are folded into one per token
        (:func:`jax_w4moe.quantization.fold_scales`), or used as they are with ``Per128`` (exactly
        where they are powers of two; else values are rounded to bf16).
      expert_axis: the mesh axis that experts are spread over (:func:`jax_w4moe.shard_experts`).
      tensor_axis: the mesh axis that the intermediate size is spread over.
      token_axes: mesh axes that tokens are spread over, in this order; with neither data nor types
        that say so, None means none. They may contain the two above. Inside the caller's own
        shard_map, where arrays are this device's parts, None means what their types say.
      mesh: of these axes; None takes that of the context, else of the weights.
      exchange: "partial_sums" (every device sees all tokens, and one row per token and device is
        exchanged and summed in f32 in the order of the devices); "dispatch" (the same bits, but
        tokens are sent only to devices that hold an expert of theirs); "slot_rows" (a row per token
        and slot is exchanged, and combined at home; with expert_axis alone bitwise what one device
        gives). None is "dispatch" where that sends much less, else "partial_sums".
      implementation: None (the kernels on a Hopper GPU, XLA elsewhere), "xla" or "cuda_sm90"; a
        forced one never falls back.
      tactic: how the kernels go about it (:func:`jax_w4moe.tactics`); None chooses by what was
        measured, else by a model. It changes no bit of the result.

    Returns:
      bf16[T, H].

    Raises:
      ValueError: shapes that do not fit, k out of range, another layout version.
      TypeError: a dtype other than the above.
      NotImplementedError: a legal request that this version does not run.
      RuntimeError: the kernels cannot run here.
    """
    checks.options(activation, act_dtype, act_scale)
    axes = {
        "expert_axis": expert_axis,
        "tensor_axis": tensor_axis,
        "token_axes": token_axes,
        "exchange": exchange,
        "mesh": mesh,
    }
    is_spread = any(value is not None for value in axes.values())
    is_partitioned = not is_spread and sharding.is_partitioned(experts)
    if is_spread or is_partitioned:
        checks.packed_shards(experts)
    else:
        checks.packed_experts(experts)
        sharding.refuse_spread(experts)
    x_scale = _as_array(x_scale)
    checks.activations(x, x_scale, 2, experts.hidden_size, "[T, H]")
    checks.routes(x, topk_ids, topk_weights, experts.num_experts)
    x, x_scale = _per_row(x, x_scale, act_scale)
    how = _how("fused_moe", implementation, x, activation, act_dtype, act_scale)
    op = functools.partial(lowering.fused_moe, how)
    tokens = Tokens(x, x_scale, topk_ids, topk_weights)
    problem = Problem.of_layer("fused_moe", experts, topk_ids.size, how.operand_dtype)
    if is_spread or is_partitioned:
        tuning.check(problem, tactic)
        options = (how, tactic)
        if is_partitioned:
            return lowering.partitioned_moe(*options)(tokens, experts)
        placement, mesh = sharding.place(x, experts, **axes)
        return sharding.run(
            placement, mesh, lowering.spread_moe(*options, placement), tokens, experts
        )
    rotated = _rotated_ids(topk_ids, experts.num_experts)
    return _run(
        problem, how.choice, tactic, op, ((tokens._replace(topk_ids=i), experts) for i in rotated)
    )


def expert_mlp(
    rows: Array,
    experts: PackedExperts,
    group_sizes: Array,
    *,
    activation: Activation = _SWIGLU,
    act_dtype: Any = jnp.float8_e4m3fn,
    act_scale: ScaleRule = _PER_TOKEN,
    x_scale: Array | float | None = None,
    implementation: str | None = None,
    tactic: Tactic | None = None,
) -> Array:
    """The experts of :func:`fused_moe` without routing and combine.

    Args:
      rows: bf16[M, H] grouped by expert, ``group_sizes[0]`` rows of expert 0 first; or the masked
        layout bf16[E, M_max, H] of a low-latency dispatch, of whose expert e the first
        ``group_sizes[e]`` rows count. Or float8_e4m3fn with ``x_scale``.
      experts: the packed weights of E experts.
      group_sizes: i32[E]; counts beyond the rows there are mean all rows there are.
      activation, act_dtype, act_scale, implementation, tactic: as in :func:`fused_moe`.
      x_scale: a number, f32[], or f32 like rows with a last axis of 1, or of H / 128.

    Returns:
      bf16, shaped like rows; rows of no group are zero.

    Raises:
      ValueError, TypeError, NotImplementedError, RuntimeError: as :func:`fused_moe`.
    """
    checks.options(activation, act_dtype, act_scale)
    checks.packed_experts(experts)
    checks.rows(rows, experts.num_experts)
    x_scale = _as_array(x_scale)
    checks.activations(rows, x_scale, None, experts.hidden_size, "[M, H] or [E, M_max, H]")
    checks.group_sizes(group_sizes, experts.num_experts)
    tokens = lowering.Rows(*_per_row(rows, x_scale, act_scale))
    how = _how("expert_mlp", implementation, tokens.rows, activation, act_dtype, act_scale)
    op = functools.partial(lowering.expert_mlp, how)
    num_rows = math.prod(rows.shape[:-1])
    problem = Problem.of_layer("expert_mlp", experts, num_rows, how.operand_dtype)
    rotated = _rotated_sizes(group_sizes)
    return _run(problem, how.choice, tactic, op, ((tokens, (experts, sizes)) for sizes in rotated))


def grouped_matmul(
    lhs: Array,
    rhs: PackedTensor,
    group_sizes: Array,
    *,
    act_dtype: Any = jnp.float8_e4m3fn,
    act_scale: ScaleRule = _PER_TOKEN,
    x_scale: Array | float | None = None,
    preferred_element_type: Any = None,
    implementation: str | None = None,
    tactic: Tactic | None = None,
) -> Array:
    """Groups of rows times their expert's packed matrix; shaped like ``jax.lax.ragged_dot``.

    Args:
      lhs: bf16[M, K] grouped by expert, or float8_e4m3fn with ``x_scale``.
      rhs: one packed projection [E, N, K] (:func:`jax_w4moe.pack`, or ``experts.w13``).
      group_sizes: i32[E]; rows past their sum give zero.
      act_dtype, act_scale, implementation, tactic: as in :func:`fused_moe`.
      x_scale: a number, f32[], f32[M, 1] or f32[M, K / 128].
      preferred_element_type: of the result, jnp.bfloat16 (default) or jnp.float32.

    Returns:
      [M, N], columns in the canonical order of the projection's rows. Accumulated in f32.

    Raises:
      ValueError, TypeError, NotImplementedError, RuntimeError: as :func:`fused_moe`.
    """
    checks.options(_SWIGLU, act_dtype, act_scale)
    checks.packed("rhs", rhs)
    x_scale = _as_array(x_scale)
    checks.activations(lhs, x_scale, 2, rhs.shape[2], "lhs [M, K]")
    checks.group_sizes(group_sizes, rhs.shape[0])
    out_dtype = checks.element_type(preferred_element_type)
    tokens = lowering.Rows(*_per_row(lhs, x_scale, act_scale))
    how = _how("grouped_matmul", implementation, tokens.rows, _SWIGLU, act_dtype, act_scale)
    op = functools.partial(lowering.grouped_matmul, how, out_dtype)
    problem = Problem.of_matmul(rhs, lhs.shape[0], how.operand_dtype)
    rotated = _rotated_sizes(group_sizes)
    return _run(problem, how.choice, tactic, op, ((tokens, (rhs, sizes)) for sizes in rotated))


def quantize_fp8(x: Array, *, implementation: str | None = None) -> tuple[Array, Array]:
    """Quantises rows to FP8, saturating, one f32 scale per row.

    ``x_scale = amax * f32(1/448)`` with amax the row's largest magnitude (at least 2**-100), and
    ``x_fp8 = e4m3(x * (448 / amax))``, rounded to nearest even. A NaN makes its row NaN; an
    infinity makes itself NaN and the rest of its row zero, with an infinite scale; no other row is
    touched. The kernel and the XLA path agree bit for bit.

    Args:
      x: bf16[T, H].
      implementation: None, "xla" or "cuda_sm90", as in :func:`fused_moe`.

    Returns:
      (x_fp8 float8_e4m3fn[T, H], x_scale f32[T, 1]).

    Raises:
      ValueError: x is not of rank 2, or the implementation is unknown.
      TypeError: x is not bfloat16.
      NotImplementedError: under differentiation.
      RuntimeError: the kernels cannot run here.
    """
    checks.quantizable(x)
    choice = implementations.choose("quantize_fp8", implementation)
    return lowering.quantize_fp8(choice)(lowering.Row(x), ())


def _how(
    op: str,
    implementation: str | None,
    x: Array,
    activation: Activation,
    act_dtype: Any,
    act_scale: ScaleRule,
) -> lowering.How:
    """Chooses the implementation."""
    if jnp.dtype(act_dtype) == jnp.bfloat16:  # nothing is scaled
        act_scale = _PER_TOKEN
    unsupported = implementations.unsupported(x.dtype, operand_dtype(act_dtype, act_scale))
    choice = implementations.choose(op, implementation, unsupported)
    return lowering.How(choice, activation, jnp.dtype(act_dtype), act_scale)


def _as_array(x_scale: Array | float | None) -> Array | None:
    """A Python number is a scale for all rows."""
    return jnp.float32(x_scale) if isinstance(x_scale, int | float) else x_scale


def _per_row(x: Array, x_scale: Array | None, rule: ScaleRule) -> tuple[Array, Array | None]:
    """With one scale per row, so that a batch axis can be folded into rows; or as bf16."""
    if x_scale is not None and isinstance(rule, Per128):
        is_per_128 = x_scale.ndim > 0 and x_scale.shape[-1] > 1
        scales = per_value(x_scale, x.shape[-1]) if is_per_128 else x_scale
        return (x.astype(jnp.float32) * scales).astype(jnp.bfloat16), None
    if x_scale is None or x_scale.shape == (*x.shape[:-1], 1):
        return x, x_scale
    if x_scale.ndim:
        return fold_scales(x, x_scale)
    return x, jnp.broadcast_to(x_scale, (*x.shape[:-1], 1))


_ROTATIONS = 8  # so that a tuned call's weights are cold in L2, as in a model


def _rotated_ids(topk_ids: Array, num_experts: int) -> Iterator[Array]:
    """The ids, then the same routing to other experts."""
    yield topk_ids
    valid = (topk_ids >= 0) & (topk_ids < num_experts)
    for i in range(1, _ROTATIONS):
        yield jnp.where(valid, (topk_ids + i * num_experts // _ROTATIONS) % num_experts, topk_ids)


def _rotated_sizes(group_sizes: Array) -> Iterator[Array]:
    """The sizes, then the same sizes of other experts."""
    yield group_sizes
    for i in range(1, _ROTATIONS):
        yield jnp.roll(group_sizes, i * group_sizes.size // _ROTATIONS)


def _run(
    problem: Problem,
    choice: implementations.Choice,
    tactic: Tactic | None,
    op: Callable[[Tactic | None], Callable[..., Array]],
    calls: Iterator[tuple[Any, Any]],
) -> Array:
    """Runs the first of the calls; inside autotune it times all tactics on all of them before."""
    tuning.check(problem, tactic)
    call = next(calls)
    if tactic is None and choice != "xla" and tuning.wanted(problem, call):
        tuning.record(problem, op, [call, *calls])
    return op(tactic)(*call)
