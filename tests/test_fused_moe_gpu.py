"""The fused layer on the GPU: against the reference, against itself, under hostile input."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_w4moe as w4
from jax_w4moe import _ffi, reference
from jax_w4moe.bench.shapes import SHAPES
from jax_w4moe.formats import formats
from jax_w4moe.ops import fused_moe as op
from jax_w4moe.ops import tiles
from jax_w4moe.ops.experts import attributes, or_nothing
from jax_w4moe.ops.experts import operands as expert_operands
from jax_w4moe.tuning import winners
from tests.helpers import data, sm_holder
from tests.helpers.compare import (
    MIRRORED_RMS,
    as_float64,
    assert_bitwise,
    assert_bitwise_or_nan,
    relative_rms,
)

pytestmark = pytest.mark.gpu

kernel = functools.partial(w4.fused_moe, implementation="cuda_sm90")
KERNEL_RMS = 1e-2  # against the mirrored reference: ties of FP8 may fall either way
GPT_OSS = w4.SwiGLU(alpha=1.702, beta=1.0, limit=7.0)

# (H, I, E, k)
LARGE = tuple(
    (layer.hidden_size, layer.intermediate_size, layer.num_experts, layer.top_k)
    for layer in map(SHAPES.__getitem__, ("flash", "r1_ep8", "r1_tp8", "gptoss", "qwen3"))
)
SMALL = ((256, 128, 4, 2), (96, 32, 5, 3))


@functools.lru_cache(maxsize=1)
def _layer(shape: tuple[int, int, int, int], bias: bool) -> w4.PackedExperts:
    return data.packed_experts(shape, bias=bias)


def _tokens(
    shape: tuple[int, int, int, int], num_tokens: int, kind: str = "random"
) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(num_tokens)
    hidden, _, num_experts, top_k = shape
    ids, weights = data.routing(rng, kind, num_tokens, num_experts, top_k)
    return data.tokens(rng, num_tokens, hidden), ids, weights


def _check(shape: tuple[int, int, int, int], num_tokens: int, kind: str = "random") -> None:
    experts = _layer(shape, True)
    x, ids, weights = _tokens(shape, num_tokens, kind)
    y = kernel(x, experts, ids, weights, activation=GPT_OSS)
    assert y.shape == x.shape and y.dtype == jnp.bfloat16
    compare = functools.partial(reference.fused_moe, x, experts, ids, weights, activation=GPT_OSS)
    assert relative_rms(y, compare(mode="mirrored")) <= KERNEL_RMS
    assert relative_rms(y, compare(mode="exact")) <= MIRRORED_RMS


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 7, 8, 9, 63, 64, 65, 128, 129, 1000, 4096])
@pytest.mark.parametrize("shape", [LARGE[0], *SMALL], ids=str)
def test_every_size(shape: tuple[int, int, int, int], num_tokens: int) -> None:
    _check(shape, num_tokens)


@pytest.mark.parametrize("num_tokens", [0, 1, 9, 65, 129, 4096])
@pytest.mark.parametrize("shape", LARGE[1:], ids=str)
def test_model_shapes(shape: tuple[int, int, int, int], num_tokens: int) -> None:
    _check(shape, num_tokens)


@pytest.mark.parametrize("kind", data.ROUTINGS)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_hostile_routings(shape: tuple[int, int, int, int], kind: str) -> None:
    _check(shape, 129, kind)
    if kind in ("outside", "no_expert"):
        experts = _layer(shape, True)
        x, ids, _ = _tokens(shape, 129, kind)
        y = kernel(x, experts, ids, jnp.full(ids.shape, jnp.nan))
        dead = ((np.asarray(ids) < 0) | (np.asarray(ids) >= shape[2])).all(axis=1)
        assert not as_float64(y)[dead].any()


@pytest.mark.parametrize("kind", data.ROUTINGS)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_few_pairs_are_planned_alike(shape: tuple[int, int, int, int], kind: str) -> None:
    """Up to 32 pairs w13's CTAs plan from the ids themselves."""
    experts = _layer(shape, True)
    x, ids, weights = _tokens(shape, 129, kind)
    everything = np.asarray(kernel(x, experts, ids, weights))
    for first, last in ((0, 1), (1, 3), (3, 13), (13, 24), (24, 40)):
        rows = slice(first, last)
        assert_bitwise(kernel(x[rows], experts, ids[rows], weights[rows]), everything[rows])
    nowhere = jnp.full_like(ids[:3], -1)
    assert not as_float64(kernel(x[:3], experts, nowhere, weights[:3])).any()


