"""What the formats with a matrix per expert refuse, each with its sentence; and edge values."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("safetensors", reason="needs the extra: pip install 'jax_w4moe[checkpoint]'")

from jax_w4moe import MXFP4, dequantize_experts, unpack_experts
from jax_w4moe.checkpoint import load_act_scale, load_experts, load_router, moe_config
from jax_w4moe.checkpoint.files import CheckpointFiles
from tests.helpers import checkpoints
from tests.helpers.compare import assert_bitwise
from tests.helpers.oracle import dequantize_mxfp4

Fixture = checkpoints.Fixture
V4 = "layers.1.ffn.experts."
R1 = "model.layers.3.mlp.experts."
K2 = "model.layers.1.mlp.experts."


def _set(name: str, value: np.ndarray) -> Callable[[Fixture], object]:
    return lambda fixture: fixture.tensors.update({name: value})


def _drop(*parts: str) -> Callable[[Fixture], object]:
    """Without the tensors whose names hold one of these."""

    def change(fixture: Fixture) -> None:
        for name in [n for n in fixture.tensors if any(part in n for part in parts)]:
            del fixture.tensors[name]

    return change


def _config(**values: Any) -> Callable[[Fixture], object]:
    return lambda fixture: fixture.config.update(values)


def _fp8_experts(fixture: Fixture) -> None:
    for name, tensor in fixture.tensors.items():
        if "experts" in name and name.endswith(".weight"):
            shape = (tensor.shape[0], 2 * tensor.shape[1])
            fixture.tensors[name] = np.zeros(shape, ml_dtypes.float8_e4m3fn)


def _same_groups(size: int) -> Callable[[Fixture], None]:
    def change(fixture: Fixture) -> None:
        for name in [n for n in fixture.tensors if n.endswith("weight_scale")]:
            rows, groups = fixture.tensors[name].shape
            scales = np.ones((rows, max(groups * 32 // size, 1)), ml_dtypes.bfloat16)
            fixture.tensors[name] = scales

    return change


@pytest.mark.parametrize(
    ("make", "change", "error", "message"),
    [
        (
            checkpoints.deepseek_v4,
            _fp8_experts,
            ValueError,
            r"expert_dtype='fp4', but .*experts\.0\.w1\.weight is F8_E4M3; take config\.json",
        ),
        (
            checkpoints.glm_nvfp4,
            _set(K2 + "1.up_proj.weight_scale_2", np.zeros(96, np.float32)),
            ValueError,
            r"weight_scale_2 has shape \(96,\), need one number",
        ),
        (
            checkpoints.deepseek_v4,
            _drop("experts.2.w1"),
            ValueError,
            r"layer 1 has experts up to 3 but no layers\.1\.ffn\.experts\.2\.w1",
        ),
        (
            checkpoints.deepseek_v4,
            _drop("experts.3.w2.scale"),
            ValueError,
            r"holds no tensor layers\.1\.ffn\.experts\.3\.w2\.scale; the nearest",
        ),
        (
            checkpoints.deepseek_v4,
            _set(V4 + "3.w2.scale", np.zeros((256, 5), ml_dtypes.float8_e8m0fnu)),
            ValueError,
            r"experts\.3\.w2\.scale has shape \(256, 5\), need \(256, 4\) since",
        ),
        (
            checkpoints.deepseek_v4,
            _set(V4 + "2.w3.weight", np.zeros((128, 128), np.uint8)),
            TypeError,
            r"experts\.2\.w3\.weight has dtype U8, need I8 as in the DeepSeek-V4 FP4 layout",
        ),
        (
            checkpoints.kimi_k2,
            _set(K2 + "9.up_proj.weight_zero_point", np.zeros((8, 2), np.int32)),
            NotImplementedError,
            r"experts\.9\.up_proj\.weight_zero_point has zero points; .*symmetric=true",
        ),
        (
            checkpoints.kimi_k2,
            _set(K2 + "0.down_proj.weight_g_idx", np.zeros(64, np.int32)),
            NotImplementedError,
            r"weight_g_idx reorders the columns \(actorder=group\)",
        ),
        (
            checkpoints.kimi_k2,
            _same_groups(64),
            ValueError,
            r"a scale per 64 of K=128; the compressed-tensors INT4 layout has one per 32 or 128",
        ),
        (
            checkpoints.kimi_k2,
            _config(n_routed_experts=12),
            ValueError,
            r"n_routed_experts=12, but the tensors of .* have 11; take both from the same",
        ),
        (
            checkpoints.deepseek_v3_fp8,
            _config(quantization_config={"weight_block_size": [64, "a"]}),
            ValueError,
            r"weight_block_size=\[64, 'a'\], need \[rows, columns\]",
        ),
    ],
)
def test_before_data_is_read(
    make: Callable[[np.random.Generator], Fixture],
    change: Callable[[Fixture], object],
    error: type[Exception],
    message: str,
    rng: np.random.Generator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fixture = make(rng)
    change(fixture)
    fixture.write(tmp_path)
    monkeypatch.setattr(CheckpointFiles, "read", lambda *_: pytest.fail("data was read"))
    options = {"quantize": MXFP4} if make is checkpoints.deepseek_v3_fp8 else {}
    with pytest.raises(error, match=message):
        load_experts(tmp_path, fixture.layer, **options)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"model_type": "mixtral"}, NotImplementedError, "model_type='mixtral' is unknown here"),
        (
            {"scoring_func": "softmax"},
            NotImplementedError,
            "scoring_func='softmax', a 'deepseek_v4'",
        ),
        (
            {"hidden_act": "gelu"},
            NotImplementedError,
            "hidden_act='gelu', a 'deepseek_v4' is known",
        ),
        ({"num_experts_per_tok": 5}, ValueError, r"num_experts_per_tok=5 is not in 1\.\.4"),
        ({"routed_scaling_factor": "2"}, ValueError, "routed_scaling_factor='2', need a number"),
    ],
)
def test_configs(
    values: dict[str, Any],
    error: type[Exception],
    message: str,
    rng: np.random.Generator,
    tmp_path: Path,
) -> None:
    fixture = checkpoints.deepseek_v4(rng)
    fixture.config.update(values)
    with pytest.raises(error, match=message):
        moe_config(fixture.write(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _set(R1 + "2.w3.input_scale", np.array([0.5], np.float32)),
            r"experts\.2\.w1\.input_scale is .* and that of w3 0\.5, .* need at most 1e-05",
        ),
        (_drop("experts.2.w2.input_scale"), r"holds no tensor .*experts\.2\.w2\.input_scale"),
        (
            _set(R1 + "1.w2.input_scale", np.array([np.nan], np.float32)),
            r"experts\.1\.w2\.input_scale is nan, need a positive number",
        ),
        (
            _set(R1 + "1.w2.input_scale", np.zeros(3, np.float32)),
            r"experts\.1\.w2\.input_scale has shape \(3,\), need one number",
        ),
    ],
)
def test_activation_scales(
    change: Callable[[Fixture], object], message: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    fixture = checkpoints.w4afp8(rng)
    change(fixture)
    with pytest.raises(ValueError, match=message):
        load_act_scale(fixture.write(tmp_path), fixture.layer)


def test_without_activation_scales(rng: np.random.Generator, tmp_path: Path) -> None:
    fixture = checkpoints.w4afp8(rng, scales=False)
    assert load_act_scale(fixture.write(tmp_path), fixture.layer) is None


def test_activation_scales_in_bf16(rng: np.random.Generator, tmp_path: Path) -> None:
    fixture = checkpoints.w4afp8(rng)
    for name in [n for n in fixture.tensors if n.endswith("input_scale")]:
        fixture.tensors[name] = fixture.tensors[name].astype(ml_dtypes.bfloat16)
    scale = load_act_scale(fixture.write(tmp_path), fixture.layer)
    assert scale is not None and fixture.act_scale is not None
    assert scale.x_scale == float(ml_dtypes.bfloat16(fixture.act_scale.x_scale))


def test_tables(rng: np.random.Generator, tmp_path: Path) -> None:
    """I32 is read too; an expert that there is not is refused."""
    fixture = checkpoints.deepseek_v4_hash(rng, np.int32)
    np.testing.assert_array_equal(load_router(fixture.write(tmp_path), 0).table, fixture.table)
    fixture.tensors["layers.0.ffn.gate.tid2eid"][5, 1] = 4
    with pytest.raises(ValueError, match=r"tid2eid holds expert 4, need 0\.\.3"):
        load_router(fixture.write(tmp_path), 0)


@pytest.mark.parametrize(
    ("value", "message"),
    [(255, r"a scale is NaN \(E8M0 byte 255\)"), (133, "a spread over 14 binades")],
)
def test_scales_that_are_not_exact(
    value: int, message: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    """With the place in the whole expert, also where a device holds a part of it only."""
    fixture = checkpoints.deepseek_v41(rng)
    name = V4 + "10.w2."
    fixture.tensors[name + "scale"].view(np.uint8)[7, 4:6] = value, 118
    fixture.tensors[name + "weight"][7] |= 0x11
    fixture.write(tmp_path)
    mesh = jax.make_mesh((2,), ("axis",))
    for options in ({}, {"mesh": mesh, "tensor_axis": "axis"}):
        with pytest.raises(ValueError, match=message) as caught:
            load_experts(tmp_path, 1, **options)
        assert f"w2 from {tmp_path}" in str(caught.value) and f"{name}weight" in str(caught.value)
        assert "the first is in expert 10, row 7, k from 128" in str(caught.value)


def test_edge_values(rng: np.random.Generator, tmp_path: Path) -> None:
    """All 16 codes under scales from 2**-127 to 2**127, exact."""
    fixture = checkpoints.deepseek_v4(rng)
    codes = np.arange(2**14, dtype=np.int32).astype(np.uint8).reshape(128, 128)
    edges = np.array([0, 1, 113, 127, 141, 254], np.uint8)
    scales = np.repeat(edges[np.arange(128) % 6][:, None], 8, axis=1)
    fixture.tensors[V4 + "0.w3.weight"] = codes.view(np.int8)
    fixture.tensors[V4 + "0.w3.scale"] = scales.view(ml_dtypes.float8_e8m0fnu)
    experts = load_experts(fixture.write(tmp_path), 1)
    actual = np.asarray(dequantize_experts(unpack_experts(experts))[1])[0]
    expected = dequantize_mxfp4(codes, scales)
    with np.errstate(over="ignore"):  # 6 * 2**127 is beyond f32
        assert_bitwise(actual, expected.astype(np.float32))
