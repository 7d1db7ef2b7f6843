"""Other on-disk formats against transformers, which loads and dequantises our files by itself."""
# ruff: noqa: E402 - without the judge's packages the rest need not be imported

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the judge needs torch: pip install '.[judge]'")
transformers = pytest.importorskip(
    "transformers", reason="the judge needs transformers: pip install '.[judge]'"
)
for package in ("accelerate", "compressed_tensors"):
    pytest.importorskip(package, reason=f"the judge needs {package}: pip install '.[judge]'")

from jax_w4moe import MXFP4, dequantize_experts, unpack_experts
from jax_w4moe.checkpoint import load_experts
from jax_w4moe.flax import MoEBlock
from tests.helpers import checkpoints
from tests.helpers.compare import EXACT_RMS, MIRRORED_RMS, assert_bitwise, relative_rms

pytestmark = pytest.mark.judge

T, VOCABULARY = 24, 64
BF16_RMS = 5e-3

_V4_MODEL = {
    "vocab_size": VOCABULARY,
    "num_attention_heads": 4,
    "head_dim": 16,
    "q_lora_rank": 16,
    "layer_types": ["sliding_attention"] * 2,
    "mlp_layer_types": ["hash_moe", "moe"],
    "num_hidden_layers": 2,
}
_V3_MODEL = {
    "vocab_size": VOCABULARY,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "num_hidden_layers": 2,
}
_PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 32,
            },
        }
    },
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    ],
}


def _with(fixture: checkpoints.Fixture, **config: Any) -> checkpoints.Fixture:
    return dataclasses.replace(fixture, config=fixture.config | config)


def _deepseek_v4(fixture: checkpoints.Fixture) -> checkpoints.Fixture:
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
        "dequantize": True,
    }
    return _with(fixture, quantization_config=quantization, **_V4_MODEL)


def _case(name: str, rng: np.random.Generator) -> tuple[checkpoints.Fixture, Any]:
    """A fixture with all that transformers needs in its config, and the model's class."""
    if name == "deepseek_v4":
        return _deepseek_v4(checkpoints.deepseek_v4(rng)), transformers.DeepseekV4ForCausalLM
    if name == "deepseek_v4_hash":
        return _deepseek_v4(checkpoints.deepseek_v4_hash(rng)), transformers.DeepseekV4ForCausalLM
    if name == "kimi_k2":
        made = _with(checkpoints.kimi_k2(rng), quantization_config=_PACKED, **_V3_MODEL)
        return _with(made, model_type="deepseek_v3"), transformers.DeepseekV3ForCausalLM
    qwen = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = {**qwen, "num_key_value_heads": 2, "head_dim": 16}
    return _with(checkpoints.qwen3(rng), **model), transformers.Qwen3MoeForCausalLM


@pytest.mark.parametrize("name", ["deepseek_v4", "deepseek_v4_hash", "kimi_k2", "qwen3"])
def test_layer(name: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """Weights bit for bit, and the whole block's output in three precisions."""
    fixture, model_class = _case(name, rng)
    fixture.write(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not ours
        model, info = model_class.from_pretrained(
            tmp_path,
            dtype=torch.float32 if name == "qwen3" else torch.bfloat16,
            experts_implementation="eager",
            output_loading_info=True,
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = [key for key in info[kind] if f"layers.{fixture.layer}.mlp" in str(key)]
        assert not keys, f"{kind}: {keys}"
    mlp = model.model.layers[fixture.layer].mlp.float()
    gate_up, down = (
        weights.detach().numpy() for weights in (mlp.experts.gate_up_proj, mlp.experts.down_proj)
    )
    options: dict[str, Any] = {}
    if name == "qwen3":  # its experts are rounded to 4 bits here: so are the judge's
        options["quantize"] = MXFP4
    experts = load_experts(tmp_path, fixture.layer, **options)
    w_gate, w_up, w_down = dequantize_experts(unpack_experts(experts))
    ours = np.concatenate([w_gate, w_up], axis=1)
    if name == "qwen3":
        mlp.experts.gate_up_proj.data = torch.from_numpy(ours.copy())
        mlp.experts.down_proj.data = torch.from_numpy(np.array(w_down))
    else:
        dtype = jnp.bfloat16 if name == "kimi_k2" else jnp.float32  # code * scale has 12 bits
        assert_bitwise(ours.astype(dtype).astype(np.float32), gate_up)
        assert_bitwise(np.asarray(w_down).astype(dtype).astype(np.float32), down)
    _compare(mlp, fixture, tmp_path, rng, options)


def test_w4afp8(rng: np.random.Generator, tmp_path: Path) -> None:
    """transformers does not read this format: its block is given what the stored bytes mean."""
    fixture = checkpoints.w4afp8(rng)
    fixture.write(tmp_path)
    config = transformers.DeepseekV3Config(**_V3_MODEL | fixture.config)
    config._experts_implementation = "eager"
    block = transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3MoE(config)
    for parameter, values in (
        (block.experts.gate_up_proj, fixture.w13),
        (block.experts.down_proj, fixture.w2),
        (block.gate.weight, fixture.router),
        (block.gate.e_score_correction_bias, fixture.selection_bias),
        (block.shared_experts.gate_proj.weight, fixture.shared[0]),
        (block.shared_experts.up_proj.weight, fixture.shared[1]),
        (block.shared_experts.down_proj.weight, fixture.shared[2]),
    ):
        assert parameter.shape == values.shape
        parameter.data = torch.from_numpy(values.astype(np.float32))
    _compare(block, fixture, tmp_path, rng, {})


def _compare(
    mlp: Any,
    fixture: checkpoints.Fixture,
    folder: Path,
    rng: np.random.Generator,
    options: dict[str, Any],
) -> None:
    """The output of transformers' block and of ours, in three precisions."""
    x = jnp.asarray(2 * rng.standard_normal((T, fixture.router.shape[1])), jnp.bfloat16)
    token_ids = rng.integers(0, VOCABULARY, T)
    arguments = [torch.from_numpy(np.asarray(x).astype(np.float32))[None]]
    if "v4" in fixture.config["model_type"]:
        arguments.append(torch.from_numpy(token_ids)[None])
    with torch.no_grad():
        result = mlp(*arguments)
    expected = (result[0] if isinstance(result, tuple) else result).numpy().reshape(T, -1)
    block = MoEBlock.from_pretrained(folder, fixture.layer, implementation="xla", **options)
    for act_dtype, bound in (
        (jnp.float32, EXACT_RMS),
        (jnp.bfloat16, BF16_RMS),
        (jnp.float8_e4m3fn, MIRRORED_RMS),
    ):
        block.routed.act_dtype = jnp.dtype(act_dtype)
        y = block(x, token_ids=jnp.asarray(token_ids, jnp.int32))
        assert relative_rms(y, expected) <= bound, act_dtype.__name__
