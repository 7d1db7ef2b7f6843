"""The shapes that benchmarks run."""

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
