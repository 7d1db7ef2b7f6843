"""The gpt-oss export in MXFP4, under Hugging Face's names and under OpenAI's own.

Layer L lies under ``model.layers.{L}.mlp.``, in ``original/`` under ``block.{L}.mlp.``:

    experts.gate_up_proj_blocks  mlp1_weight.blocks  U8    [E, 2I, H/32, 16]; row 2j is gate j,
                                                           row 2j+1 up j; low nibble first
    experts.gate_up_proj_scales  mlp1_weight.scales  U8    [E, 2I, H/32], E8M0
    experts.gate_up_proj_bias    mlp1_bias           BF16  [E, 2I], interleaved like the rows
    experts.down_proj_blocks     mlp2_weight.blocks  U8    [E, H, I/32, 16]
    experts.down_proj_scales     mlp2_weight.scales  U8    [E, H, I/32]
    experts.down_proj_bias       mlp2_bias           BF16  [E, H]
    router.weight, router.bias   gate.weight, .bias  BF16  [E, H], [E]
"""

import re
from typing import Any, NamedTuple

import einops
import numpy as np

from jax_w4moe.checkpoint.base import (
    DiskFormat,
    LayerOnDisk,
    register,
    require_dtype,
    require_layer,
    require_shape,
    require_sizes,
)
from jax_w4moe.checkpoint.files import CONFIG_FILE, CheckpointFiles
from jax_w4moe.checkpoint.per_expert import chosen_format
from jax_w4moe.formats import MXFP4, WeightFormat
from jax_w4moe.types import ExpertWeights, QuantizedTensor

MODEL_TYPE = "gpt_oss"
PREFIX = "model.layers.{layer}.mlp."
_BLOCK_BYTES = MXFP4.group_size // 2


class _Projection(NamedTuple):
    """The names of a projection's tensors under the layer's prefix, or their headers."""

    blocks: Any
    scales: Any
    bias: Any


class GptOss(DiskFormat):
    """The layout above, with one of its columns of names."""

    model_type = MODEL_TYPE
    logit_bias = ("router.bias", "gate.bias")
    selection_bias = ()

    def __init__(
        self, name: str, prefix: str, router: str, gate_up: _Projection, down: _Projection
    ) -> None:
        self.name = name
        self.router = (router,)
        self._prefix = prefix
        self._gate_up, self._down = gate_up, down
        first = re.escape(prefix + gate_up.blocks).replace(re.escape("{layer}"), r"(\d+)")
        self._first_tensor = re.compile(first)

    def layers(self, files: CheckpointFiles) -> tuple[int, ...]:
        """The layers that have blocks of gate and up."""
        matches = map(self._first_tensor.fullmatch, files.names)
        return tuple(sorted(int(match[1]) for match in matches if match))

    def layer(
        self, files: CheckpointFiles, layer: int, quantize: WeightFormat | None = None
    ) -> LayerOnDisk:
        """See :meth:`DiskFormat.layer`."""
        format = chosen_format(files, self.name, MXFP4, quantize)
        require_layer(files, self.layers(files), layer)
        self._check_model_type(files)
        prefix = self._prefix.format(layer=layer)
        gate_up, down = (
            _Projection(*(files.info(prefix + name) for name in names))
            for names in (self._gate_up, self._down)
        )
        for info in (*gate_up, *down):
            legal = ("BF16",) if info in (gate_up.bias, down.bias) else ("U8",)
            require_dtype(info, legal, self.name)
        blocks = gate_up.blocks
        if len(blocks.shape) != 4 or blocks.shape[-1] != _BLOCK_BYTES or 0 in blocks.shape:
            raise ValueError(
                f"{blocks} has shape {blocks.shape}, need [E, 2I, H/32, 16] with no axis of size 0;"
                " download the checkpoint again or correct what wrote it."
            )
        num_experts, two_i, hidden_groups, _ = blocks.shape
        multiple = 2 * MXFP4.group_size
        if two_i % multiple:
            raise ValueError(
                f"{blocks} has {two_i} rows, need 2I with I a multiple of {MXFP4.group_size};"
                f" zero-pad each expert to {-(-two_i // multiple) * multiple} rows."
            )
        hidden, intermediate = hidden_groups * MXFP4.group_size, two_i // 2
        require_sizes(blocks, num_experts, hidden, intermediate, MXFP4.group_size)
        groups = intermediate // MXFP4.group_size
        for info, shape in (
            (gate_up.scales, (num_experts, two_i, hidden_groups)),
            (gate_up.bias, (num_experts, two_i)),
            (down.blocks, (num_experts, hidden, groups, _BLOCK_BYTES)),
            (down.scales, (num_experts, hidden, groups)),
            (down.bias, (num_experts, hidden)),
        ):
            require_shape(info, shape, f"{blocks.name} is {blocks.shape}")
        return LayerOnDisk(layer, prefix, num_experts, hidden, intermediate, format, True)

    def read_expert(
        self, files: CheckpointFiles, on_disk: LayerOnDisk, expert: int
    ) -> ExpertWeights:
        """See :meth:`DiskFormat.read_expert`."""

        def parts(names: _Projection) -> list[Any]:
            blocks, scales, bias = (files.read(on_disk.prefix + n, expert) for n in names)
            return [einops.rearrange(blocks, "e n g byte -> e n (g byte)"), scales, bias]

        gate_up: list[Any] = [
            np.ascontiguousarray(einops.rearrange(part, "e (i half) ... -> e (half i) ...", half=2))
            for part in parts(self._gate_up)
        ]
        down = parts(self._down)
        return ExpertWeights(
            QuantizedTensor(gate_up[0], gate_up[1], on_disk.format),
            QuantizedTensor(down[0], down[1], on_disk.format),
            gate_up[2],
            down[2],
        )

    def replaced(self, files: CheckpointFiles, on_disk: LayerOnDisk) -> set[str]:
        """See :meth:`DiskFormat.replaced`."""
        return {on_disk.prefix + name for name in (*self._gate_up, *self._down)}

    def sources(self, files: CheckpointFiles, on_disk: LayerOnDisk, expert: int) -> str:
        """See :meth:`DiskFormat.sources`."""
        gate_up = files.info(on_disk.prefix + self._gate_up.blocks)
        down = files.info(on_disk.prefix + self._down.blocks)
        return f"w13 from {gate_up}, gate rows first; w2 from {down}"

    def _check_model_type(self, files: CheckpointFiles) -> None:
        model_type = files.setting("model_type")
        if model_type not in (None, MODEL_TYPE):
            raise NotImplementedError(
                f"{files.folder / CONFIG_FILE}: model_type={model_type!r} with tensors named as in"
                f" gpt-oss; only {MODEL_TYPE!r} is known to interleave gate and up rows: correct"
                " model_type if these rows are interleaved too."
            )


GPT_OSS = register(
    GptOss(
        "gpt-oss MXFP4",
        PREFIX,
        "router.weight",
        _Projection(*(f"experts.gate_up_proj_{part}" for part in _Projection._fields)),
        _Projection(*(f"experts.down_proj_{part}" for part in _Projection._fields)),
    )
)
GPT_OSS_ORIGINAL = register(
    GptOss(
        "gpt-oss original MXFP4",
        "block.{layer}.mlp.",
        "gate.weight",
        _Projection("mlp1_weight.blocks", "mlp1_weight.scales", "mlp1_bias"),
        _Projection("mlp2_weight.blocks", "mlp2_weight.scales", "mlp2_bias"),
    )
)
