"""Every on-disk format: weights bit for bit, routers and shared experts, the block's output."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("safetensors", reason="needs the extra: pip install 'jax_w4moe[checkpoint]'")

from jax_w4moe import (
    INT4_G32,
    MXFP4,
    MXFP4_WIDE,
    SiTU,
    SwiGLU,
    dequantize_experts,
    pack_experts,
    quantize_experts,
    shard_experts,
    unpack_experts,
)
from jax_w4moe.checkpoint import (
    load_act_scale,
    load_experts,
    load_latent,
    load_router,
    load_shared_expert,
    moe_config,
)
from tests.helpers import checkpoints, oracle
from tests.helpers.compare import assert_bitwise, relative_rms

FP8_RMS = 6e-2
BF16_RMS = 5e-3


def _written(
    name: str, rng: np.random.Generator, folder: Path
) -> tuple[checkpoints.Fixture, Path, dict[str, Any]]:
    """The fixture, its folder, and the keywords of loading it."""
    is_float = name in checkpoints.FLOAT_FIXTURES
    make = (checkpoints.FLOAT_FIXTURES if is_float else checkpoints.FIXTURES)[name]
    fixture = make(rng)
    return fixture, fixture.write(folder), {"quantize": MXFP4} if is_float else {}


def _float32(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.float32)


@pytest.mark.parametrize("name", checkpoints.FIXTURES)
def test_weights(name: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """Every weight is what the stored bytes say, bit for bit."""
    fixture, folder, _ = _written(name, rng, tmp_path)
    experts = load_experts(folder, fixture.layer)
    gate, up, down = dequantize_experts(unpack_experts(experts))
    assert_bitwise(np.concatenate([gate, up], axis=1), _float32(fixture.w13))
    assert_bitwise(down, _float32(fixture.w2))


@pytest.mark.parametrize("format", [MXFP4, INT4_G32])
@pytest.mark.parametrize("name", checkpoints.FLOAT_FIXTURES)
def test_quantized_while_loaded(
    name: str, format: Any, rng: np.random.Generator, tmp_path: Path
) -> None:
    """The same as quantising all experts at once."""
    fixture, folder, _ = _written(name, rng, tmp_path)
    gate, up = np.split(_float32(fixture.w13), 2, axis=1)
    kernels = (jnp.asarray(kernel) for kernel in (gate, up, _float32(fixture.w2)))
    expected = pack_experts(quantize_experts(*kernels, format))
    actual = load_experts(folder, fixture.layer, quantize=format)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(assert_bitwise, actual, expected)
    with pytest.raises(ValueError, match="not 4 bits; pass quantize=MXFP4"):
        load_experts(folder, fixture.layer)


@pytest.mark.parametrize("name", ["deepseek_v4", "mimo"])
def test_mxfp4_as_wide(name: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """The same weights in the format that any scales fit, also where they are too far apart."""
    fixture, folder, _ = _written(name, rng, tmp_path)
    experts = load_experts(folder, fixture.layer, quantize=MXFP4_WIDE)
    assert experts.w13.format is experts.w2.format is MXFP4_WIDE
    gate, up, down = dequantize_experts(unpack_experts(experts))
    assert_bitwise(np.concatenate([gate, up], axis=1), _float32(fixture.w13))
    assert_bitwise(down, _float32(fixture.w2))


@pytest.mark.parametrize(
    ("devices", "axes"),
    [
        ((2,), {"expert_axis": "a"}),
        ((2,), {"tensor_axis": "a"}),
        pytest.param((4, 2), {"expert_axis": "a", "tensor_axis": "b"}, marks=pytest.mark.matrix),
        pytest.param((2, 2), {"tensor_axis": "b"}, marks=pytest.mark.matrix),
    ],
)
@pytest.mark.parametrize("name", ["deepseek_v41", "w4afp8", "kimi_k2", "deepseek_v3_fp8"])
def test_on_a_mesh(
    name: str,
    devices: tuple[int, ...],
    axes: dict[str, str],
    rng: np.random.Generator,
    tmp_path: Path,
) -> None:
    """Packed where they belong: the arrays are those of loading them whole and spreading them."""
    fixture, folder, options = _written(name, rng, tmp_path)
    mesh = jax.make_mesh(devices, ("a", "b")[: len(devices)])
    whole = load_experts(folder, fixture.layer, **options)
    expected = shard_experts(whole, mesh, **axes)
    actual = load_experts(folder, fixture.layer, mesh=mesh, **axes, **options)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.sharding == other.sharding
        assert_bitwise(one, other)


@pytest.mark.parametrize("name", [*checkpoints.FIXTURES, *checkpoints.FLOAT_FIXTURES])
def test_beside_the_experts(name: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """Routers, shared experts, latents and activation scales, and None where there is none."""
    fixture, folder, _ = _written(name, rng, tmp_path)
    router = load_router(folder, fixture.layer)
    assert_bitwise(router.weight, fixture.router.astype(jnp.bfloat16))
    assert router.bias is None
    for stored, expected in (
        (router.selection_bias, fixture.selection_bias),
        (router.table, fixture.table),
    ):
        assert (stored is None) == (expected is None)
        if stored is not None:
            np.testing.assert_array_equal(stored, expected)
    for loaded, parts in (
        (load_shared_expert(folder, fixture.layer), fixture.shared),
        (load_latent(folder, fixture.layer), fixture.latent),
    ):
        assert (loaded is None) == (parts is None)
        for one, other in zip(loaded or (), parts or (), strict=False):
            assert_bitwise(one, other.astype(np.float32).astype(jnp.bfloat16))
    assert load_act_scale(folder, fixture.layer) == fixture.act_scale


def test_configs(rng: np.random.Generator, tmp_path: Path) -> None:
    """What the families' keys are read as."""

    def config(name: str) -> Any:
        folder = tmp_path / name
        folder.mkdir()
        _, _, options = _written(name, rng, folder)
        return moe_config(folder, **options)

    v4 = config("deepseek_v4")
    assert (v4.scoring, v4.renormalize, v4.routed_scale) == ("sqrtsoftplus", True, 1.5)
    assert v4.activation == SwiGLU(limit=10.0) and v4.layers == (1,) and v4.top_k == 2
    v41 = config("deepseek_v41")
    assert (v41.num_experts, v41.hidden_size, v41.intermediate_size) == (12, 256, 288)
    r1 = config("w4afp8")
    assert (r1.scoring, r1.num_groups, r1.top_groups, r1.routed_scale) == ("sigmoid", 2, 1, 2.5)
    assert r1.activation == SwiGLU() and r1.layers == (3,)
    k3 = config("kimi_k3")
    assert k3.activation == SiTU(4.0, 25.0) and k3.hidden_size == 64 and k3.top_k == 2
    qwen = config("qwen3")
    assert (qwen.scoring, qwen.renormalize, qwen.num_groups) == ("softmax", True, 1)
    assert qwen.intermediate_size == 64 and qwen.format == MXFP4


