"""Conversion to packed experts: nothing changes, nothing is lost, and it can be killed."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("safetensors", reason="needs the extra: pip install 'jax_w4moe[checkpoint]'")

from safetensors.numpy import load_file, save_file

from jax_w4moe import INT4_G32, MXFP4, shard_experts
from jax_w4moe.checkpoint import (
    convert,
    load_act_scale,
    load_experts,
    load_latent,
    load_router,
    load_shared_expert,
    moe_config,
    save_gpt_oss,
)
from jax_w4moe.checkpoint.files import CheckpointFiles
from jax_w4moe.cli import app
from tests.checkpoint.common import moe_layer
from tests.helpers import checkpoints
from tests.helpers.compare import assert_bitwise

ORIGINAL = {
    "model.layers.0.mlp.": "block.0.mlp.",
    "experts.gate_up_proj_blocks": "mlp1_weight.blocks",
    "experts.gate_up_proj_scales": "mlp1_weight.scales",
    "experts.gate_up_proj_bias": "mlp1_bias",
    "experts.down_proj_blocks": "mlp2_weight.blocks",
    "experts.down_proj_scales": "mlp2_weight.scales",
    "experts.down_proj_bias": "mlp2_bias",
    "router.": "gate.",
}


def _same(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(assert_bitwise, actual, expected)


def _original(folder: Path) -> None:
    """Renames the tensors and settings of a one-layer gpt-oss checkpoint to OpenAI's own."""
    file = folder / "model.safetensors"
    renamed = {}
    for name, tensor in load_file(file).items():
        for old, new in ORIGINAL.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    save_file(renamed, file)
    config = json.loads((folder / "config.json").read_text())
    kept = {key: config[key] for key in ("hidden_size", "intermediate_size", "swiglu_limit")}
    own = {"num_experts": 4, "experts_per_token": 2}
    (folder / "config.json").write_text(json.dumps(kept | own))


def test_original_names(rng: np.random.Generator, tmp_path: Path) -> None:
    """gpt-oss under OpenAI's names is gpt-oss."""
    layer = moe_layer(rng)
    for name in ("hugging_face", "original"):
        save_gpt_oss(tmp_path / name, [layer], top_k=2, shards=1)
    _original(tmp_path / "original")
    folders = tmp_path / "original", tmp_path / "hugging_face"
    for load in (load_experts, load_router):
        _same(*(load(folder, 0) for folder in folders))
    assert moe_config(folders[0]) == moe_config(folders[1])


