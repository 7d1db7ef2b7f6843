"""``python -m benchmarks.accuracy``: how far a layer is from float64, by format and activations.

One layer's Gaussian weights, quantised to each format; Gaussian tokens, and the same with eight
channels 30 to 3,000 times as large. The result against float64 on the same 4-bit weights, which is
what activations cost, and against float64 on the weights before they were quantised.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jax_w4moe as w4
from jax_w4moe.bench import machine
from jax_w4moe.formats import formats

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, TOKENS = 2048, 1024, 8, 2, 256
OUTLIERS = 8


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """SiLU(gate) * up."""
    return gate * (1 + np.tanh(gate / 2)) / 2 * up


def oracle(x: np.ndarray, kernels: list[np.ndarray], ids: np.ndarray) -> np.ndarray:
    """The layer in float64, every slot weighted with 1 / k."""
    y = np.zeros(x.shape)
    for expert, (gate, up, down) in enumerate(zip(*kernels, strict=True)):
        for slot in range(TOP_K):
            rows = np.flatnonzero(ids[:, slot] == expert)
            y[rows] += swiglu(x[rows] @ gate.T, x[rows] @ up.T) @ down.T / TOP_K
    return y


def static_rule(x: np.ndarray, kernels: list[np.ndarray]) -> w4.Static:
    """The largest magnitudes of what each projection multiplies, as a calibration finds them."""
    largest = 0.0
    for gate, up in zip(*kernels[:2], strict=True):
        largest = max(largest, float(np.abs(swiglu(x @ gate.T, x @ up.T)).max()))
    return w4.Static(float(np.abs(x).max()) / 448, largest / 448)


def main() -> None:
    """Prints a row per format and way of activations, a column per kind of tokens."""
    rng = np.random.default_rng(0)
    shapes = [(INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]
    kernels = [rng.standard_normal((EXPERTS, *s)) * s[1] ** -0.5 for s in shapes]
    ids = np.argsort(rng.random((TOKENS, EXPERTS)), axis=1)[:, :TOP_K].astype(np.int32)
    weights = jnp.full(ids.shape, 1 / TOP_K, jnp.float32)
    gaussian = rng.standard_normal((TOKENS, HIDDEN))
    outliers = gaussian.copy()
    outliers[:, :: HIDDEN // OUTLIERS] *= np.geomspace(30, 3000, OUTLIERS)
    tokens = [np.asarray(jnp.asarray(x, jnp.bfloat16)) for x in (gaussian, outliers)]

    def rms(y: np.ndarray, expected: np.ndarray) -> float:
        return float(np.sqrt(np.sum((y - expected) ** 2) / np.sum(expected**2)))

    table = Table(title=", ".join(machine.header().values()), title_justify="left")
    for column in ("weights", "activations", "Gaussian", "outliers", "to float weights", ""):
        table.add_column(column)
    for format in formats():
        canonical = w4.quantize_experts(*map(jnp.asarray, kernels), format)
        experts = w4.pack_experts(canonical)
        stored = [np.asarray(k, np.float64) for k in w4.dequantize_experts(canonical)]
        expected = [oracle(np.asarray(x, np.float64), stored, ids) for x in tokens]
        floats = [oracle(np.asarray(x, np.float64), kernels, ids) for x in tokens]
        static = [static_rule(np.asarray(x, np.float64), stored) for x in tokens]
        ways = {
            "bf16": [{"act_dtype": jnp.bfloat16}] * 2,
            "FP8 per token": [{}] * 2,
            "FP8 per token, power of two": [{"act_scale": w4.PerToken(pow2=True)}] * 2,
            "FP8 per 128 values, power of two": [{"act_scale": w4.Per128()}] * 2,
            "FP8 static": [{"act_scale": rule} for rule in static],
        }
        for name, options in ways.items():
            row = []
            for x, own, y, float_y in zip(tokens, options, expected, floats, strict=True):
                run = functools.partial(w4.fused_moe, **own)
                out = jax.jit(run)(jnp.asarray(x), experts, jnp.asarray(ids), weights)
                row.append(
                    (rms(np.asarray(out, np.float64), y), rms(np.asarray(out, np.float64), float_y))
                )
            (one, one_float), (two, two_float) = row
            table.add_row(
                format.name,
                name,
                f"{one:.4f}",
                f"{two:.4f}",
                f"{one_float:.3f}",
                f"{two_float:.3f}",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
