"""What an MoE block has beside its experts: a router, shared experts, projections to a latent.

gate.weight or router.weight              BF16, F16 or F32  [E, H]
router.bias                               the same          [E], added to the logits
gate.e_score_correction_bias, gate.bias   the same          [E], for the choice only
gate.tid2eid                              I32 or I64        [V, k], the experts of a token id
shared_experts.{gate,up,down}_proj or .w{1,3,2}             [S, H], [S, H], [H, S], bf16 or FP8
routed_expert_{down,up}_proj.weight, routed_expert_norm.weight   [L, H], [H, L], [L] (Kimi K3)
"""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jax_w4moe.checkpoint.base import (
    DiskFormat,
    LayerOnDisk,
    require_dtype,
    require_matrix,
    require_shape,
)
from jax_w4moe.checkpoint.files import CheckpointFiles, TensorInfo
from jax_w4moe.checkpoint.float_experts import FLOATS, check_float, read_float
from jax_w4moe.checkpoint.per_expert import PROJECTIONS

_INTEGERS = ("I32", "I64")
_TABLE = "gate.tid2eid"
_EPSILON = 1e-6


class Router(NamedTuple):
    """A router as stored.

    Attributes:
      weight: float[E, H].
      bias: float[E] added to the logits, or None.
      selection_bias: float[E] that counts for the choice of experts only, or None.
      table: i32[V, k], the experts of every token id (hash routing), or None.
    """

    weight: Any
    bias: Any = None
    selection_bias: Any = None
    table: Any = None


class SharedExpert(NamedTuple):
    """The expert that every token has, in bf16: [S, H], [S, H] and [H, S]."""

    w_gate: Any
    w_up: Any
    w_down: Any


class Latent(NamedTuple):
    """What lies around experts of a smaller hidden size L, in bf16.

    Attributes:
      down: [L, H], before the experts.
      norm: [L], the weight of an RMSNorm of their sum, or None.
      up: [H, L], after that.
      epsilon: of the norm.
    """

    down: Any
    norm: Any
    up: Any
    epsilon: float


def read_router(files: CheckpointFiles, disk_format: DiskFormat, on_disk: LayerOnDisk) -> Router:
    """Checks and reads a layer's router.

    Raises:
      ValueError, TypeError: a tensor that is missing or does not fit; an expert in a table that
        there is not.
    """
    num_experts, hidden = on_disk.num_experts, hidden_size(files, on_disk)
    names = [
        _first(files, on_disk, disk_format.router) or on_disk.prefix + disk_format.router[0],
        _first(files, on_disk, disk_format.logit_bias),
        _first(files, on_disk, disk_format.selection_bias),
    ]
    shapes = ((num_experts, hidden), (num_experts,), (num_experts,))
    for name, shape in zip(names, shapes, strict=True):
        if name is not None:
            info = files.info(name)
            require_dtype(info, FLOATS, disk_format.name)
            require_shape(info, shape, f"the experts are E={num_experts}, H={hidden}")
    weight, bias, selection_bias = (None if name is None else files.read(name) for name in names)
    return Router(weight, bias, selection_bias, _read_table(files, on_disk))


def read_shared_expert(files: CheckpointFiles, on_disk: LayerOnDisk) -> SharedExpert | None:
    """Checks and reads a layer's shared experts, which lie in files as one; None without them.

    Raises:
      ValueError, TypeError: a tensor that is missing or does not fit.
    """
    prefix = on_disk.prefix + "shared_experts."
    for names in PROJECTIONS.values():
        gate, up, down = (prefix + name for name in names)
        if f"{gate}.weight" not in files.names:
            continue
        info = files.info(f"{gate}.weight")
        require_matrix(info)
        size, hidden = info.shape[0], hidden_size(files, on_disk)
        why = f"{info.name} is {info.shape} and H={hidden}"
        for name, shape in ((gate, (size, hidden)), (up, (size, hidden)), (down, (hidden, size))):
            check_float(files, name, shape, why)
        return SharedExpert(*(_bf16(read_float(files, name)) for name in (gate, up, down)))
    return None


def read_latent(files: CheckpointFiles, on_disk: LayerOnDisk) -> Latent | None:
    """Checks and reads the projections around latent experts; None without them.

    Raises:
      ValueError, TypeError: a tensor that is missing or does not fit.
    """
    down, norm, up = (
        f"{on_disk.prefix}routed_expert_{name}" for name in ("down_proj", "norm", "up_proj")
    )
    if f"{down}.weight" not in files.names:
        return None
    latent, hidden = on_disk.hidden_size, hidden_size(files, on_disk)
    why = f"the experts see {latent} of H={hidden}"
    check_float(files, down, (latent, hidden), why)
    check_float(files, up, (hidden, latent), why)
    has_norm = f"{norm}.weight" in files.names
    if has_norm:
        info = files.info(f"{norm}.weight")
        require_dtype(info, FLOATS, "bf16")
        require_shape(info, (latent,), why)
    return Latent(
        _bf16(read_float(files, down)),
        files.read(f"{norm}.weight") if has_norm else None,
        _bf16(read_float(files, up)),
        float(files.setting("rms_norm_eps", _EPSILON)),
    )


def hidden_size(files: CheckpointFiles, on_disk: LayerOnDisk) -> int:
    """H of the tokens: the experts' own, but for latent experts."""
    name = f"{on_disk.prefix}routed_expert_down_proj.weight"
    if name not in files.names:
        return on_disk.hidden_size
    info: TensorInfo = files.info(name)
    require_matrix(info)
    return info.shape[1]


def _read_table(files: CheckpointFiles, on_disk: LayerOnDisk) -> np.ndarray | None:
    name = on_disk.prefix + _TABLE
    if name not in files.names:
        return None
    info = files.info(name)
    require_dtype(info, _INTEGERS, "hash routing")
    require_matrix(info)
    table = files.read(name)
    if table.min() < 0 or table.max() >= on_disk.num_experts:
        raise ValueError(
            f"{info} holds expert {table.min() if table.min() < 0 else table.max()}, need"
            f" 0..{on_disk.num_experts - 1}; download the checkpoint again."
        )
    return table.astype(np.int32)


def _first(files: CheckpointFiles, on_disk: LayerOnDisk, names: tuple[str, ...]) -> str | None:
    """The first of some names that the layer has."""
    found = (on_disk.prefix + name for name in names)
    return next((name for name in found if name in files.names), None)


def _bf16(array: np.ndarray) -> np.ndarray:
    return array.astype(ml_dtypes.bfloat16)
