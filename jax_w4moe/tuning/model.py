"""An estimate of a problem's time with a tactic, where nothing was measured.

Weights are read while products are done, so the longer of the two counts; then the fixed costs.
The kernel cuts an expert's rows into as few token tiles as hold them, of one width, a multiple of
8. Each tile decodes the weights, whatever its width; all but the first read them from L2.
"""

import math

from jax_w4moe import roofline
from jax_w4moe.formats.layout import BLOCK_ROWS, round_up
from jax_w4moe.tuning.problem import Problem, Tactic, tactics

# The main loop alone, on an H200: it streams packed weights at 0.83 of a plain read at 64 tokens,
# 915 TFLOPS, and does 1,335 TFLOPS at 256. Both lie on FLOPS = PEAK * width / (width + DECODE).
PEAK_FLOPS = 1576e12
DECODE_TOKENS = 46  # decoding a weight costs as much as that many tokens' products with it

WEIGHT_BYTES = 4.25 / 8  # formats differ by 6 %

# Estimates, which only have to put tiles in order.
IDLE_TOKENS = 0.1  # a token of the tile that is not there, in tokens: fewer stages, fewer warps
REREAD = 0.4  # reading weights from L2, relative to reading them from HBM
ITEM_S = 0.5e-6  # an item of 64 rows of weights and a token tile, beside its main loop
SMS = 132


def estimated_s(problem: Problem, tactic: Tactic) -> float:
    """Seconds, by which tactics of one problem may be compared."""
    projections = 1 if problem.op == "grouped_matmul" else 3
    weights = projections * problem.hidden_size * problem.intermediate_size
    rows = problem.intermediate_size
    if projections == 3:
        rows = 2 * rows + problem.hidden_size
    touched = roofline.expected_experts(problem.num_rows, 1, problem.num_experts)
    mean = max(1, -(-problem.num_rows // problem.num_experts))
    # Uniform routing: some experts have a standard deviation more, some less.
    spread = math.isqrt(mean)
    tiles = tokens = 0.0
    for count in (mean - spread, mean, mean, mean + spread):
        tiles_here = max(1, -(-count // tactic.tile_tokens))
        width = round_up(-(-count // tiles_here), 8)
        idle = IDLE_TOKENS * (tactic.tile_tokens - width)
        tiles += tiles_here / 4
        tokens += tiles_here * (width + DECODE_TOKENS + idle) / 4
    nbytes = weights * WEIGHT_BYTES * (1 + REREAD * (tiles - 1))
    each_s = max(nbytes / roofline.READ_BYTES_PER_S, 2 * weights * tokens / PEAK_FLOPS)
    items = tiles * -(-rows // BLOCK_ROWS)
    return touched * (each_s + items * ITEM_S / SMS)


def best(problem: Problem) -> Tactic:
    """The tactic of the least estimated time; of equal ones that of the smallest tile."""
    return min(tactics(problem), key=lambda t: (estimated_s(problem, t), t.tile_tokens))
