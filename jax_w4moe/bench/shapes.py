"""The named layers that benchmarks run, and GPU tests too: one GPU's share of a model's layer."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """A whole MoE layer on one GPU.

    Attributes:
      name: the model, and its split: ep8 holds an eighth of the experts, tp8 an eighth of I.
      hidden_size: H.
      intermediate_size: I, on this GPU.
      num_experts: E, on this GPU.
      top_k: k.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("flash", 4096, 2048, 256, 6),  # DeepSeek V4 Flash
        Shape("flash_ep8", 4096, 2048, 32, 6),
        Shape("pro_ep8", 7168, 3072, 48, 6),  # DeepSeek V4 Pro
        Shape("r1_ep8", 7168, 2048, 32, 8),  # DeepSeek R1
        Shape("r1_tp8", 7168, 256, 256, 8),
        Shape("gptoss", 2880, 2880, 128, 4),  # gpt-oss-120b
        Shape("qwen3", 4096, 1536, 128, 8),  # Qwen3-235B-A22B
    )
}

TINY = Shape("tiny", 256, 128, 8, 2)
"""For trying the benchmark out where there is no Hopper GPU."""

NUM_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 8192)
