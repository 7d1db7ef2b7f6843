"""``python -m tests.helpers.small_layers``: every op with every tile on small layers.

For compute-sanitizer: all operands come from the host, so that initcheck, which watches our kernels
only, knows what is written.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_w4moe as w4
from tests.helpers import data

LAYERS = (  # H, I, E, k and the format
    ((256, 128, 4, 2), w4.MXFP4),
    ((96, 32, 5, 3), w4.MXFP4),
    ((256, 128, 4, 2), w4.INT4_G128),
    ((96, 32, 5, 3), w4.INT4_G32),
    ((96, 32, 5, 3), w4.MXFP4_WIDE),
    ((96, 32, 5, 3), w4.NVFP4),
)
NUM_TOKENS = (1, 9, 65, 1100)  # the last is routed by several blocks


def _to_gpu(tree: Any) -> Any:
    gpu = jax.local_devices(backend="cuda")[0]
    return jax.tree.map(lambda array: jax.device_put(np.asarray(array), gpu), tree)


def _run(
    hidden: int, intermediate: int, num_experts: int, top_k: int, format: w4.WeightFormat
) -> None:
    rng = np.random.default_rng(0)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        on_host = w4.pack_experts(
            data.expert_weights(rng, num_experts, hidden, intermediate, bias=True, format=format)
        )
        calls = [
            (data.tokens(rng, n, hidden), *data.routing(rng, kind, n, num_experts, top_k))
            for n in NUM_TOKENS
            for kind in ("random", "outside")
        ]
        rows = data.tokens(rng, 50, hidden)
        masked = data.tokens(rng, num_experts, 12, hidden)
        sizes = jnp.asarray([7, 0, 30, 9, 1][:num_experts], jnp.int32)
    experts, calls, rows, masked, sizes = _to_gpu((on_host, calls, rows, masked, sizes))

    def every_op(how: dict[str, Any]) -> None:
        for x, ids, weights in calls:
            np.asarray(w4.fused_moe(x, experts, ids, weights, **how))
        for array in (rows, masked):
            np.asarray(w4.expert_mlp(array, experts, sizes, **how))
        for dtype in (jnp.float32, jnp.bfloat16):
            np.asarray(
                w4.grouped_matmul(rows, experts.w13, sizes, preferred_element_type=dtype, **how)
            )

    for act_dtype in (jnp.float8_e4m3fn, jnp.bfloat16):
        problem = w4.Problem.of_layer("fused_moe", experts, 1, act_dtype)
        for tactic in w4.tactics(problem):
            how = {"act_dtype": act_dtype, "tactic": tactic, "implementation": "cuda_sm90"}
            every_op(how)


if __name__ == "__main__":
    for shape, format in LAYERS:
        _run(*shape, format)
        print(shape, format, "done", flush=True)
