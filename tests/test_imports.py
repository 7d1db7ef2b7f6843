"""Imports point down only, and the package imports without extras."""

import ast
import pathlib
import subprocess
import sys

import pytest

import jax_w4moe

PACKAGE = pathlib.Path(jax_w4moe.__file__).parent

# Lower rank first; a module may import modules of a lower rank, or of its own folder.
RANKS = {
    "formats.layout": 0,
    "_ffi": 1,
    "varying": 0,
    "launcher": 0,
    "formats": 1,
    "activations": 1,
    "timing": 1,
    "quantization": 0,
    "types": 2,
    "checks": 3,
    "roofline": 3,
    "routing": 4,
    "packing": 4,
    "implementation": 4,
    "transforms": 4,
    "ops.tiles": 4,
    "tuning": 5,
    "sharding": 5,
    "replicas": 5,
    "ops": 6,
    "reference": 6,
    "explain": 7,
    "lowering": 7,
    "moe": 8,
    "checkpoint": 8,
    "flax": 9,
    "models": 10,
    "bench": 10,
    "serving": 11,
    "demo": 11,
    "doctor": 11,
    "cli": 12,
    "__main__": 13,
    "__init__": 9,
}


def _rank(module: str) -> int:
    matches = [name for name in RANKS if module == name or module.startswith(name + ".")]
    assert matches, f"{module} has no rank; add it to RANKS"
    return RANKS[max(matches, key=len)]


def _imports(path: pathlib.Path) -> set[str]:
    """The package's own modules that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = PACKAGE.parent / node.module.replace(".", "/") / alias.name
                is_module = submodule.with_suffix(".py").exists() or submodule.is_dir()
                found.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return {name.removeprefix("jax_w4moe.") for name in found if name.startswith("jax_w4moe.")}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_imports_point_down(path: pathlib.Path) -> None:
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    module = module.removesuffix(".__init__")
    for imported in _imports(path):
        same_folder = module.split(".")[0] == imported.split(".")[0]
        assert same_folder or _rank(imported) < _rank(module), f"{module} imports {imported}"


def test_package_imports_without_extras() -> None:
    """Neither importing nor running an op touches an optional package."""
    code = """
import sys
for name in ("flax", "orbax", "safetensors", "typer", "rich"):
    sys.modules[name] = None
import jax.numpy as jnp
import jax_w4moe as w4
w4.why_unavailable()
w4.build_info()
ones = jnp.ones((2, 32, 64))
experts = w4.pack_experts(w4.quantize_experts(ones, ones, jnp.ones((2, 64, 32))))
ids, weights = w4.topk_routing(jnp.ones((3, 2)), 1)
print(w4.fused_moe(jnp.ones((3, 64), jnp.bfloat16), experts, ids, weights, implementation="xla"))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
