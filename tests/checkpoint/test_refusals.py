"""Checkpoints that are refused, each with the sentence that says why."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("safetensors", reason="needs the extra: pip install 'jax_w4moe[checkpoint]'")

from safetensors.numpy import save_file

from jax_w4moe import MXFP4, MXFP4_WIDE
from jax_w4moe.checkpoint import (
    load_experts,
    load_router,
    loading,
    moe_config,
    save_gpt_oss,
)
from jax_w4moe.checkpoint.files import CheckpointFiles
from tests.checkpoint.common import EXPERTS, moe_layer, rewrite, set_config

# --- what is refused ------------------------------------------------------------------------------


def test_axes(one_file: Path) -> None:
    with pytest.raises(ValueError, match="expert_axis='x', tensor_axis=None without mesh; pass"):
        load_experts(one_file, 0, expert_axis="x")
    with pytest.raises(ValueError, match="tensor_axis='y' is not an axis of the mesh"):
        load_experts(one_file, 0, mesh=jax.make_mesh((1,), ("x",)), tensor_axis="y")


def test_quantize_of_4_bits(one_file: Path) -> None:
    with pytest.raises(ValueError, match=r"quantize=MXFP4, but .* in 4 bits .*leave quantize out"):
        load_experts(one_file, 0, quantize=MXFP4)


def test_too_little_memory(one_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed from headers: nothing is read."""
    monkeypatch.setattr(loading, "free_bytes", lambda device: 2**16)
    monkeypatch.setattr(CheckpointFiles, "read", lambda *_: pytest.fail("data was read"))
    with pytest.raises(MemoryError, match=r"layer 0: \d+ bytes are needed on .*, 65536 are free"):
        load_experts(one_file, 0)


def test_paths(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"'openai/gpt' does not exist; .* downloaded first"
    ):
        load_experts("openai/gpt", 0)
    with pytest.raises(FileNotFoundError, match=r"holds neither .* \(it holds nothing\)"):
        load_experts(tmp_path, 0)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"it holds pytorch_model\.bin"):
        load_experts(tmp_path, 0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-7],  # broken off in the data
        lambda data: data[:100],  # in the header
        lambda data: b"",
        lambda data: data.replace(b"[4,64]", b"[4,65]"),  # a header that lies
        lambda data: data + b"\0",
    ],
)
def test_damaged_file(one_file: Path, damage: Callable[[bytes], bytes]) -> None:
    file = one_file / "model.safetensors"
    data = damage(file.read_bytes())
    file.write_bytes(data)
    message = rf"model\.safetensors is truncated or not .* \({len(data)} bytes: .*download it again"
    with pytest.raises(ValueError, match=message):
        load_experts(one_file, 0)


def test_lfs_pointer(one_file: Path) -> None:
    (one_file / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"is a Git LFS pointer, .* run git lfs pull"):
        load_experts(one_file, 0)


