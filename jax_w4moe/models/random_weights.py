"""A whole gpt-oss checkpoint of random weights, for tests, demos and benchmarks."""

import itertools
import math
import os
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np

from jax_w4moe.checkpoint.files import CONFIG_FILE
from jax_w4moe.checkpoint.gpt_oss import PREFIX
from jax_w4moe.checkpoint.gpt_oss_writer import (
    QUANTIZATION,
    require_empty,
    write_json,
    write_shards,
)
from jax_w4moe.formats import MXFP4
from jax_w4moe.models.config import GptOssConfig
from jax_w4moe.models.loading import EMBEDDING, tensor_shapes

_PART = 2**24  # values that are made in f32 at a time
_E2M1_RMS = math.sqrt((0.25 + 1 + 2.25 + 4 + 9 + 16 + 36) / 8)  # of codes that are equally likely


def save_random_gpt_oss(
    path: str | os.PathLike[str], config: GptOssConfig, seed: int = 0, *, shards: int = 1
) -> None:
    """Writes config.json and all tensors of a model, as the real checkpoints have them.

    Experts are MXFP4, the rest BF16. Weights are scaled so that activations and logits are of order
    one. Tensors are made file by file: the memory that is needed is little more than one file.

    Args:
      path: a folder, made if it is missing, without a checkpoint in it.
      config: the model's settings.
      seed: of the weights; they do not depend on ``shards``.
      shards: safetensors files of about one size to spread the tensors over (fewer, where a tensor
        is larger than that); 1 writes no index.

    Raises:
      ValueError: more shards than tensors, or sizes of experts that MXFP4 cannot store.
      FileExistsError: there is a checkpoint in the folder.
    """
    folder = Path(path)
    shapes = {**tensor_shapes(config), **_expert_shapes(config)}
    require_empty(folder)
    if not 1 <= shards <= len(shapes):
        raise ValueError(f"shards={shards} is not in 1..{len(shapes)}, the tensors to write.")
    for name, size in (("hidden", config.hidden_size), ("intermediate", config.intermediate_size)):
        if size % MXFP4.group_size:
            raise ValueError(
                f"{name}_size={size} is no multiple of {MXFP4.group_size}, the group of MXFP4;"
                " make it one."
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, _runs(shapes, shards), lambda name: _tensor(name, shapes[name], seed))
    # Last, so that a write that was broken off is not mistaken for a checkpoint.
    write_json(folder / CONFIG_FILE, {**config.to_dict(), "quantization_config": QUANTIZATION})


def _expert_shapes(config: GptOssConfig) -> dict[str, tuple[int, ...]]:
    experts, group = config.num_local_experts, MXFP4.group_size
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(config.num_hidden_layers):
        for name, rows, columns in (
            ("gate_up_proj", 2 * config.intermediate_size, config.hidden_size),
            ("down_proj", config.hidden_size, config.intermediate_size),
        ):
            prefix = f"{PREFIX.format(layer=layer)}experts.{name}_"
            shapes[prefix + "blocks"] = (experts, rows, columns // group, group // 2)
            shapes[prefix + "scales"] = (experts, rows, columns // group)
            shapes[prefix + "bias"] = (experts, rows)
    return shapes


def _runs(shapes: dict[str, tuple[int, ...]], shards: int) -> list[list[str]]:
    """Names file by file, of about as many bytes each."""
    sizes = [math.prod(shape) * _dtype(name).itemsize for name, shape in shapes.items()]
    runs: list[list[str]] = [[] for _ in range(shards)]
    for name, before in zip(shapes, itertools.accumulate(sizes, initial=0), strict=False):
        runs[before * shards // sum(sizes)].append(name)
    return [run for run in runs if run]


def _dtype(name: str) -> np.dtype:
    return np.dtype(np.uint8 if name.endswith(("_blocks", "_scales")) else ml_dtypes.bfloat16)


def _tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name.endswith("_blocks"):
        return rng.integers(0, 256, shape, dtype=np.uint8)
    if name.endswith("_scales"):
        # Powers of two around one that gives rows of a norm of one.
        columns = shape[-1] * MXFP4.group_size
        middle = round(127 - math.log2(_E2M1_RMS * math.sqrt(columns)))
        return rng.integers(middle - 1, middle + 2, shape, dtype=np.uint8)
    mean, deviation = 0.0, 1.0
    if name.endswith("norm.weight"):
        mean, deviation = 1.0, 0.1
    elif name.endswith("bias"):
        deviation = 0.1
    elif len(shape) == 2 and name != EMBEDDING:
        deviation = shape[1] ** -0.5
    values = np.empty(shape, _dtype(name))
    for part in np.array_split(values, 1 + values.size // _PART):
        normal = rng.standard_normal(part.shape, dtype=np.float32)
        part[...] = mean + np.float32(deviation) * normal
    return values
