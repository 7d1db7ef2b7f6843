"""The named shapes that benchmarks run, and GPU tests too."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Activations entering a layer: T tokens of hidden size H."""

    name: str
    num_tokens: int
    hidden_size: int


QUANTIZE = tuple(
    Tokens(f"{model} T={num_tokens}", num_tokens, hidden)
    for model, hidden in (("gpt-oss", 2880), ("deepseek-v4-flash", 4096), ("deepseek-r1", 7168))
    for num_tokens in (1, 16, 256, 8192)
)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A whole MoE layer on one GPU."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int


LAYERS = (
    Layer("deepseek-v4-flash", 4096, 2048, 256, 6),
    Layer("deepseek-r1-ep8", 7168, 2048, 32, 8),
    Layer("deepseek-r1-tp8", 7168, 256, 256, 8),
    Layer("gpt-oss-120b", 2880, 2880, 128, 4),
    Layer("qwen3-30b", 2048, 768, 128, 8),
)
NUM_TOKENS = (1, 4, 16, 64, 256, 1024, 8192)
