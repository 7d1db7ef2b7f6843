"""What all formats that store a matrix per expert and projection have in common: the names.

    {model}layers.{layer}.{block}.experts.{expert}.{projection}.{part}

with the blocks ``mlp``, ``ffn`` or ``block_sparse_moe`` and the projections ``gate_proj``,
``up_proj``, ``down_proj`` or ``w1``, ``w3``, ``w2``: gate and up are [I, H], down is [H, I]. A
format beside this file says which parts a projection has, of which dtypes and shapes, and what the
codes mean.
"""

import abc
import dataclasses
import re
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from jax_w4moe.checkpoint.base import (
    DiskFormat,
    LayerOnDisk,
    require_dtype,
    require_layer,
    require_matrix,
    require_shape,
    require_sizes,
)
from jax_w4moe.checkpoint.files import CheckpointFiles, TensorInfo
from jax_w4moe.formats import WeightFormat
from jax_w4moe.types import ExpertWeights, QuantizedTensor

_GATE = re.compile(
    r"((?:model\.|language_model\.model\.|model\.language_model\.)?layers\.(\d+)\."
    r"(?:mlp|ffn|block_sparse_moe)\.)experts\.(\d+)\.(gate_proj|w1)\.(weight|weight_packed)"
)
PROJECTIONS = {"gate_proj": ("gate_proj", "up_proj", "down_proj"), "w1": ("w1", "w3", "w2")}


@dataclasses.dataclass(frozen=True)
class ExpertNames:
    """The names of a layer's experts.

    Attributes:
      prefix: up to the block, the last dot included.
      projections: those of gate, up and down.
      num_experts: E; there is a gate of each of 0..E-1.
    """

    prefix: str
    projections: tuple[str, str, str]
    num_experts: int

    def projection(self, expert: int, which: int) -> str:
        """The name of gate (0), up (1) or down (2) of an expert, without its part."""
        return f"{self.prefix}experts.{expert}.{self.projections[which]}"


_CACHE: weakref.WeakKeyDictionary[CheckpointFiles, dict[int, ExpertNames]] = (
    weakref.WeakKeyDictionary()
)


def expert_names(files: CheckpointFiles) -> dict[int, ExpertNames]:
    """The layers with a matrix per expert and projection, by number, rising.

    Raises:
      ValueError: a layer's experts are not 0..E-1.
    """
    if files not in _CACHE:
        _CACHE[files] = _scan(files)
    return _CACHE[files]


def _scan(files: CheckpointFiles) -> dict[int, ExpertNames]:
    found: dict[int, tuple[str, str, set[int]]] = {}
    for name in files.names:
        if match := _GATE.fullmatch(name):
            prefix, layer, expert, gate, _ = match.groups()
            found.setdefault(int(layer), (prefix, gate, set()))[2].add(int(expert))
    layers = {}
    for layer, (prefix, gate, experts) in sorted(found.items()):
        if missing := set(range(max(experts) + 1)) - experts:
            raise ValueError(
                f"{files.path}: layer {layer} has experts up to {max(experts)} but no"
                f" {prefix}experts.{min(missing)}.{gate}; download the checkpoint again."
            )
        layers[layer] = ExpertNames(prefix, PROJECTIONS[gate], len(experts))
    return layers


