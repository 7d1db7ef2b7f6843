"""Every precondition of a user's call, and its one sentence: the value, the bound, the remedy.

Only shapes, dtypes and static values are read, so all of it works on tracers.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_w4moe.activations import Activation
from jax_w4moe.formats import LAYOUT_VERSION, WeightFormat
from jax_w4moe.formats.layout import BLOCK_K, BLOCK_ROWS, record_bytes, record_grid
from jax_w4moe.quantization import ScaleRule
from jax_w4moe.types import ExpertWeights, PackedExperts, PackedTensor, QuantizedTensor

MAX_TOP_K = 32
MAX_EXPERTS = 1024
SIZE_MULTIPLE = 32
SCORINGS = ("softmax", "topk_softmax", "sigmoid", "sqrtsoftplus")


def _array(name: str, value: Any, rank: int | None, what: str) -> None:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(f"{name}: got {type(value).__name__}, need an array {what}.")
    if rank is not None and len(value.shape) != rank:
        raise ValueError(
            f"{name}: shape {tuple(value.shape)} has rank {len(value.shape)}, need {what};"
            " reshape it."
        )


def _shape(name: str, value: Any, expected: tuple[int, ...], why: str) -> None:
    if tuple(value.shape) != expected:
        raise ValueError(f"{name}: shape {tuple(value.shape)}, need {expected}: {why}.")


def _size(name: str, size: int, group_size: int = 1) -> None:
    multiple = max(SIZE_MULTIPLE, group_size)
    if size <= 0 or size % multiple:
        raise ValueError(
            f"{name}={size} is not a positive multiple of {multiple};"
            f" zero-pad it to {max(-(-size // multiple), 1) * multiple}."
        )


def routing(logits: Any, k: int, scoring: str, bias: Any) -> None:
    """Preconditions of ``topk_routing``."""
    _array("logits", logits, None, "float[..., E]")
    if not logits.shape:
        raise ValueError("logits: shape () has rank 0, need [..., E]; add the expert axis.")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"logits: dtype {logits.dtype} is not floating point; cast to jnp.float32.")
    num_experts = logits.shape[-1]
    if not 1 <= k <= num_experts:
        raise ValueError(f"k={k} is not in 1..{num_experts} (the experts in logits); lower k.")
    if scoring not in SCORINGS:
        raise ValueError(f"scoring={scoring!r} is unknown; use one of {', '.join(SCORINGS)}.")
    if bias is not None:
        _shape("bias", bias, (num_experts,), "one selection bias per expert")


def routing_groups(num_experts: int, k: int, num_groups: int, top_groups: int | None) -> None:
    """Preconditions of group-limited routing."""
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(
            f"num_groups={num_groups} does not divide the {num_experts} experts in logits; use the"
            " model's n_group."
        )
    if top_groups is None or top_groups == num_groups:
        return
    size = num_experts // num_groups
    if not 1 <= top_groups <= num_groups or size < 2:
        raise ValueError(
            f"top_groups={top_groups} of num_groups={num_groups} with {size} experts each: need 1"
            " to num_groups groups of at least two experts; use the model's topk_group."
        )
    if k > top_groups * size:
        raise ValueError(
            f"k={k} experts are more than top_groups={top_groups} groups of {size} hold; lower k."
        )


def hash_routing(logits: Any, token_ids: Any, table: Any, scoring: str) -> None:
    """Preconditions of ``hash_routing``."""
    _array("table", table, 2, "int[V, k]")
    routing(logits, 1, scoring, None)
    if scoring == "topk_softmax":
        raise ValueError("scoring='topk_softmax' is not for tables; use one of the others.")
    for name, array in (("token_ids", token_ids), ("table", table)):
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"{name}: dtype {array.dtype} is not an integer; pass ids.")
    _shape("token_ids", token_ids, logits.shape[:-1], "one token per row of logits")


def quantized(name: str, q: QuantizedTensor) -> tuple[int, int, int]:
    """Checks a canonical tensor's shapes and dtypes; returns its logical (E, N, K)."""
    if not isinstance(q, QuantizedTensor):
        raise TypeError(f"{name}: got {type(q).__name__}, need a QuantizedTensor.")
    if not isinstance(q.format, WeightFormat):
        raise TypeError(f"{name}.format: got {q.format!r}, need a WeightFormat such as MXFP4.")
    _array(f"{name}.codes", q.codes, 3, "u8[E, N, K/2]")
    own = f"{q.format.row_scales} + " if q.format.row_scales else ""
    _array(f"{name}.scales", q.scales, 3, f"[E, N, {own}K/{q.format.group_size}]")
    if q.codes.dtype == jnp.uint8:
        codes_per_byte = 2
    elif q.codes.dtype == q.format.code_dtype:
        codes_per_byte = 1
    else:
        raise TypeError(
            f"{name}.codes: dtype {q.codes.dtype}, need uint8 (two codes a byte) or"
            f" {q.format.code_dtype}; view the bytes as uint8."
        )
    num_experts, rows, width = q.codes.shape
    columns = width * codes_per_byte
    if num_experts < 1 or num_experts > MAX_EXPERTS:
        raise ValueError(f"{name}: E={num_experts} is not in 1..{MAX_EXPERTS}.")
    _size(f"{name}: N", rows)
    _size(f"{name}: K", columns, q.format.group_size)
    _shape(
        f"{name}.scales",
        q.scales,
        (num_experts, rows, q.format.num_scales(columns)),
        f"one scale per {q.format.group_size} of K={columns}"
        + (" after the row's own" if own else ""),
    )
    jax.eval_shape(q.format.canonical_scales, q.scales)  # raises TypeError on a foreign dtype
    return num_experts, rows, columns


