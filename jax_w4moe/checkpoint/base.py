"""What an on-disk format of experts is, and the registry that detects one from the files.

Such a format knows names, dtypes, shapes and the order of rows and nibbles in files, and gives
canonical weights in host memory. It knows nothing of packing or of models. Adding one is a module
beside this one and an import in ``__init__``.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from jax_w4moe import checks
from jax_w4moe.checkpoint.files import CheckpointFiles, TensorInfo
from jax_w4moe.formats import WeightFormat
from jax_w4moe.packing import abstract_experts
from jax_w4moe.quantization import Static
from jax_w4moe.types import ExpertWeights, PackedExperts


class Kernels(NamedTuple):
    """Experts in float: f32 [E, I, H], [E, I, H] and [E, H, I]."""

    w_gate: Any
    w_up: Any
    w_down: Any


ExpertOnHost = ExpertWeights | Kernels | PackedExperts
"""One expert (E = 1) in numpy arrays: canonical, to be quantised, or packed already."""


@dataclasses.dataclass(frozen=True)
class LayerOnDisk:
    """The experts of one layer whose headers have been checked.

    Attributes:
      layer: the layer's number.
      prefix: what the names of the layer's MoE tensors begin with, the last dot included.
      num_experts: E.
      hidden_size: H, of the experts.
      intermediate_size: I.
      format: what the weights are read as.
      has_bias: whether both projections have biases.
    """

    layer: int
    prefix: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    format: WeightFormat
    has_bias: bool = False

    def packed(self) -> PackedExperts:
        """The packed experts, with ``jax.ShapeDtypeStruct`` in place of arrays."""
        return abstract_experts(
            self.format,
            self.num_experts,
            self.hidden_size,
            self.intermediate_size,
            bias=self.has_bias,
        )


class DiskFormat(abc.ABC):
    """One way of storing experts in safetensors files.

    Attributes:
      name: as errors call it.
      is_float: whether experts are quantised while they are loaded.
      model_type: the family of the models in this format, where the config names none.
      router: names of a router's weight under the layer's prefix, the first one there counts.
      logit_bias: the same of a bias that is added to the router's logits.
      selection_bias: the same of one that counts for the choice of experts only.
    """

    name: str
    is_float: bool = False
    model_type: str | None = None
    router: tuple[str, ...] = ("gate.weight",)
    logit_bias: tuple[str, ...] = ()
    selection_bias: tuple[str, ...] = (
        "gate.e_score_correction_bias",
        "e_score_correction_bias",
        "gate.bias",
    )

    @abc.abstractmethod
    def layers(self, files: CheckpointFiles) -> tuple[int, ...]:
        """The layers whose experts are stored in this format, rising; empty if there are none."""

    @abc.abstractmethod
    def layer(
        self, files: CheckpointFiles, layer: int, quantize: WeightFormat | None = None
    ) -> LayerOnDisk:
        """Checks names, dtypes and shapes of a layer's experts against each other; reads no data.

        Args:
          files: the checkpoint.
          layer: the layer's number.
          quantize: the format to round float experts (bf16, FP8) to; MXFP4_WIDE also for MXFP4 ones
            whose scales lie too far apart, which are not rounded; else None.

        Raises:
          ValueError, TypeError: whatever is missing or does not fit.
        """

    @abc.abstractmethod
    def read_expert(
        self, files: CheckpointFiles, on_disk: LayerOnDisk, expert: int
    ) -> ExpertOnHost:
        """Reads one expert of a checked layer, with E = 1, as numpy arrays."""

    def source(self, files: CheckpointFiles) -> "DiskFormat":
        """The format whose names the tensors beside the experts have."""
        return self

    def read_act_scale(self, files: CheckpointFiles, on_disk: LayerOnDisk) -> Static | None:
        """Checks and reads the scales of a layer's activations, None if there are none."""
        return None

    @abc.abstractmethod
    def replaced(self, files: CheckpointFiles, on_disk: LayerOnDisk) -> set[str]:
        """The names of the tensors that packed experts stand for."""

    @abc.abstractmethod
    def sources(self, files: CheckpointFiles, on_disk: LayerOnDisk, expert: int) -> str:
        """Where an expert's weights come from, for errors: files and tensors."""


_REGISTRY: list[DiskFormat] = []
_Format = TypeVar("_Format", bound=DiskFormat)


def register(disk_format: _Format) -> _Format:
    """Makes an on-disk format known to :func:`detect`; returns it."""
    _REGISTRY.append(disk_format)
    return disk_format


def by_name(name: str) -> DiskFormat:
    """A registered format."""
    return next(disk_format for disk_format in _REGISTRY if disk_format.name == name)


def detect(files: CheckpointFiles) -> DiskFormat:
    """The format that a checkpoint's experts are stored in.

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


def require_dtype(info: TensorInfo, legal: Sequence[str], layout: str) -> None:
    """Refuses a tensor of another dtype than its layout stores."""
    if info.dtype not in legal:
        raise TypeError(
            f"{info} has dtype {info.dtype}, need {' or '.join(legal)} as in the {layout} layout;"
            " load a checkpoint that was not converted."
        )


def require_shape(info: TensorInfo, expected: tuple[int, ...], why: str) -> None:
    """Refuses a tensor of another shape than its neighbours demand."""
    if info.shape != expected:
        raise ValueError(
            f"{info} has shape {info.shape}, need {expected} since {why}; download the checkpoint"
            " again or correct what wrote it."
        )


def require_matrix(info: TensorInfo) -> None:
    """Refuses a tensor that is not two-dimensional, or empty."""
    if len(info.shape) != 2 or 0 in info.shape:
        raise ValueError(
            f"{info} has shape {info.shape}, need two axes, neither of size 0; download the"
            " checkpoint again or correct what wrote it."
        )


def require_sizes(
    info: TensorInfo, num_experts: int, hidden: int, intermediate: int, group_size: int
) -> None:
    """Refuses an E, H or I that cannot be packed."""
    if num_experts > checks.MAX_EXPERTS:
        raise ValueError(
            f"{info} is of E={num_experts} experts, at most {checks.MAX_EXPERTS} can be loaded;"
            " load a smaller model."
        )
    multiple = max(checks.SIZE_MULTIPLE, group_size)
    for name, size in (("H", hidden), ("I", intermediate)):
        if size % multiple:
            raise ValueError(
                f"{info} has {name}={size}, need a multiple of {multiple}; zero-pad it to"
                f" {-(-size // multiple) * multiple}."
            )