def test_index_that_does_not_fit_its_shards(sharded: Path) -> None:
    name = EXPERTS + "down_proj_bias"
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"][name] = "model-00002-of-00003.safetensors"
    file.write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=rf"says that {name} is in model-00002.*download both again"
    ):
        load_experts(sharded, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a JSON list, need an object"),
        ("{}", "has no weight_map"),
        (
            '{"weight_map": {"a": "../b.safetensors"}}',
            "maps a to '../b.safetensors', need the name",
        ),
        ('{"weight_map": {"a": 1}}', "maps a to 1, need the name"),
    ],
)
def test_damaged_index(sharded: Path, content: str, message: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_experts(sharded, 0)


def test_layer_numbers(sharded: Path) -> None:
    with pytest.raises(ValueError, match=r"layer=3 is no MoE layer of .* 3 of them, 0 to 2"):
        load_experts(sharded, 3)
    with pytest.raises(TypeError, match=r"layer='0' is a str, need an int"):
        load_router(sharded, "0")


@pytest.mark.parametrize("part", ["scales", "bias"])
def test_missing_tensor(one_file: Path, part: str) -> None:
    name = f"{EXPERTS}down_proj_{part}"
    rewrite(one_file, lambda tensors: tensors.pop(name))
    with pytest.raises(
        ValueError, match=rf"holds no tensor {name}; the nearest .*down_proj_blocks"
    ):
        load_experts(one_file, 0)


def test_missing_router(one_file: Path) -> None:
    rewrite(one_file, lambda tensors: tensors.pop("model.layers.0.mlp.router.weight"))
    with pytest.raises(
        ValueError, match=r"no tensor model\.layers\.0\.mlp\.router\.weight; .*bias"
    ):
        load_router(one_file, 0)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("gate_up_proj_blocks", np.zeros((4, 192, 2, 16), np.int8), TypeError, "dtype I8, need U8"),
        ("down_proj_scales", np.zeros((4, 64, 3), np.float32), TypeError, "dtype F32, need U8"),
        ("gate_up_proj_bias", np.zeros((4, 192), np.float16), TypeError, "dtype F16, need BF16"),
        ("gate_up_proj_blocks", np.zeros((4, 192, 32), np.uint8), ValueError, "need [E, 2I, H/32"),
        (
            "gate_up_proj_blocks",
            np.zeros((4, 192, 2, 8), np.uint8),
            ValueError,
            "need [E, 2I, H/32",
        ),
        (
            "gate_up_proj_blocks",
            np.zeros((0, 192, 2, 16), np.uint8),
            ValueError,
            "no axis of size 0",
        ),
        ("gate_up_proj_blocks", np.zeros((4, 96, 2, 16), np.uint8), ValueError, "96 rows, need 2I"),
        ("gate_up_proj_scales", np.zeros((4, 192, 3), np.uint8), ValueError, "need (4, 192, 2)"),
        ("down_proj_blocks", np.zeros((3, 64, 3, 16), np.uint8), ValueError, "need (4, 64, 3, 16)"),
        ("down_proj_blocks", np.zeros((4, 64, 2, 16), np.uint8), ValueError, "need (4, 64, 3, 16)"),
        ("down_proj_scales", np.zeros((4, 32, 3), np.uint8), ValueError, "need (4, 64, 3)"),
    ],
)
def test_tensors_that_do_not_fit(
    one_file: Path, name: str, value: np.ndarray, error: type[Exception], message: str
) -> None:
    rewrite(one_file, lambda tensors: tensors.update({EXPERTS + name: value}))
    with pytest.raises(error) as caught:
        load_experts(one_file, 0)
    assert message in str(caught.value) and EXPERTS + name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("weight", np.zeros((4, 32), np.float32), ValueError, "need (4, 64) since"),
        ("weight", np.zeros((4, 64), np.int8), TypeError, "dtype I8, need BF16 or F16 or F32"),
        ("bias", np.zeros((5,), np.float32), ValueError, "need (4,) since"),
    ],
)
def test_routers_that_do_not_fit(
    one_file: Path, name: str, value: np.ndarray, error: type[Exception], message: str
) -> None:
    key = f"model.layers.0.mlp.router.{name}"
    rewrite(one_file, lambda tensors: tensors.update({key: value}))
    with pytest.raises(error) as caught:
        load_router(one_file, 0)
    assert message in str(caught.value) and key in str(caught.value)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"hidden_size": 128}, ValueError, "hidden_size=128, but the tensors of"),
        ({"intermediate_size": 64}, ValueError, "intermediate_size=64, but the tensors of"),
        ({"num_local_experts": 8}, ValueError, "num_local_experts=8, but the tensors of"),
        ({"model_type": "minimax_m3"}, NotImplementedError, "model_type='minimax_m3'"),
        ({"num_experts_per_tok": 5}, ValueError, r"num_experts_per_tok=5 is not in 1\.\.4"),
        ({"num_experts_per_tok": None}, ValueError, "num_experts_per_tok=None, need a number"),
        ({"num_experts_per_tok": 2.5}, ValueError, r"num_experts_per_tok=2\.5 is not in"),
        ({"swiglu_limit": "7"}, ValueError, "swiglu_limit='7', need a number"),
    ],
)
def test_config_that_does_not_fit(
    one_file: Path, values: dict[str, object], error: type[Exception], message: str
) -> None:
    set_config(one_file, **values)
    with pytest.raises(error, match=message):
        moe_config(one_file)
    if "tensors" in message:
        with pytest.raises(error, match=message):
            load_experts(one_file, 0)


