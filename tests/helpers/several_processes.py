"""``python -m tests.helpers.several_processes NUMBER COUNT PORT``: one of several processes.

Each has four CPU devices, or its own GPU. Layers are spread over all of them; every process
compares the rows that it holds with what one device gives, and prints "equal" at the end.
"""

import functools
import os
import sys

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_w4moe as w4
from tests.helpers import data
from tests.helpers.compare import assert_bitwise, relative_rms
from tests.helpers.meshes import make_mesh, named

E, H, I, K, T = 6, 64, 256, 3, 16  # noqa: E741


def rows_equal(y: jax.Array, expected: np.ndarray, is_exact: bool) -> None:
    """Compares the rows that this process holds."""
    for shard in y.addressable_shards:
        if is_exact:
            assert_bitwise(shard.data, expected[shard.index])
        else:
            assert relative_rms(shard.data, expected[shard.index]) < 2e-2


def main(number: int, count: int, port: int) -> None:
    jax.distributed.initialize(
        f"127.0.0.1:{port}", num_processes=count, process_id=number, initialization_timeout=60
    )
    devices = jax.device_count()
    assert devices == 4 * count or jax.default_backend() != "cpu"
    rng = np.random.default_rng(0)
    experts = w4.pack_experts(data.expert_weights(rng, E, H, I, bias=True))
    x, (ids, weights) = data.tokens(rng, T, H), data.routing(rng, "random", T, E, K)
    one = np.asarray(w4.fused_moe(x, experts, ids, weights))
    cases = [((devices, 1), "slot_rows"), ((devices // 2, 2), "partial_sums")]
    for shape, exchange in cases:
        mesh = make_mesh(shape)
        axes = named(mesh)
        placed = w4.shard_experts(experts, mesh, **axes)
        for token_axes in ((), ("expert",)):
            rows = NamedSharding(mesh, P(token_axes or None))
            operands = [jax.device_put(np.asarray(array), rows) for array in (x, ids, weights)]

            layer = functools.partial(
                w4.fused_moe, token_axes=token_axes, exchange=exchange, **axes
            )
            y = jax.jit(layer)(operands[0], placed, *operands[1:])
            rows_equal(y, one, exchange == "slot_rows")
    print("equal", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
