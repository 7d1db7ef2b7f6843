"""The gpt-oss export in MXFP4: reading it, and writing small checkpoints of the same layout.

Layer L lies under ``model.layers.{L}.mlp.``; G = K/32 groups of 16 bytes, low nibble first:

    router.weight, router.bias        BF16  [E, H], [E]
    experts.gate_up_proj_blocks       U8    [E, 2I, H/32, 16]; row 2j is gate j, row 2j+1 is up j
    experts.gate_up_proj_scales       U8    [E, 2I, H/32], E8M0
    experts.gate_up_proj_bias         BF16  [E, 2I], interleaved like the rows
    experts.down_proj_blocks, _scales U8    [E, H, I/32, 16], [E, H, I/32]
    experts.down_proj_bias            BF16  [E, H]
"""

import re
from typing import Any

import einops
import jax
import jax.numpy as jnp
from jax import Array

from jax_w4moe import checks
from jax_w4moe.activations import SwiGLU
from jax_w4moe.checkpoint.base import (
    DiskFormat,
    LayerOnDisk,
    MoEConfig,
    register,
    require_layer,
)
from jax_w4moe.checkpoint.files import CONFIG_FILE, CheckpointFiles, TensorInfo
from jax_w4moe.formats import MXFP4
from jax_w4moe.types import ExpertWeights, QuantizedTensor

MODEL_TYPE = "gpt_oss"
ALPHA = 1.702  # the sigmoid's slope and the shift of the up projection are not in the config
BETA = 1.0
DEFAULT_LIMIT = 7.0

PREFIX = "model.layers.{layer}.mlp."
_FIRST_TENSOR = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.gate_up_proj_blocks")
_FLOATS = ("BF16", "F16", "F32")
_BLOCK_BYTES = MXFP4.group_size // 2


