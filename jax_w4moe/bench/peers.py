"""What other libraries took for the same layers, measured once on one H200 (peers_h200.json)."""

import functools
import json
import pathlib
from typing import Any

FP8_WEIGHTS = "dg53_fp8_mega"
"""The peer whose weights are FP8: the same layer in twice the bytes, so no peer of the others."""


@functools.cache
def table() -> dict[str, Any]:
    """The file: hardware, date, note, and us[shape][T][peer]."""
    path = pathlib.Path(__file__).with_name("peers_h200.json")
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def times_us(shape: str, num_tokens: int) -> dict[str, float]:
    """Microseconds of each library on a layer with balanced routing; empty if none was measured."""
    times: dict[str, float] = table()["us"].get(shape, {}).get(str(num_tokens), {})
    return times


def names() -> list[str]:
    """Every library that was measured."""
    cells = [cell for shape in table()["us"].values() for cell in shape.values()]
    return sorted({name for cell in cells for name in cell})


def best(shape: str, num_tokens: int) -> tuple[str, float] | None:
    """The fastest library with weights other than FP8, and its microseconds."""
    times = {k: v for k, v in times_us(shape, num_tokens).items() if k != FP8_WEIGHTS}
    return min(times.items(), key=lambda item: item[1]) if times else None
