"""INT4: two's complement codes with a float scale per group of K.

A weight is ``code * scale``, code in -8..7. The tensor core is given ``code * 2**-8``, exact in
E4M3, and the f32 accumulation multiplies every group's sum by the row's ``scale * 2**8``: the scale
is never rounded. The scale words of a (row, 128 of K) are those numbers, an f32 for a group of 128
(DeepSeek's W4AFP8), four bf16 for groups of 32 (Kimi K2); zeros mean: zero.

E4M3 bytes from 0 to 16 count up in steps of 2**-9. So a code is stored as ``2 m + s``, with s its
sign and m = code or, for negative ones, -code - 1; and ``2 m + s * 0x82`` is the byte of the value:
``2 (m + s)`` steps, the sign on top.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Shaped, UInt8, UInt32

from jax_w4moe.formats.base import WeightFormat, register

_BLOCK_K = 128
_LARGEST = 7  # magnitude that quantize uses, on both sides
_STEPS = 8  # a weight's operand is the code times 2**-8
_SMALLEST_NORMAL = 2.0**-126
_TOO_LARGE = 2.0**120


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Int4(WeightFormat):
    """INT4; use the instances :data:`jax_w4moe.INT4_G128` and :data:`jax_w4moe.INT4_G32`."""

    code_dtype: jnp.dtype = dataclasses.field(default_factory=lambda: jnp.dtype(jnp.int4))

    def canonical_scales(self, scales: Shaped[Array, "*rest G"]) -> Float[Array, "*rest G"]:
        """The format's own dtype, or bf16, every value of which f32 holds."""
        if scales.dtype in (self.scale_dtype, jnp.bfloat16):
            return scales.astype(self.scale_dtype)
        legal = sorted({jnp.dtype(jnp.bfloat16).name, self.scale_dtype.name})
        raise TypeError(
            f"scales: dtype {scales.dtype} does not hold {self!r} scales; pass"
            f" {' or '.join(legal)}."
        )

    def quantize(
        self, weights: Float32[Array, "*rest K"]
    ) -> tuple[UInt8[Array, "*rest K"], Float[Array, "*rest G"]]:
        """Rounds to nearest even with the scale ``amax / 7``; that of a group of zeros is one."""
        groups = weights.reshape(*weights.shape[:-1], -1, self.group_size)
        amax = jnp.max(jnp.abs(groups), axis=-1)
        scales = jnp.where(amax == 0, 1.0, jnp.maximum(amax / _LARGEST, _SMALLEST_NORMAL))
        scales = scales.astype(self.scale_dtype)
        values = jnp.round(groups / scales.astype(jnp.float32)[..., None])
        values = jnp.clip(values, -_LARGEST - 1, _LARGEST)
        return (values.astype(jnp.int32) & 15).astype(jnp.uint8).reshape(weights.shape), scales

    def dequantize(
        self, codes: UInt8[Array, "*rest K"], scales: Float[Array, "*rest G"]
    ) -> Float32[Array, "*rest K"]:
        """Exact for bf16 scales; one rounding to f32 for others."""
        groups = codes.reshape(*codes.shape[:-1], -1, self.group_size).astype(jnp.int32)
        values = (groups ^ 8) - 8  # two's complement
        factors = scales.astype(jnp.float32)[..., None]
        return (values.astype(jnp.float32) * factors).reshape(codes.shape)

    def words_from_scales(
        self, codes: UInt8[Array, "*rest K"], scales: Float[Array, "*rest G"]
    ) -> tuple[UInt32[Array, "*rest C W"], Int32[Array, "*rest C"]]:
        """The bits of scale * 2**8; zero for groups of zeros, and for a scale that cannot be so."""
        live = jnp.any(codes.reshape(*scales.shape, self.group_size) != 0, axis=-1)
        bits = jax.lax.bitcast_convert_type(scales.astype(jnp.float32), jnp.uint32)
        exponent = bits >> 23 & 255
        legal = (exponent >= 1) & (exponent <= 254 - _STEPS)
        held = jnp.where(live & legal, bits + (_STEPS << 23), jnp.uint32(0))
        is_zero = bits << 1 == 0
        by_block = (*scales.shape[:-1], -1, _BLOCK_K // self.group_size)
        inexact = jnp.sum((live & ~legal & ~is_zero).reshape(by_block), axis=-1, dtype=jnp.int32)
        if self.scale_dtype != jnp.float32:  # two a word
            pairs = (held >> 16).reshape(*held.shape[:-1], -1, 2)
            held = pairs[..., 0] | pairs[..., 1] << 16
        return held.reshape(*held.shape[:-1], -1, self.scale_words), inexact

    def scales_from_words(self, words: UInt32[Array, "*rest C W"]) -> Float[Array, "*rest G"]:
        """The scales; those of all-zero groups come back as zero."""
        held = words.reshape(*words.shape[:-2], -1)
        if self.scale_dtype != jnp.float32:
            pairs = jnp.stack([held << 16, held >> 16 << 16], axis=-1)
            held = pairs.reshape(*held.shape[:-1], -1)
        bits = jnp.where(held == 0, held, held - (_STEPS << 23))
        return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(self.scale_dtype)

    def word_bytes(self, codes: UInt8[Array, "*rest 2 4"]) -> UInt8[Array, "*rest 4"]:
        """Two codes a byte, each as 2 m + s: half 0 in the low nibble."""
        sign = codes >> 3
        fields = ((codes ^ sign * 7) & 7) << 1 | sign
        return fields[..., 0, :] | fields[..., 1, :] << 4

    def codes_from_word_bytes(self, word: UInt8[Array, "*rest 4"]) -> UInt8[Array, "*rest 2 4"]:
        """The inverse of :meth:`word_bytes`."""
        fields = jnp.stack([word & 15, word >> 4], axis=-2)
        sign = fields & 1
        return fields >> 1 ^ sign * 7 | sign << 3

    def inexact_reason(self, scales: Sequence[int | float]) -> str:
        """Names the scale and its bounds."""
        bad = next(s for s in scales if not _SMALLEST_NORMAL <= abs(s) < _TOO_LARGE and s != 0)
        return (
            f"a scale is {bad}, beyond what times 2**8 is a normal f32 (magnitudes 2**-126 to"
            " 2**119, or zero); re-quantise this row"
        )


INT4_G128 = register(
    Int4(
        name="int4_g128",
        group_size=128,
        scale_dtype=jnp.dtype(jnp.float32),
        k_order="t p q h b",  # any would do; this is MXFP4's, whose tokens are laid out alike
        scale_words=1,
    )
)
INT4_G32 = register(
    Int4(
        name="int4_g32",
        group_size=32,
        scale_dtype=jnp.dtype(jnp.bfloat16),
        k_order="p q h t b",  # as it is: an instruction multiplies one group
        scale_words=2,
    )
)
