"""Checkpoints: what comes back from files, and what is left alone."""

import dataclasses
import shutil
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("safetensors", reason="needs the extra: pip install 'jax_w4moe[checkpoint]'")

from safetensors.numpy import load_file

from jax_w4moe import MXFP4, SwiGLU, pack_experts, unpack_experts
from jax_w4moe.checkpoint import (
    MoEConfig,
    load_experts,
    load_router,
    moe_config,
    save_gpt_oss,
)
from jax_w4moe.checkpoint.files import CheckpointFiles
from jax_w4moe.checkpoint.loading import READERS
from jax_w4moe.types import ExpertWeights
from tests.checkpoint.common import EXPERTS, moe_layer, rewrite, set_config
from tests.helpers.compare import assert_bitwise

ODD = (11, 96, 32)  # expert 10 comes after 9; no size is a multiple of 128


# --- what comes back ------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(4, 64, 96), ODD, (3, 160, 288)])
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_round_trip(
    rng: np.random.Generator, tmp_path: Path, sizes: tuple[int, int, int], shards: int
) -> None:
    """Codes, scales, biases and routers come back bit for bit, from the right layer."""
    layers = [moe_layer(rng, *sizes) for _ in range(2)]
    save_gpt_oss(tmp_path, layers, top_k=2, shards=shards)
    assert (tmp_path / "model.safetensors").exists() == (shards == 1)
    for number, layer in enumerate(layers):
        packed = load_experts(tmp_path, number)
        assert jax.tree.structure(packed) == jax.tree.structure(pack_experts(layer.experts))
        assert packed.w13.shape == (sizes[0], 2 * sizes[2], sizes[1])
        assert packed.w2.shape == sizes
        canonical = unpack_experts(packed)
        for name in ("w13", "w2"):
            actual, written = getattr(canonical, name), getattr(layer.experts, name)
            assert_bitwise(actual.codes, written.codes)
            assert_bitwise(actual.scales, written.scales)
        assert_bitwise(canonical.w13_bias, layer.experts.w13_bias.astype(jnp.float32))
        assert_bitwise(canonical.w2_bias, layer.experts.w2_bias.astype(jnp.float32))
        weight, bias, _, _ = load_router(tmp_path, number)
        assert_bitwise(weight, layer.router_weight)
        assert_bitwise(bias, layer.router_bias)


