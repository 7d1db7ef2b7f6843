"""The README's first example runs as it stands."""

import pathlib
import re

import jax.numpy as jnp
import pytest

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_first_example() -> None:
    if not README.exists():
        pytest.skip("README.md is not beside the tests")
    example = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert example
    namespace: dict[str, object] = {}
    exec(example[1], namespace)
    y = namespace["y"]
    assert isinstance(y, jnp.ndarray)
    assert y.shape == (5, 256) and y.dtype == jnp.bfloat16
    assert bool(jnp.isfinite(y).all())
