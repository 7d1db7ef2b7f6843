"""The compiled tiles of the grouped GEMM, chosen from static shapes, and sizes of a workspace."""

from jax_w4moe.formats.layout import round_up

TILE_TOKENS = (64, 224)
"""Tokens of the compiled tiles; results do not depend on the tile, bit for bit. The kernel cuts the
rows of each expert into as few tiles as hold them, of equal width."""

_LARGE_FROM = 64  # more rows per expert than this

_PLAN_BYTES = 12_416  # as in csrc/schedule/grouped.cuh


def tile_tokens(num_rows: int, num_experts: int) -> int:
    """The tile for the expected rows of an expert."""
    return TILE_TOKENS[-(-num_rows // num_experts) > _LARGE_FROM]


def workspace_bytes(parts: list[int]) -> int:
    """Bytes of a plan and of parts that start at multiples of 128."""
    return _PLAN_BYTES + sum(round_up(part, 128) for part in parts)


def image_parts(num_rows: int, k_blocks: int) -> list[int]:
    """A token image: its rows, and their scales."""
    return [num_rows * k_blocks * 128, 4 * num_rows]