def test_bytes_on_disk(rng: np.random.Generator, tmp_path: Path) -> None:
    """The layout of the format's table: row 2j is gate j, 2j + 1 up j; 16 bytes a group."""
    layer = moe_layer(rng, *ODD)
    save_gpt_oss(tmp_path, [layer], top_k=2, shards=1)
    tensors = load_file(tmp_path / "model.safetensors")
    num_experts, hidden, intermediate = ODD
    codes = np.asarray(layer.experts.w13.codes).reshape(num_experts, 2 * intermediate, -1, 16)
    blocks = tensors[EXPERTS + "gate_up_proj_blocks"]
    assert blocks.shape == (num_experts, 2 * intermediate, hidden // 32, 16)
    np.testing.assert_array_equal(blocks[:, 0::2], codes[:, :intermediate])
    np.testing.assert_array_equal(blocks[:, 1::2], codes[:, intermediate:])
    scales = np.asarray(layer.experts.w13.scales)
    stored = tensors[EXPERTS + "gate_up_proj_scales"]
    np.testing.assert_array_equal(stored[:, 1::2], scales[:, intermediate:])
    bias = np.asarray(layer.experts.w13_bias)
    np.testing.assert_array_equal(tensors[EXPERTS + "gate_up_proj_bias"][:, 0::2], bias[:, :32])
    assert tensors[EXPERTS + "down_proj_blocks"].shape == (num_experts, hidden, 1, 16)
    assert tensors["model.layers.0.mlp.router.weight"].dtype.name == "bfloat16"


def test_moe_config(sharded: Path) -> None:
    assert moe_config(sharded) == MoEConfig(
        hidden_size=64,
        intermediate_size=96,
        num_experts=4,
        top_k=2,
        layers=(0, 1, 2),
        activation=SwiGLU(alpha=1.702, beta=1.0, limit=7.0),
        scoring="topk_softmax",
        format=MXFP4,
    )
    set_config(sharded, swiglu_limit=10)
    assert moe_config(sharded).activation.limit == 10.0


def test_layers_are_numbers(rng: np.random.Generator, tmp_path: Path) -> None:
    """Layer 10 comes after layer 9, not after layer 1."""
    save_gpt_oss(tmp_path, [moe_layer(rng, 2, 32, 32) for _ in range(12)], top_k=1)
    assert moe_config(tmp_path).layers == tuple(range(12))


def test_file_without_config(one_file: Path) -> None:
    """A path to the file itself; load_experts needs no config.json."""
    (one_file / "config.json").unlink()
    file = one_file / "model.safetensors"
    assert load_experts(file, 0).num_experts == 4
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist and top_k is stored"):
        moe_config(file)


def test_router_without_bias(one_file: Path) -> None:
    rewrite(one_file, lambda tensors: tensors.pop("model.layers.0.mlp.router.bias"))
    weight, bias, _, _ = load_router(one_file, 0)
    assert weight.shape == (4, 64) and bias is None


def test_float4_codes_and_no_biases(rng: np.random.Generator, tmp_path: Path) -> None:
    """The writer takes every canonical form; missing biases become zeros."""
    layer = moe_layer(rng)
    weights = layer.experts

    def as_float4(q):
        codes = jax.lax.bitcast_convert_type(q.codes, jnp.float4_e2m1fn)
        scales = jax.lax.bitcast_convert_type(q.scales, jnp.float8_e8m0fnu)
        return dataclasses.replace(q, codes=codes.reshape(*q.codes.shape[:2], -1), scales=scales)

    unusual = ExpertWeights(as_float4(weights.w13), as_float4(weights.w2))
    save_gpt_oss(tmp_path, [(unusual, layer.router_weight, layer.router_bias)], top_k=1)
    loaded = unpack_experts(load_experts(tmp_path, 0))
    assert_bitwise(loaded.w13.codes, weights.w13.codes)
    assert_bitwise(loaded.w2.scales, weights.w2.scales)
    assert not loaded.w13_bias.any() and not loaded.w2_bias.any()


def test_moved_checkpoint(sharded: Path, tmp_path: Path) -> None:
    """An index names files beside it, wherever the folder is; a relative path works too."""
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in [*sharded.glob("*.safetensors"), *sharded.glob("*.json")]:
        shutil.move(file, moved)
    assert moe_config(str(moved)).layers == (0, 1, 2)


# --- what is left alone ---------------------------------------------------------------------------


def test_only_needed_shards(sharded: Path) -> None:
    """Shards of other layers may be broken or missing; those of this layer are opened."""
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) == 3
    shards[0].unlink()
    shards[2].write_bytes(b"nothing that can be opened")
    assert load_experts(sharded, 1).num_experts == 4
    assert load_router(sharded, 1)[0].shape == (4, 64)
    with pytest.raises(FileNotFoundError, match=r"index\.json names model-00001-of-00003"):
        load_experts(sharded, 0)
    with pytest.raises(ValueError, match=r"00003-of-00003\.safetensors is truncated"):
        load_experts(sharded, 2)


def test_opened_files(sharded: Path) -> None:
    with CheckpointFiles(sharded) as files:
        assert len(files.names) == 24 and not files.opened
        info = files.info("model.layers.2.mlp.router.bias")
        assert (info.dtype, info.shape) == ("BF16", (4,))
        assert files.opened == {sharded / "model-00003-of-00003.safetensors"}


def test_host_memory(rng: np.random.Generator, tmp_path: Path) -> None:
    """The host holds the experts that are read ahead and those that wait to be packed."""
    num_experts, hidden, intermediate = 24, 512, 512
    layer = moe_layer(rng, num_experts, hidden, intermediate)
    save_gpt_oss(tmp_path, [layer], top_k=2)
    load_experts(tmp_path, 0)  # compiles; tracers and programs are not what is measured
    one_expert = 3 * hidden * intermediate * 17 // 32
    tracemalloc.start()
    try:
        load_experts(tmp_path, 0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    bound = (2 * READERS + 2) * one_expert + 2**18
    assert bound < num_experts * one_expert
    assert one_expert / 2 < peak < bound, f"{peak} bytes, {one_expert} an expert"


def test_progress(one_file: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_experts(one_file, 0, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_checked_before_data_is_read(one_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last tensor of the layer is wrong: nothing may have been read by then."""
    rewrite(
        one_file,
        lambda tensors: tensors.update({EXPERTS + "down_proj_bias": np.zeros((4, 64), np.float32)}),
    )
    monkeypatch.setattr(
        CheckpointFiles, "read", lambda *_: pytest.fail("data was read before the check")
    )
    with pytest.raises(TypeError, match="down_proj_bias has dtype F32, need BF16"):
        load_experts(one_file, 0)
