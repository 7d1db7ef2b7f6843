"""Time against tokens, one panel per layer; needs matplotlib."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jax_w4moe.bench import peers
from jax_w4moe.bench.sweep import Row

_COLUMNS = 4


def save(path: Path, rows: Sequence[Row], header: dict[str, str]) -> None:
    """Draws the floor and our time as lines, the peers as points; log-log."""
    shapes = list(dict.fromkeys(row.shape for row in rows))
    columns = min(_COLUMNS, len(shapes))
    lines = -(-len(shapes) // columns)
    figure = Figure(figsize=(5 * columns + 3, 4 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    labels: dict[str, Artist] = {}
    for shape, panel in zip(shapes, panels, strict=False):
        _draw(panel, [row for row in rows if row.shape == shape])
        panel.set(title=shape, xlabel="tokens", ylabel="us", xscale="log", yscale="log")
        handles, names = panel.get_legend_handles_labels()
        labels |= dict(zip(names, handles, strict=True))
    for panel in panels:  # what is left
        panel.set_axis_off()
    figure.legend(list(labels.values()), list(labels), loc="outside right upper", fontsize="small")
    figure.suptitle(", ".join(f"{k} {v}" for k, v in header.items()), fontsize="small")
    figure.savefig(path)


def _draw(panel: Axes, rows: Sequence[Row]) -> None:
    for i, routing in enumerate(dict.fromkeys(row.routing for row in rows)):
        suffix = "" if routing == "balanced" else f", {routing}"
        of_one = sorted((r for r in rows if r.routing == routing), key=lambda r: r.num_tokens)
        tokens = [row.num_tokens for row in of_one]
        color = f"C{i}"
        panel.plot(tokens, [r.floor_us for r in of_one], "--", color=color, label=f"floor{suffix}")
        panel.plot(tokens, [r.time_us for r in of_one], "-", color=color, label=f"ours{suffix}")
        for name in sorted({name for row in of_one for name in row.backends_us}):
            times = [row.backends_us.get(name) or math.nan for row in of_one]  # nan leaves a gap
            panel.plot(tokens, times, ".:", label=f"{name}{suffix}")
    for i, peer in enumerate(peers.names()):
        measured = [(r.num_tokens, peers.times_us(r.shape, r.num_tokens).get(peer)) for r in rows]
        points = sorted({(t, us) for t, us in measured if us is not None})
        if points:
            x, y = zip(*points, strict=True)
            panel.plot(x, y, "xos^v<>*dp"[i % 10], color=f"C{1 + i % 9}", markersize=4, label=peer)
