"""The compiled extension: what it registers, how it loads, and its quantize_fp8 on a GPU."""

import functools
import pathlib
import re
import subprocess
import sys
from types import ModuleType

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_w4moe import _ffi
from jax_w4moe.formats.layout import LAYOUT_VERSION
from jax_w4moe.ops.quantize_fp8 import quantize_fp8_cuda
from jax_w4moe.quantization import quantize_per_token

X_TYPE = jax.ShapeDtypeStruct((4, 256), jnp.bfloat16)


@pytest.fixture(scope="module")
def extension() -> ModuleType:
    if (error := _ffi.extension_error()) is not None:
        pytest.skip(error)
    from jax_w4moe import _sm90

    return _sm90


# --- without a GPU --------------------------------------------------------------------------------


def test_registrations(extension: ModuleType) -> None:
    registrations = extension.registrations()
    assert set(registrations) == {_ffi.target_name(op) for op in _ffi.OPS}
    for target, stages in registrations.items():
        assert target.startswith("jax_w4moe_") and target.endswith(f"_v{LAYOUT_VERSION}")
        assert set(stages) == {"initialize", "execute"}
    assert _ffi.targets() == frozenset(_ffi.OPS)


def test_build_info(extension: ModuleType) -> None:
    info = extension.build_info()
    assert info["layout_version"] == LAYOUT_VERSION
    assert info["arch"] == "sm_90a"
    assert info["cuda_runtime_version"] >= 12080
    # Newer headers would shut out the oldest jaxlib that we support.
    assert info["ffi_api_version"] <= (0, 3)
    config = _ffi.build_info()["build_config"]
    assert config["cuda"] == "ON" and config["reason"] == ""


def test_import_loads_no_cuda_library(extension: ModuleType) -> None:
    """The CUDA runtime is linked statically and the driver is not linked at all."""
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("This system has no /proc/self/maps.")
    # By its path: importing the package imports jax, whose own plugin may load CUDA.
    code = f"""
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
spec = spec_from_loader("_sm90", ExtensionFileLoader("_sm90", {extension.__file__!r}))
spec.loader.exec_module(module_from_spec(spec))
print(open({str(maps)!r}).read())
"""
    mapped = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout
    assert b"_sm90" in mapped
    assert not re.search(rb"libcuda(rt)?\.so", mapped)


def test_call_count_of_unknown_op(extension: ModuleType) -> None:
    with pytest.raises(KeyError, match="no_such_op"):
        _ffi.call_count("no_such_op")


def test_lowering_contains_target(extension: ModuleType) -> None:
    text = jax.jit(quantize_fp8_cuda).trace(X_TYPE).lower(lowering_platforms=("cuda",)).as_text()
    assert f"@jax_w4moe_quantize_fp8_v{LAYOUT_VERSION}" in text
    assert "(tensor<4x256xf8E4M3FN>, tensor<4x1xf32>)" in text


def test_other_layout_version_is_refused(
    extension: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ffi, "LAYOUT_VERSION", LAYOUT_VERSION + 1)
    loaded = _ffi._extension.__wrapped__()
    assert loaded.module is None
    assert f"layout version {LAYOUT_VERSION}, the package has {LAYOUT_VERSION + 1}" in loaded.error


def test_call_checks_name_and_attributes() -> None:
    x = jnp.zeros((1, 8), jnp.bfloat16)
    with pytest.raises(ValueError, match="op='no_such_op' is unknown"):
        _ffi.call("no_such_op", X_TYPE, x)
    with pytest.raises(TypeError, match="has type tuple, need bool, int, float or str"):
        _ffi.call("quantize_fp8", X_TYPE, x, sizes=(1, 2))


def test_attributes_have_fixed_widths() -> None:
    def with_attributes(x: jax.Array, **attrs: bool | int | float | str) -> jax.Array:
        result: jax.Array = _ffi.call("quantize_fp8", X_TYPE, x, **attrs)
        return result

    python = dict(flag=True, count=3, limit=0.5, kind="silu")
    numpy = dict(flag=np.True_, count=np.int32(3), limit=np.float64(0.5), kind="silu")
    for attrs in (python, numpy):
        traced = jax.jit(functools.partial(with_attributes, **attrs)).trace(X_TYPE)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        for attribute in ("flag = true", "count = 3 : i64", "limit = 5.000000e-01 : f32"):
            assert attribute in text


def test_export_checks_name_every_target() -> None:
    checks = _ffi.disable_export_checks()
    assert [str(check) for check in checks] == [
        str(jax.export.DisabledSafetyCheck.custom_call(_ffi.target_name(op))) for op in _ffi.OPS
    ]


# --- quantize_fp8 on a GPU ------------------------------------------------------------------------


