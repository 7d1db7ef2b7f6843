"""The programs in examples/, as a user starts them."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SERVE, GENERATE = EXAMPLES / "serve_multihost.py", EXAMPLES / "generate_gpt_oss.py"


def serve(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SERVE), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)


@pytest.mark.matrix  # its start and first steps are those of the next test
def test_serving_on_two_processes() -> None:
    result = serve("--steps", "3")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 devices of 2 processes, 2 layers of 16 experts, 32 tokens a step" in result.stdout
    assert "step 3 of 3: " in result.stdout and "tokens/s" in result.stdout


def test_a_lost_process_ends_all() -> None:
    result = serve("--steps", "1000000", "--lose-after", "2")
    assert result.returncode == 1
    last = "Process 1 ended with code -9; all others are stopped, since its experts are gone."
    assert last in result.stdout


def generate(*options: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("flax", reason="needs the extra [flax]")
    pytest.importorskip("safetensors", reason="needs the extra [checkpoint]")
    command = [sys.executable, str(GENERATE), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)


@pytest.mark.matrix
def test_generating_on_two_devices() -> None:
    """The tiny model, with sampling; token ids in and out."""
    options = ("--prompt", "5 6 7", "--max-new-tokens", "9", "--temperature", "1")
    result = generate(*options, "--expert-parallel", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    new = re.search(r"^((\d+ ){9})$", result.stdout, re.MULTILINE)
    assert new and all(int(token) < 256 for token in new[1].split())
    assert "Prefill: 3 tokens, " in result.stdout and "Decode: 8 tokens, " in result.stdout


def test_generating_text(tmp_path: Path) -> None:
    """A folder with a tokenizer; greedy, so twice the same."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra [examples]")
    from jax_w4moe.models import save_random_gpt_oss
    from tests.models.common import CONFIG

    save_random_gpt_oss(tmp_path, CONFIG)
    words = {f"w{number}": number for number in range(CONFIG.vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    result = generate(str(tmp_path), "--prompt", "w3 w4", "--max-new-tokens", "4")
    assert result.returncode == 0, result.stdout + result.stderr
    new = re.search(r"^w\d+( w\d+){3}$", result.stdout, re.MULTILINE)
    assert new and "Prefill: 2 tokens, " in result.stdout
    # What the model says by itself.
    from jax_w4moe.models import GptOss

    ids = [3, 4, *(int(word[1:]) for word in new[0].split())]
    logits = jax.jit(lambda model: model(jnp.asarray([ids], jnp.int32)))(
        GptOss.from_pretrained(tmp_path)
    )
    assert jnp.argmax(logits[0, 1:-1], axis=-1).tolist() == ids[2:]
