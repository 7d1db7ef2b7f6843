"""gpt-oss's settings, from a Hugging Face config.json and back."""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from jax_w4moe.activations import SwiGLU
from jax_w4moe.checkpoint.families import DEFAULT_LIMIT
from jax_w4moe.checkpoint.files import CONFIG_FILE, CheckpointFiles
from jax_w4moe.checkpoint.gpt_oss import MODEL_TYPE

SLIDING, FULL = LAYER_TYPES = ("sliding_attention", "full_attention")

_ALPHA = 1.702  # the sigmoid's slope, where config.json does not say
_ROPE_THETA = 150000.0
# What transformers takes where config.json says nothing of positions.
_DEFAULT_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_experts_per_tok",
)


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN: frequencies of rotary embeddings, stretched for contexts longer than trained for.

    Attributes:
      factor: how many times longer.
      original_max_position_embeddings: the length of the contexts trained for.
      beta_fast: a frequency that turns more often within that length is left as it is.
      beta_slow: one that turns less often is divided by factor; between them it is interpolated.
      truncate: whether the ends of the interpolation are rounded outwards to whole dimensions.
      attention_factor: of cosines and sines; None: 0.1 ln(factor) + 1.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None


@dataclasses.dataclass(frozen=True)
class GptOssConfig:
    """What a gpt-oss model is made with; the names are those of its config.json.

    Attributes:
      vocab_size: V.
      hidden_size: H.
      intermediate_size: I, of one expert.
      num_hidden_layers: transformer layers, each of them with attention and experts.
      num_attention_heads: heads of queries.
      num_key_value_heads: heads of keys and values; divides the former.
      head_dim: of one head, even.
      num_local_experts: E.
      num_experts_per_tok: k.
      layer_types: "sliding_attention" or "full_attention", of every layer.
      sliding_window: keys that a query of a sliding layer sees, itself included.
      max_position_embeddings: the longest context.
      rope_theta: the base of the rotary frequencies.
      yarn: how they are stretched, or None.
      rms_norm_eps: added to mean squares.
      attention_bias: whether the projections of attention have biases.
      swiglu_alpha: the sigmoid's slope in the activation of the experts.
      swiglu_limit: its clamp.
      tie_word_embeddings: whether the embedding is the output projection too.
      eos_token_ids: tokens that end a text.
      pad_token_id: the token that fills up a prompt, or None.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    layer_types: tuple[str, ...]
    sliding_window: int = 128
    max_position_embeddings: int = 131072
    rope_theta: float = _ROPE_THETA
    yarn: Yarn | None = None
    rms_norm_eps: float = 1e-5
    attention_bias: bool = True
    swiglu_alpha: float = _ALPHA
    swiglu_limit: float = DEFAULT_LIMIT
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for key in (*_SIZES, "sliding_window", "max_position_embeddings"):
            _require_positive(key, getattr(self, key))
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(
                f"num_key_value_heads={kv_heads} does not divide num_attention_heads={heads};"
                " correct one of them."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd, rotary embeddings turn pairs.")
        known = set(self.layer_types) <= set(LAYER_TYPES)
        if not known or len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types={self.layer_types!r}: need {' or '.join(LAYER_TYPES)} for each of"
                f" num_hidden_layers={self.num_hidden_layers}; correct it."
            )

    @property
    def activation(self) -> SwiGLU:
        """Of the experts."""
        return SwiGLU(alpha=self.swiglu_alpha, beta=1.0, limit=self.swiglu_limit)

    def window(self, layer: int) -> int | None:
        """How many keys a query of a layer sees, itself included; None: all before it."""
        return self.sliding_window if self.layer_types[layer] == SLIDING else None

    def rope_frequencies(self) -> tuple[np.ndarray, float]:
        """Radians per position, f32[head_dim / 2], and the factor of cosines and sines."""
        half = np.arange(self.head_dim // 2)
        frequencies = self.rope_theta ** (-2 * half / self.head_dim)
        yarn = self.yarn
        if yarn is None:
            return frequencies.astype(np.float32), 1.0

        def dimension(turns: float) -> float:
            """Whose frequency turns so often within the length trained for."""
            length = yarn.original_max_position_embeddings / (2 * math.pi * turns)
            return self.head_dim * math.log(length) / (2 * math.log(self.rope_theta))

        low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
        if yarn.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        # The ends may meet: then it is a step.
        ramp = np.clip((half - low) / (high - low if high != low else 1e-3), 0, 1)
        frequencies *= (1 - ramp) + ramp / yarn.factor
        factor = yarn.attention_factor
        if factor is None:
            factor = 0.1 * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0
        return frequencies.astype(np.float32), factor

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> Self:
        """Reads the config.json of a model's folder.

        Args:
          path: the folder.

        Raises:
          FileNotFoundError: there is none.
          ValueError: a value is missing or wrong.
          NotImplementedError: it asks for something that this version does not do.
        """
        with CheckpointFiles(path) as files:
            file, content = files.folder / CONFIG_FILE, files.config
        if content is None:
            raise FileNotFoundError(
                f"{file} does not exist; it holds the model's sizes: download it again."
            )
        return cls.from_dict(content, file)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], file: str | Path = CONFIG_FILE) -> Self:
        """The settings of a parsed config.json; what is not said is as in transformers.

        Args:
          content: the parsed file.
          file: its name, for errors.

        Raises:
          ValueError, NotImplementedError: as :meth:`from_pretrained`.
        """
        _require_known(content, file)
        values = {key: content.get(key) for key in _SIZES}
        for key in (
            "max_position_embeddings",
            "rms_norm_eps",
            "attention_bias",
            "swiglu_alpha",
            "swiglu_limit",
            "tie_word_embeddings",
            "pad_token_id",
        ):
            if content.get(key) is not None:
                values[key] = content[key]
        try:
            for key in ("num_hidden_layers", "vocab_size"):
                _require_positive(key, values[key])
            count: Any = values["num_hidden_layers"]
            types = content.get("layer_types") or [LAYER_TYPES[i % 2] for i in range(count)]
            if (window := content.get("sliding_window")) is not None:
                values["sliding_window"] = window
            elif "sliding_window" in content and SLIDING in types:
                raise ValueError(f"sliding_window=None with layers of {SLIDING}; correct it.")
            for key in ("rms_norm_eps", "swiglu_alpha", "swiglu_limit"):
                if key in values:
                    values[key] = _number(key, values[key])
            theta, yarn = _rope(content)
            eos = content.get("eos_token_id")
            values["eos_token_ids"] = tuple(eos) if isinstance(eos, list) else (eos,)
            if eos is None:
                values["eos_token_ids"] = ()
            settings: Any = {**values, "layer_types": tuple(types)}
            return cls(**settings, rope_theta=theta, yarn=yarn)
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"{file}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json that :meth:`from_dict` and transformers read."""
        content = dataclasses.asdict(self)
        yarn, eos = content.pop("yarn"), content.pop("eos_token_ids")
        rope = {"rope_type": "default"}
        if yarn is not None:
            rope = {"rope_type": "yarn", **{k: v for k, v in yarn.items() if v is not None}}
        content["layer_types"] = list(self.layer_types)
        return {
            "architectures": ["GptOssForCausalLM"],
            "model_type": MODEL_TYPE,
            "hidden_act": "silu",
            "rope_scaling": rope,
            "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
            **content,
        }