@pytest.mark.parametrize("name", ["gpt_oss", "original", *checkpoints.FIXTURES])
def test_same_as_the_source(name: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """Experts bit for bit, whatever lies beside them, and the config."""
    source, destination = tmp_path / "source", tmp_path / "destination"
    source.mkdir()
    layer = 0
    if name in checkpoints.FIXTURES:
        fixture = checkpoints.FIXTURES[name](rng)
        layer = fixture.layer
        fixture.write(source)
    else:
        save_gpt_oss(source, [moe_layer(rng)], top_k=2, shards=1)
        if name == "original":
            _original(source)
    (source / "tokenizer.json").write_text("{}")
    convert(source, destination)
    for load in (load_experts, load_router, load_shared_expert, load_latent):
        _same(load(destination, layer), load(source, layer))
    assert load_act_scale(destination, layer) == load_act_scale(source, layer)
    assert moe_config(destination) == moe_config(source)
    assert (destination / "tokenizer.json").read_text() == "{}"
    with CheckpointFiles(source) as old, CheckpointFiles(destination) as new:
        kept = [n for n in new.names if not n.endswith(("experts.w13", "experts.w2", "_bias"))]
        assert kept and all(n in old.names for n in kept)
        for tensor in kept:
            assert_bitwise(new.read(tensor), old.read(tensor))


@pytest.mark.parametrize("axes", [{"expert_axis": "a"}, {"tensor_axis": "a"}])
def test_on_a_mesh(axes: dict[str, str], rng: np.random.Generator, tmp_path: Path) -> None:
    """The file holds no mesh; any one can be loaded onto."""
    source, destination = tmp_path / "source", tmp_path / "destination"
    save_gpt_oss(source, [moe_layer(rng, 5, 64, 288)], top_k=2)
    convert(source, destination)
    mesh = jax.make_mesh((2,), ("a",))
    actual = load_experts(destination, 0, mesh=mesh, **axes)
    _same(actual, shard_experts(load_experts(source, 0), mesh, **axes))


def test_quantized(rng: np.random.Generator, tmp_path: Path) -> None:
    fixture = checkpoints.qwen3(rng)
    source, destination = tmp_path / "source", tmp_path / "destination"
    source.mkdir()
    fixture.write(source)
    with pytest.raises(ValueError, match="not 4 bits; pass quantize=MXFP4"):
        convert(source, destination)
    assert not destination.exists()
    result = CliRunner().invoke(
        app, ["convert", str(source), str(destination), "--quantize", "int4_g32"]
    )
    assert result.exit_code == 0 and "GB written in" in result.output
    _same(load_experts(destination, 1), load_experts(source, 1, quantize=INT4_G32))
    assert moe_config(destination) == moe_config(source, quantize=INT4_G32)


# --- what it refuses ------------------------------------------------------------------------------


def test_refusals(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, other, destination = (tmp_path / name for name in ("source", "other", "destination"))
    save_gpt_oss(source, [moe_layer(rng)], top_k=2)
    save_gpt_oss(other, [moe_layer(rng, 5)], top_k=2)
    with pytest.raises(ValueError, match=r"quantize=MXFP4, but .* leave quantize out"):
        convert(source, destination, quantize=MXFP4)
    with monkeypatch.context() as patch:
        usage = shutil._ntuple_diskusage(10, 0, 10)  # type: ignore[attr-defined]
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(OSError, match=r"\d+ bytes are to be written, 10 are free"):
            convert(source, tmp_path / "full")
    convert(source, destination)
    with pytest.raises(FileExistsError, match="is of another conversion"):
        convert(other, destination)
    with pytest.raises(FileExistsError, match="is not empty; pass an empty or a missing folder"):
        convert(other, source)
    with pytest.raises(ValueError, match="is packed already"):
        convert(destination, tmp_path / "again")
    result = CliRunner().invoke(app, ["convert", str(source), str(other), "--quantize", "fp8"])
    assert result.exit_code == 1 and "--quantize='fp8' is unknown" in result.output


def test_another_layout_version(rng: np.random.Generator, tmp_path: Path) -> None:
    source, destination = tmp_path / "source", tmp_path / "destination"
    save_gpt_oss(source, [moe_layer(rng)], top_k=2)
    convert(source, destination)
    file = destination / "experts-00000.safetensors"
    content = file.read_bytes()
    key = rb"{\"layout_version\": 1,"
    assert key in content
    file.write_bytes(content.replace(key, key.replace(b"1", b"7")))
    with pytest.raises(ValueError, match="packed with layout version 7, this library reads"):
        load_experts(destination, 0)
    save_file(load_file(file), file)
    with pytest.raises(ValueError, match="has no metadata 'jax_w4moe' beside it"):
        load_experts(destination, 0)


def test_files_appear_whole(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every one of them by being renamed."""
    source, destination = tmp_path / "source", tmp_path / "destination"
    save_gpt_oss(source, [moe_layer(rng)], top_k=2)
    renamed, replace = [], os.replace

    def spy(old: Path, new: Path) -> None:
        renamed.append(new)
        replace(old, new)

    monkeypatch.setattr(os, "replace", spy)
    convert(source, destination)
    assert sorted(renamed) == sorted(destination.iterdir())


# --- killed ---------------------------------------------------------------------------------------

EVENT_S = 0.005  # that a conversion pauses where it may be killed


def _convert(source: Path, destination: Path, events: Any) -> None:
    """Converts, and says when a file begins to be written and when it is to get its name."""
    # It may read what others have compiled, but not leave a half-written entry when it is killed.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    module: Any = sys.modules["jax_w4moe.checkpoint.convert"]

    def announced(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> None:
            events.send(function.__name__)
            time.sleep(EVENT_S)
            function(*arguments, **options)

        return call

    module.save_file, module._publish = announced(module.save_file), announced(module._publish)
    convert(source, destination)


def test_killed_ten_times(rng: np.random.Generator, tmp_path: Path) -> None:
    """kill -9 at ten random moments, then on: the bytes are those of a run that was left alone."""
    source, destination, whole = (tmp_path / name for name in ("source", "destination", "whole"))
    save_gpt_oss(source, [moe_layer(rng, 2, 64, 64) for _ in range(40)], top_k=2, shards=5)
    convert(source, whole)
    # Its server has imported everything, so that a conversion starts at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jax_w4moe.checkpoint"])
    moments = random.Random(0)
    kept, partial = 0, 0
    for number in range(10):
        own, events = context.Pipe(duplex=False)
        process = context.Process(target=_convert, args=(source, destination, events))
        process.start()
        for _ in range(moments.randint(1, 5)):
            assert own.poll(60), "the conversion has stopped"
            own.recv()
        time.sleep(moments.uniform(0, 2 * EVENT_S))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"it was over before kill {number}"
        partial += len(list(destination.glob(".partial/*")))
        before, kept = kept, len(list(destination.glob("*.safetensors")))
        assert before <= kept < len(list(whole.glob("*.safetensors")))
        assert not (destination / "model.safetensors.index.json").exists()
    assert kept > 5 and partial > 0, f"{kept} whole files, {partial} times one that was not"
    convert(source, destination)
    names = sorted(file.name for file in whole.iterdir())
    assert names == sorted(file.name for file in destination.iterdir())
    for name in names:
        assert (whole / name).read_bytes() == (destination / name).read_bytes(), name
