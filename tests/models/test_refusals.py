"""Settings, files and calls that a model refuses, in one sentence each and before data is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

nnx = pytest.importorskip("flax.nnx", reason="needs the extra [flax]")
pytest.importorskip("safetensors", reason="needs the extra [checkpoint]")

from safetensors.numpy import load_file  # noqa: E402

from jax_w4moe.checkpoint.files import CheckpointFiles  # noqa: E402
from jax_w4moe.models import (  # noqa: E402
    GptOss,
    GptOssConfig,
    loading,
    save_random_gpt_oss,
)
from jax_w4moe.models.cache import empty_cache  # noqa: E402
from tests.checkpoint.common import rewrite, set_config  # noqa: E402
from tests.helpers.compare import assert_bitwise  # noqa: E402
from tests.helpers.meshes import make_mesh  # noqa: E402
from tests.models.common import CONFIG, config  # noqa: E402

ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LAYER = "model.layers.1."


def test_config_there_and_back() -> None:
    assert GptOssConfig.from_dict(CONFIG.to_dict()) == CONFIG
    plain = config(yarn=None, eos_token_ids=(3, 5), pad_token_id=1, tie_word_embeddings=True)
    assert GptOssConfig.from_dict(json.loads(json.dumps(plain.to_dict()))) == plain


def test_config_without_what_has_a_default() -> None:
    """As transformers fills it in."""
    content = CONFIG.to_dict()
    for key in ("rope_scaling", "layer_types", "sliding_window", "rms_norm_eps", "rope_theta"):
        del content[key]
    found = GptOssConfig.from_dict(content)
    assert found.layer_types == ("sliding_attention", "full_attention")
    assert (found.sliding_window, found.rms_norm_eps, found.rope_theta) == (128, 1e-5, 150000.0)
    assert found.yarn is not None and found.yarn.factor == 32 and not found.yarn.truncate


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"head_dim": None}, "head_dim=None, need a positive integer"),
        ({"head_dim": 15}, "head_dim=15 is odd"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True"),
        ({"num_key_value_heads": 3}, "does not divide num_attention_heads=4"),
        ({"layer_types": ["full_attention"]}, "num_hidden_layers=2"),
        ({"layer_types": ["full_attention", "linear"]}, "sliding_attention or full_attention"),
        ({"sliding_window": None}, "sliding_window=None"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0, need a positive number"),
        ({"rope_scaling": {**ROPE, "rope_type": "llama3"}}, "rope_type='llama3'"),
        ({"rope_scaling": {**ROPE, "mscale": 0.7}}, "YaRN with mscale=0.7"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "original_max_position_embed"),
        ({"rope_scaling": {**ROPE, "factor": "4"}}, "factor='4', need a positive number"),
        ({"rope_scaling": {**ROPE, "truncate": 1}}, "truncate=1, need true or false"),
        ({"rope_parameters": ROPE}, "both rope_parameters and rope_scaling"),
    ],
)
def test_config(changes: dict[str, Any], match: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=match) as raised:
        GptOssConfig.from_dict({**CONFIG.to_dict(), **changes})
    assert str(raised.value).startswith("config.json: ") and str(raised.value).endswith(".")


def _drop(name: str) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda tensors: tensors.pop(name)


def _set(name: str, array: np.ndarray) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda tensors: tensors.__setitem__(name, array)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_drop("model.norm.weight"), "holds no tensor model.norm.weight"),
        (_drop(LAYER + "self_attn.q_proj.bias"), "holds no tensor .*q_proj.bias"),
        (_drop(LAYER + "self_attn.sinks"), "holds no tensor .*sinks"),
        (_drop(LAYER + "mlp.experts.down_proj_scales"), "holds no tensor .*down_proj_scales"),
        (_set(LAYER + "mlp.router.bias", np.zeros(4, np.float32)), r"router.bias has shape \(4,\)"),
        (_set("lm_head.weight", np.zeros((48, 64), np.int8)), "lm_head.weight has dtype I8"),
        (_set(LAYER + "self_attn.q_norm.weight", np.zeros(16, np.float32)), "is no tensor of a"),
    ],
)
def test_files(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, np.ndarray]], object],
    match: str,
) -> None:
    """Whatever is wrong anywhere, nothing is read."""
    save_random_gpt_oss(tmp_path, CONFIG)
    rewrite(tmp_path, change)

    def read(*_: object) -> None:
        raise AssertionError("data was read")

    monkeypatch.setattr(CheckpointFiles, "read", read)
    with pytest.raises((ValueError, TypeError), match=match):
        GptOss.from_pretrained(tmp_path)


def test_files_of_another_config(tmp_path: Path) -> None:
    save_random_gpt_oss(tmp_path, CONFIG)
    set_config(tmp_path, num_hidden_layers=1, layer_types=["full_attention"])
    with pytest.raises(ValueError, match="2 layers, 0 to 1, config.json says num_hidden_layers=1"):
        GptOss.from_pretrained(tmp_path)
    set_config(tmp_path, vocab_size=50)
    with pytest.raises(ValueError, match=r"need \(50, 64\) by config.json"):
        GptOss.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        GptOss.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dtype": jnp.float16}, "dtype=float16: use jnp.bfloat16 or jnp.float32"),
        ({"act_dtype": jnp.float16}, "act_dtype=float16: use one of"),
        ({"attention": "flash"}, "attention='flash' is unknown"),
        ({"attention": "cudnn", "dtype": jnp.float32}, "computes in bfloat16 only"),
        ({"act_dtype": jnp.float32, "implementation": "cuda_sm90"}, "cuda_sm90"),
        ({"expert_axis": "x"}, "without a mesh"),
        ({"mesh": 1}, "without expert_axis and tensor_axis"),
        ({"mesh": 1, "expert_axis": "y"}, "expert_axis='y' is not an axis of the mesh"),
        ({"mesh": 1, "tensor_axis": "x", "act_dtype": jnp.float32}, "runs on one device"),
    ],
)
def test_options(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    save_random_gpt_oss(tmp_path, CONFIG)
    if "mesh" in options:
        options = {**options, "mesh": make_mesh((2,), axes=("x",))}
    with pytest.raises((ValueError, TypeError, NotImplementedError, RuntimeError), match=match):
        GptOss.from_pretrained(tmp_path, **options)


I32 = jnp.zeros((2, 4), jnp.int32)


@pytest.mark.parametrize(
    ("method", "arguments", "match"),
    [
        ("init_cache", (0, 8), "batch=0 is below 1"),
        ("init_cache", (1, 65), r"capacity=65 is not in 1..64"),
        ("prefill", (I32[0], I32[:, 0]), r"tokens: shape \(4,\), need \[any, any\]"),
        ("prefill", (I32, I32[0]), r"lengths: shape \(4,\), need \[2\]"),
        ("prefill", (I32[:, :0], I32[:, 0]), "has no token"),
        ("prefill", (jnp.zeros((2, 9), jnp.int32), I32[:, 0]), "S=9 is more than .* capacity=8"),
        ("prefill", (I32.astype(jnp.int16), I32[:, 0]), "tokens: dtype int16, need int32"),
        ("prefill", (I32, I32[:, 0], I32[0]), r"slots: shape \(4,\), need \[2\]"),
        ("prefill", (jnp.zeros((4, 1), jnp.int32), I32[0]), "4 prompts for a cache of 3 rows"),
        ("decode", (I32[0],), r"tokens: shape \(4,\), need \[3\]"),
        ("decode", ([1, 2, 3],), "tokens: got list, need an i32 array"),
        ("decode", (I32[0, :3], I32[0, :3]), r"active: int32\[3\], need bool\[3\]"),
    ],
)
def test_calls(method: str, arguments: tuple[Any, ...], match: str) -> None:
    model: Any = nnx.eval_shape(lambda: GptOss(CONFIG, rngs=nnx.Rngs(0)))
    if method != "init_cache":
        arguments = (empty_cache(CONFIG, 3, 8, jnp.float32), *arguments)
    with pytest.raises((ValueError, TypeError), match=match):
        getattr(model, method)(*arguments)


def test_random_weights_do_not_depend_on_the_files(tmp_path: Path) -> None:
    tensors: list[dict[str, np.ndarray]] = []
    for shards in (1, 3):
        save_random_gpt_oss(tmp_path / str(shards), CONFIG, seed=5, shards=shards)
        tensors.append({})
        for file in sorted((tmp_path / str(shards)).glob("*.safetensors")):
            tensors[-1] |= load_file(file)
    assert tensors[0].keys() == tensors[1].keys()
    for name, array in tensors[0].items():
        assert_bitwise(tensors[1][name], array)
    save_random_gpt_oss(tmp_path / "other", CONFIG, seed=6)
    other = load_file(tmp_path / "other" / "model.safetensors")
    assert not any((other[name] == array).all() for name, array in tensors[0].items())


@pytest.mark.parametrize(
    ("changes", "shards", "match"),
    [
        ({}, 0, "shards=0 is not in 1.."),
        ({"intermediate_size": 40}, 1, "intermediate_size=40 is no multiple of 32"),
    ],
)
def test_random_weights(tmp_path: Path, changes: Any, shards: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        save_random_gpt_oss(tmp_path / "new", config(**changes), shards=shards)
    assert not (tmp_path / "new").exists()
    save_random_gpt_oss(tmp_path / "twice", CONFIG)
    with pytest.raises(FileExistsError, match="holds a checkpoint already"):
        save_random_gpt_oss(tmp_path / "twice", CONFIG)


@pytest.mark.parametrize("axis", [None, "expert_axis", "tensor_axis"])
def test_too_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, axis: str | None
) -> None:
    """Of the whole model, computed from config and headers; a device needs its part only."""
    save_random_gpt_oss(tmp_path, CONFIG)
    options = {} if axis is None else {"mesh": make_mesh((2,), axes=("x",)), axis: "x"}
    model = GptOss.from_pretrained(tmp_path, **options)
    device = next(iter(model.norm.weight.get_value().devices()))
    parts = [
        shard.data.nbytes
        for leaf in jax.tree.leaves(model)
        for shard in leaf.addressable_shards
        if shard.device == device
    ]
    monkeypatch.setattr(CheckpointFiles, "read", lambda *_: pytest.fail("data was read"))
    monkeypatch.setattr(loading, "free_bytes", lambda _: sum(parts) - 1)
    sentence = rf"the model needs {sum(parts)} bytes on .*, {sum(parts) - 1} are free; spread it"
    with pytest.raises(MemoryError, match=sentence):
        GptOss.from_pretrained(tmp_path, **options)
