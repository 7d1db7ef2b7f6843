"""gpt-oss in float64 numpy, from a checkpoint folder: no code shared with the package's model.

One sequence at a time, every position from scratch, no cache; one token and one expert at a time.
"""

import json
import math
from pathlib import Path

import ml_dtypes  # noqa: F401 - so that safetensors reads BF16
import numpy as np
from safetensors.numpy import load_file

from tests.helpers.oracle import dequantize_mxfp4


class Oracle:
    """The tensors of a folder and what they make of a sequence."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.stored: dict[str, np.ndarray] = {}
        for file in folder.glob("*.safetensors"):
            self.stored |= load_file(file)

    def tensor(self, name: str) -> np.ndarray:
        return self.stored[name].astype(np.float64)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """float64[S, V]."""
        x = self.tensor("model.embed_tokens.weight")[tokens]
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            x = x + self._attention(layer, self._norm(prefix + "input_layernorm", x))
            normed = self._norm(prefix + "post_attention_layernorm", x)
            x = x + np.stack([self._experts(prefix + "mlp.", row) for row in normed])
        tied = self.config["tie_word_embeddings"]
        head = self.tensor("model.embed_tokens.weight" if tied else "lm_head.weight")
        return self._norm("model.norm", x) @ head.T

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        mean_square = (x * x).mean(axis=-1, keepdims=True)
        return (
            x / np.sqrt(mean_square + self.config["rms_norm_eps"]) * self.tensor(name + ".weight")
        )

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        y = x @ self.tensor(name + ".weight").T
        return y + self.tensor(name + ".bias") if name + ".bias" in self.stored else y

    def _attention(self, layer: int, x: np.ndarray) -> np.ndarray:
        prefix, dim = f"model.layers.{layer}.self_attn.", self.config["head_dim"]
        q, k, v = (
            self._linear(f"{prefix}{name}_proj", x).reshape(len(x), -1, dim) for name in "qkv"
        )
        q, k = self._rotated(q), self._rotated(k)
        sinks, out = self.tensor(prefix + "sinks"), np.zeros_like(q)
        is_sliding = self.config["layer_types"][layer] == "sliding_attention"
        for head in range(q.shape[1]):
            kv_head = head * k.shape[1] // q.shape[1]
            for now in range(len(x)):
                first = max(0, now + 1 - self.config["sliding_window"]) if is_sliding else 0
                seen = slice(first, now + 1)
                scores = np.exp(k[seen, kv_head] @ q[now, head] / math.sqrt(dim))
                share = scores / (scores.sum() + math.exp(sinks[head]))
                out[now, head] = share @ v[seen, kv_head]
        return self._linear(prefix + "o_proj", out.reshape(len(x), -1))

    def _rotated(self, x: np.ndarray) -> np.ndarray:
        half = x.shape[-1] // 2
        pairs = x[..., :half] + 1j * x[..., half:]
        angles = np.arange(len(x))[:, None] * np.array([self._frequency(i) for i in range(half)])
        pairs = pairs * (self._magnitude() * np.exp(1j * angles))[:, None]
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    def _frequency(self, pair: int) -> float:
        rope, dim = self.config["rope_scaling"], self.config["head_dim"]
        base = self.config["rope_theta"]
        plain = base ** (-2 * pair / dim)
        if rope["rope_type"] == "default":
            return plain
        trained = rope["original_max_position_embeddings"]
        # The (real-valued) pair that turns beta times within the context trained for.
        ends = [
            dim / 2 * math.log(trained / (2 * math.pi * rope[beta]), base)
            for beta in ("beta_fast", "beta_slow")
        ]
        if rope["truncate"]:
            ends = [math.floor(ends[0]), math.ceil(ends[1])]
        low, high = max(ends[0], 0), min(ends[1], dim - 1)
        stretched = min(max((pair - low) / (high - low), 0), 1)
        return plain * (1 - stretched) + plain / rope["factor"] * stretched

    def _magnitude(self) -> float:
        rope = self.config["rope_scaling"]
        return 1.0 if rope["rope_type"] == "default" else 0.1 * math.log(rope["factor"]) + 1

    def _experts(self, prefix: str, x: np.ndarray) -> np.ndarray:
        scores = self._linear(prefix + "router", x)
        chosen = np.argsort(-scores, kind="stable")[: self.config["num_experts_per_tok"]]
        weights = np.exp(scores[chosen]) / np.exp(scores[chosen]).sum()
        return sum(w * self._expert(prefix, e, x) for e, w in zip(chosen, weights, strict=True))

    def _expert(self, prefix: str, expert: int, x: np.ndarray) -> np.ndarray:
        def project(name: str, x: np.ndarray) -> np.ndarray:
            part = f"{prefix}experts.{name}_"
            blocks = self.stored[part + "blocks"][expert]
            codes = blocks.reshape(len(blocks), -1)
            matrix = dequantize_mxfp4(codes, self.stored[part + "scales"][expert])
            return matrix @ x + self.tensor(part + "bias")[expert]

        both, limit = project("gate_up_proj", x), self.config["swiglu_limit"]
        gate, up = np.minimum(both[0::2], limit), np.clip(both[1::2], -limit, limit)
        gated = gate / (1 + np.exp(-self.config["swiglu_alpha"] * gate)) * (up + 1)
        return project("down_proj", gated)
