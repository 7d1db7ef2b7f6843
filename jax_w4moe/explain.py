"""What a call of ``fused_moe`` will do: ``explain`` and ``workspace_bytes``."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_w4moe import checks, roofline, tuning
from jax_w4moe import implementation as implementations
from jax_w4moe.activations import Activation, SwiGLU
from jax_w4moe.ops import fused_moe as op
from jax_w4moe.quantization import PerToken, ScaleRule, operand_dtype
from jax_w4moe.tuning import Problem, Tactic
from jax_w4moe.types import PackedExperts

_MIB = 2**20
_SWIGLU = SwiGLU()
_PER_TOKEN = PerToken()


def workspace_bytes(
    experts: PackedExperts,
    num_tokens: int,
    top_k: int,
    *,
    act_dtype: Any = jnp.float8_e4m3fn,
    act_scale: ScaleRule = _PER_TOKEN,
) -> int:
    """GPU memory that a call of ``fused_moe`` needs beside its operands and its result.

    Args:
      experts: the packed weights; only their shapes count.
      num_tokens: T. From T * k = 65,536 on the workspace grows no more.
      top_k: k.
      act_dtype, act_scale: as for ``fused_moe``.

    Returns:
      Bytes.

    Raises:
      ValueError: T below 0, or k out of range.
    """
    checks.packed_experts(experts)
    checks.sizes(num_tokens, top_k, experts.num_experts)
    return op.workspace_bytes(num_tokens, top_k, experts, operand_dtype(act_dtype, act_scale))


def explain(
    x: jax.Array | jax.ShapeDtypeStruct,
    experts: PackedExperts,
    topk_ids: jax.Array | jax.ShapeDtypeStruct,
    topk_weights: Any = None,
    *,
    activation: Activation = _SWIGLU,
    act_dtype: Any = jnp.float8_e4m3fn,
    act_scale: ScaleRule = _PER_TOKEN,
    implementation: str | None = None,
    tactic: Tactic | None = None,
) -> str:
    """What ``fused_moe`` would run for these arguments, and the least time it could take.

    Args:
      x: bf16[T, H] or float8_e4m3fn[T, H]; only its shape counts.
      experts: the packed weights.
      topk_ids: i32[T, k]. The experts they touch are counted if this is an array with values, else
        estimated for uniform routing.
      topk_weights: as for ``fused_moe``; they change nothing here.
      activation, act_dtype, act_scale, implementation, tactic: as for
        :func:`jax_w4moe.fused_moe`.

    Returns:
      Lines of text: implementation and why, tactic and where from, workspace, weights that are
      read, the floor on one H200 (the larger of weight bytes at 4.57 TB/s and FLOPs at 1,450
      TFLOPS, plus 5.5 us).

    Raises:
      ValueError, TypeError, NotImplementedError, RuntimeError: as ``fused_moe`` would.
    """
    checks.options(activation, act_dtype, act_scale)
    act_dtype = operand_dtype(act_dtype, act_scale)
    checks.packed_experts(experts)
    num_tokens, top_k = topk_ids.shape
    checks.sizes(num_tokens, top_k, experts.num_experts)
    if x.shape != (num_tokens, experts.hidden_size):
        raise ValueError(
            f"x: shape {x.shape}, need ({num_tokens}, {experts.hidden_size}) for topk_ids of"
            f" {num_tokens} tokens and experts of H={experts.hidden_size}; pass those of one call."
        )
    pairs, num_experts = num_tokens * top_k, experts.num_experts
    touched, counted = _touched(topk_ids, num_experts)
    nbytes, flops = roofline.layer_work(experts, pairs, touched)
    chosen = tuning.choose(Problem.of_layer("fused_moe", experts, pairs, act_dtype), tactic)
    workspace = op.workspace_bytes(num_tokens, top_k, experts, act_dtype) / _MIB
    inexact = int(np.sum(np.asarray(experts.inexact_groups)))
    rows = [
        ("call", f"{num_tokens} tokens, {top_k} of {num_experts} experts each"),
        (
            "experts",
            f"{experts.w13.format.name}, H={experts.hidden_size}, I={experts.intermediate_size},"
            f" {experts.nbytes / _MIB:,.1f} MiB, {inexact} inexact groups",
        ),
        (
            "implementation",
            _implementation(
                implementation,
                implementations.unsupported(x.dtype, act_dtype),
            ),
        ),
        (
            "tactic",
            f"tiles of {chosen.tactic.tile_tokens} tokens at most, by {chosen.source};"
            f" {pairs / num_experts:.3g} rows per expert on average",
        ),
        ("workspace", f"{workspace:,.1f} MiB"),
        (
            "weights read",
            f"{nbytes / 1e6:,.0f} MB: {touched:.0f} experts"
            + ("" if counted else ", expected under uniform routing"),
        ),
        (
            "floor on an H200",
            f"{roofline.floor_us(nbytes, flops):.1f} us: the larger of"
            f" {roofline.floor_us(nbytes, 0):.1f} for the weights and"
            f" {roofline.floor_us(0, flops):.1f} for {flops / 1e9:,.1f} GFLOP",
        ),
    ]
    return "\n".join(f"{name:<17} {value}" for name, value in rows)


def _touched(topk_ids: Any, num_experts: int) -> tuple[float, bool]:
    """How many experts, and whether they were counted."""
    if isinstance(topk_ids, jax.ShapeDtypeStruct | jax.core.Tracer):
        num_tokens, top_k = topk_ids.shape
        return roofline.expected_experts(num_tokens, top_k, num_experts), False
    return roofline.touched_experts(topk_ids, num_experts), True


def _implementation(requested: str | None, unsupported: str | None) -> str:
    choice = implementations.choose("fused_moe", requested, unsupported)
    if requested is not None:
        return f"{choice}, as asked for"
    if choice == "xla":
        return "xla: there is no Hopper GPU here, or no kernel for these options"
    if jax.default_backend() == "gpu":
        return "cuda_sm90: a Hopper GPU and the kernels are here"
    return "cuda_sm90 where the program is run on a Hopper GPU, xla elsewhere (as here)"
