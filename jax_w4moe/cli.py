"""The command line: ``python -m jax_w4moe demo | doctor | convert | bench``, also ``jax-w4moe``."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TextColumn

app = typer.Typer(
    help="Mixture-of-Experts layers with 4-bit weights for JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_EXTRAS = {"flax": "flax", "orbax": "flax", "safetensors": "checkpoint"}


def _fail(sentence: object) -> typer.Exit:
    # soft_wrap: a sentence that is piped or searched for stays on one line.
    Console(stderr=True).print(str(sentence), style="red", markup=False, soft_wrap=True)
    return typer.Exit(code=1)


@app.command()
def demo(
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="A gpt-oss checkpoint in MXFP4; by default a small one is written."),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(min=1, help="Layers to write (3), or to load at most (all)."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens in a batch.")] = 64,
    batches: Annotated[int, typer.Option(min=1, help="Batches to run.")] = 10,
) -> None:
    """Loads the MoE layers of a checkpoint, runs them, and compares them with float64."""
    try:
        # These need extras that the rest of the library does without.
        from jax_w4moe import demo as program
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRAS:
            raise
        raise _fail(
            f"The demo needs {missing}, which is not installed; run"
            " pip install 'jax_w4moe[flax,checkpoint]'."
        ) from error
    console = Console()
    try:
        result = program.run(
            checkpoint, layers=layers, tokens=tokens, batches=batches, console=console
        )
    except (ValueError, TypeError, NotImplementedError, FileNotFoundError) as error:
        raise _fail(error) from error
    console.print(program.table(result))


@app.command()
def doctor() -> None:
    """Shows versions, devices and whether the kernels can run here; and if not, why."""
    from jax_w4moe import doctor as program

    Console().print(program.table())


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    destination: Annotated[Path, typer.Argument(help="A folder to write, or to go on with.")],
    quantize: Annotated[
        str, typer.Option(help="Round bf16 or FP8 experts to this format, e.g. mxfp4.")
    ] = "",
) -> None:
    """Packs the experts of a checkpoint once, so that loading it only reads. Can be resumed."""
    try:
        from jax_w4moe import checkpoint, formats
    except ModuleNotFoundError as error:
        raise _fail(error) from error
    known = {weight_format.name: weight_format for weight_format in formats.formats()}
    if quantize and quantize not in known:
        raise _fail(f"--quantize={quantize!r} is unknown; use one of {', '.join(known)}.")
    console = Console()
    began = time.perf_counter()
    gigabytes = 0.0
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("files", total=None, rate="")

        def show(done: int, total: int, written: int) -> None:
            nonlocal gigabytes
            gigabytes = written / 1e9
            rate = gigabytes / (time.perf_counter() - began)
            bar.update(task, completed=done, total=total, rate=f"{rate:.2f} GB/s")

        try:
            checkpoint.convert(source, destination, quantize=known.get(quantize), progress=show)
        except (ValueError, TypeError, NotImplementedError, OSError, MemoryError) as error:
            raise _fail(error) from error
    console.print(
        f"{destination}: {gigabytes:.3f} GB written in {time.perf_counter() - began:.1f} s",
        soft_wrap=True,
    )


# Of bench, what each option that asks for something else takes beside it.
_BENCH_ONLY = {
    "host": {"shape"},
    "stack": {"shape", "tokens"},
    "spread": {"shape", "tokens", "devices"},
}


def _refuse_unused(context: typer.Context) -> None:
    """Raises ValueError for an option that would not be looked at."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
    only = next((name for name in _BENCH_ONLY if name in given), None)
    if only:
        what, takes = f"bench --{only}", {only, *_BENCH_ONLY[only]}
    else:
        what, takes = "bench without --spread", context.params.keys() - {"devices"}
    for name in given:
        if name not in takes:
            raise ValueError(f"{what} takes no --{name.replace('_', '-')}; leave it out.")


@app.command()
def bench(
    context: typer.Context,
    shape: Annotated[
        list[str] | None, typer.Option(help="A layer's name (all); tiny runs anywhere.")
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens (1 to 8192).")] = None,
    routing: Annotated[
        list[str] | None, typer.Option(help="balanced (default), zipf, or one expert for all.")
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="Time ragged_dot or tokamax, too.")
    ] = None,
    format: Annotated[
        str, typer.Option(help="Of the weights, its name; an unknown one lists them.")
    ] = "mxfp4",
    act_dtype: Annotated[
        str, typer.Option(help="Of the activations: float8_e4m3fn or bfloat16.")
    ] = "float8_e4m3fn",
    burst: Annotated[
        bool, typer.Option("--burst", help="Short bursts after pauses, not a sustained load.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Where to write the figures.")] = None,
    compare: Annotated[
        Path | None, typer.Option(help="An earlier run's JSON; exit code 1 if a cell is slower.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Where to draw them; needs matplotlib.")] = None,
    autotune: Annotated[
        Path | None, typer.Option(help="Time every tactic first; use and write the winners.")
    ] = None,
    host: Annotated[
        bool, typer.Option("--host", help="Only the host's cost of dispatching a call.")
    ] = False,
    stack: Annotated[
        bool, typer.Option("--stack", help="Only 40 layers in one program, per layer.")
    ] = False,
    spread: Annotated[
        bool, typer.Option("--spread", help="Only a layer over several devices, EP and TP.")
    ] = False,
    devices: Annotated[int, typer.Option(help="Of --spread; 0: all.")] = 0,
) -> None:
    """Times MoE layers against their floor and other libraries. Options may be repeated."""
    from jax_w4moe.bench import command

    try:
        _refuse_unused(context)
        if host:
            command.host(shape or ())
            return
        if stack:
            command.stack(shape or ("flash",), tokens or ())
            return
        if spread:
            command.spread(shape or ("flash",), tokens or (), devices)
            return
        unchanged = command.run(
            shapes=shape or (),
            num_tokens=tokens or (),
            routings=routing or (),
            backend_names=backend or (),
            format=format,
            act_dtype=act_dtype,
            burst=burst,
            json=json,
            compare=compare,
            plot=plot,
            autotune=autotune,
        )
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise _fail(
            "A plot needs matplotlib, which is not installed; run pip install 'jax_w4moe[bench]'."
        ) from error
    except (ValueError, RuntimeError, NotImplementedError, FileNotFoundError) as error:
        raise _fail(error) from error
    if not unchanged:
        raise typer.Exit(code=1)