# --- layers ---------------------------------------------------------------------------------------


def _routing(
    fixture: checkpoints.Fixture, config: Any, x: np.ndarray, token_ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and weights in float64, from the families' formulas."""
    logits = x @ fixture.router.T
    scores = {
        "softmax": np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True),
        "sigmoid": 1 / (1 + np.exp(-logits)),
        "sqrtsoftplus": np.sqrt(np.log1p(np.exp(logits))),
    }[config.scoring]
    selection = scores if fixture.selection_bias is None else scores + fixture.selection_bias
    if config.num_groups > 1:
        groups = selection.reshape(len(x), config.num_groups, -1)
        best = np.sort(groups, axis=-1)[..., -2:].sum(axis=-1)
        keep = np.argsort(-best, axis=-1)[:, : config.top_groups]
        mask = np.zeros(best.shape, bool)
        np.put_along_axis(mask, keep, True, axis=-1)
        selection = np.where(mask[..., None], groups, -np.inf).reshape(scores.shape)
    ids = np.argsort(-selection, axis=-1)[:, : fixture.top_k]
    if fixture.table is not None:
        ids = fixture.table[token_ids]
    weights = np.take_along_axis(scores, ids, axis=-1)
    return ids, weights / weights.sum(axis=-1, keepdims=True) * config.routed_scale


def _block(
    fixture: checkpoints.Fixture, config: Any, x: np.ndarray, token_ids: np.ndarray
) -> np.ndarray:
    """The whole MoE block in float64."""
    ids, weights = _routing(fixture, config, x, token_ids)
    seen = x if fixture.latent is None else x @ fixture.latent[0].T
    y = oracle.moe(seen, fixture.w13, fixture.w2, ids, weights, config.activation)
    if fixture.latent is not None:
        y = y / np.sqrt((y**2).mean(axis=-1, keepdims=True) + 1e-5) * fixture.latent[1]
        y = y @ fixture.latent[2].T
    if fixture.shared is not None:
        gate, up, down = fixture.shared
        y = y + oracle.gated(config.activation, x @ gate.T, x @ up.T) @ down.T
    return y


# Eleven experts over two devices, nine groups of I over two; one of each kind of block on one.
_BLOCKS = {
    ("deepseek_v4", None),
    ("deepseek_v4_hash", None),
    ("w4afp8", None),
    ("kimi_k3", None),
    ("qwen3", None),
    ("kimi_k2", "expert_axis"),
    ("deepseek_v41", "tensor_axis"),
}


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        pytest.param(name, axis, marks=() if (name, axis) in _BLOCKS else pytest.mark.matrix)
        for name in (*checkpoints.FIXTURES, *checkpoints.FLOAT_FIXTURES)
        for axis in (None, "expert_axis", "tensor_axis")
    ],
)
def test_block(name: str, axis: str | None, rng: np.random.Generator, tmp_path: Path) -> None:
    """``MoEBlock.from_pretrained`` against the block in float64, on one device and over two."""
    pytest.importorskip("flax", reason="the layer needs flax: pip install '.[flax]'")
    from flax import nnx

    from jax_w4moe.flax import MoEBlock

    fixture, folder, options = _written(name, rng, tmp_path)
    if options:  # what was rounded while loading is not the question here
        experts = load_experts(folder, fixture.layer, **options)
        gate, up, down = (np.asarray(w) for w in dequantize_experts(unpack_experts(experts)))
        fixture = dataclasses.replace(fixture, w13=np.concatenate([gate, up], axis=1), w2=down)
    config = moe_config(folder, **options)
    x = jnp.asarray(2 * rng.standard_normal((24, fixture.router.shape[1])), jnp.bfloat16)
    token_ids = rng.integers(0, 64, 24)
    expected = _block(fixture, config, np.asarray(x).astype(np.float64), token_ids)
    if axis is not None:
        options |= {axis: "axis", "mesh": jax.make_mesh((2,), ("axis",))}
    block = MoEBlock.from_pretrained(folder, fixture.layer, implementation="xla", **options)
    run = nnx.jit(lambda block, x, ids: block(x, token_ids=ids))
    for act_dtype, bound in ((jnp.float8_e4m3fn, FP8_RMS), (jnp.bfloat16, BF16_RMS)):
        block.routed.act_dtype = jnp.dtype(act_dtype)
        y = run(block, x, jnp.asarray(token_ids, jnp.int32))
        assert y.dtype == jnp.bfloat16
        assert relative_rms(y, expected) <= bound, act_dtype.__name__
