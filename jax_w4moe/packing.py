"""Between float kernels, canonical 4-bit weights and packed records. Jittable; exact or refused."""

import dataclasses
import functools

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float32, UInt8

from jax_w4moe import checks
from jax_w4moe.formats import LAYOUT_VERSION, MXFP4, WeightFormat
from jax_w4moe.formats.layout import (
    BLOCK_K,
    BLOCK_ROWS,
    codes_from_record,
    padded_rows,
    record_from_codes,
)
from jax_w4moe.types import (
    ExpertWeights,
    PackedExperts,
    PackedTensor,
    QuantizedTensor,
    RowOrder,
)

# w13's records interleave gate and up in runs of 8 rows, so that one thread of the kernel holds
# both halves of an activation; w2's K-blocks hold 128 of I, so w13 pads I to the same 128.
_GATE_UP = "e (half r w g) ... -> e (r w half g) ...", {"half": 2, "w": 4, "g": 8}
_UNGATE_UP = "e (r w half g) ... -> e (half r w g) ...", {"half": 2, "w": 4, "g": 8}


def quantize_experts(
    w_gate: Array, w_up: Array, w_down: Array, format: WeightFormat = MXFP4
) -> ExpertWeights:
    """Quantises float kernels to canonical 4-bit expert weights.

    Args:
      w_gate: float[E, I, H], the gate projection.
      w_up: float[E, I, H], the up projection.
      w_down: float[E, H, I], the down projection.
      format: the weight format.

    Returns:
      The weights, without biases (``dataclasses.replace`` adds them). They always pack exactly.

    Raises:
      ValueError: shapes that do not fit together, or H or I not a multiple of 32 and of the group.
      TypeError: kernels that are not floating point.
    """
    checks.float_kernels(w_gate, w_up, w_down, format.group_size)
    w13 = _quantize(jnp.concatenate([w_gate, w_up], axis=1), format)
    return ExpertWeights(w13, _quantize(w_down, format))


def dequantize_experts(
    weights: ExpertWeights, dtype: jnp.dtype = jnp.float32
) -> tuple[Array, Array, Array]:
    """The exact float kernels of canonical weights.

    Args:
      weights: canonical expert weights.
      dtype: of the result; f32 holds every MXFP4 weight below 2**128 exactly.

    Returns:
      (w_gate [E, I, H], w_up [E, I, H], w_down [E, H, I]).

    Raises:
      ValueError, TypeError: parts that do not fit together.
    """
    checks.expert_weights(weights)
    w_gate, w_up = jnp.split(_dequantize(weights.w13), 2, axis=1)
    return w_gate.astype(dtype), w_up.astype(dtype), _dequantize(weights.w2).astype(dtype)


def pack(
    q: QuantizedTensor, *, row_order: RowOrder = "canonical", first_expert: int = 0
) -> PackedTensor:
    """Lays one projection out as records in the kernels' order. Exact; jittable.

    Args:
      q: a canonical tensor, E <= 1024, N and K multiples of 32 (padded with zeros to 64 and 128).
      row_order: "canonical", or "gate_up" for a w13 (both halves padded to 128 rows each).
      first_expert: the number of q's first expert, for errors, where q is a slice of the experts.

    Returns:
      The packed tensor. Under ``jit`` its ``inexact_groups`` says what could not be exact.

    Raises:
      ValueError: a shape that is not as above; or, called eagerly, scales that cannot be held
        exactly (an E8M0 byte 255, a spread of more than 14 binades within 128 of K).
      TypeError: a dtype that the format does not store.
    """
    return _pack_named("weights", q, row_order, first_expert)


def unpack(packed: PackedTensor) -> QuantizedTensor:
    """The exact inverse of :func:`pack`, up to the scale bytes of all-zero groups.

    Args:
      packed: a whole packed tensor.

    Returns:
      Codes u8[E, N, K/2] and scales in the format's canonical dtype.

    Raises:
      ValueError: another layout version.
      TypeError: not a packed tensor.
    """
    checks.packed("packed", packed)
    return _unpack(packed)


