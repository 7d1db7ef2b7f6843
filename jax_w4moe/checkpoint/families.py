"""What models do around their experts, from ``config.json``: scoring, groups, scale, activation.

A family is a row of one table, whatever format the weights are stored in.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from jax_w4moe import checks
from jax_w4moe.activations import Activation, SiTU, SwiGLU
from jax_w4moe.checkpoint.base import LayerOnDisk
from jax_w4moe.checkpoint.files import CONFIG_FILE, CheckpointFiles
from jax_w4moe.formats import WeightFormat

DEFAULT_LIMIT = 7.0  # of gpt-oss

# The first name that a config has counts.
_NUM_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")
_INTERMEDIATE = ("moe_intermediate_size", "intermediate_size")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token")
_HIDDEN = ("routed_expert_hidden_size", "hidden_size")  # what the experts see
_GROUPS = ("n_group", "num_expert_group")
_TOP_GROUPS = ("topk_group",)
_RENORMALIZE = ("norm_topk_prob", "moe_renormalize")
_SCALE = ("routed_scaling_factor",)
_HIDDEN_ACT = ("hidden_act",)
_SCORING = ("scoring_func", "moe_router_activation_func")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """What a model needs to know of its MoE layers, besides their weights.

    Attributes:
      hidden_size: H, of the experts; of the tokens too, but for latent experts (Kimi K3).
      intermediate_size: I, of one expert.
      num_experts: E.
      top_k: experts per token.
      layers: the numbers of the layers that are MoE layers, rising.
      activation: the gated activation of the experts, the shared ones included.
      scoring, renormalize, routed_scale, num_groups, top_groups: as in
        :func:`jax_w4moe.topk_routing`, where ``routed_scale`` is called ``scale``.
      format: the format of the experts' weights.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    layers: tuple[int, ...]
    activation: Activation
    scoring: str
    format: WeightFormat
    renormalize: bool = True
    routed_scale: float = 1.0
    num_groups: int = 1
    top_groups: int | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
      scoring: of the router.
      hidden_act: what the config must call the activation, if it names one.
      activation: from the config's numbers.
      renormalize: where the config does not say.
      has_groups: whether experts are chosen by groups.
    """

    scoring: str
    activation: Callable[[CheckpointFiles], Activation]
    hidden_act: str = "silu"
    renormalize: bool = True
    has_groups: bool = False


def _plain(files: CheckpointFiles) -> Activation:
    return SwiGLU()


def _clamped(files: CheckpointFiles) -> Activation:
    limit = _number(files, ("swiglu_limit",), 0)
    return SwiGLU(limit=float(limit) or None)


def _gpt_oss(files: CheckpointFiles) -> Activation:
    # The sigmoid's slope and the shift of the up projection are not in the config.
    limit = _number(files, ("swiglu_limit",), DEFAULT_LIMIT)
    return SwiGLU(alpha=1.702, beta=1.0, limit=float(limit))


def _situ(files: CheckpointFiles) -> Activation:
    usual = SiTU()
    return SiTU(
        float(_number(files, ("activation_situ_beta",), usual.gate_bound)),
        float(_number(files, ("activation_situ_linear_beta",), usual.up_bound)),
    )


_SIGMOID = Family("sigmoid", _plain, has_groups=True)
_SQRTSOFTPLUS = Family("sqrtsoftplus", _clamped)
FAMILIES = {
    "gpt_oss": Family("topk_softmax", _gpt_oss),
    "qwen3_moe": Family("softmax", _plain, renormalize=False),
    "deepseek_v3": _SIGMOID,
    "deepseek_v32": _SIGMOID,
    "kimi_k2": _SIGMOID,
    "kimi_k25": _SIGMOID,
    "glm4_moe": _SIGMOID,
    "glm_moe_dsa": _SIGMOID,
    "mimo_v2": _SIGMOID,
    "mimo_v2_flash": _SIGMOID,
    "minimax_m2": Family("sigmoid", _plain),
    "deepseek_v4": _SQRTSOFTPLUS,
    "deepseek_v41": _SQRTSOFTPLUS,
    "kimi_k3": Family("sigmoid", _situ, hidden_act="situ", has_groups=True),
}


def family(files: CheckpointFiles, model_type: str | None) -> Family:
    """The family that a config's ``model_type`` names.

    Args:
      files: the checkpoint.
      model_type: where the config names none.

    Raises:
      FileNotFoundError: there is no config.json.
      NotImplementedError: no family of that name, or another activation or scoring than its own.
    """
    file = files.folder / CONFIG_FILE
    if files.config is None:
        raise FileNotFoundError(
            f"{file} does not exist and top_k is stored nowhere else; download it again, or"
            " build MoEConfig yourself."
        )
    named = [files.setting("model_type", model_type), files.config.get("model_type")]
    found = next((FAMILIES[name] for name in named if name in FAMILIES), None)
    if found is None:
        raise NotImplementedError(
            f"{file}: model_type={named[0]!r} is unknown here, so is how it routes; known are"
            f" {', '.join(FAMILIES)}. load_experts and load_router read what they find by names,"
            " for FusedMoE.from_experts."
        )
    for names, known in ((_HIDDEN_ACT, found.hidden_act), (_SCORING, found.scoring)):
        name = _name(files, names)
        if (value := files.setting(name, known)) != known:
            raise NotImplementedError(
                f"{file}: {name}={value!r}, a {named[0]!r} is known with {known!r} only; build"
                " FusedMoE.from_experts with the settings it needs."
            )
    return found


def moe_config(
    files: CheckpointFiles, layers: tuple[int, ...], first: LayerOnDisk, model_type: str | None
) -> MoEConfig:
    """The settings of a checkpoint's MoE layers.

    Args:
      files: the checkpoint.
      layers: the MoE layers.
      first: the headers of one of them.
      model_type: as in :func:`family`.

    Raises:
      FileNotFoundError, NotImplementedError: as :func:`family`.
      ValueError: a setting that is missing or that the tensors contradict.
    """
    row = family(files, model_type)
    file = files.folder / CONFIG_FILE
    check_sizes(files, first)
    top_k = _number(files, _TOP_K, None)
    bound = min(checks.MAX_TOP_K, first.num_experts)
    if not isinstance(top_k, int) or not 1 <= top_k <= bound:
        raise ValueError(
            f"{file}: {_name(files, _TOP_K)}={top_k!r} is not in 1..{bound} (the layers have"
            f" {first.num_experts} experts); correct it."
        )
    num_groups = _number(files, _GROUPS, 1) if row.has_groups else 1
    top_groups = _number(files, _TOP_GROUPS, num_groups) if row.has_groups else None
    checks.routing_groups(first.num_experts, top_k, num_groups, top_groups)
    return MoEConfig(
        hidden_size=first.hidden_size,
        intermediate_size=first.intermediate_size,
        num_experts=first.num_experts,
        top_k=top_k,
        layers=layers,
        activation=row.activation(files),
        scoring=row.scoring,
        format=first.format,
        renormalize=bool(files.setting(_name(files, _RENORMALIZE), row.renormalize)),
        routed_scale=float(_number(files, _SCALE, 1.0)),
        num_groups=num_groups,
        top_groups=top_groups,
    )


def check_sizes(files: CheckpointFiles, on_disk: LayerOnDisk) -> None:
    """Refuses tensors that are not those of the config.json beside them, if there is one."""
    for names, stored in (
        (_NUM_EXPERTS, on_disk.num_experts),
        (_HIDDEN, on_disk.hidden_size),
        (_INTERMEDIATE, on_disk.intermediate_size),
    ):
        name = _name(files, names)
        if (value := files.setting(name, stored)) not in (stored, None):
            raise ValueError(
                f"{files.folder / CONFIG_FILE}: {name}={value!r}, but the tensors of {files.path}"
                f" have {stored}; take both from the same checkpoint."
            )


def _name(files: CheckpointFiles, names: tuple[str, ...]) -> str:
    """The name that a config uses."""
    return next((name for name in names if files.setting(name) is not None), names[0])


def _number(files: CheckpointFiles, names: tuple[str, ...], default: float | None) -> Any:
    name = _name(files, names)
    value = files.setting(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(
            f"{files.folder / CONFIG_FILE}: {name}={value!r}, need a number; correct it."
        )
    return value
