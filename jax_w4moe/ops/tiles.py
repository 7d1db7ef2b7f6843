"""The compiled tiles of the grouped GEMM, chosen from static shapes."""

from jax_w4moe.formats.layout import round_up

TILE_TOKENS = (8, 16, 32, 64, 128)
"""Tokens of the compiled tiles; results do not depend on the tile, bit for bit."""

PLAN_BYTES = 16_512
"""Bytes of a plan in a workspace, as in csrc/schedule/grouped.cuh."""

_ATOM = 8  # tokens of a swizzle atom; every expert's rows are padded to whole ones


def tile_tokens(num_rows: int, num_experts: int) -> int:
    """The smallest tile that holds the expected rows of an expert."""
    expected = -(-num_rows // num_experts)
    return next((tile for tile in TILE_TOKENS if tile >= expected), TILE_TOKENS[-1])


def image_bytes(num_rows: int, num_experts: int, k_blocks: int) -> int:
    """Bytes of the token image of ``num_rows`` rows, every expert's padded to whole atoms."""
    padding = min(num_rows, num_experts) * (_ATOM - 1)
    atoms = round_up(num_rows + padding, _ATOM) // _ATOM + TILE_TOKENS[-1] // _ATOM
    return atoms * k_blocks * 1024
