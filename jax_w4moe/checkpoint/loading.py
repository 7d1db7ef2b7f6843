"""Loading MoE layers from checkpoints: checked from headers first, then packed expert by expert.

Threads read a few experts ahead; each device packs what of an expert it holds and writes that into
the arrays it keeps. A process reads no expert that none of its devices holds.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jax_w4moe.checkpoint import block, families
from jax_w4moe.checkpoint.base import (
    DiskFormat,
    ExpertOnHost,
    Kernels,
    LayerOnDisk,
    detect,
)
from jax_w4moe.checkpoint.files import AnyPath, CheckpointFiles, opened
from jax_w4moe.formats import MXFP4, WeightFormat
from jax_w4moe.formats.layout import BLOCK_K
from jax_w4moe.packing import pack_experts, quantize_experts
from jax_w4moe.quantization import Static
from jax_w4moe.sharding import shard_experts
from jax_w4moe.sharding.specs import ROW_BLOCKS
from jax_w4moe.types import ExpertWeights, PackedExperts

READERS = 4
"""Threads that read, and experts that are read ahead; as many may wait to be packed."""


def load_experts(
    path: AnyPath,
    layer: int,
    *,
    quantize: WeightFormat | None = None,
    mesh: Mesh | None = None,
    expert_axis: str | None = None,
    tensor_axis: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PackedExperts:
    """Loads and packs the experts of one MoE layer, on the default device or over a mesh.

    Names, dtypes, shapes and the devices' free memory are checked before any data is read.

    Args:
      path: a checkpoint folder, one .safetensors file, or a :class:`CheckpointFiles` of them: then
        the headers are read once for all layers. The format is detected.
      layer: the layer's number in the checkpoint.
      quantize: the format to round float experts (bf16, FP8) to; MXFP4_WIDE also for MXFP4 ones
        whose scales lie too far apart, which are not rounded; else None.
      mesh: the devices; None: the default device. Every process of a mesh must call.
      expert_axis, tensor_axis: as in :func:`jax_w4moe.shard_experts`.
      progress: called with (experts done, experts in all) of this process, after every expert.

    Returns:
      The packed experts; biases in f32.

    Raises:
      FileNotFoundError: there is no such path, or a shard is missing.
      ValueError: a damaged file, a missing tensor, shapes that do not fit together or contradict
        config.json, scales that cannot be packed exactly, float experts without ``quantize``.
      TypeError: a tensor is stored in another dtype than its format's.
      NotImplementedError: a format that this version does not read.
      MemoryError: a device has too little memory left.
    """
    with opened(path) as files:
        disk_format, on_disk = _checked(files, layer, quantize)
        whole = on_disk.packed()
        if mesh is not None:
            whole = shard_experts(whole, mesh, expert_axis=expert_axis, tensor_axis=tensor_axis)
        elif expert_axis is not None or tensor_axis is not None:
            raise ValueError(
                f"expert_axis={expert_axis!r}, tensor_axis={tensor_axis!r} without mesh; pass the"
                " mesh that has these axes."
            )
        shards = _shards(whole)
        for shard in shards:
            shard.check_memory(on_disk)
        for shard in shards:
            shard.allocate()
        wanted = sorted({expert for shard in shards for expert in shard.experts(on_disk)})
        for done, (expert, weights) in enumerate(_read(files, disk_format, on_disk, wanted), 1):
            for shard in shards:
                shard.insert(expert, weights, on_disk)
            if done % READERS == 0:
                jax.block_until_ready(shards[-1].arrays)  # or copies would pile up in host memory
            if progress is not None:
                progress(done, len(wanted))
        for shard in shards:
            _check_exact(shard, files, disk_format, on_disk)
        return _joined(whole, shards)


def load_router(path: AnyPath, layer: int) -> block.Router:
    """Loads the router of one MoE layer.

    Args:
      path: as in :func:`load_experts`.
      layer: the layer's number in the checkpoint.

    Returns:
      Its arrays in the stored dtypes, in host memory.

    Raises:
      FileNotFoundError, ValueError, TypeError, NotImplementedError: as :func:`load_experts`.
    """
    with opened(path) as files:
        disk_format, on_disk = _checked_beside(files, layer)
        return block.read_router(files, disk_format.source(files), on_disk)


def load_shared_expert(path: AnyPath, layer: int) -> block.SharedExpert | None:
    """Loads the shared experts of one MoE layer in bf16, None if it has none; else as
    :func:`load_router`."""
    with opened(path) as files:
        return block.read_shared_expert(files, _checked_beside(files, layer)[1])


def load_latent(path: AnyPath, layer: int) -> block.Latent | None:
    """Loads what lies around the experts of a layer with latent experts in bf16, None if they see
    the tokens themselves; else as :func:`load_router`."""
    with opened(path) as files:
        return block.read_latent(files, _checked_beside(files, layer)[1])


def load_act_scale(path: AnyPath, layer: int) -> Static | None:
    """Loads the scales of a layer's activations, None if the checkpoint has none; else as
    :func:`load_router`."""
    with opened(path) as files:
        disk_format, on_disk = _checked_beside(files, layer)
        return disk_format.source(files).read_act_scale(files, on_disk)


def moe_config(path: AnyPath, *, quantize: WeightFormat | None = None) -> families.MoEConfig:
    """Reads what a model needs to know of its MoE layers.

    Args:
      path: as in :func:`load_experts`, with a config.json.
      quantize: as in :func:`load_experts`.

    Returns:
      Sizes, the numbers of the MoE layers, routing and activation.

    Raises:
      FileNotFoundError: there is no such path, or no config.json.
      ValueError, TypeError, NotImplementedError: as :func:`load_experts`, or a config.json of an
        unknown family, or one that does not fit the tensors.
    """
    with opened(path) as files:
        disk_format = detect(files)
        layers = disk_format.layers(files)
        first = disk_format.layer(files, layers[0], quantize)
        model_type = disk_format.source(files).model_type
        return families.moe_config(files, layers, first, model_type)


@dataclasses.dataclass(frozen=True)
class _Region:
    """What of an array a device holds: where it begins, and its shape."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: Any

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Shard:
    """What one device holds of a layer.

    Attributes:
      device: the device, or None for the default one (whose arrays stay uncommitted).
      regions: which parts of the packed experts, of those that are appended too.
      arrays: those parts, in the order of the packed experts' leaves, filled expert by expert.
    """

    def __init__(self, device: jax.Device | None, regions: Any) -> None:
        self.device = device
        self.regions = regions
        self.arrays: list[Array] = []

    def allocate(self) -> None:
        """Makes the arrays, of zeros."""
        self.arrays = [
            jnp.zeros(region.shape, region.dtype, device=self.device)
            for region in jax.tree.leaves(self.regions)
        ]

    def experts(self, on_disk: LayerOnDisk) -> range:
        """The experts of the checkpoint among its own."""
        own = self.regions.w13.data
        return range(own.start[0], min(own.start[0] + own.shape[0], on_disk.num_experts))

    def insert(self, expert: int, weights: ExpertOnHost, on_disk: LayerOnDisk) -> None:
        """Packs the device's part of an expert, if there is one."""
        columns = self.regions.w2.data
        begin = columns.start[2] * BLOCK_K
        end = min(begin + columns.shape[2] * BLOCK_K, on_disk.intermediate_size)
        if expert in self.experts(on_disk) and begin < end:
            part = jax.device_put(_part(weights, begin, end, on_disk), self.device)
            where = expert - columns.start[0]
            self.arrays = _insert(self.arrays, part, where, format=on_disk.format)

    def check_memory(self, on_disk: LayerOnDisk) -> None:
        """Refuses a layer that the device has no room for."""
        device = self.device or jnp.zeros(()).devices().pop()
        free = free_bytes(device)
        held = sum(region.nbytes for region in jax.tree.leaves(self.regions))
        one = 3 * on_disk.hidden_size * on_disk.intermediate_size  # packed, beside its codes
        if free is not None and held + one > free:
            raise MemoryError(
                f"layer {on_disk.layer}: {held + one} bytes are needed on {device}, {free} are"
                " free; spread the experts over more devices (mesh, expert_axis, tensor_axis), or"
                " free some memory."
            )


