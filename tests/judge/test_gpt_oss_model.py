"""A whole gpt-oss model against transformers: prompts, steps over the cache, greedy tokens.

On a Hopper GPU with the kernels: ``pytest -m judge tests/judge/test_gpt_oss_model.py``.
"""
# ruff: noqa: E402 - without the judge's packages the rest need not be imported

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the judge needs torch: pip install '.[judge]'")
transformers = pytest.importorskip(
    "transformers", reason="the judge needs transformers: pip install '.[judge]'"
)
pytest.importorskip("accelerate", reason="the judge needs accelerate: pip install '.[judge]'")
pytest.importorskip("flax", reason="the model needs flax: pip install '.[flax]'")

from jax_w4moe.models import GptOss, GptOssConfig, Yarn, save_random_gpt_oss
from tests.helpers.compare import relative_rms
from tests.models.common import greedy_choices, logits_along

pytestmark = pytest.mark.judge

CONFIG = GptOssConfig(
    vocab_size=160,
    hidden_size=96,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    num_local_experts=8,
    num_experts_per_tok=3,
    layer_types=("sliding_attention", "full_attention") * 2,
    sliding_window=8,
    max_position_embeddings=256,
    yarn=Yarn(8.0, 32, truncate=False),
    eos_token_ids=(7,),
    pad_token_id=0,
)
PROMPT, STEPS, ROWS = 64, 32, 2


class Judge:
    """A checkpoint, transformers' model of it, and what that says to prompts and after them."""

    def __init__(self, folder: Path) -> None:
        save_random_gpt_oss(folder, CONFIG, seed=1, shards=2)
        self.folder = folder
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not ours
            model, self.info = transformers.GptOssForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                experts_implementation="eager",
                attn_implementation="eager",
                output_loading_info=True,
            )
        # transformers dequantises to bf16, which holds every MXFP4 weight, whatever dtype says.
        self.model = model.float()
        rng = np.random.default_rng(2)
        prompts = rng.integers(0, CONFIG.vocab_size, (ROWS, PROMPT))
        self.tokens, self.logits = self._greedy(prompts)

    def _greedy(self, prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [B, PROMPT + STEPS] and logits at the same positions, with their cache."""
        tokens, cache = (
            torch.from_numpy(prompts),
            transformers.DynamicCache(config=self.model.config),
        )
        parts, new = [], tokens
        with torch.no_grad():
            for _ in range(STEPS + 1):
                logits = self.model(new, past_key_values=cache, use_cache=True).logits
                parts.append(logits.numpy())
                new = logits[:, -1:].argmax(-1)
                tokens = torch.cat([tokens, new], dim=1)
        return tokens[:, :-1].numpy().astype(np.int32), np.concatenate(parts, axis=1)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    return Judge(tmp_path_factory.mktemp("gpt_oss"))


def test_transformers_finds_every_tensor(judge: Judge) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not judge.info[kind], kind
    assert type(judge.model.model.layers[0].mlp.experts).__name__ == "GptOssExperts"


def test_config_as_transformers_writes_it(judge: Judge, tmp_path: Path) -> None:
    """Its rope_parameters and ours of the same file are the same model."""
    judge.model.config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written and "rope_scaling" not in written
    assert GptOssConfig.from_dict(written) == CONFIG
    # The frequencies, with both ways of rounding the ends.
    for truncate in (False, True):
        written["rope_parameters"]["truncate"] = truncate
        theirs = transformers.GptOssConfig(**written)
        rotary = type(judge.model.model.rotary_emb)(theirs)
        frequencies, factor = GptOssConfig.from_dict(written).rope_frequencies()
        np.testing.assert_allclose(frequencies, rotary.inv_freq.numpy(), rtol=1e-6)
        assert factor == pytest.approx(rotary.attention_scaling)


# The bound on the relative RMS of logits, by what activations of the experts are rounded to. With
# FP8 a router's near tie now and then goes to another expert, in one layer after the other.
BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2, "float8_e4m3fn": 0.2}


@pytest.fixture
def no_tf32() -> Iterator[None]:
    """Products of f32 as they are on CPUs; GPUs round the operands to TF32 by default."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.usefixtures("no_tf32")
@pytest.mark.parametrize("act_dtype", BOUNDS)
def test_logits_and_greedy_tokens(judge: Judge, act_dtype: str) -> None:
    """A prompt, then steps over the cache: rings of 8 go round a dozen times."""
    on_gpu = jax.default_backend() == "gpu" and act_dtype != "float32"
    model = GptOss.from_pretrained(
        judge.folder,
        dtype=jnp.float32,
        act_dtype=jnp.dtype(act_dtype),
        implementation="cuda_sm90" if on_gpu else "xla",
    )
    actual = logits_along(model, judge.tokens, PROMPT)
    expected = judge.logits[:, PROMPT - 1 :]
    error = relative_rms(actual, expected)
    print(f"{act_dtype}: relative RMS of logits {error:.2e}")
    assert error <= BOUNDS[act_dtype]
    same, clear = greedy_choices(actual, expected)
    print(f"  of {same.size} greedy tokens {same.sum()} equal, {clear.sum()} by a clear margin")
    assert same[clear].all()
    assert act_dtype == "float8_e4m3fn" or clear.sum() > same.size / 2