def assert_same_as_reference(x: np.ndarray) -> None:
    """Bitwise the same as XLA on the CPU and on the GPU, but for the sign and payload of a NaN."""
    got = list(map(np.asarray, jax.jit(quantize_fp8_cuda)(x)))
    for backend in ("cpu", "cuda"):
        with jax.default_device(jax.local_devices(backend=backend)[0]):
            _assert_same(got, list(map(np.asarray, jax.jit(quantize_per_token)(x))))


def _assert_same(got_pair: list[np.ndarray], want_pair: list[np.ndarray]) -> None:
    (got_fp8, got_scale), (want_fp8, want_scale) = got_pair, want_pair
    assert got_fp8.dtype == want_fp8.dtype and got_scale.shape == want_scale.shape
    for got, want, bits in ((got_fp8, want_fp8, np.uint8), (got_scale, want_scale, np.uint32)):
        is_nan = np.isnan(want.astype(np.float32))
        np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), is_nan)
        np.testing.assert_array_equal(
            np.where(is_nan, 0, got.view(bits)), np.where(is_nan, 0, want.view(bits))
        )


def random_rows(num_tokens: int, hidden_size: int) -> np.ndarray:
    """Normal rows whose magnitudes span what bf16 can hold."""
    rng = np.random.default_rng(num_tokens * 65537 + hidden_size)
    rows = rng.standard_normal((num_tokens, hidden_size))
    exponents = rng.integers(-130, 125, (num_tokens, 1))
    return np.ldexp(rows, exponents).astype(ml_dtypes.bfloat16)


# 1024 is the longest row of the one-warp kernel, 8192 the longest that stays in registers; sizes
# that are no multiple of 8 take the scalar kernel.
@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 3, 257])
@pytest.mark.parametrize("hidden_size", [1, 7, 96, 1024, 1032, 2880, 7168, 8192, 9000, 9001])
def test_quantize_fp8_random(num_tokens: int, hidden_size: int) -> None:
    assert_same_as_reference(random_rows(num_tokens, hidden_size))


@pytest.mark.gpu
@pytest.mark.parametrize("hidden_size", [7, 96, 2880])
def test_quantize_fp8_special_rows(hidden_size: int) -> None:
    x = random_rows(12, hidden_size)
    x[0] = 0
    x[1] = -0.0
    x[2, -1] = np.nan
    x[3, 0] = -np.nan
    x[4, -1] = np.inf
    x[5, 0] = -np.inf
    x[6, :2] = np.inf, np.nan
    x[7] = 2.0**-126
    x[8] = 2.0**-133  # the smallest subnormal
    x[9] = 2.0**-100
    x[10] = 2.0**-101
    x[11] = ml_dtypes.finfo(ml_dtypes.bfloat16).max
    assert_same_as_reference(x)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(0, 96), (0, 0), (5, 0)])
def test_quantize_fp8_empty(shape: tuple[int, int]) -> None:
    assert_same_as_reference(np.zeros(shape, ml_dtypes.bfloat16))


@pytest.mark.gpu
def test_quantize_fp8_every_bf16() -> None:
    """Each finite bf16 beside the largest e4m3 value, so that no scale hides the rounding."""
    values = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    values = values[np.abs(values.astype(np.float32)) <= 448]
    x = np.stack([values, np.full_like(values, 448)], axis=1)
    assert_same_as_reference(x)


@pytest.mark.gpu
def test_quantize_fp8_handler_checks_again() -> None:
    x = jnp.zeros((4, 256), jnp.float32)
    results = [
        jax.ShapeDtypeStruct((4, 256), jnp.float8_e4m3fn),
        jax.ShapeDtypeStruct((4, 1), jnp.float32),
    ]
    with pytest.raises(jax.errors.JaxRuntimeError, match="x has dtype F32, expected BF16"):
        jax.block_until_ready(_ffi.call("quantize_fp8", results, x))
    results[1] = jax.ShapeDtypeStruct((4, 2), jnp.float32)
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=r"x_scale has shape \[4, 2\], expected \[4, 1\]"
    ):
        jax.block_until_ready(_ffi.call("quantize_fp8", results, x.astype(jnp.bfloat16)))


@pytest.mark.gpu
def test_quantize_fp8_is_replayed_by_cuda_graphs() -> None:
    @functools.partial(jax.jit, donate_argnums=0)
    def step(x: jax.Array) -> jax.Array:
        for _ in range(10):  # XLA does not capture very short chains
            x_fp8, x_scale = quantize_fp8_cuda(x)
            x = (x_fp8.astype(jnp.float32) * x_scale).astype(jnp.bfloat16)
        return x

    x = jax.device_put(random_rows(16, 2880), jax.local_devices(backend="cuda")[0])
    for _ in range(4):  # the first runs record the graph
        x = jax.block_until_ready(step(x))
    recorded = _ffi.call_count("quantize_fp8")
    assert recorded > 0
    for _ in range(5):
        x = jax.block_until_ready(step(x))
    assert _ffi.call_count("quantize_fp8") == recorded