class GptOss(DiskFormat):
    """The gpt-oss layout, as in the table above."""

    name = "gpt-oss MXFP4"

    def layers(self, files: CheckpointFiles) -> tuple[int, ...]:
        """The layers that have gate_up_proj_blocks."""
        matches = (_FIRST_TENSOR.fullmatch(name) for name in files.names)
        return tuple(sorted(int(match[1]) for match in matches if match))

    def layer(self, files: CheckpointFiles, layer: int) -> LayerOnDisk:
        """See :meth:`DiskFormat.layer`."""
        require_layer(files, self.layers(files), layer)
        prefix = PREFIX.format(layer=layer) + "experts."
        infos = {
            (projection, part): files.info(f"{prefix}{projection}_{part}")
            for projection in ("gate_up_proj", "down_proj")
            for part in ("blocks", "scales", "bias")
        }
        for (_, part), info in infos.items():
            _require_dtype(info, ("BF16",) if part == "bias" else ("U8",))
        gate_up, down = infos["gate_up_proj", "blocks"], infos["down_proj", "blocks"]
        num_experts, two_i, hidden_groups, _ = _blocks_shape(gate_up, "[E, 2I, H/32, 16]")
        hidden, intermediate = hidden_groups * MXFP4.group_size, two_i // 2
        _require_even_rows(gate_up)
        expected = {
            ("gate_up_proj", "scales"): (num_experts, two_i, hidden_groups),
            ("gate_up_proj", "bias"): (num_experts, two_i),
            ("down_proj", "blocks"): (
                num_experts,
                hidden,
                intermediate // MXFP4.group_size,
                _BLOCK_BYTES,
            ),
            ("down_proj", "scales"): (num_experts, hidden, intermediate // MXFP4.group_size),
            ("down_proj", "bias"): (num_experts, hidden),
        }
        for key, shape in expected.items():
            _require_shape(infos[key], shape, f"{gate_up.name} is {gate_up.shape}")
        _check_config(files, num_experts, hidden, intermediate)
        return LayerOnDisk(
            layer,
            num_experts,
            hidden,
            intermediate,
            f"{gate_up.file}: {prefix}gate_up_proj",
            f"{down.file}: {prefix}down_proj",
        )

    def read_expert(
        self, files: CheckpointFiles, on_disk: LayerOnDisk, expert: int
    ) -> ExpertWeights:
        """See :meth:`DiskFormat.read_expert`."""
        prefix = PREFIX.format(layer=on_disk.layer) + "experts."

        def parts(projection: str) -> list[Array]:
            return [
                jnp.asarray(files.read(f"{prefix}{projection}_{part}", expert))
                for part in ("blocks", "scales", "bias")
            ]

        return _canonical(parts("gate_up_proj"), parts("down_proj"))

    def read_router(self, files: CheckpointFiles, layer: int) -> tuple[Array, Array | None]:
        """See :meth:`DiskFormat.read_router`."""
        on_disk = self.layer(files, layer)
        prefix = PREFIX.format(layer=layer) + "router."
        weight = files.info(prefix + "weight")
        _require_dtype(weight, _FLOATS)
        sizes = (on_disk.num_experts, on_disk.hidden_size)
        why = f"the experts are E={sizes[0]}, H={sizes[1]}"
        _require_shape(weight, sizes, why)
        bias = files.info(prefix + "bias") if prefix + "bias" in files.names else None
        if bias is None:
            return jnp.asarray(files.read(weight.name)), None
        _require_dtype(bias, _FLOATS)
        _require_shape(bias, sizes[:1], why)
        return jnp.asarray(files.read(weight.name)), jnp.asarray(files.read(bias.name))

    def config(self, files: CheckpointFiles) -> MoEConfig:
        """See :meth:`DiskFormat.config`."""
        layers = self.layers(files)
        first = self.layer(files, layers[0])
        file = files.folder / CONFIG_FILE
        if files.config is None:
            raise FileNotFoundError(
                f"{file} does not exist and top_k is stored nowhere else; download it again, or"
                " build MoEConfig yourself."
            )
        top_k = _number(files, "num_experts_per_tok", None)
        checks_bound = min(checks.MAX_TOP_K, first.num_experts)
        if not isinstance(top_k, int) or not 1 <= top_k <= checks_bound:
            raise ValueError(
                f"{file}: num_experts_per_tok={top_k!r} is not in 1..{checks_bound} (the layers"
                f" have {first.num_experts} experts); correct it."
            )
        limit = float(_number(files, "swiglu_limit", DEFAULT_LIMIT))
        return MoEConfig(
            hidden_size=first.hidden_size,
            intermediate_size=first.intermediate_size,
            num_experts=first.num_experts,
            top_k=top_k,
            layers=layers,
            activation=SwiGLU(alpha=ALPHA, beta=BETA, limit=limit),
            scoring="topk_softmax",
            format=MXFP4,
        )


@jax.jit
def _canonical(gate_up: list[Array], down: list[Array]) -> ExpertWeights:
    blocks, scales, bias = (
        einops.rearrange(part, "e (i half) ... -> e (half i) ...", half=2) for part in gate_up
    )
    return ExpertWeights(
        QuantizedTensor(_join(blocks), scales, MXFP4),
        QuantizedTensor(_join(down[0]), down[1], MXFP4),
        bias,
        down[2],
    )


def _join(blocks: Array) -> Array:
    return einops.rearrange(blocks, "e n g byte -> e n (g byte)")


def _require_dtype(info: TensorInfo, legal: tuple[str, ...]) -> None:
    if info.dtype not in legal:
        raise TypeError(
            f"{info.file}: {info.name} has dtype {info.dtype}, need {' or '.join(legal)} as in the"
            f" {GptOss.name} layout; load a checkpoint that was not converted."
        )


def _require_shape(info: TensorInfo, expected: tuple[int, ...], why: str) -> None:
    if info.shape != expected:
        raise ValueError(
            f"{info.file}: {info.name} has shape {info.shape}, need {expected} since {why};"
            " download the checkpoint again or correct what wrote it."
        )


def _blocks_shape(info: TensorInfo, what: str) -> tuple[int, ...]:
    if len(info.shape) != 4 or info.shape[-1] != _BLOCK_BYTES or 0 in info.shape:
        raise ValueError(
            f"{info.file}: {info.name} has shape {info.shape}, need {what} with no axis of size 0;"
            " download the checkpoint again or correct what wrote it."
        )
    if info.shape[0] > checks.MAX_EXPERTS:
        raise ValueError(
            f"{info.file}: {info.name} holds E={info.shape[0]} experts, at most"
            f" {checks.MAX_EXPERTS} can be loaded; load a smaller model."
        )
    return info.shape


def _require_even_rows(gate_up: TensorInfo) -> None:
    multiple = 2 * MXFP4.group_size
    if gate_up.shape[1] % multiple:
        raise ValueError(
            f"{gate_up.file}: {gate_up.name} has {gate_up.shape[1]} rows, need 2I with I a multiple"
            f" of {MXFP4.group_size}; zero-pad each expert to"
            f" {-(-gate_up.shape[1] // multiple) * multiple} rows."
        )


def _check_config(files: CheckpointFiles, num_experts: int, hidden: int, intermediate: int) -> None:
    """Refuses tensors that are not those of the config.json beside them, if there is one."""
    if files.config is None:
        return
    file = files.folder / CONFIG_FILE
    model_type = files.config.get("model_type")
    if model_type not in (None, MODEL_TYPE):
        raise NotImplementedError(
            f"{file}: model_type={model_type!r} with tensors named as in gpt-oss; only"
            f" {MODEL_TYPE!r} is known to interleave gate and up rows: correct model_type if these"
            " rows are interleaved too."
        )
    for key, stored in (
        ("num_local_experts", num_experts),
        ("hidden_size", hidden),
        ("intermediate_size", intermediate),
    ):
        if (value := files.config.get(key, stored)) != stored:
            raise ValueError(
                f"{file}: {key}={value!r}, but the tensors of {files.path} have {stored}; take both"
                " from the same checkpoint."
            )


def _number(files: CheckpointFiles, key: str, default: float | None) -> Any:
    value = (files.config or {}).get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        file = files.folder / CONFIG_FILE
        raise ValueError(f"{file}: {key}={value!r}, need a number; correct it.")
    return value


GPT_OSS = register(GptOss())
