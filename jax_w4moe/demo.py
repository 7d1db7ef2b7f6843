"""``python -m jax_w4moe demo``: a checkpoint's MoE layers, loaded, run and compared with float64.

The comparison shares no code with the library after the file reader: codes are looked up in a table
and all maths is numpy in float64.
"""

import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from jax_w4moe import checkpoint, implementation, roofline
from jax_w4moe.checkpoint.files import CheckpointFiles
from jax_w4moe.flax import FusedMoE
from jax_w4moe.moe import fused_moe
from jax_w4moe.packing import quantize_experts
from jax_w4moe.routing import topk_routing
from jax_w4moe.timing import median_us
from jax_w4moe.types import QuantizedTensor

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
_COMPARED_TOKENS = 4
_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The checkpoint that is written when none is given."""

    hidden_size: int = 512
    intermediate_size: int = 512
    num_experts: int = 16
    top_k: int = 4
    layers: int = 3


@dataclasses.dataclass(frozen=True)
class Result:
    """What the demo found out.

    Attributes:
      device: the device that ran the layers.
      implementation: "xla" or "cuda_sm90".
      config: the model's MoE settings.
      layers: how many layers were run.
      packed_bytes: of all packed experts.
      bf16_bytes: what the same experts take as bf16.
      relative_error: RMS of the difference over RMS of the float64 result; the worst layer.
      tokens: in a batch.
      tokens_per_second: the median over batches, through all layers.
      kernel: microseconds of one layer's fused_moe and its floor; None without the kernels.
    """

    device: str
    implementation: str
    config: checkpoint.MoEConfig
    layers: int
    packed_bytes: int
    bf16_bytes: int
    relative_error: float
    tokens: int
    tokens_per_second: float
    kernel: tuple[float, float] | None


def run(
    path: Path | None,
    *,
    layers: int | None,
    tokens: int,
    batches: int,
    console: Console,
    sizes: Sizes = Sizes(),
) -> Result:
    """Loads a checkpoint's MoE layers, compares and times them.

    Args:
      path: a checkpoint folder, or None to write one of ``sizes`` to a temporary folder.
      layers: how many layers to write, or to load at most; None means ``sizes.layers``, or all.
      tokens: in a batch.
      batches: to run; one more is run first to compile.
      console: where progress goes.
      sizes: of the checkpoint that is written.

    Returns:
      The figures of the table.

    Raises:
      FileNotFoundError, ValueError, TypeError, NotImplementedError: see
        :func:`jax_w4moe.checkpoint.load_experts`.
    """
    forced, name = _choose(console)
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(_progress(console))
        if path is None:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            _write(path, sizes, sizes.layers if layers is None else layers, progress)
        config = checkpoint.moe_config(path)
        numbers = config.layers[:layers]
        modules = tuple(
            FusedMoE.from_checkpoint(path, number, implementation=forced)
            for number in progress.track(numbers, description="loading layers")
        )
        key = jax.random.key(1)
        compared = min(tokens, _COMPARED_TOKENS)
        sample = jax.random.normal(key, (compared, config.hidden_size), jnp.bfloat16)
        pairs = list(zip(numbers, modules, strict=True))
        error = max(
            _relative_error(path, config, number, module, sample)
            for number, module in progress.track(pairs, description="comparing with float64")
        )
        rate = _tokens_per_second(modules, config.hidden_size, tokens, batches, progress)
    weights = 3 * config.num_experts * config.hidden_size * config.intermediate_size
    biases = config.num_experts * (2 * config.intermediate_size + config.hidden_size)
    return Result(
        device=_device(),
        implementation=name,
        config=config,
        layers=len(modules),
        packed_bytes=sum(module.experts.nbytes for module in modules),
        bf16_bytes=2 * (weights + biases) * len(modules),
        relative_error=error,
        tokens=tokens,
        tokens_per_second=rate,
        kernel=_kernel(modules, tokens) if name == "cuda_sm90" else None,
    )


def table(result: Result) -> Table:
    """The result as a table of two columns."""
    config, mib = result.config, result.packed_bytes / _MIB
    shown = Table(title="jax_w4moe demo", show_header=False, title_justify="left")
    shown.add_column(style="bold", no_wrap=True)
    shown.add_column(overflow="fold")
    shown.add_row("device", Text(result.device))  # Text: brackets are no markup
    shown.add_row("implementation", result.implementation)
    shown.add_row(
        "layers",
        f"{result.layers} x {config.num_experts} experts, top {config.top_k},"
        f" H={config.hidden_size}, I={config.intermediate_size}, {config.format}",
    )
    shown.add_row(
        "memory of the experts",
        f"{mib:.1f} MiB, bf16 takes {result.bf16_bytes / _MIB:.1f} MiB:"
        f" {result.bf16_bytes / result.packed_bytes:.2f} x less",
    )
    shown.add_row(
        "relative RMS error",
        f"{result.relative_error:.2%} against float64 (the weights are exact, the activations FP8)",
    )
    shown.add_row(
        "tokens/s",
        f"{result.tokens_per_second:,.0f} on {jax.default_backend().upper()}, through all layers,"
        f" in batches of {result.tokens}",
    )
    if result.kernel:
        time_us, floor = result.kernel
        shown.add_row(
            "fused_moe",
            f"{time_us:.1f} us per layer, floor {floor:.1f} us, ratio {time_us / floor:.2f}",
        )
    return shown


def _choose(console: Console) -> tuple[str | None, str]:
    """The ``implementation`` to pass, and the name of what will run."""
    try:
        choice = implementation.choose("fused_moe", None)
    except (NotImplementedError, RuntimeError) as error:
        console.print(f"{error} The demo goes on with xla.", markup=False, soft_wrap=True)
        return "xla", "xla"
    if choice == "xla":
        return "xla", "xla"
    return None, "cuda_sm90" if jax.default_backend() == "gpu" else "xla"


def _device() -> str:
    device = jax.devices()[0]
    return f"{device.platform.upper()} ({device.device_kind})"


def _progress(console: Console) -> Progress:
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(
        TextColumn(" "),
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,  # no blank lines in a file or a log
    )


def _write(folder: Path, sizes: Sizes, num_layers: int, progress: Progress) -> None:
    hidden, intermediate = sizes.hidden_size, sizes.intermediate_size
    num_experts = sizes.num_experts

    def layer(key: Array) -> checkpoint.MoELayer:
        keys = jax.random.split(key, 7)

        def normal(number: int, *shape: int, fan_in: int) -> Array:
            return jax.random.normal(keys[number], shape) / np.sqrt(np.float32(fan_in))

        up_shape, bias_scale = (num_experts, intermediate, hidden), 100
        experts = quantize_experts(
            normal(0, *up_shape, fan_in=hidden),
            normal(1, *up_shape, fan_in=hidden),
            normal(2, num_experts, hidden, intermediate, fan_in=intermediate),
        )
        return checkpoint.MoELayer(
            dataclasses.replace(
                experts,
                w13_bias=normal(3, num_experts, 2 * intermediate, fan_in=bias_scale),
                w2_bias=normal(4, num_experts, hidden, fan_in=bias_scale),
            ),
            normal(5, num_experts, hidden, fan_in=hidden),
            normal(6, num_experts, fan_in=bias_scale),
        )

    keys = jax.random.split(jax.random.key(0), num_layers)
    layers = [layer(key) for key in progress.track(keys, description="writing a checkpoint")]
    checkpoint.save_gpt_oss(folder, layers, top_k=sizes.top_k)


@nnx.jit
def _forward(modules: tuple[FusedMoE, ...], x: Array) -> Array:
    for module in modules:
        values = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(values * values, axis=-1, keepdims=True) + 1e-5)
        x = x + module((values * scale).astype(jnp.bfloat16))
    return x


def _tokens_per_second(
    modules: tuple[FusedMoE, ...], hidden: int, tokens: int, batches: int, progress: Progress
) -> float:
    def stream(count: int) -> Iterator[Array]:
        for key in jax.random.split(jax.random.key(2), count):
            yield jax.random.normal(key, (tokens, hidden), jnp.bfloat16)

    for x in stream(1):
        _forward(modules, x).block_until_ready()  # compiles
    seconds = []
    for x in progress.track(stream(batches), total=batches, description="running batches"):
        x.block_until_ready()
        start = time.perf_counter()
        _forward(modules, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return tokens / statistics.median(seconds)


def _kernel(modules: tuple[FusedMoE, ...], tokens: int) -> tuple[float, float]:
    """Microseconds of fused_moe on uniform routing, layer after layer, and the floor."""
    experts = [module.experts for module in modules]
    first, top_k = experts[0], modules[0].router.top_k
    key = jax.random.key(3)
    x = jax.random.normal(key, (tokens, first.hidden_size), jnp.bfloat16)
    ids, weights = topk_routing(jax.random.normal(key, (tokens, first.num_experts)), top_k)
    time_us = median_us(lambda packed: fused_moe(x, packed, ids, weights), experts)
    touched = roofline.touched_experts(ids, first.num_experts)
    return time_us, roofline.floor_us(*roofline.layer_work(first, ids.size, touched))


def _relative_error(
    path: Path, config: checkpoint.MoEConfig, number: int, module: FusedMoE, x: Array
) -> float:
    expected = _float64_layer(path, config, number, np.asarray(x).astype(np.float64))
    actual = np.asarray(_call(module, x)).astype(np.float64)
    return float(np.sqrt(np.sum((actual - expected) ** 2) / np.sum(expected**2)))


@nnx.jit
def _call(module: FusedMoE, x: Array) -> Array:
    return module(x)


def _float64_layer(
    path: Path, config: checkpoint.MoEConfig, number: int, x: np.ndarray
) -> np.ndarray:
    """The layer in float64 numpy, from the file; only for the scoring of gpt-oss."""
    router = checkpoint.load_router(path, number)
    weight, bias = _float64(router.weight), _float64(router.bias)
    logits = x @ weight.T + bias
    ids = np.argsort(-logits, axis=-1, kind="stable")[:, : config.top_k]
    chosen = np.take_along_axis(logits, ids, axis=-1)
    chosen = np.exp(chosen - chosen.max(axis=-1, keepdims=True))
    routing = chosen / chosen.sum(axis=-1, keepdims=True)
    y = np.zeros_like(x)
    with CheckpointFiles(path) as files:
        on_disk = checkpoint.GPT_OSS.layer(files, number)
        for expert in np.unique(ids):
            one = checkpoint.GPT_OSS.read_expert(files, on_disk, int(expert))
            token, slot = np.nonzero(ids == expert)
            gate_up = x[token] @ _dequantize(one.w13).T + _float64(one.w13_bias)
            gate, up = np.split(gate_up, 2, axis=-1)
            act: Any = config.activation
            if act.limit is not None:
                gate, up = np.minimum(gate, act.limit), np.clip(up, -act.limit, act.limit)
            h = gate / (1 + np.exp(-act.alpha * gate)) * (up + act.beta)
            out = h @ _dequantize(one.w2).T + _float64(one.w2_bias)
            y[token] += routing[token, slot, None] * out
    return y


def _dequantize(q: QuantizedTensor) -> np.ndarray:
    """One MXFP4 expert, [N, K] in float64."""
    codes, scales = np.asarray(q.codes)[0], np.asarray(q.scales)[0].astype(np.int32)
    values = _E2M1[np.stack([codes & 15, codes >> 4], axis=-1).reshape(codes.shape[0], -1)]
    return np.ldexp(values, np.repeat(scales - 127, q.format.group_size, axis=-1))


def _float64(array: Array | None) -> np.ndarray:
    return np.zeros(()) if array is None else np.asarray(array).astype(np.float64)
