"""An MoE layer in float64 numpy, from the formulas alone: no code shared with the package.

Codes are decoded with ml_dtypes, weights are used one token and slot at a time.
"""

import ml_dtypes
import numpy as np

from jax_w4moe import SiTU, SwiGLU

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def dequantize_mxfp4(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """u8[..., K/2] codes and u8[..., K/32] E8M0 bytes -> float64[..., K]."""
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    exponents = np.repeat(scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64), 32, axis=-1)
    return E2M1[nibbles] * exponents


def dequantize_int4(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """u8[..., K/2] two's complement codes and float[..., K/group] scales -> float64[..., K]."""
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    values = np.where(nibbles > 7, nibbles - 16.0, nibbles)
    return values * np.repeat(
        scales.astype(np.float64), nibbles.shape[-1] // scales.shape[-1], axis=-1
    )


def dequantize_nvfp4(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """u8[..., K/2] codes and f32[..., 1 + K/16] scales, the row's first -> float64[..., K]."""
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    factors = scales[..., 1:] * scales[..., :1]
    assert factors.dtype == np.float32
    return E2M1[nibbles] * np.repeat(factors.astype(np.float64), 16, axis=-1)


DEQUANTIZE = {
    "mxfp4": dequantize_mxfp4,
    "mxfp4_wide": dequantize_mxfp4,
    "nvfp4": dequantize_nvfp4,
    "int4_g128": dequantize_int4,
    "int4_g32": dequantize_int4,
}


def moe(
    x: np.ndarray,
    w13: np.ndarray,
    w2: np.ndarray,
    topk_ids: np.ndarray,
    topk_weights: np.ndarray,
    activation: SwiGLU | SiTU,
    w13_bias: np.ndarray | None = None,
    w2_bias: np.ndarray | None = None,
) -> np.ndarray:
    """[T, H] float64 from dequantised [E, 2I, H] and [E, H, I]."""
    y = np.zeros(x.shape, np.float64)
    for token in range(x.shape[0]):
        for slot in range(topk_ids.shape[1]):
            expert = topk_ids[token, slot]
            if 0 <= expert < w13.shape[0]:
                row = mlp(x[token], expert, w13, w2, activation, w13_bias, w2_bias)
                y[token] += topk_weights[token, slot] * row
    return y


def mlp(
    x: np.ndarray,
    expert: int,
    w13: np.ndarray,
    w2: np.ndarray,
    activation: SwiGLU | SiTU,
    w13_bias: np.ndarray | None = None,
    w2_bias: np.ndarray | None = None,
) -> np.ndarray:
    """One expert on rows [..., H]."""
    gate_up = x.astype(np.float64) @ w13[expert].T
    if w13_bias is not None:
        gate_up = gate_up + w13_bias[expert]
    gate, up = np.split(gate_up, 2, axis=-1)
    out = gated(activation, gate, up) @ w2[expert].T
    return out if w2_bias is None else out + w2_bias[expert]


def gated(activation: SwiGLU | SiTU, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """The activation in float64."""
    if isinstance(activation, SiTU):
        first, second = activation.gate_bound, activation.up_bound
        return first * np.tanh(gate / first) / (1 + np.exp(-gate)) * second * np.tanh(up / second)
    if activation.limit is not None:
        gate = np.minimum(gate, activation.limit)
        up = np.clip(up, -activation.limit, activation.limit)
    return gate / (1 + np.exp(-activation.alpha * gate)) * (up + activation.beta)
