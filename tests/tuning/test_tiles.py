"""The table of tiles, which stands in Python and in C++."""

import re
from pathlib import Path

import jax.numpy as jnp
import pytest

from jax_w4moe.formats import formats
from jax_w4moe.ops import tiles

CSRC = Path(__file__).parents[2] / "csrc"
ALL_GROUPS = (1, 8)


def _rows(file: str, macro: str, pattern: str) -> list[tuple[str, ...]]:
    """The groups of ``pattern`` in each X(...) of a macro's definition."""
    text = re.sub(r"\\\n", "", (CSRC / file).read_text())
    (line,) = re.findall(rf"#define {macro}\(X\)(.*)", text)
    return re.findall(rf"X\({pattern}\)", line)


def _tiles(macro: str) -> dict[int, tuple[int, int]]:
    """Least and most groups by tokens."""
    number = r"(\d+)"
    rows = _rows("launch/grouped_gemm_tiles.h", macro, ", ".join([number] * 6))
    return {int(r[0]) * int(r[1]): (int(r[4]), int(r[5])) for r in rows}


@pytest.mark.skipif(not CSRC.exists(), reason="runs in a checkout")
@pytest.mark.parametrize(
    ("macro", "tokens"),
    [
        ("JAX_W4MOE_FP8_TILES", tiles.TILE_TOKENS),
        ("JAX_W4MOE_BF16_TILES", tiles.BF16_TILE_TOKENS),
    ],
)
def test_tiles_are_those_of_the_header(macro: str, tokens: tuple[int, ...]) -> None:
    expected = _tiles(macro)
    assert tokens == tuple(expected)
    assert {tile: tiles.LIMITS.get(tile, ALL_GROUPS) for tile in tokens} == expected


@pytest.mark.skipif(not CSRC.exists(), reason="runs in a checkout")
def test_groups_are_those_of_the_header() -> None:
    rows = _rows("formats/formats.h", "JAX_W4MOE_FORMATS", r"\w+, (\w+), \d, KOrder::\w+, (\d)")
    assert {name: tiles.GROUPS.get(name, 1) for name, _ in rows} == {
        name: int(groups) for name, groups in rows
    }
    assert {format.name for format in formats()} == {name for name, _ in rows}


def test_tiles_of_formats_with_more_sums() -> None:
    """Each has a small tile and one for prefill."""
    assert tiles.compiled("int4_g32", jnp.float8_e4m3fn) == (64, 96, 240, 288)
    assert tiles.compiled("nvfp4", jnp.bfloat16) == (32, 64, 96, 192)
    assert tiles.compiled("mxfp4", jnp.bfloat16) == (32, 64, 96, 120, 160, 224)
