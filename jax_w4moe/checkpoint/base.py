"""What an on-disk format of MoE layers is, and the registry that detects one from the files.

Such a format knows names, shapes and the order of rows in files, and gives canonical weights. It
knows nothing of packing. Adding one is a module beside this one and an import in ``__init__``.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

from jax import Array

from jax_w4moe.activations import SwiGLU
from jax_w4moe.checkpoint.files import CheckpointFiles
from jax_w4moe.formats import WeightFormat
from jax_w4moe.types import ExpertWeights


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """What a model needs to know of its MoE layers, besides their weights.

    Attributes:
      hidden_size: H.
      intermediate_size: I, of one expert.
      num_experts: E.
      top_k: experts per token.
      layers: the numbers of the layers that are MoE layers, rising.
      activation: the gated activation of the experts.
      scoring: the ``scoring`` of :func:`jax_w4moe.topk_routing`.
      format: the format of the experts' weights.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    layers: tuple[int, ...]
    activation: SwiGLU
    scoring: str
    format: WeightFormat


@dataclasses.dataclass(frozen=True)
class LayerOnDisk:
    """The experts of one layer whose headers have been checked.

    Attributes:
      layer: the layer's number.
      num_experts: E.
      hidden_size: H.
      intermediate_size: I.
      w13_source: the file and tensor that gate and up come from, for errors.
      w2_source: the same of the down projection.
    """

    layer: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    w13_source: str
    w2_source: str


class DiskFormat(abc.ABC):
    """One way of storing MoE layers in safetensors files.

    Attributes:
      name: as errors call it.
    """

    name: str

    @abc.abstractmethod
    def layers(self, files: CheckpointFiles) -> tuple[int, ...]:
        """The layers stored in this format, rising; empty if there are none."""

    @abc.abstractmethod
    def layer(self, files: CheckpointFiles, layer: int) -> LayerOnDisk:
        """Checks names, dtypes and shapes of a layer's experts against each other; reads no data.

        Raises:
          ValueError, TypeError: whatever is missing or does not fit.
        """

    @abc.abstractmethod
    def read_expert(
        self, files: CheckpointFiles, on_disk: LayerOnDisk, expert: int
    ) -> ExpertWeights:
        """Reads one expert of a checked layer as canonical weights with E = 1."""

    @abc.abstractmethod
    def read_router(self, files: CheckpointFiles, layer: int) -> tuple[Array, Array | None]:
        """Checks and reads a layer's router: weight [E, H] and bias [E] or None, as stored."""

    @abc.abstractmethod
    def config(self, files: CheckpointFiles) -> MoEConfig:
        """The model's MoE settings, from ``config.json`` and the headers."""


_REGISTRY: list[DiskFormat] = []


def register(disk_format: DiskFormat) -> DiskFormat:
    """Makes an on-disk format known to :func:`detect`; returns it."""
    _REGISTRY.append(disk_format)
    return disk_format


def detect(files: CheckpointFiles) -> DiskFormat:
    """The format that a checkpoint's MoE layers are stored in.

    Raises:
      NotImplementedError: no registered format finds a layer.
    """
    for disk_format in _REGISTRY:
        if disk_format.layers(files):
            return disk_format
    experts = [name for name in files.names if "expert" in name]
    seen = f"experts are stored as {experts[0]}" if experts else "no tensor's name holds 'expert'"
    known = ", ".join(disk_format.name for disk_format in _REGISTRY)
    raise NotImplementedError(
        f"{files.path}: no MoE layer of a format that this version reads ({known}) among"
        f" {len(files.names)} tensors, {seen}; pass a checkpoint in one of them, or build"
        " ExpertWeights from the arrays and call pack_experts."
    )


def require_layer(files: CheckpointFiles, layers: Sequence[int], layer: Any) -> None:
    """Refuses a layer that the checkpoint has no experts for."""
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"layer={layer!r} is a {type(layer).__name__}, need an int.")
    if layer not in layers:
        raise ValueError(
            f"layer={layer} is no MoE layer of {files.path}, which has {len(layers)} of them,"
            f" {layers[0]} to {layers[-1]}; pass one of these."
        )
