"""Experts that are packed already, as ``python -m jax_w4moe convert`` writes them.

A layer's experts take the place of the tensors they were read from, under the same prefix; all
other tensors of the checkpoint keep their names:

    experts.w13       U8   [E, row blocks, K blocks, record bytes]
    experts.w2        U8   the same
    experts.w13_bias  F32  [E, row blocks, 64], with biases only
    experts.w2_bias   F32  [E, H]

in one file per layer, whose metadata says format, sizes and layout version. No mesh is in it.
"""

import dataclasses
import json
import re
from typing import Any

import numpy as np

from jax_w4moe import checks
from jax_w4moe.checkpoint.base import (
    DiskFormat,
    LayerOnDisk,
    by_name,
    register,
    require_dtype,
    require_layer,
    require_shape,
)
from jax_w4moe.checkpoint.files import CheckpointFiles
from jax_w4moe.checkpoint.per_expert import refuse_quantize
from jax_w4moe.formats import LAYOUT_VERSION, WeightFormat, formats
from jax_w4moe.packing import abstract_experts
from jax_w4moe.types import PackedExperts

METADATA_KEY = "jax_w4moe"
_W13 = re.compile(r"((?:.+\.)?(?:layers|block)\.(\d+)\.(?:.+\.)?)experts\.w13")
_DTYPES = {"uint8": "U8", "float32": "F32"}


class Packed(DiskFormat):
    """The layout above."""

    name = "packed by jax_w4moe"

    def source(self, files: CheckpointFiles) -> DiskFormat:
        """The format that was converted."""
        prefix = next(iter(_prefixes(files).values()))
        return by_name(_settings(files, f"{prefix}experts.w13")["source"])

    def layers(self, files: CheckpointFiles) -> tuple[int, ...]:
        """The layers that have a packed w13."""
        return tuple(sorted(_prefixes(files)))

    def layer(
        self, files: CheckpointFiles, layer: int, quantize: WeightFormat | None = None
    ) -> LayerOnDisk:
        """See :meth:`DiskFormat.layer`."""
        refuse_quantize(files, self.name, quantize)
        require_layer(files, self.layers(files), layer)
        prefix = _prefixes(files)[layer]
        settings = _settings(files, f"{prefix}experts.w13")
        weight_formats = {weight_format.name: weight_format for weight_format in formats()}
        on_disk = LayerOnDisk(
            layer,
            prefix,
            settings["num_experts"],
            settings["hidden_size"],
            settings["intermediate_size"],
            weight_formats[settings["format"]],
            settings["has_bias"],
        )
        for name, leaf in named_arrays(_abstract(on_disk)).items():
            info = files.info(f"{prefix}experts.{name}")
            require_dtype(info, (_DTYPES[leaf.dtype.name],), self.name)
            require_shape(info, leaf.shape, f"its layer is {settings}")
        return on_disk

    def read_expert(
        self, files: CheckpointFiles, on_disk: LayerOnDisk, expert: int
    ) -> PackedExperts:
        """See :meth:`DiskFormat.read_expert`."""
        one = _abstract(dataclasses.replace(on_disk, num_experts=1))
        arrays = {
            name: files.read(f"{on_disk.prefix}experts.{name}", expert)
            for name in named_arrays(one)
        }
        exact: Any = np.zeros(1, np.int32)  # what is not, no converter has written
        return PackedExperts(
            dataclasses.replace(one.w13, data=arrays["w13"], inexact_groups=exact),
            dataclasses.replace(one.w2, data=arrays["w2"], inexact_groups=exact),
            arrays.get("w13_bias"),
            arrays.get("w2_bias"),
        )

    def sources(self, files: CheckpointFiles, on_disk: LayerOnDisk, expert: int) -> str:
        """See :meth:`DiskFormat.sources`."""
        return str(files.info(f"{on_disk.prefix}experts.w13"))


def named_arrays(experts: PackedExperts) -> dict[str, Any]:
    """What is stored of packed experts, by name."""
    arrays = {
        "w13": experts.w13.data,
        "w2": experts.w2.data,
        "w13_bias": experts.w13_bias,
        "w2_bias": experts.w2_bias,
    }
    return {name: array for name, array in arrays.items() if array is not None}


def metadata(source: DiskFormat, on_disk: LayerOnDisk) -> dict[str, str]:
    """A file's metadata: one key, since the order of several is not the same in every run."""
    settings = {
        "layout_version": LAYOUT_VERSION,
        "source": source.name,
        "format": on_disk.format.name,
        "num_experts": on_disk.num_experts,
        "hidden_size": on_disk.hidden_size,
        "intermediate_size": on_disk.intermediate_size,
        "has_bias": on_disk.has_bias,
    }
    return {METADATA_KEY: json.dumps(settings)}


def _settings(files: CheckpointFiles, name: str) -> dict[str, Any]:
    info = files.info(name)
    text = files.metadata(info.file).get(METADATA_KEY)
    if text is None:
        raise ValueError(
            f"{info} has no metadata {METADATA_KEY!r} beside it; convert the checkpoint again."
        )
    settings: dict[str, Any] = json.loads(text)
    checks.layout_version(str(info), settings["layout_version"])
    return settings


def _prefixes(files: CheckpointFiles) -> dict[int, str]:
    matches = map(_W13.fullmatch, files.names)
    return {int(match[2]): match[1] for match in matches if match}


def _abstract(on_disk: LayerOnDisk) -> PackedExperts:
    return abstract_experts(
        on_disk.format,
        on_disk.num_experts,
        on_disk.hidden_size,
        on_disk.intermediate_size,
        bias=on_disk.has_bias,
    )


PACKED = register(Packed())
