"""How results are compared, and the bounds with their reasons."""

from typing import Any

import numpy as np

EXACT_RMS = 4e-3
"""bf16 output: 2**-9 relative at most per value, about 1.7e-3 in RMS; twice that and some."""

MIRRORED_RMS = 6e-2
"""FP8 activations round twice to 3 mantissa bits, 2.6 % RMS each: 0.046 on Gaussian data."""


def as_float64(array: Any) -> np.ndarray:
    """Any jax or numpy array, bf16 and fp8 included, as float64."""
    return np.asarray(array).astype(np.float64)


def relative_rms(actual: Any, expected: Any) -> float:
    """RMS of the difference over the RMS of what is expected; 0 if both are all zero."""
    actual, expected = as_float64(actual), as_float64(expected)
    assert actual.shape == expected.shape
    error = float(np.sqrt(np.sum((actual - expected) ** 2)))
    norm = float(np.sqrt(np.sum(expected**2)))
    return error / norm if norm else error


def assert_bitwise(actual: Any, expected: Any) -> None:
    """Same shape, dtype and bits."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    different = actual.reshape(-1).view(np.uint8) != expected.reshape(-1).view(np.uint8)
    assert not different.any(), f"{int(different.sum())} of {different.size} bytes differ"


def assert_bitwise_or_nan(actual: Any, expected: Any) -> None:
    """The same, but a NaN may have any bits."""
    actual, expected = np.array(actual), np.array(expected)
    is_nan = np.isnan(expected)
    assert_bitwise(np.isnan(actual), is_nan)
    actual[is_nan] = expected[is_nan] = 0
    assert_bitwise(actual, expected)