def gate_up(name: str, rows: int) -> None:
    """Checks that a w13's rows are two halves."""
    if rows % (2 * SIZE_MULTIPLE):
        raise ValueError(
            f"{name}: N={rows} cannot be two halves of a multiple of {SIZE_MULTIPLE} rows; pack it"
            ' with row_order="canonical".'
        )


def expert_weights(weights: ExpertWeights) -> None:
    """Checks that the parts of canonical expert weights fit together."""
    if not isinstance(weights, ExpertWeights):
        raise TypeError(
            f"got {type(weights).__name__}, need ExpertWeights (quantize_experts or load_experts"
            " make them)."
        )
    w13, w2 = quantized("w13", weights.w13), quantized("w2", weights.w2)
    if w13[0] != w2[0]:
        raise ValueError(
            f"w13 has E={w13[0]} experts and w2 has E={w2[0]}; both must hold the same experts."
        )
    if w13[1] != 2 * w2[2] or w13[2] != w2[1]:
        raise ValueError(
            f"w13 is [E, N={w13[1]}, K={w13[2]}] and w2 is [E, N={w2[1]}, K={w2[2]}]; need w13"
            " [E, 2I, H] (gate rows, then up rows) and w2 [E, H, I]."
        )
    if weights.w13.format != weights.w2.format:
        raise ValueError(
            f"w13 is {weights.w13.format} and w2 is {weights.w2.format}; both must be of one."
        )
    for name, bias, size in (
        ("w13_bias", weights.w13_bias, w13[1]),
        ("w2_bias", weights.w2_bias, w2[1]),
    ):
        if bias is not None:
            _array(name, bias, 2, f"float[{w13[0]}, {size}]")
            _shape(name, bias, (w13[0], size), "one bias per expert and row")
            if not jnp.issubdtype(bias.dtype, jnp.floating):
                raise TypeError(f"{name}: dtype {bias.dtype} is not floating point; cast it.")


def float_kernels(w_gate: Any, w_up: Any, w_down: Any, group_size: int) -> None:
    """Preconditions of ``quantize_experts``."""
    for name, value in (("w_gate", w_gate), ("w_up", w_up), ("w_down", w_down)):
        layout = "[E, H, I]" if name == "w_down" else "[E, I, H]"
        _array(name, value, 3, f"float{layout}")
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"{name}: dtype {value.dtype} is not floating point; cast it.")
    num_experts, intermediate, hidden = w_gate.shape
    _shape(
        "w_up", w_up, (num_experts, intermediate, hidden), "w_up is shaped like w_gate [E, I, H]"
    )
    _shape("w_down", w_down, (num_experts, hidden, intermediate), "w_down is [E, H, I]")
    _size("hidden_size H", hidden, group_size)
    _size("intermediate_size I", intermediate, group_size)


