"""What ``python -m jax_w4moe bench`` does with its options."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import track

from jax_w4moe import _ffi, tuning
from jax_w4moe.bench import backends, machine, report
from jax_w4moe.bench import spread as spreads
from jax_w4moe.bench import stack as stacks
from jax_w4moe.bench.host import dispatch_us
from jax_w4moe.bench.layers import ROUTINGS
from jax_w4moe.bench.shapes import NUM_TOKENS, SHAPES, TINY, Shape
from jax_w4moe.bench.sweep import sweep
from jax_w4moe.formats.base import WeightFormat, formats

_ACT_DTYPES = {"float8_e4m3fn": jnp.float8_e4m3fn, "bfloat16": jnp.bfloat16}
_WIDTH = 160  # a table's, whatever the terminal's: squeezed columns tell nothing


def run(
    *,
    shapes: Sequence[str] = (),
    num_tokens: Sequence[int] = (),
    routings: Sequence[str] = (),
    backend_names: Sequence[str] = (),
    format: str = "mxfp4",
    act_dtype: str = "float8_e4m3fn",
    burst: bool = False,
    json: Path | None = None,
    compare: Path | None = None,
    plot: Path | None = None,
    autotune: Path | None = None,
    console: Console | None = None,
) -> bool:
    """Measures and reports.

    Args:
      shapes: names of layers, by default all of ``SHAPES``; "tiny" runs anywhere.
      num_tokens: values of T, by default ``NUM_TOKENS``.
      routings: by default balanced only.
      backend_names: other backends to time.
      format: the name of the weights' format.
      act_dtype: the name of the activations' dtype.
      burst: time bursts after pauses, not a sustained load.
      json: where to write the rows.
      compare: an earlier run's rows.
      plot: where to draw; the suffix says in which format.
      autotune: a file of tactics to use, and to add to: times every tactic of each cell first.
      console: where to print.

    Returns:
      Whether nothing became slower than ``compare`` beyond noise.

    Raises:
      ValueError: an unknown name, a T below 1, or a file to compare with that does not fit.
      RuntimeError: the kernels cannot run here.
      FileNotFoundError: no file to compare with, or no folder to write to.
      ModuleNotFoundError: a plot is asked for without matplotlib.
    """
    layers = named_shapes(shapes)
    for count in num_tokens:
        if count < 1:
            raise ValueError(f"tokens={count} is below 1; leave it out.")
    for name in routings:
        if name not in ROUTINGS:
            raise ValueError(f"routing {name!r} is unknown; use one of {', '.join(ROUTINGS)}.")
    weights, activations = named_format(format), named_act_dtype(act_dtype)
    console = console or Console()
    console.width = max(_WIDTH, console.width)
    # What can fail does so before anything is measured.
    for path in (json, plot):
        if path and not path.parent.is_dir():
            raise FileNotFoundError(f"{path.parent} does not exist; make it, or write elsewhere.")
    if plot:
        from jax_w4moe.bench import plot as plots
    header = {
        **machine.header(),
        "format": format,
        "act_dtype": act_dtype,
        "clocks": "burst" if burst else "sustained",
    }
    old = report.load(compare, header) if compare else None
    modules = backends.load(backend_names, console.print)

    counts = tuple(num_tokens) or NUM_TOKENS
    kinds = tuple(routings) or ROUTINGS[:1]
    cells = sweep(
        layers,
        counts,
        kinds,
        format=weights,
        act_dtype=activations,
        backends=modules,
        burst=burst,
        tune=autotune is not None,
        report=console.print,
    )
    total = len(layers) * len(counts) * len(kinds)
    with tuning.autotune(autotune) if autotune else contextlib.nullcontext():
        rows = list(track(cells, "measuring", total=total, console=console, transient=True))

    console.print(report.table(rows, header))
    console.print(report.summary(rows), soft_wrap=True)
    if json:
        report.save(json, rows, header)
    if plot:
        plots.save(plot, rows, header)
    if old is None:
        return True
    changes = report.compare(rows, old)
    slower = [change for change in changes if change.relative > change.noise]
    faster = sum(change.relative < -change.noise for change in changes)
    for change in slower:
        console.print(f"slower: {change}", soft_wrap=True)
    console.print(f"{len(changes)} cells compared: {len(slower)} slower, {faster} faster.")
    return not slower


def host(shapes: Sequence[str] = (), console: Console | None = None) -> None:
    """Measures and prints what dispatching a call costs the host."""
    console = console or Console()
    for shape in named_shapes(shapes):
        layer_us, addition_us = dispatch_us(shape)
        console.print(
            f"{shape.name}: {layer_us:.1f} us to dispatch a jitted fused_moe at T = 1, without"
            f" waiting for it ({addition_us:.1f} us for x + 1).",
            soft_wrap=True,
        )


def stack(
    shapes: Sequence[str], num_tokens: Sequence[int] = (), console: Console | None = None
) -> None:
    """Measures and prints what a layer takes among many in one program."""
    console = console or Console()
    for shape in named_shapes(shapes):
        for count in num_tokens or stacks.NUM_TOKENS:
            each_us, alone_us, nbytes = stacks.layer_us(shape, count)
            console.print(
                f"{shape.name}, T = {count}: {each_us:.1f} us per layer in a program of"
                f" {stacks.LAYERS} layers over {nbytes / 1e9:.1f} GB of weights,"
                f" {alone_us:.1f} us by itself.",
                soft_wrap=True,
            )


def spread(
    shapes: Sequence[str],
    num_tokens: Sequence[int] = (),
    devices: int = 0,
    console: Console | None = None,
) -> None:
    """Measures and prints what a layer takes on several devices.

    Args:
      shapes: names of layers.
      num_tokens: of a device, by default ``spread.NUM_TOKENS``.
      devices: how many, of all processes; 0 means all.
      console: where to print.

    Raises:
      ValueError: one device only, or more than there are.
      RuntimeError: as :func:`named_shapes`.
    """
    console = console or Console()
    there = jax.device_count()
    devices = devices or there
    if not 2 <= devices <= there:
        raise ValueError(f"--spread over {devices} devices, here are {there}; use 2 to {there}.")
    for shape in map(spreads.whole, named_shapes(shapes)):
        for kind in spreads.KINDS:
            layer = spreads.Layer(shape, kind, devices)
            for count in num_tokens or spreads.NUM_TOKENS:
                cell = layer.measure(count)
                others = {"bf16 sent": cell.bf16_us, "dispatched": cell.dispatch_us}
                console.print(
                    f"{shape.name}, {kind} axis of {devices}, {count} tokens a device:"
                    f" {cell.layer_us:.1f} us, of which {cell.compute_us:.1f} us are local work"
                    f" and {cell.layer_us - cell.compute_us:.1f} us exchange"
                    f" ({cell.compute_us / cell.layer_us:.0%} efficiency)"
                    + "".join(f"; {name} {us:.1f} us" for name, us in others.items() if us)
                    + ".",
                    soft_wrap=True,
                )


def named_format(name: str) -> WeightFormat:
    """A weight format by its name.

    Raises:
      ValueError: there is none of that name.
    """
    known = {own.name: own for own in formats()}
    if name not in known:
        raise ValueError(f"format {name!r} is unknown; use one of {', '.join(known)}.")
    return known[name]


def named_act_dtype(name: str) -> Any:
    """A dtype of activations by its name.

    Raises:
      ValueError: there is none of that name.
    """
    if name not in _ACT_DTYPES:
        raise ValueError(f"act-dtype {name!r} is unknown; use {' or '.join(_ACT_DTYPES)}.")
    return _ACT_DTYPES[name]


def named_layers(names: Sequence[str]) -> list[Shape]:
    """The layers of these names, or all but "tiny".

    Raises:
      ValueError: an unknown name.
    """
    known = {**SHAPES, TINY.name: TINY}
    for name in names:
        if name not in known:
            raise ValueError(f"shape {name!r} is unknown; use one of {', '.join(known)}.")
    return [known[name] for name in names] or list(SHAPES.values())


def named_shapes(names: Sequence[str]) -> list[Shape]:
    """The layers of these names, which can run here.

    Raises:
      ValueError: an unknown name.
      RuntimeError: a layer other than "tiny" where the kernels cannot run.
    """
    chosen = named_layers(names)
    reason = _ffi.why_unavailable()
    if reason and chosen != [TINY]:
        raise RuntimeError(
            f"The benchmark needs a Hopper GPU and the kernels: {reason} Or pass --shape tiny, a"
            " small layer that runs anywhere."
        )
    return chosen