def _require_positive(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key}={value!r}, need a positive integer; correct it.")


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{key}={value!r}, need a positive number; correct it.")
    return float(value)


def _require_known(content: Mapping[str, Any], file: str | Path) -> None:
    for key, known in (("model_type", MODEL_TYPE), ("hidden_act", "silu")):
        if (value := content.get(key, known)) != known:
            raise NotImplementedError(
                f"{file}: {key}={value!r}, this model does {known!r} only; load another model."
            )


def _rope(content: Mapping[str, Any]) -> tuple[float, Yarn | None]:
    """Theta and YaRN, from ``rope_parameters`` (transformers 5) or ``rope_scaling``."""
    new, old = content.get("rope_parameters"), content.get("rope_scaling")
    if new is not None and old is not None and new != old:
        raise ValueError("both rope_parameters and rope_scaling are given; keep one of them.")
    rope = dict(new or old or _DEFAULT_ROPE)
    rope_type = rope.pop("rope_type", None) or rope.pop("type", None)
    rope.pop("type", None)
    theta = _number("rope_theta", rope.pop("rope_theta", content.get("rope_theta", _ROPE_THETA)))
    if rope_type == "default":
        return theta, None
    if rope_type != "yarn":
        raise NotImplementedError(
            f"rope_type={rope_type!r}, this model does 'yarn' and 'default' only; load another"
            " model."
        )
    rope = {key: value for key, value in rope.items() if value is not None}
    known = {field.name for field in dataclasses.fields(Yarn)}
    if unknown := sorted(set(rope) - known):
        raise NotImplementedError(
            f"YaRN with {unknown[0]}={rope[unknown[0]]!r}: only {', '.join(sorted(known))} are"
            " known; load another model."
        )
    numbers = {key: _number(key, value) for key, value in rope.items() if key != "truncate"}
    for key in ("factor", "original_max_position_embeddings"):
        if key not in rope:
            raise ValueError(f"YaRN without {key}, need a positive number; add it.")
    truncate = rope.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ValueError(f"truncate={truncate!r}, need true or false; correct it.")
    original = int(numbers.pop("original_max_position_embeddings"))
    yarn = Yarn(original_max_position_embeddings=original, truncate=truncate, **numbers)
    return theta, yarn


TINY_GPT_OSS = GptOssConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_local_experts=8,
    num_experts_per_tok=2,
    layer_types=("sliding_attention", "full_attention"),
    sliding_window=32,
    max_position_embeddings=8192,
    yarn=Yarn(32.0, 256, truncate=False),
)
"""Small enough for any machine; of random weights, it says nothing."""
