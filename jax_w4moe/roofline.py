"""The least time that an MoE layer can take on one H200."""

from typing import Any

import numpy as np

from jax_w4moe.types import PackedExperts

READ_BYTES_PER_S = 4.57e12
"""Plain reads of weights from HBM, of any size from 25 MB to 2 GB."""

LAUNCH_US = 5.5
"""What such a read takes beside its bytes."""

FP8_FLOPS = 1450e12
"""The rate of a large FP8 matrix product in bursts."""


def expected_experts(num_tokens: int, top_k: int, num_experts: int) -> float:
    """How many experts T tokens touch under uniform routing."""
    return num_experts * (1 - (1 - top_k / num_experts) ** num_tokens)


def floor_us(nbytes: float, flops: float) -> float:
    """Microseconds to read the weights or to do the products, whichever is more."""
    return LAUNCH_US + max(nbytes / READ_BYTES_PER_S, flops / FP8_FLOPS) * 1e6


def touched_experts(topk_ids: Any, num_experts: int) -> int:
    """How many experts these ids touch."""
    ids = np.asarray(topk_ids)
    return len(np.unique(ids[(ids >= 0) & (ids < num_experts)]))


def layer_work(experts: PackedExperts, num_pairs: float, touched: float) -> tuple[float, float]:
    """Bytes of the touched experts, and FLOPs of so many (token, slot) pairs."""
    nbytes = experts.nbytes * touched / experts.num_experts
    return nbytes, 6 * num_pairs * experts.hidden_size * experts.intermediate_size


def activation_bytes(experts: PackedExperts, num_tokens: int, num_pairs: float) -> float:
    """Bytes of activations that a layer writes and reads, as though none stayed in the L2 cache.

    Per token, x is read and y written in bf16: 2 H + 2 H. Per (token, slot) pair, written and read
    once each: the FP8 image of the token (2 H), h in bf16 (4 I), its FP8 image (2 I) and the slot
    in bf16 (4 H): 6 H + 6 I.
    """
    hidden, intermediate = experts.hidden_size, experts.intermediate_size
    return num_tokens * 4 * hidden + num_pairs * 6 * (hidden + intermediate)
