"""MXFP4: E2M1 codes with one E8M0 scale per 32 of K (OCP Microscaling Formats v1.0, section 5).

A weight is ``e2m1(code) * 2**(scale - 127)``. In FP8 the tensor core is given
``e2m1(code) * 2**(index - 9)``, which is exact in E4M3 for index 1..15, and the f32 accumulation
multiplies by the row's ``2**(base - 127)``: so four groups (128 of K) of one row are exact whenever
their scales lie within 14 binades of each other. The scale word of a (row, 128 of K):

    bits 23..30   base, in the place of an f32 exponent: the masked word IS the row's f32 scale
    bits 4t+3..4t+6   index of group t (t = 0..3), so that (word >> 4t) & 0x78 is 8 * index, the
                  offset of the group's 8-byte PRMT table; index 0: the whole group is zero
    all other bits    zero, reserved. A word of zeros means: all four groups are zero.

``MXFP4_WIDE`` is the same for any scales whatever: the word is the four E8M0 bytes, the tensor core
is given ``e2m1(code)``, and the accumulation multiplies the product of every group by its scale.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, Shaped, UInt8, UInt32

from jax_w4moe.formats.base import WeightFormat, register

_GROUPS = 4  # groups in a K-block of 128
_MAX_SPREAD = 14  # E2M1 * 2**s is exact in E4M3 for s in [-8, 6]
_MAX_EXPONENT = 254  # 255 is NaN
_ONE = 127  # the scale byte of 2**0; what quantize and unpack give an all-zero group
_INDEX_SHIFTS = tuple(4 * group + 3 for group in range(_GROUPS))
_BASE_SHIFT = 23


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Mxfp4(WeightFormat):
    """The MXFP4 format; use the instance :data:`jax_w4moe.MXFP4`."""

    name: str = "mxfp4"
    group_size: int = 32
    scale_dtype: jnp.dtype = dataclasses.field(default_factory=lambda: jnp.dtype(jnp.uint8))
    code_dtype: jnp.dtype = dataclasses.field(default_factory=lambda: jnp.dtype(jnp.float4_e2m1fn))
    max_spread: int | None = _MAX_SPREAD  # of the scales within 128 of K, in binades
    # All 32 codes that a thread holds of one row are one scale group: it needs two tables a record.
    k_order: str = "t p q h b"
    scale_words: int = 1

    def canonical_scales(self, scales: Shaped[Array, "*rest G"]) -> UInt8[Array, "*rest G"]:
        """E8M0 bytes from uint8, float8_e8m0fnu, or f32 powers of two (all else gives 255)."""
        if scales.dtype == jnp.uint8:
            return scales
        if scales.dtype == jnp.float8_e8m0fnu:
            return jax.lax.bitcast_convert_type(scales, jnp.uint8)
        if scales.dtype == jnp.float32:
            bits = jax.lax.bitcast_convert_type(scales, jnp.uint32)
            exponent, mantissa = bits >> 23, bits & 0x7FFFFF
            normal = (mantissa == 0) & (exponent >= 1) & (exponent <= _MAX_EXPONENT)
            byte = jnp.where(normal, exponent, jnp.uint32(255))
            return jnp.where(bits == 0x400000, jnp.uint32(0), byte).astype(jnp.uint8)  # 2**-127
        raise TypeError(
            f"scales: dtype {scales.dtype} does not hold MXFP4 scales; pass uint8 or float8_e8m0fnu"
            " E8M0 bytes, or float32 powers of two."
        )

    def quantize(
        self, weights: Float32[Array, "*rest K"]
    ) -> tuple[UInt8[Array, "*rest K"], UInt8[Array, "*rest G"]]:
        """Rounds to nearest even with the OCP scale ``floor(log2(amax)) - 2``.

        With a ``max_spread`` of 14 a group more than that below the largest of its 128 of K takes
        that window's lowest scale, so that what is quantised here always packs exactly; its
        rounding error is then still at most 2**-16 of the largest weight beside it.
        """
        groups = weights.reshape(*weights.shape[:-1], -1, self.group_size)
        amax_bits = jnp.max(_bits(jnp.abs(groups)), axis=-1)
        exponent = jnp.maximum((amax_bits >> 23).astype(jnp.int32) - 2, 0)
        if self.max_spread is not None:
            blocks = _by_block(jnp.where(amax_bits == 0, 0, exponent))
            lowest = jnp.max(blocks, axis=-1, keepdims=True) - self.max_spread
            exponent = jnp.maximum(blocks, lowest).reshape(*exponent.shape[:-1], -1)
            exponent = exponent[..., : groups.shape[-2]]
        exponent = jnp.where(amax_bits == 0, _ONE, exponent)
        inverse_scale = _power_of_two(254 - exponent)
        codes = e2m1_codes(groups * inverse_scale[..., None]).reshape(weights.shape)
        return codes, exponent.astype(jnp.uint8)

    def dequantize(
        self, codes: UInt8[Array, "*rest K"], scales: UInt8[Array, "*rest G"]
    ) -> Float32[Array, "*rest K"]:
        """Exact for every byte, f32 subnormals included; inf above f32's range, NaN for 255."""
        groups = codes.reshape(*codes.shape[:-1], -1, self.group_size)
        return _ldexp_e2m1(groups, scales[..., None]).reshape(codes.shape)

    def words_from_scales(
        self, codes: UInt8[Array, "*rest K"], scales: UInt8[Array, "*rest G"]
    ) -> tuple[UInt32[Array, "*rest C 1"], Int32[Array, "*rest C"]]:
        """See the module's head for the bits. A group outside the window gets index 0 (zero)."""
        live = jnp.any((codes & 7).reshape(*scales.shape, self.group_size) != 0, axis=-1)
        live, exponent = _by_block(live), _by_block(scales).astype(jnp.int32)
        highest = jnp.max(jnp.where(live, exponent, 0), axis=-1)
        base = jnp.maximum(highest - 6, 1)
        index = exponent - base[..., None] + 9
        legal = live & (index >= 1) & (exponent <= _MAX_EXPONENT)
        fields = jnp.where(legal, index, 0).astype(jnp.uint32)
        base = jnp.where(jnp.any(legal, axis=-1), base, 0).astype(jnp.uint32)
        word = base << _BASE_SHIFT
        for group, shift in enumerate(_INDEX_SHIFTS):
            word |= fields[..., group] << shift
        return word[..., None], jnp.sum(live & ~legal, axis=-1, dtype=jnp.int32)

    def scales_from_words(self, words: UInt32[Array, "*rest C 1"]) -> UInt8[Array, "*rest G"]:
        """Scale bytes; all-zero groups come back as 127 (a scale of one)."""
        words = words[..., 0]
        base = (words >> _BASE_SHIFT).astype(jnp.int32)
        index = jnp.stack([words >> s & 15 for s in _INDEX_SHIFTS], axis=-1).astype(jnp.int32)
        byte = jnp.where(index == 0, _ONE, index + base[..., None] - 9)
        return byte.astype(jnp.uint8).reshape(*words.shape[:-1], -1)

    def word_bytes(self, codes: UInt8[Array, "*rest 2 4"]) -> UInt8[Array, "*rest 4"]:
        """Magnitudes and braided signs.

        A word holds eight 4-bit fields. The low three bits of field 4*half + byte are that code's
        magnitude: the two halves of the word, masked, are PRMT selectors. The field's top bit is
        free and carries a sign placed so that one mask yields four E4M3 sign bits: bit 8*byte + 7
        is the sign of (half 0, byte), bit 8*byte + 3 of (half 1, byte).
        """
        magnitude, sign = codes & 7, codes >> 3
        pairs = magnitude.reshape(*magnitude.shape[:-2], 4, 2)
        return pairs[..., 0] | pairs[..., 1] << 4 | sign[..., 0, :] << 7 | sign[..., 1, :] << 3

    def codes_from_word_bytes(self, word: UInt8[Array, "*rest 4"]) -> UInt8[Array, "*rest 2 4"]:
        """The inverse of :meth:`word_bytes`."""
        pairs = jnp.stack([word & 7, word >> 4 & 7], axis=-1)
        sign = jnp.stack([word >> 7, word >> 3 & 1], axis=-2)
        return pairs.reshape(sign.shape) | sign << 3

    def inexact_reason(self, scales: Sequence[int | float]) -> str:
        """Names the byte 255, or the spread and its bound."""
        exponents = [int(e) for e in scales]
        if 255 in exponents:
            return (
                "a scale is NaN (E8M0 byte 255) or no power of two; E8M0 bytes 0 to 254 and float32"
                " 2**-127 to 2**127 are legal"
            )
        return (
            f"the E8M0 scale bytes of its groups are {exponents}, a spread over 14 binades, more"
            " than an FP8 weight can hold exactly; take MXFP4_WIDE, which holds any (of a"
            " checkpoint with quantize=MXFP4_WIDE)"
        )


