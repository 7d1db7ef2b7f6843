"""The packed layout: where every 4-bit code of a projection lies, for the kernels and for Python.

A projection [E, N, K] is cut into records of 64 rows x 128 of K. A record is 4,352 or 4,608 bytes:

    bytes 0..4095   codes in WGMMA A-fragment order: two planes of 128 threads x 16 bytes
    the rest        one or two 32-bit scale words per row (a format's own), rows g and g+8 adjacent

Records are stored [E, row_blocks, K_blocks, bytes]: the block axes stay visible, so a packed array
is sharded like any other. ``docs/layout.md`` has the byte map with a picture.

Digits used in the patterns below (radix in parentheses), most significant first:

    row in a record  = (w s g)      w(4) warp, s(2) low or high half of its 16 rows, g(8) lane group
    K in a K-block   = (p q h t b)  in hardware order: p(2) plane, q(2) instruction of the plane,
                       h(2) half of the instruction's 32, t(4) lane of the quad, b(4) byte of a word

Source of the fragment map: PTX ISA, "Register fragments for wgmma.mma_async.m64nNk32", matrix A.
"""

from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8, UInt32

LAYOUT_VERSION = 1
"""Version of the byte map: static in every packed array, and part of the FFI targets' names."""

BLOCK_ROWS = 64
BLOCK_K = 128
CODE_BYTES = BLOCK_ROWS * BLOCK_K // 2

_RADIX = {"w": 4, "s": 2, "g": 8, "p": 2, "q": 2, "h": 2, "t": 4, "b": 4}


def record_bytes(scale_words: int) -> int:
    """Bytes of a record with so many scale words per row."""
    return CODE_BYTES + BLOCK_ROWS * 4 * scale_words


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


def padded_rows(rows: int, halves: int = 1) -> int:
    """Rows of a packed projection.

    Two halves (gate and up) are padded to 128 rows each, so that four row blocks of w13 always
    belong to one K-block of w2.
    """
    return halves * round_up(rows // halves, BLOCK_K) if halves > 1 else round_up(rows, BLOCK_ROWS)


def record_grid(rows: int, columns: int, halves: int = 1) -> tuple[int, int]:
    """(row_blocks, K_blocks) of a projection of ``rows`` x ``columns``."""
    return padded_rows(rows, halves) // BLOCK_ROWS, round_up(columns, BLOCK_K) // BLOCK_K


def record_from_codes(
    nibbles: UInt8[Array, "E N K"],
    scale_words: UInt32[Array, "E N C W"],
    k_order: str,
    word_bytes: Callable[[UInt8[Array, "..."]], UInt8[Array, "..."]],
) -> UInt8[Array, "E R C B"]:
    """Lays out codes and scale words as records.

    Args:
      nibbles: codes in 0..15; N a multiple of 64, K of 128.
      scale_words: W words per (row, K-block); C = K / 128.
      k_order: the digits of a logical k inside its K-block, e.g. "t p q h b" (a format's trait).
      word_bytes: the four bytes of eight codes [..., half, byte] (a format's trait).

    Returns:
      The records, row blocks R = N / 64.
    """
    by_word = einops.rearrange(
        nibbles, f"e (r w s g) (c {k_order}) -> e r c p w g t q s h b", **_sizes("wsg" + k_order)
    )
    codes = einops.rearrange(
        word_bytes(by_word), "e r c p w g t q s byte -> e r c (p w g t q s byte)"
    )
    words = einops.rearrange(
        scale_words, "e (r w s g) c word -> e r c (w g s word)", **_sizes("wsg")
    )
    scales = einops.rearrange(
        jax.lax.bitcast_convert_type(words, jnp.uint8), "e r c word byte -> e r c (word byte)"
    )
    return jnp.concatenate([codes, scales], axis=-1)


def codes_from_record(
    records: UInt8[Array, "E R C B"],
    k_order: str,
    codes_from_word_bytes: Callable[[UInt8[Array, "..."]], UInt8[Array, "..."]],
) -> tuple[UInt8[Array, "E N K"], UInt32[Array, "E N C W"]]:
    """The inverse of :func:`record_from_codes`."""
    codes = einops.rearrange(
        records[..., :CODE_BYTES],
        "e r c (p w g t q s byte) -> e r c p w g t q s byte",
        **_sizes("pwgtqs"),
    )
    nibbles = einops.rearrange(
        codes_from_word_bytes(codes),
        f"e r c p w g t q s h b -> e (r w s g) (c {k_order})",
        **_sizes("wsg"),
    )
    words = jax.lax.bitcast_convert_type(
        einops.rearrange(records[..., CODE_BYTES:], "e r c (word byte) -> e r c word byte", byte=4),
        jnp.uint32,
    )
    by_row = einops.rearrange(words, "e r c (w g s word) -> e (r w s g) c word", **_sizes("wgs"))
    return nibbles, by_row


def _sizes(digits: str) -> dict[str, int]:
    return {digit: _RADIX[digit] for digit in digits.replace(" ", "")}
