"""The kernels on several GPUs of one process, against one GPU."""

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_w4moe as w4
from jax_w4moe import _ffi
from tests.helpers import data
from tests.helpers.compare import assert_bitwise, relative_rms
from tests.helpers.meshes import make_mesh, named
from tests.helpers.slices import sum_of_slices

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("gpus")]

E, H, I, K = 16, 512, 512, 4  # noqa: E741


@pytest.fixture(scope="module")
def canonical() -> w4.ExpertWeights:
    return data.expert_weights(np.random.default_rng(0), E, H, I, bias=True)


@pytest.fixture(scope="module")
def experts(canonical: w4.ExpertWeights) -> w4.PackedExperts:
    return w4.pack_experts(canonical)


@pytest.mark.parametrize("num_tokens", [4, 64, 1024])
@pytest.mark.parametrize("shape", [(2, 1), (4, 1), (1, 2), (1, 4), (2, 2)], ids=str)
def test_kernels_on_several_gpus(
    shape: tuple[int, int],
    num_tokens: int,
    canonical: w4.ExpertWeights,
    experts: w4.PackedExperts,
) -> None:
    mesh = make_mesh(shape)
    rng = np.random.default_rng(1)
    x = data.tokens(rng, num_tokens, H)
    ids, weights = data.routing(rng, "random", num_tokens, E, K)
    ids = ids.at[0].set(-1)
    if shape[1] == 1:
        expected = np.asarray(w4.fused_moe(x, experts, ids, weights, implementation="cuda_sm90"))
    else:
        expected = sum_of_slices(canonical, (x, ids, weights), shape[1])
    axes: dict[str, Any] = {**named(mesh)}
    placed = w4.shard_experts(experts, mesh, **axes)
    exchanges = ["partial_sums"] if shape[1] > 1 else ["slot_rows", "partial_sums", "dispatch"]
    for token_axes in ((), tuple(name for name in mesh.axis_names if mesh.shape[name] > 1)):
        rows = NamedSharding(mesh, P(token_axes or None))
        operands = [jax.device_put(array, rows) for array in (x, ids, weights)]
        partial_sums: Any = None
        for exchange in exchanges[: 3 if token_axes else 2]:

            @jax.jit
            def layer(
                x: Any, experts: Any, ids: Any, weights: Any, t: Any = token_axes, e: Any = exchange
            ) -> jax.Array:
                return w4.fused_moe(
                    x,
                    experts,
                    ids,
                    weights,
                    token_axes=t,
                    exchange=e,
                    implementation="cuda_sm90",
                    **axes,
                )

            before = _ffi.call_count("fused_moe")
            y = layer(operands[0], placed, *operands[1:])
            assert y.sharding.is_equivalent_to(rows, 2)
            assert _ffi.call_count("fused_moe") >= before + mesh.size
            if exchange == "slot_rows":
                assert_bitwise(y, expected)
            elif exchange == "dispatch":
                assert_bitwise(y, partial_sums)
            else:
                partial_sums = y
                assert relative_rms(y, expected) < (4e-3 if shape[1] == 1 else 1e-2)