def free_bytes(device: jax.Device) -> int | None:
    """What a device has left, None if it does not say (CPU)."""
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return int(stats["bytes_limit"] - stats["bytes_in_use"])


@functools.partial(jax.jit, donate_argnums=0, static_argnames="format")
def _insert(
    arrays: list[Array], part: ExpertOnHost, where: Array, format: WeightFormat
) -> list[Array]:
    if isinstance(part, Kernels):
        part = quantize_experts(*part, format)
    if isinstance(part, ExpertWeights):
        part = pack_experts(part)
    return [
        jax.lax.dynamic_update_slice(array, leaf, (where, *(0,) * (leaf.ndim - 1)))
        for array, leaf in zip(arrays, jax.tree.leaves(part), strict=True)
    ]


def _part(weights: ExpertOnHost, begin: int, end: int, on_disk: LayerOnDisk) -> ExpertOnHost:
    """The columns [begin, end) of I; begin is a multiple of 128, so is end unless it is I."""
    size = on_disk.intermediate_size
    if (begin, end) == (0, size):
        return weights
    if isinstance(weights, Kernels):
        gate, up, down = weights
        return Kernels(gate[:, begin:end], up[:, begin:end], down[:, :, begin:end])
    if isinstance(weights, PackedExperts):
        return _part_of_packed(weights, begin // BLOCK_K, -(-end // BLOCK_K))
    scales = [
        *range(on_disk.format.row_scales),
        *range(on_disk.format.num_scales(begin), on_disk.format.num_scales(end)),
    ]

    def rows(array: Any) -> Any:
        return np.concatenate([array[:, begin:end], array[:, size + begin : size + end]], axis=1)

    w13, w2, bias = weights.w13, weights.w2, weights.w13_bias
    return ExpertWeights(
        dataclasses.replace(w13, codes=rows(w13.codes), scales=rows(w13.scales)),
        dataclasses.replace(
            w2,
            codes=w2.codes[:, :, begin // 2 : end // 2],
            scales=w2.scales[:, :, scales],
        ),
        None if bias is None else rows(bias),
        weights.w2_bias,
    )


def _part_of_packed(weights: PackedExperts, begin: int, end: int) -> PackedExperts:
    """The blocks [begin, end) of w2's K."""
    rows, bias = slice(ROW_BLOCKS * begin, ROW_BLOCKS * end), weights.w13_bias
    return dataclasses.replace(
        weights,
        w13=dataclasses.replace(weights.w13, data=weights.w13.data[:, rows]),
        w2=dataclasses.replace(weights.w2, data=weights.w2.data[:, :, begin:end]),
        w13_bias=None if bias is None else bias[:, rows],
    )


def _shards(whole: PackedExperts) -> list[_Shard]:
    """What each device of this process is to hold."""

    def region(leaf: jax.ShapeDtypeStruct, index: tuple[slice, ...]) -> _Region:
        bounds = [axis.indices(size)[:2] for axis, size in zip(index, leaf.shape, strict=True)]
        start = tuple(begin for begin, _ in bounds)
        return _Region(start, tuple(end - begin for begin, end in bounds), leaf.dtype)

    def on(device: jax.Device | None) -> Any:
        def of(leaf: Any) -> _Region:
            if device is None:
                return region(leaf, (slice(None),) * len(leaf.shape))
            indices = leaf.sharding.addressable_devices_indices_map(leaf.shape)
            return region(leaf, indices[device])

        return jax.tree.map(of, whole)

    sharding: Any = whole.w13.data.sharding
    devices = [None] if sharding is None else sharding.addressable_devices
    return [_Shard(device, on(device)) for device in devices]


def _joined(whole: PackedExperts, shards: list[_Shard]) -> PackedExperts:
    leaves, structure = jax.tree.flatten(whole)
    parts = zip(*(shard.arrays for shard in shards), strict=True)
    arrays = [
        same[0]
        if leaf.sharding is None
        else jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, list(same))
        for leaf, same in zip(leaves, parts, strict=True)
    ]
    joined: PackedExperts = jax.tree.unflatten(structure, arrays)
    return joined


def _read(
    files: CheckpointFiles, disk_format: DiskFormat, on_disk: LayerOnDisk, experts: list[int]
) -> Iterator[tuple[int, ExpertOnHost]]:
    """The experts in order, read ahead by threads."""
    ahead: collections.deque[concurrent.futures.Future[ExpertOnHost]] = collections.deque()
    left = iter(experts)
    with concurrent.futures.ThreadPoolExecutor(READERS) as readers:
        try:
            for expert in experts:
                for following in itertools.islice(left, READERS - len(ahead)):
                    read = disk_format.read_expert
                    ahead.append(readers.submit(read, files, on_disk, following))
                yield expert, ahead.popleft().result()
        finally:
            readers.shutdown(cancel_futures=True)


def _check_exact(
    shard: _Shard, files: CheckpointFiles, disk_format: DiskFormat, on_disk: LayerOnDisk
) -> None:
    """Refuses what could not be packed exactly, with the place in the whole expert."""
    arrays: PackedExperts = jax.tree.unflatten(jax.tree.structure(shard.regions), shard.arrays)
    inexact = np.flatnonzero(arrays.inexact_groups)
    if not inexact.size:
        return
    expert = shard.experts(on_disk)[inexact[0]]
    weights: Any = disk_format.read_expert(files, on_disk, expert)
    try:
        pack_experts(jax.tree.map(jnp.asarray, weights), first_expert=expert)
    except ValueError as error:
        sources = disk_format.sources(files, on_disk, expert)
        raise ValueError(f"layer {on_disk.layer} ({sources}): {error}") from error


def _checked(
    files: CheckpointFiles, layer: int, quantize: WeightFormat | None
) -> tuple[DiskFormat, LayerOnDisk]:
    disk_format = detect(files)
    on_disk = disk_format.layer(files, layer, quantize)
    families.check_sizes(files, on_disk)
    return disk_format, on_disk


def _checked_beside(files: CheckpointFiles, layer: int) -> tuple[DiskFormat, LayerOnDisk]:
    """The same for what lies beside the experts, for which their own format does not matter."""
    return _checked(files, layer, MXFP4 if detect(files).is_float else None)
