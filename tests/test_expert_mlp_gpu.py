"""The experts on grouped rows on the GPU: against the reference, and against fused_moe."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_w4moe as w4
from jax_w4moe import _ffi, reference
from jax_w4moe.ops import expert_mlp as op
from jax_w4moe.ops import tiles
from jax_w4moe.ops.experts import attributes, operands, or_nothing
from tests.helpers import data
from tests.helpers.compare import as_float64, assert_bitwise, relative_rms

pytestmark = pytest.mark.gpu

kernel = functools.partial(w4.expert_mlp, implementation="cuda_sm90")

H, I, E = 288, 160, 6  # noqa: E741
SIZES = (5, 0, 70, 1, 300, 9)


@pytest.fixture(scope="module")
def experts() -> w4.PackedExperts:
    return w4.pack_experts(data.expert_weights(np.random.default_rng(0), E, H, I, bias=True))


def _masked(rows: jax.Array, sizes: tuple[int, ...], capacity: int) -> np.ndarray:
    """Grouped rows spread over [E, capacity, H], NaN where nothing counts."""
    spread = np.full((E, capacity, rows.shape[1]), np.nan, rows.dtype)
    starts = np.cumsum([0, *sizes])
    for e, size in enumerate(sizes):
        spread[e, :size] = np.asarray(rows)[starts[e] : starts[e + 1]]
    return spread


def test_groups_against_the_mirrored_reference(
    rng: np.random.Generator, experts: w4.PackedExperts
) -> None:
    rows = data.tokens(rng, sum(SIZES) + 7, H)
    sizes = jnp.asarray(SIZES, jnp.int32)
    out = kernel(rows, experts, sizes)
    expected = reference.expert_mlp(rows, experts, sizes, mode="mirrored")
    assert relative_rms(out, expected) < 1e-2
    assert not as_float64(out)[sum(SIZES) :].any()


def test_masked_layout_gives_the_bits_of_the_groups(
    rng: np.random.Generator, experts: w4.PackedExperts
) -> None:
    """What lies in rows that do not count, NaN here, changes nothing and gives zeros."""
    rows, sizes = data.tokens(rng, sum(SIZES), H), jnp.asarray(SIZES, jnp.int32)
    grouped = np.asarray(kernel(rows, experts, sizes))
    out = np.asarray(kernel(jnp.asarray(_masked(rows, SIZES, 301)), experts, sizes))
    for e, (start, size) in enumerate(zip(np.cumsum([0, *SIZES[:-1]]), SIZES, strict=True)):
        assert_bitwise(out[e, :size], grouped[start : start + size])
        assert not as_float64(out[e, size:]).any()


def test_is_fused_moe_without_routing_and_combine(
    rng: np.random.Generator, experts: w4.PackedExperts
) -> None:
    x = data.tokens(rng, 40, H)
    ids = jnp.asarray(rng.integers(0, E, (40, 1)), jnp.int32)
    order = np.argsort(np.asarray(ids)[:, 0], kind="stable")
    sizes = jnp.asarray(np.bincount(np.asarray(ids)[:, 0], minlength=E), jnp.int32)
    y = w4.fused_moe(x, experts, ids, jnp.ones((40, 1)), implementation="cuda_sm90")
    assert_bitwise(kernel(x[order], experts, sizes), np.asarray(y)[order])


def test_fp8_rows_are_used_as_they_are(rng: np.random.Generator, experts: w4.PackedExperts) -> None:
    rows, sizes = data.tokens(rng, sum(SIZES), H), jnp.asarray(SIZES, jnp.int32)
    x_fp8, x_scale = w4.quantize_fp8(rows)
    assert_bitwise(kernel(x_fp8, experts, sizes, x_scale=x_scale), kernel(rows, experts, sizes))
    masked = jnp.asarray(_masked(rows, SIZES, 300))
    x_fp8, x_scale = w4.quantize_fp8(masked.reshape(-1, H))
    actual = kernel(x_fp8.reshape(masked.shape), experts, sizes, x_scale=x_scale.reshape(E, 300, 1))
    assert_bitwise(actual, kernel(masked, experts, sizes))


@pytest.mark.parametrize("sizes", [(3, -7, 10_000, 5, 0, 1), (2**31 - 1,) * 6, (0,) * 6])
def test_sizes_out_of_range_are_clipped(
    rng: np.random.Generator, experts: w4.PackedExperts, sizes: tuple[int, ...]
) -> None:
    rows, group_sizes = data.tokens(rng, 24, H), jnp.asarray(sizes, jnp.int32)
    for array, limit in ((rows, 24), (rows.reshape(E, 4, H), 4)):
        clipped = jnp.asarray(np.clip(sizes, 0, limit), jnp.int32)
        expected = reference.expert_mlp(array, experts, clipped, mode="mirrored")
        actual = kernel(array, experts, group_sizes)
        assert relative_rms(actual, expected) < 1e-2
        assert_bitwise(as_float64(actual) == 0, as_float64(expected) == 0)


def test_no_rows(experts: w4.PackedExperts) -> None:
    sizes = jnp.zeros(E, jnp.int32)
    assert kernel(jnp.zeros((0, H), jnp.bfloat16), experts, sizes).shape == (0, H)
    assert kernel(jnp.zeros((E, 0, H), jnp.bfloat16), experts, sizes).shape == (E, 0, H)


def test_handler_checks_again(rng: np.random.Generator, experts: w4.PackedExperts) -> None:
    x, sizes = data.tokens(rng, 24, H), jnp.full(E, 4, jnp.int32)
    needed = op.workspace_bytes(24, experts)

    def call(nbytes: int, rows_per_expert: int = 0) -> None:
        types = [
            jax.ShapeDtypeStruct((24, H), jnp.bfloat16),
            jax.ShapeDtypeStruct((nbytes,), jnp.uint8),
        ]
        out = _ffi.call(
            "expert_mlp",
            types,
            x,
            or_nothing(None),
            *operands(experts),
            sizes,
            **attributes(
                experts,
                jnp.float8_e4m3fn,
                w4.PerToken(),
                w4.SwiGLU(),
                w4.Tactic(tiles.TILE_TOKENS[0]),
                rows_per_expert,
            ),
        )
        jax.block_until_ready(out)

    call(needed)
    call(needed, 4)
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"workspace has {needed - 1} bytes"):
        call(needed - 1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="24 rows are not 6 experts of 5"):
        call(needed, 5)
