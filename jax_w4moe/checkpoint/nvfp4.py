"""NVFP4 experts (modelopt, compressed-tensors): known, so that they are refused by name.

E2M1 codes with E4M3 scales per 16 and an f32 scale per matrix: their products are not exact in any
format that the kernels have.
"""

from typing import NoReturn

from jax_w4moe.checkpoint.base import DiskFormat, LayerOnDisk, register
from jax_w4moe.checkpoint.files import CheckpointFiles
from jax_w4moe.checkpoint.per_expert import expert_names
from jax_w4moe.formats import WeightFormat
from jax_w4moe.types import ExpertWeights


class Nvfp4(DiskFormat):
    """Found by its scales' dtype."""

    name = "NVFP4"

    def layers(self, files: CheckpointFiles) -> tuple[int, ...]:
        """Those with U8 codes and E4M3 scales."""
        layers = expert_names(files)
        if not layers:
            return ()
        name = next(iter(layers.values())).projection(0, 0) + ".weight_scale"
        is_nvfp4 = name in files.names and files.info(name).dtype == "F8_E4M3"
        return tuple(layers) if is_nvfp4 else ()

    def layer(
        self, files: CheckpointFiles, layer: int, quantize: WeightFormat | None = None
    ) -> LayerOnDisk:
        """Refuses."""
        self._refuse(files)

    def read_expert(
        self, files: CheckpointFiles, on_disk: LayerOnDisk, expert: int
    ) -> ExpertWeights:
        """Refuses."""
        self._refuse(files)

    def sources(self, files: CheckpointFiles, on_disk: LayerOnDisk, expert: int) -> str:
        """Refuses."""
        self._refuse(files)

    def _refuse(self, files: CheckpointFiles) -> NoReturn:
        raise NotImplementedError(
            f"{files.path}: the experts are {self.name} (E4M3 scales per 16), which this version"
            " has no kernel for; load the model's bf16 or FP8 checkpoint with quantize=, or one in"
            " MXFP4 or INT4."
        )


NVFP4_EXPERTS = register(Nvfp4())
