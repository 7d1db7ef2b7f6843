"""Written checkpoints; safetensors may be missing, so only the fixtures import what needs it."""

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def one_file(rng: np.random.Generator, tmp_path: Path) -> Path:
    from tests.checkpoint.common import moe_layer, save_gpt_oss

    save_gpt_oss(tmp_path, [moe_layer(rng)], top_k=2, shards=1)
    return tmp_path


@pytest.fixture
def sharded(rng: np.random.Generator, tmp_path: Path) -> Path:
    """Three layers in three shards, one layer in each."""
    from tests.checkpoint.common import moe_layer, save_gpt_oss

    save_gpt_oss(tmp_path, [moe_layer(rng) for _ in range(3)], top_k=2, shards=3)
    return tmp_path
