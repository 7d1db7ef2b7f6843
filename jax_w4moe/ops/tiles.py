"""The compiled tiles of the grouped GEMM, and sizes of a workspace."""

from typing import Any

import jax.numpy as jnp

from jax_w4moe.formats.layout import round_up

TILE_TOKENS = (64, 96, 120, 160, 240, 288)
"""Tokens of the compiled tiles; results do not depend on the tile, bit for bit. The kernel cuts the
rows of each expert into as few tiles as hold them, as equal as can be."""

BF16_TILE_TOKENS = (32, 64, 96, 120, 160, 192, 224)
"""The same for bf16 activations."""

GROUPS = {"int4_g32": 4, "mxfp4_wide": 4, "nvfp4": 8}
"""Groups of 128 of K that have a sum each, where it is not one; as in csrc/formats/formats.h."""

LIMITS = {
    120: (1, 1),
    160: (1, 1),
    192: (4, 8),
    224: (1, 1),
    240: (1, 4),
    288: (1, 4),
}
"""The least and the most groups of the formats that have a tile, where not all formats have it; as
in csrc/launch/grouped_gemm_tiles.h."""

_MAX_EXPERTS = 1024  # as in csrc/common/limits.h
_MIN_TILE_TOKENS = 32


def workspace_bytes(num_rows: int, num_experts: int, parts: list[int]) -> int:
    """Bytes of a plan and of parts that start at multiples of 128.

    The plan (csrc/schedule/plan.h): its head, four numbers per expert that there may be, and a
    tile of 16 bytes for all full tiles and one per expert that is not full.
    """
    max_tiles = num_rows // _MIN_TILE_TOKENS + min(num_rows, num_experts)
    plan = 128 + 4 * 4 * _MAX_EXPERTS + 16 * max_tiles
    return sum(round_up(part, 128) for part in [plan, *parts])


def compiled(format: str, act_dtype: Any) -> tuple[int, ...]:
    """Tokens of the tiles that are compiled for a weight format."""
    groups = GROUPS.get(format, 1)

    def has(tile: int) -> bool:
        least, most = LIMITS.get(tile, (groups, groups))
        return least <= groups <= most

    return tuple(filter(has, BF16_TILE_TOKENS if is_bf16(act_dtype) else TILE_TOKENS))


def is_bf16(act_dtype: Any) -> bool:
    """Whether activations are bf16, not E4M3."""
    return jnp.dtype(act_dtype) == jnp.bfloat16


def image_parts(num_rows: int, k_blocks: int, act_dtype: Any) -> list[int]:
    """A token image: its rows, and their scales."""
    return [num_rows * k_blocks * 128 * jnp.dtype(act_dtype).itemsize, 4 * num_rows]
