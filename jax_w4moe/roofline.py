"""The least time that an MoE layer can take on one H200."""

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


def layer_flops(num_pairs: int, hidden_size: int, intermediate_size: int) -> int:
    """FLOPs of both projections for ``num_pairs`` (token, slot) pairs."""
    return 6 * num_pairs * hidden_size * intermediate_size
