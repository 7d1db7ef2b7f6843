"""gpt-oss against float64 numpy: prompts, steps, rows that come and go; and on several devices."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

nnx = pytest.importorskip("flax.nnx", reason="needs the extra [flax]")
pytest.importorskip("safetensors", reason="needs the extra [checkpoint]")

from jax_w4moe.checkpoint import convert  # noqa: E402
from jax_w4moe.flax import FusedMoE  # noqa: E402
from jax_w4moe.models import Cache, GptOss, Runner, Yarn, save_random_gpt_oss  # noqa: E402
from tests.helpers.compare import assert_bitwise, relative_rms  # noqa: E402
from tests.helpers.gpt_oss_oracle import Oracle  # noqa: E402
from tests.helpers.meshes import make_mesh  # noqa: E402
from tests.models.common import CONFIG, config  # noqa: E402

EXACT = {"dtype": jnp.float32, "act_dtype": jnp.float32}
BATCH, CAPACITY, WIDTH = 3, 20, 8  # rows and tokens of the cache; of padded prompts
F32_RMS = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "gpt_oss"
    save_random_gpt_oss(path, CONFIG, seed=3, shards=2)
    return path


@pytest.fixture(scope="module")
def runner(folder: Path) -> Runner:
    return Runner(GptOss.from_pretrained(folder, **EXACT))


def prefill(
    runner: Runner, cache: Cache, prompts: list[list[int]], slots: list[int]
) -> tuple[np.ndarray, Cache]:
    """Two prompts at a time, padded with a token that must not matter."""
    tokens = np.full((2, WIDTH), 11, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)
    logits, cache = runner.prefill(
        cache, jnp.asarray(tokens), lengths, jnp.asarray(slots, jnp.int32)
    )
    return np.asarray(logits), cache


def decode(
    runner: Runner, cache: Cache, tokens: list[int], active: list[int]
) -> tuple[np.ndarray, Cache]:
    rows = jnp.asarray([row in active for row in range(BATCH)])
    logits, cache = runner.decode(cache, jnp.asarray(tokens, jnp.int32), rows)
    return np.asarray(logits), cache


def rows_of(cache: Cache, row: int) -> list[np.ndarray]:
    return [np.asarray(leaf[row]) for leaf in jax.tree.leaves(cache)]


def test_rows_that_come_and_go(runner: Runner, folder: Path, rng: np.random.Generator) -> None:
    """Rows at different positions, a slot used twice, a window that goes round many times."""
    oracle = Oracle(folder)
    first, second, third = (rng.integers(0, CONFIG.vocab_size, n).tolist() for n in (20, 9, 16))

    def agree(logits: np.ndarray, tokens: list[int]) -> None:
        assert relative_rms(logits, oracle.logits(tokens)[-1]) <= F32_RMS

    cache = runner.init_cache(BATCH, CAPACITY)
    assert [k.shape[1] for k in cache.keys] == [CONFIG.sliding_window, CAPACITY]
    logits, cache = prefill(runner, cache, [first[:8], second[:2]], [2, 0])
    agree(logits[0], first[:8])
    agree(logits[1], second[:2])
    for step in range(6):
        at = {2: (first, 8 + step), 0: (second, 2 + step)}
        logits, cache = decode(runner, cache, [second[2 + step], 0, first[8 + step]], [0, 2])
        for row, (tokens, position) in at.items():
            agree(logits[row], tokens[: position + 1])
    # The second sequence is over, the third takes its place; one prompt is not there.
    logits, cache = prefill(runner, cache, [[5], third[:7]], [-1, 0])
    assert np.isnan(logits[0]).all()
    agree(logits[1], third[:7])
    for step in range(6):
        logits, cache = decode(runner, cache, [third[7 + step], 0, first[14 + step]], [0, 2])
        agree(logits[0], third[: 8 + step])
        agree(logits[2], first[: 15 + step])
    assert np.asarray(cache.lengths).tolist() == [13, 0, 20]
    assert runner._decode._cache_size() == 1 and runner._prefill._cache_size() == 1


def test_rows_do_not_see_each_other(runner: Runner, rng: np.random.Generator) -> None:
    """Bit for bit: a row among others, among different others, and alone."""
    own, others = rng.integers(0, CONFIG.vocab_size, (2, 8)).tolist()
    results = []
    for neighbour, is_there in ((others, True), (others[::-1], True), (others, False)):
        cache = runner.init_cache(BATCH, CAPACITY)
        logits, cache = prefill(runner, cache, [own[:6], neighbour], [1, 0 if is_there else -1])
        parts = [logits[0]]
        for step in (6, 7):
            active = [0, 1] if is_there else [1]
            logits, cache = decode(runner, cache, [neighbour[step], own[step], 0], active)
            parts.append(logits[1])
        results.append(np.stack(parts))
    assert_bitwise(results[1], results[0])
    assert_bitwise(results[2], results[0])


def test_what_is_no_token_has_no_expert(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding, a prompt that is not there, and rows that are not active."""
    seen: list[np.ndarray] = []

    def spy(_: FusedMoE, x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
        jax.debug.callback(lambda ids: seen.append(np.asarray(ids)), ids)
        return jnp.zeros_like(x)

    monkeypatch.setattr(FusedMoE, "_exact", spy)
    own = Runner(runner.model)
    cache = own.init_cache(BATCH, CAPACITY)
    _, cache = prefill(own, cache, [[1, 2, 3], [4, 5]], [1, -1])
    jax.effects_barrier()
    prompts, seen[:] = list(seen), []
    decode(own, cache, [1, 2, 3], [1])
    jax.effects_barrier()
    for found, tokens in ((prompts, [0, 1, 2]), (seen, [1])):
        assert len(found) == CONFIG.num_hidden_layers
        for ids in found:
            assert (ids >= 0).all(axis=1).nonzero()[0].tolist() == tokens
            assert (np.delete(ids, tokens, axis=0) == -1).all()


def test_what_a_sequence_leaves_behind_is_gone(runner: Runner) -> None:
    """Even a NaN, which a mask alone would let through."""
    prompts = [[1, 2, 3], [4]]
    clean = runner.init_cache(BATCH, CAPACITY)
    nan = jax.tree.map(
        lambda a: a * jnp.nan if a.ndim > 1 else a, runner.init_cache(BATCH, CAPACITY)
    )
    logits = []
    for cache in (clean, nan):
        _, cache = prefill(runner, cache, prompts, [0, 1])
        logits.append(decode(runner, cache, [5, 6, 0], [0, 1])[0][:2])
    assert np.isfinite(logits[0]).all()
    assert_bitwise(logits[1], logits[0])


def test_rows_that_cannot_go_on(runner: Runner) -> None:
    """NaN logits and an untouched row: not active, full, or a token outside the vocabulary."""
    unknown = CONFIG.vocab_size
    cache = runner.init_cache(BATCH, CAPACITY)
    logits, cache = prefill(runner, cache, [[1, 2], [3, unknown]], [0, 1])
    assert np.isfinite(logits[0]).all() and np.isnan(logits[1]).all()
    assert np.asarray(cache.lengths).tolist() == [2, 0, 0]
    assert not any(row.any() for row in rows_of(cache, 1))
    logits, cache = prefill(runner, cache, [[], [4, 5, 6]], [0, 1])
    assert np.isnan(logits[0]).all() and np.asarray(cache.lengths).tolist() == [2, 3, 0]

    for tokens, dead in (([1, 1, 1], [2]), ([-1, 1, unknown], [0, 2])):
        before = [rows_of(cache, row) for row in dead]
        logits, cache = decode(runner, cache, tokens, [0, 1])
        assert np.isnan(logits).all(axis=1).nonzero()[0].tolist() == dead
        for row, old in zip(dead, before, strict=True):
            for now, then in zip(rows_of(cache, row), old, strict=True):
                assert_bitwise(now, then)

    full = dataclasses.replace(cache, lengths=jnp.asarray([CAPACITY, 5, 0], jnp.int32))
    before = rows_of(full, 0)
    logits, cache = decode(runner, full, [1, 1, 1], [0, 1])
    assert np.isnan(logits[0]).all() and np.isfinite(logits[1]).all()
    for now, then in zip(rows_of(cache, 0), before, strict=True):
        assert_bitwise(now, then)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True, "attention_bias": False, "yarn": None},
        {"yarn": Yarn(32.0, 8, beta_slow=0.5, truncate=False), "swiglu_limit": 0.5},
    ],
    ids=["tied, no biases, plain rope", "another yarn, a low clamp"],
)
def test_other_configs(tmp_path: Path, rng: np.random.Generator, changes: dict[str, Any]) -> None:
    """Whole sequences without a cache, of different lengths."""
    save_random_gpt_oss(
        tmp_path, config(num_hidden_layers=1, layer_types=("sliding_attention",), **changes)
    )
    model = GptOss.from_pretrained(tmp_path, **EXACT)
    tokens = rng.integers(0, CONFIG.vocab_size, (2, WIDTH)).astype(np.int32)
    lengths = jnp.asarray([8, 5], jnp.int32)
    logits = jax.jit(lambda model: model(jnp.asarray(tokens), lengths))(model)
    for row, length in enumerate((8, 5)):
        expected = Oracle(tmp_path).logits(tokens[row, :length].tolist())
        assert relative_rms(logits[row, :length], expected) <= F32_RMS