@pytest.mark.parametrize("act_dtype", [jnp.float8_e4m3fn, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("format", formats(), ids=lambda f: f.name)
def test_one_token_alone(format: w4.WeightFormat, act_dtype: jnp.dtype) -> None:
    """Its rows are made by the CTAs that multiply them; bit for bit what they are among others."""
    shape = (1408, 512, 9, 7) if format.group_size == 128 else (1312, 416, 9, 7)
    experts = data.packed_experts(shape, bias=True, format=format)
    x, ids, weights = _tokens(shape, 12)
    ids = np.array(ids)
    ids[1, 2:5], ids[2] = (-1, 9, 3), 3  # no experts; the same one seven times
    x = x.at[3, 7].set(jnp.nan).at[4].set(0)
    rules = [w4.PerToken(), w4.PerToken(pow2=True), w4.Static(0.01, 0.25), w4.Per128()]
    for rule in rules if act_dtype == jnp.float8_e4m3fn else rules[:1]:
        run = functools.partial(kernel, act_dtype=act_dtype, act_scale=rule)
        together = np.asarray(run(x, experts, ids, weights))
        for t in range(6):
            row = slice(t, t + 1)
            alone = np.asarray(run(x[row], experts, ids[row], weights[row]))
            assert_bitwise_or_nan(alone, together[row])
        assert not np.isnan(as_float64(together)).any(axis=1)[:3].any()


@pytest.mark.parametrize("blocks", range(1, 8))
def test_one_token_of_few_k128(blocks: int) -> None:
    """Three warpgroups share the K128 of a slab, however few: 1 to 7 of w13's, 7 to 1 of w2's."""
    shape = (128 * blocks, 128 * (8 - blocks), 5, 3)
    experts = data.packed_experts(shape)
    x, ids, weights = _tokens(shape, 9)
    together = kernel(x, experts, ids, weights)
    assert_bitwise(kernel(x[:1], experts, ids[:1], weights[:1]), together[:1])


@pytest.mark.parametrize("act_dtype", [jnp.float8_e4m3fn, jnp.bfloat16], ids=str)
def test_one_wide_token_alone(act_dtype: jnp.dtype) -> None:
    """As many K128 as a CTA holds of a token (96, and 64 of bf16), and one more."""
    blocks = 96 if act_dtype == jnp.float8_e4m3fn else 64
    for hidden in (128 * blocks, 128 * blocks + 32):
        shape = (hidden, 64, 3, 2)
        experts = data.packed_experts(shape)
        x, ids, weights = _tokens(shape, 3)
        together = kernel(x, experts, ids, weights, act_dtype=act_dtype)
        alone = kernel(x[:1], experts, ids[:1], weights[:1], act_dtype=act_dtype)
        assert_bitwise(alone, together[:1])


@pytest.mark.parametrize("act_dtype", [jnp.float8_e4m3fn, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("intermediate", [32, 160, 512])
def test_many_narrow_rows(intermediate: int, act_dtype: jnp.dtype) -> None:
    """Of 4,096 and more a warp requantises four: bit for bit as a warp or a block to each."""
    shape = (256, intermediate, 6, 3)
    experts = data.packed_experts(shape, bias=True)
    x, ids, weights = _tokens(shape, 1400, "outside")
    for rule in (w4.PerToken(), w4.Per128()):
        run = functools.partial(kernel, act_dtype=act_dtype, act_scale=rule)
        together = np.asarray(run(x, experts, ids, weights))
        for rows in (slice(0, 50), slice(300, 600)):
            assert_bitwise(run(x[rows], experts, ids[rows], weights[rows]), together[rows])


@pytest.mark.parametrize("num_tokens", [1, 33, 64, 65])
def test_most_experts_and_slots(num_tokens: int) -> None:
    """E = 1,024 and k = 32, placed by counting (up to 2,048 pairs) and by blocks of pairs."""
    _check((64, 32, 1024, 32), num_tokens)
    _check((64, 32, 1024, 32), num_tokens, "duplicates")


@pytest.mark.parametrize("rows", [65_535, 65_536, 65_537])
def test_around_one_chunk(rows: int) -> None:
    """k = 1 and 3, so that chunks end inside and at the end of the batch."""
    experts = _layer(SMALL[1], False)
    rng = np.random.default_rng(rows)
    for top_k in (1, 3):
        num_tokens = -(-rows // top_k)
        x = data.tokens(rng, num_tokens, 96)
        ids, weights = data.routing(rng, "random", num_tokens, 5, top_k)
        y = np.asarray(kernel(x, experts, ids, weights))
        probe = rng.integers(0, num_tokens, 64)
        assert_bitwise(y[probe], kernel(x[probe], experts, ids[probe], weights[probe]))
        assert_bitwise(y[-1:], kernel(x[-1:], experts, ids[-1:], weights[-1:]))


@pytest.mark.parametrize("shape", [LARGE[0], *SMALL], ids=str)
def test_a_token_is_bitwise_the_same_in_every_batch(shape: tuple[int, int, int, int]) -> None:
    experts = _layer(shape, False)
    x, ids, weights = _tokens(shape, 4096)
    everything = np.asarray(kernel(x, experts, ids, weights))
    rng = np.random.default_rng(1)
    for num_tokens in (1, 8, 9, 64, 65, 512, 4096):
        rows = rng.permutation(4096)[:num_tokens]
        assert_bitwise(kernel(x[rows], experts, ids[rows], weights[rows]), everything[rows])


@pytest.mark.parametrize("shape", [LARGE[0], *SMALL], ids=str)
def test_a_hundred_repeats_beside_a_tenant(
    shape: tuple[int, int, int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Bitwise equal, and no hang, while another stream holds 1 to 64 SMs."""
    library = sm_holder.load(tmp_path_factory.mktemp("sm_holder"))
    experts = _layer(shape, False)
    calls = [_tokens(shape, num_tokens) for num_tokens in (1, 65, 2049)]

    def run() -> list[jax.Array]:
        return jax.block_until_ready([kernel(x, experts, ids, w) for x, ids, w in calls])

    for _ in range(5):  # what is loaded, allocated or recorded once may wait for the whole GPU
        expected = [np.asarray(y) for y in run()]
    for repeat in range(100):
        with sm_holder.held(library, 1 + repeat * 63 // 99):
            actual = run()
        for one, other in zip(actual, expected, strict=True):
            assert_bitwise(one, other)


def test_a_thousand_replays_beside_a_tenant(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A CUDA graph of six layers is replayed while another stream holds 1 to 64 SMs."""
    library = sm_holder.load(tmp_path_factory.mktemp("sm_holder"))
    experts = _layer(SMALL[0], False)
    calls = [_tokens(SMALL[0], num_tokens) for num_tokens in (1, 4, 9, 65, 700, 2049)]

    # Results go where those of the step before lay: a graph holds addresses.
    @functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
    def step(
        _: list[jax.Array], calls: list[tuple[jax.Array, ...]], experts: w4.PackedExperts
    ) -> list[jax.Array]:
        return [kernel(x, experts, ids, weights) for x, ids, weights in calls]

    actual = [jnp.zeros_like(x) for x, _, _ in calls]
    for _ in range(5):
        actual = jax.block_until_ready(step(actual, calls, experts))
    expected = [np.asarray(y) for y in actual]
    recorded = _ffi.call_count("fused_moe")
    for num_sms in range(1, 65):
        with sm_holder.held(library, num_sms):
            for _ in range(16):
                actual = step(actual, calls, experts)
            jax.block_until_ready(actual)
        for one, other in zip(actual, expected, strict=True):
            assert_bitwise(one, other)
    assert _ffi.call_count("fused_moe") == recorded


@pytest.mark.parametrize("num_tokens", [1, 9, 700])
def test_what_lies_in_the_workspace_changes_nothing(num_tokens: int) -> None:
    """Zeros, then NaN in every byte of E4M3, bf16 and f32; indices out of all bounds."""
    shape = SMALL[1]
    experts = _layer(shape, True)
    x, ids, weights = _tokens(shape, num_tokens, "outside")
    expected = np.asarray(kernel(x, experts, ids, weights))
    nbytes = op.workspace_bytes(num_tokens, shape[3], experts)
    tactic = w4.tactics(w4.Problem.of_layer("fused_moe", experts, ids.size))[0]

    @functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
    def call(workspace: jax.Array) -> list[jax.Array]:
        types = [
            jax.ShapeDtypeStruct(x.shape, jnp.bfloat16),
            jax.ShapeDtypeStruct(workspace.shape, jnp.uint8),
        ]
        attrs = attributes(experts, jnp.float8_e4m3fn, w4.PerToken(), w4.SwiGLU(), tactic)
        operands = (x, or_nothing(None), *expert_operands(experts), ids, weights)
        return _ffi.call("fused_moe", types, *operands, **attrs)

    for byte in (0x00, 0x7F, 0xFF):
        poison = jnp.full(nbytes, byte, jnp.uint8)
        address = poison.unsafe_buffer_pointer()
        y, workspace = call(poison)
        assert workspace.unsafe_buffer_pointer() == address  # the donated buffer was the workspace
        assert_bitwise(y, expected)


def test_more_than_two_to_the_31_elements() -> None:
    """Rows x H of one call, and of one token image: 64-bit offsets everywhere."""
    shape, num_tokens = (4096, 32, 2, 1), 2**19 + 77
    experts = _layer(shape, True)
    assert num_tokens * shape[0] > 2**31
    rng = np.random.default_rng(0)
    pattern = data.tokens(rng, 1009, shape[0])  # a prime number of different rows
    rows = np.arange(num_tokens) % 1009
    x = jnp.take(pattern, jnp.asarray(rows), axis=0)
    ids = jnp.asarray(rng.integers(0, 2, (num_tokens, 1)), jnp.int32)
    weights = jnp.ones((num_tokens, 1), jnp.float32)
    probe = np.append(np.arange(num_tokens - 40, num_tokens), rng.integers(0, num_tokens, 60))
    few = kernel(x[probe], experts, ids[probe], weights[probe])
    assert_bitwise(kernel(x, experts, ids, weights)[probe], few)
    sizes = jnp.asarray([num_tokens - 300, 300], jnp.int32)
    grouped = w4.expert_mlp(x, experts, sizes, implementation="cuda_sm90")
    ends = jnp.asarray([0, 1, num_tokens - 301, num_tokens - 300, num_tokens - 1])
    expected = kernel(
        x[ends],
        experts,
        (ends >= num_tokens - 300)[:, None].astype(jnp.int32),
        jnp.ones((5, 1), jnp.float32),
    )
    assert_bitwise(grouped[ends], expected)


def test_other_tokens_may_be_nan() -> None:
    experts = _layer(SMALL[0], True)
    x, ids, weights = _tokens(SMALL[0], 65)
    clean = np.asarray(kernel(x, experts, ids, weights))
    dirty = np.asarray(kernel(x.at[7].set(jnp.nan), experts, ids, weights))
    keep = np.arange(65) != 7
    assert_bitwise(dirty[keep], clean[keep])
    assert np.isnan(dirty[7].astype(np.float32)).all()


def test_fp8_tokens_are_used_as_they_are() -> None:
    experts = _layer(SMALL[0], True)
    x, ids, weights = _tokens(SMALL[0], 33)
    x_fp8, x_scale = w4.quantize_fp8(x)
    expected = kernel(x, experts, ids, weights)
    assert_bitwise(kernel(x_fp8, experts, ids, weights, x_scale=x_scale), expected)


def test_platform_decides_by_itself() -> None:
    experts = _layer(SMALL[0], True)
    x, ids, weights = _tokens(SMALL[0], 33)
    calls = _ffi.call_count("fused_moe")
    y = w4.fused_moe(x, experts, ids, weights)
    assert _ffi.call_count("fused_moe") > calls
    assert_bitwise(y, kernel(x, experts, ids, weights))


@pytest.mark.parametrize("act_dtype", [jnp.float8_e4m3fn, jnp.bfloat16])
def test_every_tactic_gives_the_same_bits(act_dtype: Any) -> None:
    experts = _layer(SMALL[0], True)
    x, ids, weights = _tokens(SMALL[0], 700)
    expected = np.asarray(kernel(x, experts, ids, weights, act_dtype=act_dtype))
    for tactic in w4.tactics(w4.Problem.of_layer("fused_moe", experts, ids.size, act_dtype)):
        y = kernel(x, experts, ids, weights, act_dtype=act_dtype, tactic=tactic)
        assert_bitwise(y, expected)


def test_autotune_records_a_tactic(tmp_path: pathlib.Path) -> None:
    experts = _layer(SMALL[0], True)
    x, ids, weights = _tokens(SMALL[0], 700)
    problem = w4.Problem.of_layer("fused_moe", experts, ids.size)
    expected = np.asarray(kernel(x, experts, ids, weights))
    path = tmp_path / "winners.json"
    with w4.autotune(path):
        assert_bitwise(kernel(x, experts, ids, weights), expected)
    assert list(winners.load(path).entries) == [problem.key()]
    assert "by autotune;" in w4.explain(x, experts, ids)


def test_gradients_beside_the_kernel() -> None:
    experts = _layer(SMALL[0], True)
    x, ids, weights = _tokens(SMALL[0], 9)

    def loss(x: jax.Array, weights: jax.Array, implementation: str) -> jax.Array:
        y = w4.fused_moe(x, experts, ids, weights, implementation=implementation)
        return jnp.sum(y.astype(jnp.float32))

    for actual, expected in zip(
        jax.grad(loss, (0, 1))(x, weights, "cuda_sm90"),
        jax.grad(loss, (0, 1))(x, weights, "xla"),
        strict=True,
    ):
        assert relative_rms(actual, expected) < 1e-5


def test_decode_step_is_replayed_by_cuda_graphs() -> None:
    """Several layers in one jitted step with a donated state: no handler runs after recording."""
    rng = np.random.default_rng(0)
    layers = [
        (w4.pack_experts(data.expert_weights(rng, 4, 256, 128)), jnp.asarray(router, jnp.float32))
        for router in rng.standard_normal((4, 256, 4))
    ]
    x = data.tokens(rng, 16, 256)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(x: jax.Array, layers: list[tuple[w4.PackedExperts, jax.Array]]) -> jax.Array:
        for experts, router in layers:
            ids, weights = w4.topk_routing(x.astype(jnp.float32) @ router, 2)
            x = jnp.tanh(x + kernel(x, experts, ids, weights))
        return x

    for _ in range(4):
        x = jax.block_until_ready(step(x, layers))
    recorded = _ffi.call_count("fused_moe")
    assert recorded > 0
    for _ in range(5):
        x = jax.block_until_ready(step(x, layers))
    assert _ffi.call_count("fused_moe") == recorded


@pytest.mark.parametrize("num_tokens", [1, 5000, 40_000])
def test_workspace_is_sized_alike_on_both_sides(num_tokens: int) -> None:
    experts = _layer(SMALL[1], False)
    x, ids, weights = _tokens(SMALL[1], num_tokens)
    needed = op.workspace_bytes(num_tokens, 3, experts)

    def call(nbytes: int, **changes: float | str) -> None:
        types = [
            jax.ShapeDtypeStruct(x.shape, jnp.bfloat16),
            jax.ShapeDtypeStruct((nbytes,), jnp.uint8),
        ]
        empty = jnp.zeros(0, jnp.float32)
        tactic = w4.Tactic(tiles.TILE_TOKENS[0])
        told = attributes(experts, jnp.float8_e4m3fn, w4.PerToken(), w4.SwiGLU(), tactic)
        operands = (experts.w13.data, empty, experts.w2.data, empty, ids, weights)
        out = _ffi.call("fused_moe", types, x, empty, *operands, **{**told, **changes})
        jax.block_until_ready(out)

    call(needed)
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"workspace has {needed - 1} bytes"):
        call(needed - 1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no tile of 24 tokens is compiled"):
        call(needed, tile_tokens=24)
    with pytest.raises(jax.errors.JaxRuntimeError, match='weights of format "int5" have no kernel'):
        call(needed, format="int5")
    with pytest.raises(jax.errors.JaxRuntimeError, match="activation 2 has no kernel"):
        call(needed, activation=2)