def layout_version(name: str, version: int) -> None:
    """Refuses weights packed by another version of the layout."""
    if version != LAYOUT_VERSION:
        raise ValueError(
            f"{name}: packed with layout version {version}, this library reads version"
            f" {LAYOUT_VERSION}; pack the canonical weights again."
        )


def layout(name: str, found: Sequence[int], sizes: tuple[int, int, int]) -> None:
    """Refuses stored weights of another layout version, or of another layer.

    Args:
      name: whose weights.
      found: what was stored with them: version, E, H, I.
      sizes: the layer's own E, H, I.
    """
    layout_version(name, found[0])
    if tuple(found[1:]) != sizes:
        names = " ".join(f"{n}={size}" for n, size in zip("EHI", sizes, strict=True))
        raise ValueError(
            f"{name}: the stored weights have E={found[1]} H={found[2]} I={found[3]}, the layer"
            f" has {names}; make the layer of the checkpoint's sizes."
        )


def packed(name: str, tensor: PackedTensor) -> None:
    """Checks a packed tensor handed to an op."""
    if not isinstance(tensor, PackedTensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, need a PackedTensor; call pack().")
    layout_version(name, tensor.layout_version)
    if tensor.data.dtype != jnp.uint8:
        raise TypeError(f"{name}.data: dtype {tensor.data.dtype}, need uint8; call pack() again.")
    num_experts, rows, columns = tensor.shape
    halves = 2 if tensor.row_order == "gate_up" else 1
    _shape(
        f"{name}.data",
        tensor.data,
        (num_experts, *record_grid(rows, columns, halves), record_bytes(tensor.format.scale_words)),
        f"E={num_experts}, N={rows}, K={columns} as packed; name expert_axis or tensor_axis for"
        " weights that are spread over devices",
    )


def packed_shards(experts: PackedExperts) -> None:
    """Checks packed experts that may be a part of all, or padded for a mesh: that they fit."""
    if not isinstance(experts, PackedExperts):
        raise TypeError(
            f"experts: got {type(experts).__name__}, need PackedExperts; call pack_experts()."
        )
    for name, tensor in (("w13", experts.w13), ("w2", experts.w2)):
        layout_version(f"experts.{name}", tensor.layout_version)
        _array(f"experts.{name}.data", tensor.data, 4, "u8[E, row_blocks, K_blocks, record]")
    held, blocks = experts.w13.data.shape[0], experts.w2.data.shape[2]
    hidden_blocks = record_grid(experts.hidden_size, experts.hidden_size)
    nbytes = record_bytes(experts.format.scale_words)
    w13 = (held, 2 * blocks * BLOCK_K // BLOCK_ROWS, hidden_blocks[1], nbytes)
    w2 = (held, hidden_blocks[0], blocks, nbytes)
    why = f"{held} experts and {blocks} blocks of I; spread both projections alike"
    _shape("experts.w13.data", experts.w13.data, w13, why)
    _shape("experts.w2.data", experts.w2.data, w2, why)
    if experts.w13_bias is not None:
        _shape("experts.w13_bias", experts.w13_bias, (*w13[:2], BLOCK_ROWS), why)
    if experts.w2_bias is not None:
        _shape("experts.w2_bias", experts.w2_bias, (held, experts.hidden_size), why)


def packed_experts(experts: PackedExperts) -> None:
    """Checks packed experts handed to an op; reads no data, but nothing may lead out of bounds."""
    if not isinstance(experts, PackedExperts):
        raise TypeError(
            f"experts: got {type(experts).__name__}, need PackedExperts; call pack_experts()."
        )
    packed("experts.w13", experts.w13)
    packed("experts.w2", experts.w2)
    (e13, n13, k13), (e2, n2, k2) = experts.w13.shape, experts.w2.shape
    if (e13, n13, k13) != (e2, 2 * k2, n2) or experts.w13.row_order != "gate_up":
        raise ValueError(
            f"experts: w13 is [{e13}, {n13}, {k13}] with {experts.w13.row_order} rows and w2 is"
            f" [{e2}, {n2}, {k2}]; need [E, 2I, H] with gate_up rows and [E, H, I]: call"
            " pack_experts()."
        )
    if experts.w13_bias is not None:
        shape = (*experts.w13.data.shape[:2], BLOCK_ROWS)
        _shape("experts.w13_bias", experts.w13_bias, shape, "one bias per packed row")
    if experts.w2_bias is not None:
        _shape("experts.w2_bias", experts.w2_bias, (e2, n2), "one bias per expert and row")


def rows(value: Any, num_experts: int) -> None:
    """Checks the two layouts of ``expert_mlp``."""
    _array("rows", value, None, "[M, H] or [E, M_max, H]")
    if len(value.shape) not in (2, 3):
        raise ValueError(
            f"rows: shape {tuple(value.shape)} has rank {len(value.shape)}, need [M, H] or"
            " [E, M_max, H]; reshape it."
        )
    if len(value.shape) == 3 and value.shape[0] != num_experts:
        raise ValueError(
            f"rows: shape {tuple(value.shape)} holds {value.shape[0]} experts, the weights hold"
            f" E={num_experts}; pass [E, M_max, H]."
        )


def element_type(dtype: Any) -> jnp.dtype:
    """The result dtype of ``grouped_matmul``."""
    dtype = jnp.dtype(jnp.bfloat16 if dtype is None else dtype)
    if dtype not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        raise TypeError(f"preferred_element_type={dtype}: use jnp.bfloat16 or jnp.float32.")
    return dtype


def quantizable(x: Any) -> None:
    """Checks the operand of ``quantize_fp8``."""
    _array("x", x, 2, "bf16[T, H]")
    if x.dtype != jnp.bfloat16:
        raise TypeError(f"x: dtype {x.dtype}, need bfloat16; use x.astype(jnp.bfloat16).")


def activations(x: Any, x_scale: Any, rank: int | None, contraction: int, what: str) -> None:
    """Checks the activations of an op: bf16, or E4M3 with its scale."""
    _array("x", x, rank, what)
    if x.shape[-1] != contraction:
        raise ValueError(
            f"x: shape {tuple(x.shape)} ends in {x.shape[-1]}, the weights contract over"
            f" {contraction}; pass {what} with that last axis."
        )
    if x.dtype == jnp.float8_e4m3fn:
        if x_scale is None:
            raise ValueError(
                "x is float8_e4m3fn but x_scale is None; pass its scale, () or [T, 1] or"
                " [T, H / 128]."
            )
        _array("x_scale", x_scale, None, "f32[] or f32[T, 1]")
        sizes = dict.fromkeys((1, -(-contraction // BLOCK_K)))
        legal = [(), *((*x.shape[:-1], size) for size in sizes)]
        if x_scale.shape not in legal:
            raise ValueError(
                f"x_scale: shape {tuple(x_scale.shape)}, need {' or '.join(map(str, legal))}: one"
                " scale for all rows, one per row, or one per 128 values of a row."
            )
        if x_scale.dtype != jnp.float32:
            raise TypeError(f"x_scale: dtype {x_scale.dtype}, need float32; cast it.")
    elif x.dtype != jnp.bfloat16:
        raise TypeError(
            f"x: dtype {x.dtype}, need bfloat16 (or float8_e4m3fn with x_scale); use"
            " x.astype(jnp.bfloat16)."
        )
    elif x_scale is not None:
        raise ValueError(
            "x_scale was given but x is bfloat16; pass x as float8_e4m3fn, or leave x_scale out."
        )


def sizes(num_tokens: int, top_k: int, num_experts: int) -> None:
    """Checks T and k of ``fused_moe``."""
    if num_tokens < 0:
        raise ValueError(f"num_tokens={num_tokens} is below 0; pass how many tokens there are.")
    if not 1 <= top_k <= min(MAX_TOP_K, num_experts):
        raise ValueError(
            f"topk_ids: k={top_k} is not in 1..{min(MAX_TOP_K, num_experts)} (at most {MAX_TOP_K},"
            f" and the weights hold E={num_experts} experts); lower k."
        )


def routes(x: Any, topk_ids: Any, topk_weights: Any, num_experts: int) -> None:
    """Checks the routing arrays of ``fused_moe``."""
    _array("topk_ids", topk_ids, 2, "i32[T, k]")
    _array("topk_weights", topk_weights, 2, "f32[T, k]")
    if topk_ids.dtype != jnp.int32:
        raise TypeError(
            f"topk_ids: dtype {topk_ids.dtype}, need int32 expert numbers; use"
            " topk_ids.astype(jnp.int32)."
        )
    if topk_weights.dtype != jnp.float32:
        raise TypeError(
            f"topk_weights: dtype {topk_weights.dtype}, need float32; routing weights lose bits in"
            " less, cast them where they are made."
        )
    k = topk_ids.shape[1]
    sizes(x.shape[0], k, num_experts)
    _shape("topk_ids", topk_ids, (x.shape[0], k), f"x has T={x.shape[0]} tokens")
    _shape("topk_weights", topk_weights, (x.shape[0], k), "one weight per id in topk_ids")


def group_sizes(sizes: Any, num_experts: int) -> None:
    """Checks the per-expert row counts of a grouped op."""
    _array("group_sizes", sizes, 1, "i32[E]")
    if sizes.dtype != jnp.int32:
        raise TypeError(f"group_sizes: dtype {sizes.dtype}, need int32; cast it.")
    _shape("group_sizes", sizes, (num_experts,), "one count per expert of the weights")


def options(activation: Any, act_dtype: Any, act_scale: Any) -> None:
    """Checks the static choices of an op."""
    if not isinstance(activation, Activation):
        raise NotImplementedError(
            f"activation={activation!r}: only SwiGLU(...) and SiTU(...) exist."
        )
    if jnp.dtype(act_dtype) not in (jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.bfloat16)):
        raise TypeError(f"act_dtype={jnp.dtype(act_dtype)}: use jnp.float8_e4m3fn or jnp.bfloat16.")
    if not isinstance(act_scale, ScaleRule):
        raise NotImplementedError(
            f"act_scale={act_scale!r}: only PerToken(...), Per128() and Static(...) exist."
        )


def layer_sizes(
    hidden: int, intermediate: int, num_experts: int, top_k: int, group_size: int
) -> None:
    """Checks the sizes a layer is made with."""
    _size("hidden_size", hidden, group_size)
    _size("intermediate_size", intermediate, group_size)
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"num_experts={num_experts} is not in 1..{MAX_EXPERTS}.")
    bound = min(MAX_TOP_K, num_experts)
    if not 1 <= top_k <= bound:
        raise ValueError(f"top_k={top_k} is not in 1..{bound} (E={num_experts}); lower top_k.")


def router(kernel: Any, bias: Any, hidden: int, num_experts: int) -> None:
    """Checks a router's given parameters."""
    _array("router_kernel", kernel, 2, "float[H, E]")
    _shape("router_kernel", kernel, (hidden, num_experts), "the experts are [E, .., H]")
    if bias is not None:
        _array("router_bias", bias, 1, "float[E]")
        _shape("router_bias", bias, (num_experts,), "one bias per expert")


def routing_parts(selection_bias: Any, table: Any, num_experts: int, top_k: int) -> None:
    """Checks what a router is given beside its parameters."""
    if selection_bias is not None:
        _array("selection_bias", selection_bias, 1, "float[E]")
        _shape("selection_bias", selection_bias, (num_experts,), "one bias per expert")
    if table is not None:
        _array("table", table, 2, "int[V, k]")
        _shape("table", table, (table.shape[0], top_k), "top_k experts per token id")


def exact(name: str, inexact_groups: int) -> None:
    """Refuses weights that were packed under jit and could not be exact."""
    if inexact_groups:
        raise ValueError(
            f"{name}: {inexact_groups} scale groups were packed inexactly, need 0; pack the weights"
            " outside jit to see which they are."
        )