def _text(model: GptOss) -> np.ndarray:
    """Logits of a few steps, from nothing."""
    runner = Runner(model)
    cache, parts = runner.init_cache(BATCH, CAPACITY), []
    for token in range(6):
        logits, cache = decode(runner, cache, [token, 2 * token, 0], [0, 1])
        parts.append(logits[:2])
    return np.stack(parts)


def test_on_two_devices(folder: Path) -> None:
    """Experts, or slices of them and heads, on two devices."""
    options = {"dtype": jnp.float32, "act_dtype": jnp.bfloat16}
    alone = _text(GptOss.from_pretrained(folder, **options))
    mesh = make_mesh((2,), axes=("x",))
    experts = GptOss.from_pretrained(
        folder, mesh=mesh, expert_axis="x", exchange="slot_rows", **options
    )
    assert experts.layers[0].mlp.w13.get_value().sharding.spec[0] == "x"
    assert_bitwise(_text(experts), alone)
    slices = GptOss.from_pretrained(folder, mesh=mesh, tensor_axis="x", **options)
    assert slices.layers[0].self_attn.k_proj.kernel.get_value().sharding.spec == PartitionSpec(
        None, "x"
    )
    assert slices.init_cache(1, 4).keys[0].sharding.spec[2] == "x"
    assert relative_rms(_text(slices), alone) <= 1e-2


def test_random_model_in_bf16_and_fp8() -> None:
    """What the constructor makes, with its own defaults."""
    small = config(num_hidden_layers=1, layer_types=("full_attention",))
    model = GptOss(small, rngs=nnx.Rngs(0))
    tokens = jnp.asarray([[1, 2, 3], [4, 5, CONFIG.vocab_size]], jnp.int32)
    logits = np.asarray(jax.jit(lambda model: model(tokens))(model))
    assert logits.shape == (2, 3, CONFIG.vocab_size) and logits.dtype == np.float32
    assert np.isfinite(logits[0]).all() and 0.3 < logits[0].std() < 3
    assert np.isnan(logits[1]).all()
    packed = nnx.state(model, nnx.Not(nnx.Param))  # gradients see everything but the experts
    assert not {"embed_tokens", "norm", "lm_head"} & set(packed)


def test_converted(folder: Path, runner: Runner, tmp_path: Path) -> None:
    """From packed experts the same model, bit for bit."""
    convert(folder, tmp_path / "packed")
    model = GptOss.from_pretrained(tmp_path / "packed", **EXACT)
    expected = jax.tree.leaves(runner.model)
    for one, other in zip(jax.tree.leaves(model), expected, strict=True):
        assert_bitwise(one, other)
