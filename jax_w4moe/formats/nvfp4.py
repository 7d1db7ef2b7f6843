"""NVFP4: E2M1 codes with an E4M3 scale per 16 of K, and an f32 scale of the whole row beside them.

A weight is ``e2m1(code) * fl(scale * row)``, the product of both scales rounded to f32 once; files
have one f32 for a matrix, and gate and up may have different ones. Canonical scales are f32
[1 + K/16] a row: the row's own, then those of its groups, every one of which E4M3 holds. The tensor
core is given ``e2m1(code)``, half an instruction at a time, and the f32 accumulation multiplies the
product of every group by its scale. The scale words of a (row, 128 of K) are eight E4M3 bytes, the
first group's lowest, and the bits of the row's f32; zeros mean: zero.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, Shaped, UInt8, UInt32

from jax_w4moe.formats.base import WeightFormat, register
from jax_w4moe.formats.mxfp4 import MXFP4, e2m1_codes, e2m1_values
from jax_w4moe.quantization import round_to_e4m3

_GROUPS = 8  # in a K-block of 128
_LARGEST_CODE = 6.0
_LARGEST_SCALE = 448.0
_SMALLEST_SCALE = 2.0**-6  # that is normal
_SMALLEST_NORMAL = 2.0**-126


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Nvfp4(WeightFormat):
    """The NVFP4 format; use the instance :data:`jax_w4moe.NVFP4`."""

    name: str = "nvfp4"
    group_size: int = 16
    scale_dtype: jnp.dtype = dataclasses.field(default_factory=lambda: jnp.dtype(jnp.float32))
    code_dtype: jnp.dtype = dataclasses.field(default_factory=lambda: jnp.dtype(jnp.float4_e2m1fn))
    k_order: str = "p q h t b"  # as it is: half an instruction multiplies one group
    scale_words: int = 3
    row_scales: int = 1

    def canonical_scales(self, scales: Shaped[Array, "*rest G"]) -> Float32[Array, "*rest G"]:
        """f32, as it is."""
        if scales.dtype == jnp.float32:
            return scales
        raise TypeError(
            f"scales: dtype {scales.dtype} does not hold NVFP4 scales; pass float32"
            " [E, N, 1 + K/16], the scale of the row before those of its groups."
        )

    def quantize(
        self, weights: Float32[Array, "*rest K"]
    ) -> tuple[UInt8[Array, "*rest K"], Float32[Array, "*rest G"]]:
        """Rounds to nearest even; the row's scale takes its largest group's to 448, 6 takes that
        group's largest weight. A row of zeros has scales of one."""
        groups = weights.reshape(*weights.shape[:-1], -1, self.group_size)
        amax = jnp.max(jnp.abs(groups), axis=-1)
        largest = jnp.max(amax, axis=-1, keepdims=True)
        row = jnp.maximum(largest / (_LARGEST_CODE * _LARGEST_SCALE), _SMALLEST_NORMAL)
        row = jnp.where(largest == 0, 1.0, row)
        scales = jnp.clip(amax / _LARGEST_CODE / row, _SMALLEST_SCALE, _LARGEST_SCALE)
        scales = jnp.where(amax == 0, 1.0, round_to_e4m3(scales))
        factors = (scales * row)[..., None]
        codes = e2m1_codes(groups / factors).reshape(weights.shape)
        return codes, jnp.concatenate([row, scales], axis=-1)

    def dequantize(
        self, codes: UInt8[Array, "*rest K"], scales: Float32[Array, "*rest G"]
    ) -> Float32[Array, "*rest K"]:
        """One rounding for the product of the scales, one for that with a code."""
        groups = codes.reshape(*codes.shape[:-1], -1, self.group_size)
        factors = scales[..., 1:] * scales[..., :1]
        return (e2m1_values(groups) * factors[..., None]).reshape(codes.shape)

    def words_from_scales(
        self, codes: UInt8[Array, "*rest K"], scales: Float32[Array, "*rest G"]
    ) -> tuple[UInt32[Array, "*rest C 3"], Int32[Array, "*rest C"]]:
        """See the module's head. A group whose scale E4M3 does not hold gets zero."""
        row, own = scales[..., :1], scales[..., 1:]
        live = jnp.any((codes & 7).reshape(*own.shape, self.group_size) != 0, axis=-1)
        is_row = (jnp.abs(row) >= _SMALLEST_NORMAL) & jnp.isfinite(row)
        legal = (round_to_e4m3(own) == own) & (jnp.abs(own) <= _LARGEST_SCALE) & is_row
        held = jnp.where(live & legal, own, 0.0).astype(jnp.float8_e4m3fn)
        bits = jax.lax.bitcast_convert_type(held, jnp.uint8).astype(jnp.uint32)
        fours = bits.reshape(*bits.shape[:-1], -1, 2, 4)
        shifts = jnp.arange(0, 32, 8, dtype=jnp.uint32).reshape(*[1] * (fours.ndim - 1), 4)
        words = jnp.sum(fours << shifts, axis=-1, dtype=jnp.uint32)
        row_word = jax.lax.bitcast_convert_type(row, jnp.uint32)[..., None]
        row_word = jnp.where(jnp.any(words != 0, axis=-1, keepdims=True), row_word, 0)
        by_block = (*own.shape[:-1], -1, _GROUPS)
        inexact = jnp.sum((live & ~legal).reshape(by_block), axis=-1, dtype=jnp.int32)
        return jnp.concatenate([words, row_word], axis=-1), inexact

    def scales_from_words(self, words: UInt32[Array, "*rest C 3"]) -> Float32[Array, "*rest G"]:
        """The scales; those of all-zero groups come back as zero, of all-zero rows, too."""
        shifts = jnp.arange(0, 32, 8, dtype=jnp.uint32).reshape(*[1] * words.ndim, 4)
        held = (words[..., :2, None] >> shifts & 255).astype(jnp.uint8)
        own = jax.lax.bitcast_convert_type(held, jnp.float8_e4m3fn).astype(jnp.float32)
        # The row's word is the same in all its blocks, zero in those that are zero.
        rows = jax.lax.bitcast_convert_type(words[..., 2], jnp.float32)
        largest = jnp.argmax(jnp.abs(rows), axis=-1)
        row = jnp.take_along_axis(rows, largest[..., None], axis=-1)
        return jnp.concatenate([row, own.reshape(*words.shape[:-2], -1)], axis=-1)

    def word_bytes(self, codes: UInt8[Array, "*rest 2 4"]) -> UInt8[Array, "*rest 4"]:
        """As MXFP4's."""
        return MXFP4.word_bytes(codes)

    def codes_from_word_bytes(self, word: UInt8[Array, "*rest 4"]) -> UInt8[Array, "*rest 2 4"]:
        """The inverse of :meth:`word_bytes`."""
        return MXFP4.codes_from_word_bytes(word)

    def inexact_reason(self, scales: Sequence[int | float]) -> str:
        """Names the scales and their bounds."""
        row, *own = scales
        return (
            f"the row's scale is {row} and its groups' are {own}, need a normal f32 and numbers"
            " that E4M3 holds, at most 448; quantise this row again"
        )


NVFP4 = register(Nvfp4())