def pack_experts(weights: ExpertWeights, *, first_expert: int = 0) -> PackedExperts:
    """Packs both projections and lays the biases out beside them. Exact; jittable.

    Args:
      weights: canonical expert weights.
      first_expert: as in :func:`pack`.

    Returns:
      The packed experts.

    Raises:
      ValueError, TypeError: as :func:`pack`, or parts that do not fit together.
    """
    checks.expert_weights(weights)
    w13 = _pack_named("w13", weights.w13, "gate_up", first_expert)
    w2 = _pack_named("w2", weights.w2, "canonical", first_expert)
    w13_bias, w2_bias = weights.w13_bias, weights.w2_bias
    if w13_bias is not None:
        w13_bias = _pad_gate_up(jnp.asarray(w13_bias, jnp.float32))
        rows = einops.rearrange(w13_bias, _GATE_UP[0], **_GATE_UP[1])
        w13_bias = rows.reshape(*w13.data.shape[:2], BLOCK_ROWS)
    if w2_bias is not None:
        w2_bias = jnp.asarray(w2_bias, jnp.float32)
    return PackedExperts(w13, w2, w13_bias, w2_bias)


def abstract_experts(
    format: WeightFormat, num_experts: int, hidden: int, intermediate: int, *, bias: bool
) -> PackedExperts:
    """Packed experts of these sizes with ``jax.ShapeDtypeStruct`` in place of arrays."""

    def tensor(rows: int, columns: int) -> QuantizedTensor:
        codes = jnp.zeros((num_experts, rows, columns // 2), jnp.uint8)
        scales = (num_experts, rows, format.num_scales(columns))
        return QuantizedTensor(codes, jnp.zeros(scales, format.scale_dtype), format)

    def packed() -> PackedExperts:
        weights = ExpertWeights(tensor(2 * intermediate, hidden), tensor(hidden, intermediate))
        if bias:
            weights = dataclasses.replace(
                weights,
                w13_bias=jnp.zeros((num_experts, 2 * intermediate)),
                w2_bias=jnp.zeros((num_experts, hidden)),
            )
        return pack_experts(weights)

    return jax.eval_shape(packed)


def unpack_experts(experts: PackedExperts) -> ExpertWeights:
    """The exact inverse of :func:`pack_experts`; biases come back as f32.

    Args:
      experts: whole packed experts.

    Returns:
      Canonical expert weights.

    Raises:
      ValueError, TypeError: as :func:`unpack`.
    """
    checks.packed_experts(experts)
    w13_bias = experts.w13_bias
    if w13_bias is not None:
        w13_bias = canonical_rows(experts.w13, w13_bias.reshape(w13_bias.shape[0], -1))
    return ExpertWeights(unpack(experts.w13), unpack(experts.w2), w13_bias, experts.w2_bias)


def dequantize_expert(packed: PackedTensor, expert: Array) -> Float32[Array, "N K"]:
    """One expert's weights in f32, canonical order, for the expert number in a traced scalar."""
    record = jax.lax.dynamic_index_in_dim(packed.data, expert, keepdims=True)
    nibbles, scales = _canonical(packed, record)
    return packed.format.dequantize(nibbles, scales)[0]


def canonical_rows(packed: PackedTensor, rows: Array) -> Array:
    """[E, padded rows, ...] in record order -> [E, N, ...] in canonical order, padding dropped."""
    num_rows = packed.shape[1]
    if packed.row_order == "gate_up":
        rows = einops.rearrange(rows, _UNGATE_UP[0], **_UNGATE_UP[1])
        halves = rows.reshape(rows.shape[0], 2, -1, *rows.shape[2:])[:, :, : num_rows // 2]
        return halves.reshape(rows.shape[0], num_rows, *rows.shape[2:])
    return rows[:, :num_rows]


def _pack_named(
    name: str, q: QuantizedTensor, row_order: RowOrder, first_expert: int
) -> PackedTensor:
    shape = checks.quantized(name, q)
    if row_order == "gate_up":
        checks.gate_up(name, shape[1])
    data, inexact_groups = _pack(q, row_order)
    if not isinstance(inexact_groups, jax.core.Tracer):
        _require_exact(name, q, inexact_groups, first_expert)
    return PackedTensor(data, inexact_groups, q.format, shape, row_order, LAYOUT_VERSION)


@functools.partial(jax.jit, static_argnames="format")
def _quantize(weights: Array, format: WeightFormat) -> QuantizedTensor:
    codes, scales = format.quantize(weights.astype(jnp.float32))
    return QuantizedTensor(codes[..., ::2] | codes[..., 1::2] << 4, scales, format)


@jax.jit
def _dequantize(q: QuantizedTensor) -> Array:
    return q.format.dequantize(_nibbles(q.codes), q.format.canonical_scales(q.scales))


@functools.partial(jax.jit, static_argnames="row_order")
def _pack(q: QuantizedTensor, row_order: RowOrder) -> tuple[Array, Array]:
    nibbles, scales = _nibbles(q.codes), q.format.canonical_scales(q.scales)
    pad_k = -nibbles.shape[-1] % BLOCK_K
    nibbles = _pad(nibbles, 2, pad_k)
    scales = _pad(scales, 2, pad_k // q.format.group_size)
    if row_order == "gate_up":
        nibbles = einops.rearrange(_pad_gate_up(nibbles), _GATE_UP[0], **_GATE_UP[1])
        scales = einops.rearrange(_pad_gate_up(scales), _GATE_UP[0], **_GATE_UP[1])
    else:
        pad_rows = padded_rows(nibbles.shape[1]) - nibbles.shape[1]
        nibbles, scales = _pad(nibbles, 1, pad_rows), _pad(scales, 1, pad_rows)
    words, inexact = q.format.words_from_scales(nibbles, scales)
    records = record_from_codes(nibbles, words, q.format.k_order, q.format.word_bytes)
    return records, jnp.sum(inexact, axis=(1, 2))


@jax.jit
def _unpack(packed: PackedTensor) -> QuantizedTensor:
    nibbles, scales = _canonical(packed, packed.data)
    return QuantizedTensor(nibbles[..., ::2] | nibbles[..., 1::2] << 4, scales, packed.format)


def _canonical(packed: PackedTensor, records: Array) -> tuple[Array, Array]:
    """Records -> (nibbles [E, N, K], canonical scales), padding dropped."""
    own = packed.format
    nibbles, words = codes_from_record(records, own.k_order, own.codes_from_word_bytes)
    columns = packed.shape[2]
    scales = packed.format.scales_from_words(words)
    return (
        canonical_rows(packed, nibbles)[..., :columns],
        canonical_rows(packed, scales)[..., : packed.format.num_scales(columns)],
    )


def _nibbles(codes: Array) -> UInt8[Array, "*rest K"]:
    if codes.dtype != jnp.uint8:  # unpacked, of the format's own dtype
        pairs = codes.reshape(*codes.shape[:-1], -1, 2)
        codes = jax.lax.bitcast_convert_type(pairs, jnp.uint8)
    return jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)


def _pad(array: Array, axis: int, amount: int) -> Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, amount)
    return jnp.pad(array, widths)


def _pad_gate_up(array: Array) -> Array:
    """[E, 2I, ...] -> [E, 2 * round_up(I, 128), ...], each half padded by itself."""
    half = array.shape[1] // 2
    halves = array.reshape(array.shape[0], 2, half, *array.shape[2:])
    padded = _pad(halves, 2, padded_rows(array.shape[1], halves=2) // 2 - half)
    return padded.reshape(array.shape[0], -1, *array.shape[2:])


def _require_exact(name: str, q: QuantizedTensor, inexact_groups: Array, first_expert: int) -> None:
    counts = np.asarray(inexact_groups)
    if not counts.any():
        return
    expert = int(np.flatnonzero(counts)[0])
    codes = jnp.asarray(q.codes[expert])
    scales = q.format.canonical_scales(jnp.asarray(q.scales[expert]))
    nibbles = _nibbles(codes)
    pad_k = -nibbles.shape[-1] % BLOCK_K
    _, inexact = q.format.words_from_scales(
        jnp.pad(nibbles, ((0, 0), (0, pad_k))),
        jnp.pad(scales, ((0, 0), (0, pad_k // q.format.group_size))),
    )
    row, block = np.argwhere(np.asarray(inexact))[0]
    per_block = BLOCK_K // q.format.group_size
    first = q.format.row_scales + block * per_block
    groups = [*np.asarray(scales)[row, : q.format.row_scales]]
    groups += [*np.asarray(scales)[row, first : first + per_block]]
    raise ValueError(
        f"{name}: {int(counts.sum())} scale groups cannot be packed exactly; the first is in expert"
        f" {first_expert + expert}, row {row}, k from {block * BLOCK_K}:"
        f" {q.format.inexact_reason([group.item() for group in groups])}."
    )