def test_damaged_config(one_file: Path) -> None:
    (one_file / "config.json").write_text("<html>")
    with pytest.raises(ValueError, match=r"config\.json is not JSON \(.*\); download it again"):
        load_experts(one_file, 0)


def test_other_formats(tmp_path: Path) -> None:
    """A dequantised checkpoint, and one without experts."""
    file = tmp_path / "model.safetensors"
    save_file({EXPERTS + "gate_up_proj": np.zeros((2, 64, 64), np.float32)}, file)
    message = (
        r"formats? .*\(packed by jax_w4moe, .*gpt-oss MXFP4.*\) among 1 tensors, experts are stored"
        r" as .*gate_up_proj"
    )
    with pytest.raises(NotImplementedError, match=message):
        load_experts(tmp_path, 0)
    save_file({"lm_head.weight": np.zeros((2, 2), np.float32)}, file)
    with pytest.raises(NotImplementedError, match="no tensor's name holds 'expert'"):
        moe_config(tmp_path)


@pytest.mark.parametrize("expert", [0, 9, 10])
@pytest.mark.parametrize("projection", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize(
    ("scales", "message"),
    [([255], r"a scale is NaN \(E8M0 byte 255\)"), ([110, 125], "a spread over 14 binades")],
)
def test_inexact_scales(
    rng: np.random.Generator,
    tmp_path: Path,
    expert: int,
    projection: str,
    scales: list[int],
    message: str,
) -> None:
    """Byte 255 and a spread of 15 name the file, the tensor and the expert's true number."""
    save_gpt_oss(tmp_path, [moe_layer(rng, 11, 96, 96)], top_k=2, shards=1)

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{EXPERTS}{projection}_scales"][expert, 4, : len(scales)] = scales
        tensors[f"{EXPERTS}{projection}_blocks"][expert, 4] |= 0x11

    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        load_experts(tmp_path, 0)
    text = str(caught.value)
    file, name = tmp_path / "model.safetensors", "w13" if "gate" in projection else "w2"
    assert f"layer 0 (w13 from {file}: {EXPERTS}gate_up_proj_blocks, gate rows first;" in text
    assert f"w2 from {file}: {EXPERTS}down_proj_blocks): {name}: " in text
    row = 2 if projection == "gate_up_proj" else 4
    assert f"the first is in expert {expert}, row {row}, k from 0" in text
    if 255 in scales:
        with pytest.raises(ValueError, match=message):
            load_experts(tmp_path, 0, quantize=MXFP4_WIDE)
    else:
        assert load_experts(tmp_path, 0, quantize=MXFP4_WIDE).w2.format is MXFP4_WIDE


# --- what the writer refuses ----------------------------------------------------------------------


def test_writer_refuses(rng: np.random.Generator, tmp_path: Path) -> None:
    layer = moe_layer(rng)
    with pytest.raises(ValueError, match="layers: got none"):
        save_gpt_oss(tmp_path, [], top_k=1)
    with pytest.raises(ValueError, match=r"top_k=5 is not in 1\.\.4"):
        save_gpt_oss(tmp_path, [layer], top_k=5)
    with pytest.raises(ValueError, match=r"shards=9 is not in 1\.\.8"):
        save_gpt_oss(tmp_path, [layer], top_k=1, shards=9)
    with pytest.raises(ValueError, match="layer 1: w13 codes have shape"):
        save_gpt_oss(tmp_path, [layer, moe_layer(rng, 4, 96, 96)], top_k=1)
    with pytest.raises(ValueError, match=r"layer 0: router_bias has shape \(4, 64\), need \(4,\)"):
        save_gpt_oss(tmp_path, [layer._replace(router_bias=layer.router_weight)], top_k=1)
    weights = layer.experts
    nan = dataclasses.replace(weights.w2, scales=weights.w2.scales.at[0, 0, 0].set(255))
    with pytest.raises(ValueError, match=r"down_proj_scales: a scale is NaN"):
        save_gpt_oss(
            tmp_path, [layer._replace(experts=dataclasses.replace(weights, w2=nan))], top_k=1
        )
    assert not list(tmp_path.iterdir())
    save_gpt_oss(tmp_path, [layer], top_k=1)
    with pytest.raises(FileExistsError, match="holds a checkpoint already"):
        save_gpt_oss(tmp_path, [layer], top_k=1)
