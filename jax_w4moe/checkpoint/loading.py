"""Loading MoE layers from checkpoints: checked from headers first, then packed expert by expert.

The host holds one expert at a time, the device the packed layer and one expert.
"""

import dataclasses
import functools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jax_w4moe import packing
from jax_w4moe.checkpoint.base import LayerOnDisk, MoEConfig, detect
from jax_w4moe.checkpoint.files import CheckpointFiles
from jax_w4moe.types import ExpertWeights, PackedExperts, PackedTensor

Path = str | os.PathLike[str]


def load_experts(
    path: Path,
    layer: int,
    *,
    mesh: jax.sharding.Mesh | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PackedExperts:
    """Loads and packs the experts of one MoE layer on the default device.

    Names, dtypes and shapes are checked before any data is read.

    Args:
      path: a checkpoint folder, or one .safetensors file. Its format is detected.
      layer: the layer's number in the checkpoint.
      mesh: must be None in this version.
      progress: called with (experts done, experts in all) after every expert.

    Returns:
      The packed experts; biases in f32.

    Raises:
      FileNotFoundError: there is no such path, or a shard is missing.
      ValueError: a damaged file, a missing tensor, shapes that do not fit together, or scales that
        cannot be packed exactly.
      TypeError: a tensor is stored in another dtype than its format's.
      NotImplementedError: a mesh, or a format that this version does not read.
    """
    if mesh is not None:
        raise NotImplementedError(
            f"mesh={mesh!r}: this version loads onto one device; leave mesh out."
        )
    with CheckpointFiles(path) as files:
        disk_format = detect(files)
        on_disk = disk_format.layer(files, layer)
        total = on_disk.num_experts
        stack, structure = [], None
        for expert in range(total):
            one = _pack(on_disk, disk_format.read_expert(files, on_disk, expert), expert)
            leaves, structure = jax.tree.flatten(one)
            if expert == 0:
                stack = [jnp.zeros((total, *leaf.shape[1:]), leaf.dtype) for leaf in leaves]
            stack = _insert(stack, leaves, expert)
            if progress is not None:
                progress(expert + 1, total)
    experts: PackedExperts = jax.tree.unflatten(structure, stack)
    return dataclasses.replace(
        experts, w13=_of_all(experts.w13, total), w2=_of_all(experts.w2, total)
    )


def load_router(path: Path, layer: int) -> tuple[Array, Array | None]:
    """Loads the router of one MoE layer.

    Args:
      path: a checkpoint folder, or one .safetensors file.
      layer: the layer's number in the checkpoint.

    Returns:
      (weight [E, H], bias [E] or None), in the stored dtype.

    Raises:
      FileNotFoundError, ValueError, TypeError, NotImplementedError: as :func:`load_experts`.
    """
    with CheckpointFiles(path) as files:
        return detect(files).read_router(files, layer)


def moe_config(path: Path) -> MoEConfig:
    """Reads what a model needs to know of its MoE layers.

    Args:
      path: a checkpoint folder with its config.json, or one .safetensors file beside it.

    Returns:
      Sizes, the numbers of the MoE layers, routing and activation.

    Raises:
      FileNotFoundError: there is no such path, or no config.json.
      ValueError, TypeError, NotImplementedError: as :func:`load_experts`, or a config.json that
        does not fit the tensors.
    """
    with CheckpointFiles(path) as files:
        return detect(files).config(files)


def _pack(on_disk: LayerOnDisk, weights: ExpertWeights, expert: int) -> PackedExperts:
    try:
        return packing.pack_experts(weights, first_expert=expert)
    except ValueError as error:
        raise ValueError(
            f"layer {on_disk.layer} (w13 from {on_disk.w13_source}, gate rows first; w2 from"
            f" {on_disk.w2_source}): {error}"
        ) from error


@functools.partial(jax.jit, donate_argnums=0)
def _insert(stack: list[Array], one: list[Array], expert: Array) -> list[Array]:
    return [
        jax.lax.dynamic_update_slice_in_dim(all_experts, leaf, expert, 0)
        for all_experts, leaf in zip(stack, one, strict=True)
    ]


def _of_all(one: PackedTensor, num_experts: int) -> PackedTensor:
    return dataclasses.replace(one, shape=(num_experts, *one.shape[1:]))
