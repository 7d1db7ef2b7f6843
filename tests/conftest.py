"""Strictness for all tests: several CPU devices, strict promotion, warnings as errors."""

import importlib.metadata
import os

# Before jax starts its CPU backend. XLA's older code generator, which jaxlib 0.10 still has,
# compiles in half the time.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8"
    + " --xla_cpu_use_fusion_emitters=false"
    * (
        os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1"
        and importlib.metadata.version("jaxlib").startswith("0.10.")
    ),
)

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that depend on the test's name only."""
    return np.random.default_rng(list(request.node.name.encode()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked ``gpu`` where the kernels cannot run, with the reason."""
    from jax_w4moe import why_unavailable

    reason = why_unavailable()
    if reason:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))
