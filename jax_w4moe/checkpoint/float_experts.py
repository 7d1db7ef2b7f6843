"""Float experts, quantised while they are loaded: bf16, or FP8 with a scale per block.

    {gate,up,down}_proj.weight            BF16, F16 or F32  [N, K]
    or .weight                            F8_E4M3           [N, K]
       .weight_scale_inv or .scale        F32 or F8_E8M0    [ceil N/rows, ceil K/columns]

with (rows, columns) from ``quantization_config.weight_block_size``, 128 by 128 if it is not there;
a weight is the stored value times its block's scale.
"""

import numpy as np

from jax_w4moe.checkpoint.base import (
    DiskFormat,
    Kernels,
    LayerOnDisk,
    register,
    require_dtype,
    require_layer,
    require_matrix,
    require_shape,
    require_sizes,
)
from jax_w4moe.checkpoint.files import CONFIG_FILE, CheckpointFiles
from jax_w4moe.checkpoint.per_expert import (
    expert_names,
    expert_sources,
    expert_tensors,
    matrices,
)
from jax_w4moe.formats import WeightFormat

FLOATS = ("BF16", "F16", "F32")
_FP8 = "F8_E4M3"
_SCALE_PARTS = ("weight_scale_inv", "scale")
_SCALES = ("F32", "F8_E8M0", "BF16")
_DEFAULT_BLOCK = (128, 128)


class FloatExperts(DiskFormat):
    """The layout above."""

    name = "bf16 or FP8 experts"
    is_float = True

    def layers(self, files: CheckpointFiles) -> tuple[int, ...]:
        """Those with names of this pattern, if the first expert's gate is float."""
        layers = expert_names(files)
        if not layers:
            return ()
        name = next(iter(layers.values())).projection(0, 0) + ".weight"
        is_float = name in files.names and files.info(name).dtype in (*FLOATS, _FP8)
        return tuple(layers) if is_float else ()

    def layer(
        self, files: CheckpointFiles, layer: int, quantize: WeightFormat | None = None
    ) -> LayerOnDisk:
        """See :meth:`DiskFormat.layer`."""
        require_layer(files, self.layers(files), layer)
        names = expert_names(files)[layer]
        first = files.info(names.projection(0, 0) + ".weight")
        require_matrix(first)
        if "fp4" in (files.setting("expert_dtype"), files.quantization.get("expert_dtype")):
            raise ValueError(
                f"{files.folder / CONFIG_FILE}: expert_dtype='fp4', but {first} is {first.dtype};"
                " take config.json and the tensors from the same checkpoint."
            )
        if quantize is None:
            raise ValueError(
                f"{first} is {first.dtype}, not 4 bits; pass quantize=MXFP4 (or another format) to"
                " round the experts to 4 bits while they are loaded."
            )
        intermediate, hidden = first.shape
        require_sizes(first, names.num_experts, hidden, intermediate, quantize.group_size)
        for expert in range(names.num_experts):
            for which, shape in enumerate(matrices(hidden, intermediate)):
                check_float(files, names.projection(expert, which), shape, f"H={hidden}")
        return LayerOnDisk(layer, names.prefix, names.num_experts, hidden, intermediate, quantize)

    def read_expert(self, files: CheckpointFiles, on_disk: LayerOnDisk, expert: int) -> Kernels:
        """See :meth:`DiskFormat.read_expert`."""
        names = expert_names(files)[on_disk.layer]
        gate, up, down = (read_float(files, names.projection(expert, i))[None] for i in range(3))
        return Kernels(gate, up, down)

    def replaced(self, files: CheckpointFiles, on_disk: LayerOnDisk) -> set[str]:
        """See :meth:`DiskFormat.replaced`."""
        return expert_tensors(files, on_disk, ("weight", *_SCALE_PARTS))

    def sources(self, files: CheckpointFiles, on_disk: LayerOnDisk, expert: int) -> str:
        """See :meth:`DiskFormat.sources`."""
        return expert_sources(files, on_disk, expert, "weight")


def check_float(files: CheckpointFiles, name: str, shape: tuple[int, int], why: str) -> None:
    """Checks the header of a float matrix, and of its scales if it is FP8."""
    info = files.info(f"{name}.weight")
    require_dtype(info, (*FLOATS, _FP8), FloatExperts.name)
    require_shape(info, shape, why)
    if info.dtype == _FP8:
        block = block_size(files)
        scales = files.info(f"{name}.{_scale_part(files, name)}")
        require_dtype(scales, _SCALES, FloatExperts.name)
        grid = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
        require_shape(scales, grid, f"{info.name} is {shape} with a scale per {block}")


def read_float(files: CheckpointFiles, name: str) -> np.ndarray:
    """Reads a checked float matrix: f32[N, K], exact for bf16, one rounding for FP8 with f32."""
    weight = files.read(f"{name}.weight")
    values: np.ndarray = weight.astype(np.float32)
    if files.info(f"{name}.weight").dtype == _FP8:
        block = block_size(files)
        scales = files.read(f"{name}.{_scale_part(files, name)}").astype(np.float32)
        grid = np.repeat(np.repeat(scales, block[0], axis=0), block[1], axis=1)
        values *= grid[: values.shape[0], : values.shape[1]]
    return values


def block_size(files: CheckpointFiles) -> tuple[int, int]:
    """(rows, columns) of an FP8 matrix that share a scale, from the config.

    Raises:
      ValueError: it is not a pair of positive integers.
    """
    settings = files.quantization.get("weight_block_size", list(_DEFAULT_BLOCK))
    if (
        not isinstance(settings, list)
        or len(settings) != 2
        or not all(type(size) is int and size > 0 for size in settings)
    ):
        raise ValueError(
            f"{files.folder / CONFIG_FILE}: weight_block_size={settings!r}, need [rows, columns];"
            " correct it."
        )
    return settings[0], settings[1]


def _scale_part(files: CheckpointFiles, name: str) -> str:
    for part in _SCALE_PARTS:
        if f"{name}.{part}" in files.names:
            return part
    return _SCALE_PARTS[0]  # which info() then says is missing


FLOAT_EXPERTS = register(FloatExperts())