class PerExpert(DiskFormat):
    """Base of these formats: every projection has ``codes`` and ``scales``, [N, K] in 4 bits.

    Attributes:
      codes: the part that holds the codes, with its dtypes.
      scales: the same of the scales.
      numbers: parts that are one F32 number each.
      codes_per_item: codes in an item of the codes' dtype.
      group_sizes: the legal numbers of codes to a scale.
      other_parts: what a projection may have beside these, and is not needed.
      refused_parts: what it must not have, and why.
    """

    codes: tuple[str, tuple[str, ...]]
    scales: tuple[str, tuple[str, ...]]
    numbers: tuple[str, ...] = ()
    codes_per_item: int = 2
    group_sizes: tuple[int, ...] = (32,)
    other_parts: tuple[str, ...] = ()
    refused_parts: ClassVar[dict[str, str]] = {}

    @abc.abstractmethod
    def weight_format(self, group_size: int) -> WeightFormat:
        """What the codes are, with scales per so many."""

    @abc.abstractmethod
    def canonical(self, codes: np.ndarray, scales: np.ndarray, *numbers: Any) -> tuple[Any, Any]:
        """Codes, scales and numbers of a projection as stored -> canonical codes and scales."""

    def layers(self, files: CheckpointFiles) -> tuple[int, ...]:
        """Those with names of this pattern, if the first expert's gate looks like this format."""
        layers = expert_names(files)
        if not layers:
            return ()
        first = next(iter(layers.values())).projection(0, 0)
        for part, dtypes in (self.codes, self.scales):
            name = f"{first}.{part}"
            if name not in files.names or files.info(name).dtype not in dtypes:
                return ()
        return tuple(layers)

    def layer(
        self, files: CheckpointFiles, layer: int, quantize: WeightFormat | None = None
    ) -> LayerOnDisk:
        """See :meth:`DiskFormat.layer`."""
        require_layer(files, self.layers(files), layer)
        names = expert_names(files)[layer]
        first = files.info(f"{names.projection(0, 0)}.{self.codes[0]}")
        require_dtype(first, self.codes[1], self.name)
        require_matrix(first)
        intermediate, hidden = first.shape[0], first.shape[1] * self.codes_per_item
        group_size = self._group_size(files, names, hidden)
        require_sizes(first, names.num_experts, hidden, intermediate, group_size)
        why = f"{first.name} is {first.shape}"
        for expert in range(names.num_experts):
            for which, (rows, columns) in enumerate(matrices(hidden, intermediate)):
                name = names.projection(expert, which)
                self._refuse_parts(files, name)
                for (part, dtypes), width in (
                    (self.codes, columns // self.codes_per_item),
                    (self.scales, columns // group_size),
                ):
                    info = files.info(f"{name}.{part}")
                    require_dtype(info, dtypes, self.name)
                    require_shape(info, (rows, width), why)
                for part in self.numbers:
                    require_number(files.info(f"{name}.{part}"), self.name)
        return LayerOnDisk(
            layer,
            names.prefix,
            names.num_experts,
            hidden,
            intermediate,
            chosen_format(files, self.name, self.weight_format(group_size), quantize),
        )

    def read_expert(
        self, files: CheckpointFiles, on_disk: LayerOnDisk, expert: int
    ) -> ExpertWeights:
        """See :meth:`DiskFormat.read_expert`."""
        names = expert_names(files)[on_disk.layer]

        def tensor(*projections: int) -> QuantizedTensor:
            parts: list[tuple[Any, Any]] = []
            for which in projections:
                name = names.projection(expert, which)
                rows = (files.read(f"{name}.{part[0]}") for part in (self.codes, self.scales))
                numbers = (files.read(f"{name}.{part}").reshape(())[()] for part in self.numbers)
                parts.append(self.canonical(*rows, *numbers))
            codes: Any
            scales: Any
            codes, scales = map(np.concatenate, zip(*parts, strict=True))
            return QuantizedTensor(codes[None], scales[None], on_disk.format)

        return ExpertWeights(tensor(0, 1), tensor(2))

    def replaced(self, files: CheckpointFiles, on_disk: LayerOnDisk) -> set[str]:
        """See :meth:`DiskFormat.replaced`."""
        parts = (self.codes[0], self.scales[0], *self.numbers, *self.other_parts)
        return expert_tensors(files, on_disk, parts)

    def sources(self, files: CheckpointFiles, on_disk: LayerOnDisk, expert: int) -> str:
        """See :meth:`DiskFormat.sources`."""
        return expert_sources(files, on_disk, expert, self.codes[0])

    def _group_size(self, files: CheckpointFiles, names: ExpertNames, hidden: int) -> int:
        scales = files.info(f"{names.projection(0, 0)}.{self.scales[0]}")
        require_matrix(scales)
        group_size = -(-hidden // scales.shape[1])
        if group_size not in self.group_sizes:
            legal = " or ".join(map(str, self.group_sizes))
            raise ValueError(
                f"{scales} has shape {scales.shape}, a scale per {group_size} of K={hidden}; the"
                f" {self.name} layout has one per {legal}."
            )
        return group_size

    def _refuse_parts(self, files: CheckpointFiles, projection: str) -> None:
        for part, why in self.refused_parts.items():
            if f"{projection}.{part}" in files.names:
                raise NotImplementedError(f"{files.path}: {projection}.{part} {why}.")


def require_number(info: TensorInfo, layout: str) -> None:
    """Refuses what is not one F32."""
    require_dtype(info, ("F32",), layout)
    if info.shape not in ((), (1,)):
        raise ValueError(f"{info} has shape {info.shape}, need one number; download it again.")


def matrices(hidden: int, intermediate: int) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of gate, up and down."""
    return (intermediate, hidden), (intermediate, hidden), (hidden, intermediate)


def expert_tensors(files: CheckpointFiles, on_disk: LayerOnDisk, parts: Sequence[str]) -> set[str]:
    """The names of some parts of all projections of all experts that there are."""
    names = expert_names(files)[on_disk.layer]
    every = (
        f"{names.projection(expert, which)}.{part}"
        for expert in range(names.num_experts)
        for which in range(3)
        for part in parts
    )
    return {name for name in every if name in files.names}


def expert_sources(files: CheckpointFiles, on_disk: LayerOnDisk, expert: int, part: str) -> str:
    """The files and tensors of an expert's gate, up and down."""
    names = expert_names(files)[on_disk.layer]
    gate, up, down = (files.info(f"{names.projection(expert, i)}.{part}") for i in range(3))
    return f"w13 from {gate} and {up}; w2 from {down}"


def chosen_format(
    files: CheckpointFiles, layout: str, stored: WeightFormat, quantize: WeightFormat | None
) -> WeightFormat:
    """What experts of 4 bits are packed as: as they are stored, or what takes that as it is."""
    if quantize is not None and quantize.takes(stored):
        return quantize
    refuse_quantize(files, layout, quantize)
    return stored


def refuse_quantize(files: CheckpointFiles, layout: str, quantize: WeightFormat | None) -> None:
    """Refuses to quantise what is quantised."""
    if quantize is not None:
        raise ValueError(
            f"quantize={quantize!r}, but the experts of {files.path} are stored in 4 bits"
            f" ({layout}); leave quantize out."
        )