def _bits(values: Float32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    return jax.lax.bitcast_convert_type(values, jnp.uint32)


def _power_of_two(biased_exponent: Int32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """2**(biased_exponent - 127) for 1..254."""
    bits = biased_exponent.astype(jnp.uint32) << 23
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _by_block(groups: Shaped[Array, "*rest G"]) -> Shaped[Array, "*rest C 4"]:
    """Splits the groups of a row into blocks of four, with zeros after a ragged end."""
    pad = -groups.shape[-1] % _GROUPS
    padded = jnp.pad(groups, [(0, 0)] * (groups.ndim - 1) + [(0, pad)])
    return padded.reshape(*groups.shape[:-1], -1, _GROUPS)


def e2m1_codes(values: Float32[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """Rounds to the nearest of 0, .5, 1, 1.5, 2, 3, 4, 6; ties to the even code; saturates."""
    magnitude = jnp.abs(values)
    code = jnp.zeros(values.shape, jnp.uint8)
    for k, midpoint in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)):
        above = magnitude >= midpoint if k % 2 else magnitude > midpoint
        code += above.astype(jnp.uint8)
    return code | jnp.signbit(values).astype(jnp.uint8) << 3


def e2m1_values(codes: UInt8[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """The numbers that codes stand for."""
    return _ldexp_e2m1(codes, jnp.full(codes.shape, _ONE, jnp.uint8))


def _ldexp_e2m1(
    codes: UInt8[Array, "*shape"], scales: UInt8[Array, "*scale_shape"]
) -> Float32[Array, "*shape"]:
    """e2m1(code) * 2**(scale - 127), from its bits: XLA may flush f32 subnormals in a product."""
    magnitude = (codes & 7).astype(jnp.int32)
    # 0.5 = 2**-1 * 1.0 (code 1); from code 2 on the code is exponent:mantissa with bias 1.
    mantissa = jnp.where(magnitude >= 2, magnitude & 1, 0) << 22
    exponent = jnp.where(magnitude >= 2, magnitude >> 1, 0) - 1 + scales.astype(jnp.int32)
    subnormal = (mantissa | 1 << 23) >> jnp.clip(1 - exponent, 0, 24)
    bits = jnp.where(exponent >= 1, exponent << 23 | mantissa, subnormal)
    bits = jnp.where(exponent >= 255, 0x7F800000, bits)
    bits = jnp.where(magnitude == 0, 0, bits)
    bits = jnp.where(scales.astype(jnp.int32) == 255, 0x7FC00000, bits)
    bits = bits.astype(jnp.uint32) | (codes & 8).astype(jnp.uint32) << 28
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Mxfp4Wide(Mxfp4):
    """MXFP4 with scales any distance apart; use the instance :data:`jax_w4moe.MXFP4_WIDE`."""

    name: str = "mxfp4_wide"
    k_order: str = "p q h t b"  # as it is: an instruction multiplies one group
    max_spread: int | None = None

    def takes(self, other: WeightFormat) -> bool:
        """MXFP4's: both have the same."""
        return other == MXFP4

    def words_from_scales(
        self, codes: UInt8[Array, "*rest K"], scales: UInt8[Array, "*rest G"]
    ) -> tuple[UInt32[Array, "*rest C 1"], Int32[Array, "*rest C"]]:
        """The four bytes, the first one lowest; zero for a group of zeros, and for NaN."""
        live = jnp.any((codes & 7).reshape(*scales.shape, self.group_size) != 0, axis=-1)
        legal = scales <= _MAX_EXPONENT
        held = _by_block(jnp.where(live & legal, scales, 0)).astype(jnp.uint32)
        word = held[..., 0] | held[..., 1] << 8 | held[..., 2] << 16 | held[..., 3] << 24
        return word[..., None], jnp.sum(_by_block(live & ~legal), axis=-1, dtype=jnp.int32)

    def scales_from_words(self, words: UInt32[Array, "*rest C 1"]) -> UInt8[Array, "*rest G"]:
        """Scale bytes; all-zero groups come back as 0."""
        held = jnp.concatenate([words >> shift & 255 for shift in (0, 8, 16, 24)], axis=-1)
        return held.astype(jnp.uint8).reshape(*words.shape[:-2], -1)


MXFP4 = register(Mxfp4())
MXFP4_WIDE = register(Mxfp4Wide())
