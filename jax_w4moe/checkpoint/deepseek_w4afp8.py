"""DeepSeek-R1 and V3 in W4AFP8: INT4 experts with a scale per 128, and scales of the activations.

Under ``model.layers.{L}.mlp.experts.{e}.``:

    {gate,up,down}_proj.weight             I8   [N, K/2], two's complement, low nibble first
    {gate,up,down}_proj.weight_scale_inv   F32  [N, K/128]; a weight is code * scale, "inv" or not
    w{1,2,3}.input_scale                   F32 or BF16, one number: the largest activation / 448

The activations of a projection have one scale for all experts: the largest of the stored ones.
"""

from typing import Any

import numpy as np

from jax_w4moe.checkpoint.base import LayerOnDisk, register, require_dtype
from jax_w4moe.checkpoint.files import CheckpointFiles
from jax_w4moe.checkpoint.per_expert import PerExpert
from jax_w4moe.formats import INT4_G128, WeightFormat
from jax_w4moe.quantization import Static

_FLOATS = ("F32", "BF16")
_LARGEST_DIFFERENCE = 1e-5  # of w1's and w3's scales, which belong to one tensor


class DeepseekW4AFP8(PerExpert):
    """The layout above."""

    name = "DeepSeek W4AFP8"
    codes = ("weight", ("I8",))
    scales = ("weight_scale_inv", _FLOATS)
    group_sizes = (128,)

    def weight_format(self, group_size: int) -> WeightFormat:
        """INT4_G128."""
        return INT4_G128

    def canonical(self, codes: np.ndarray, scales: np.ndarray, *numbers: Any) -> tuple[Any, Any]:
        """The same codes; scales in f32."""
        return codes.view(np.uint8), scales.astype(np.float32)

    def read_act_scale(self, files: CheckpointFiles, on_disk: LayerOnDisk) -> Static | None:
        """See :meth:`DiskFormat.read_act_scale`; reads the scales of all experts."""
        names = {
            (expert, which): f"{on_disk.prefix}experts.{expert}.{which}.input_scale"
            for expert in range(on_disk.num_experts)
            for which in ("w1", "w2", "w3")
        }
        stored = [key for key, name in names.items() if name in files.names]
        if not stored:
            return None
        values = {key: _number(files, name) for key, name in names.items()}
        for expert in range(on_disk.num_experts):
            gate, up = values[expert, "w1"], values[expert, "w3"]
            if abs(gate - up) > _LARGEST_DIFFERENCE:
                raise ValueError(
                    f"{files.path}: {names[expert, 'w1']} is {gate} and that of w3 {up}, but both"
                    f" scale the same activations, need at most {_LARGEST_DIFFERENCE} between them;"
                    " calibrate the checkpoint again."
                )
        largest = {"w1": 0.0, "w2": 0.0, "w3": 0.0}
        for (_, which), value in values.items():
            largest[which] = max(largest[which], value)
        return Static(x_scale=max(largest["w1"], largest["w3"]), h_scale=largest["w2"])


def _number(files: CheckpointFiles, name: str) -> float:
    info = files.info(name)
    require_dtype(info, _FLOATS, DeepseekW4AFP8.name)
    if info.shape not in ((), (1,)):
        raise ValueError(f"{info} has shape {info.shape}, need one number; download it again.")
    value = float(files.read(name).astype(np.float32).reshape(()))
    if not 0 < value < np.inf:
        raise ValueError(f"{info} is {value}, need a positive number; calibrate it again.")
    return value


DEEPSEEK_W4AFP8 = register(DeepseekW4AFP8())
