"""Who chooses the tactic, what overrides it, and that no trace keeps an old choice."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_w4moe as w4
from jax_w4moe import _ffi, implementation
from jax_w4moe.ops import tiles
from jax_w4moe.tuning import choice, model, recording, winners
from jax_w4moe.tuning.winners import Winner, Winners
from tests.helpers import data
from tests.helpers.compare import assert_bitwise

H, I, E, K = 64, 32, 4, 2  # noqa: E741
DEVICE = "NVIDIA H200"
T = 8
FLASH = w4.Problem("fused_moe", 4096, 2048, 256, 6 * 3)  # not in any table
SMALL, LARGE = (w4.Tactic(pick(tiles.TILE_TOKENS)) for pick in (min, max))


@pytest.fixture(autouse=True)
def _nothing_loaded() -> Iterator[None]:
    yield
    choice._loaded.set_global(choice._Loaded({}))


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """As though this were one; arrays stay where they are."""
    monkeypatch.setattr(implementation, "device_kind", lambda: DEVICE)
    monkeypatch.setattr(_ffi, "why_unavailable", lambda: None)
    monkeypatch.setattr(recording, "_PLATFORM", jax.default_backend())


@pytest.fixture(scope="module")
def call() -> tuple[jax.Array, w4.PackedExperts, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    experts = w4.pack_experts(data.expert_weights(rng, E, H, I))
    ids, weights = data.routing(rng, "random", T, E, K)
    return data.tokens(rng, T, H), experts, ids, weights


def _tiles(function: Any, *arguments: Any) -> set[int]:
    """The tiles that a function's kernels are traced with."""
    text = str(jax.jit(function).trace(*arguments).jaxpr)
    return set(map(int, re.findall(r"'tile_tokens', (?:np\.int64\()?(\d+)", text)))


# --- problems and tactics -------------------------------------------------------------------------


def test_every_compiled_tile_is_a_tactic() -> None:
    tactics = w4.tactics(FLASH)
    assert sorted(t.tile_tokens for t in tactics) == sorted(tiles.TILE_TOKENS)
    assert hash(tactics[0]) == hash(w4.Tactic(tactics[0].tile_tokens))
    with pytest.raises(ValueError, match="op='quantize_fp8' has no tactics; use one of fused_moe"):
        w4.Problem("quantize_fp8", H, I, E, 1)


@pytest.mark.parametrize(("rows", "key"), [(0, 0), (7, 7), (8, 8), (9, 10), (65, 80), (6144, 6144)])
def test_keys(rows: int, key: int) -> None:
    assert w4.Problem("fused_moe", H, I, E, rows).key() == w4.Problem("fused_moe", H, I, E, key)


def test_problems_of_arrays(call: Any) -> None:
    experts = call[1]
    assert w4.Problem.of_layer("expert_mlp", experts, 9) == w4.Problem("expert_mlp", H, I, E, 9)
    expected = w4.Problem("grouped_matmul", H, 2 * I, E, 9)
    assert w4.Problem.of_matmul(experts.w13, 9) == expected


# --- the model ------------------------------------------------------------------------------------


def _best(rows_per_expert: int) -> int:
    problem = w4.Problem("fused_moe", 4096, 2048, 32, 32 * rows_per_expert)
    return model.best(problem).tile_tokens


@pytest.mark.parametrize("compiled", [(64, 224), (240, 64, 96), (128,)])
def test_model_takes_wider_tiles_for_more_rows(
    monkeypatch: pytest.MonkeyPatch, compiled: tuple[int, ...]
) -> None:
    """In whatever order and number; the narrowest where it holds all rows, the widest at last."""
    monkeypatch.setattr(tiles, "TILE_TOKENS", compiled)
    chosen = [_best(rows) for rows in (1, 8, 32, 48, 80, 200, 2000)]
    assert chosen == sorted(chosen)
    assert chosen[:4] == [min(compiled)] * 4 and chosen[-2:] == [max(compiled)] * 2
    if 96 in compiled:
        assert _best(80) == 96


def test_model_grows_with_work() -> None:
    times = [
        model.estimated_s(w4.Problem("fused_moe", 4096, 2048, 256, rows), SMALL)
        for rows in (0, 6, 24, 384, 6144, 49152)
    ]
    assert times == sorted(times) and times[0] == 0
    one = model.estimated_s(w4.Problem("grouped_matmul", 4096, 4096, 256, 384), SMALL)
    assert one < times[3]  # one projection of the layer's two
    assert 0.5 < times[1] / 17.4e-6 < 2  # the floor's own time at T = 1


# --- precedence -----------------------------------------------------------------------------------


def test_precedence(monkeypatch: pytest.MonkeyPatch, h200: None) -> None:
    """Argument, autotuned, shipped, model; the other kind of device sees none of them."""
    assert w4.tuning.choose(FLASH) == (model.best(FLASH), "the cost model")
    other = LARGE if model.best(FLASH) == SMALL else SMALL
    entry = {FLASH.key(): Winner(other, 1.0)}
    monkeypatch.setattr(winners, "shipped", lambda device: entry if device == DEVICE else {})
    assert w4.tuning.choose(FLASH) == (other, f"the measured table for {DEVICE}")
    choice.use(DEVICE, {FLASH.key(): Winner(SMALL, 1.0)})
    assert w4.tuning.choose(FLASH) == (SMALL, "autotune")
    assert w4.tuning.choose(FLASH, LARGE) == (LARGE, "the argument")
    monkeypatch.setattr(implementation, "device_kind", lambda: "NVIDIA H20")
    assert w4.tuning.choose(FLASH).source == "the cost model"
    monkeypatch.setattr(implementation, "device_kind", lambda: None)
    assert w4.tuning.choose(FLASH).source == "the cost model"


def test_shipped_tables() -> None:
    """Every file is found by its device's name and names compiled tactics only (load checks)."""
    files = list((Path(winners.__file__).parent / "tables").glob("*.json"))
    assert files
    for file in files:
        table = winners.load(file)
        assert winners.shipped(table.device) == table.entries
        assert all(problem == problem.key() for problem in table.entries)
    assert winners.shipped("an unknown ../device") == {}


def test_a_format_without_times_of_its_own_takes_mxfp4s(h200: None) -> None:
    sizes = (7168, 2048, 32, 8 * 8192)
    of_mxfp4 = w4.tuning.choose(w4.Problem("fused_moe", *sizes))
    assert "the measured table" in of_mxfp4.source
    assert w4.tuning.choose(w4.Problem("fused_moe", *sizes, format="int4_g128")) == of_mxfp4
    own = w4.tuning.choose(w4.Problem("fused_moe", *sizes, format="int4_g32"))
    assert own.source == of_mxfp4.source and own.tactic != of_mxfp4.tactic


@pytest.mark.parametrize("op", ["fused_moe", "expert_mlp", "grouped_matmul"])
def test_tactic_reaches_the_kernel(call: Any, op: str) -> None:
    x, experts, ids, weights = call
    sizes = jnp.full(E, T // E, jnp.int32)
    arguments: dict[str, tuple[Any, ...]] = {
        "fused_moe": (x, experts, ids, weights),
        "expert_mlp": (x, experts, sizes),
        "grouped_matmul": (x, experts.w13, sizes),
    }
    results = []
    for tactic in (SMALL, LARGE):

        def run(*arguments: Any, tactic: w4.Tactic = tactic) -> jax.Array:
            return getattr(w4, op)(*arguments, tactic=tactic)

        assert _tiles(run, *arguments[op]) == {tactic.tile_tokens}
        results.append(run(*arguments[op]))
    assert_bitwise(results[0], results[1])  # plain XLA here; the kernels have their own tests


def test_tactic_is_chosen_for_the_folded_batch(
    call: Any, h200: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, experts, ids, weights = call
    problem = w4.Problem.of_layer("fused_moe", experts, 3 * ids.size)
    assert problem.key() != w4.Problem.of_layer("fused_moe", experts, ids.size).key()
    choice.use(DEVICE, {problem.key(): Winner(LARGE, 1.0)})
    stacked = [jnp.stack([a] * 3) for a in (x, ids, weights)]

    def batch(x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.vmap(lambda *a: w4.fused_moe(a[0], experts, *a[1:]))(x, ids, weights)

    assert _tiles(batch, *stacked) == {LARGE.tile_tokens}


# --- files and caches -----------------------------------------------------------------------------


def test_loading_traces_again(call: Any, h200: None, tmp_path: Path) -> None:
    """Neither the user's jit nor JAX's caches inside keep the tactic of before."""
    _, experts, ids, _ = call
    problem = w4.Problem.of_layer("fused_moe", experts, ids.size)
    path = tmp_path / "winners.json"
    traces = []

    @jax.jit
    def layer(*arguments: Any) -> jax.Array:
        traces.append(1)
        return w4.fused_moe(*arguments)

    before = layer(*call)
    for tactic in (SMALL, LARGE, SMALL):
        path.unlink(missing_ok=True)
        winners.save(path, Winners(DEVICE, {problem.key(): Winner(tactic, 1.0)}))
        w4.load_tactics(path)
        count = len(traces)
        assert_bitwise(layer(*call), before)
        assert len(traces) == count + 1
        layer(*call)
        assert len(traces) == count + 1
        assert _tiles(layer, *call) == {tactic.tile_tokens}


def test_saving_merges(tmp_path: Path) -> None:
    path = tmp_path / "winners.json"
    other = w4.Problem("expert_mlp", H, I, E, 8)
    winners.save(
        path, Winners(DEVICE, {FLASH.key(): Winner(LARGE, 2.0), other: Winner(SMALL, 3.0)})
    )
    winners.save(path, Winners(DEVICE, {FLASH.key(): Winner(SMALL, 1.234567)}))
    entries = {FLASH.key(): Winner(SMALL, 1.23), other: Winner(SMALL, 3.0)}
    assert winners.load(path) == (DEVICE, entries)
    content = json.loads(path.read_text())
    assert set(content) == {"device", "date", "entries"}
    assert [p.name for p in tmp_path.iterdir()] == ["winners.json"]
    with pytest.raises(ValueError, match="is for 'NVIDIA H200', this GPU is 'NVIDIA H20'; use an"):
        winners.save(path, Winners("NVIDIA H20", {}))


def test_files_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "winners.json"
    with pytest.raises(FileNotFoundError):
        w4.load_tactics(path)
    for text in ("", "[]", '{"device": "x", "entries": [{"problem": {}}]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="holds no tactics .*; delete it and run autotune"):
            w4.load_tactics(path)
    winners.save(tmp_path / "old.json", Winners(DEVICE, {FLASH.key(): Winner(w4.Tactic(24), 1.0)}))
    with pytest.raises(ValueError, match="old.json: .*24\\) is not compiled; use one of .* again."):
        w4.load_tactics(tmp_path / "old.json")


# --- autotune -------------------------------------------------------------------------------------


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes the last tactic the fastest; the number of calls that each measurement rotates."""
    measured: list[int] = []

    def median_us(op: Any, calls: Any) -> float:
        measured.append(len(calls))
        tokens, fixed = calls[-1]
        op(tokens, fixed)
        return 100.0 - len(measured)

    monkeypatch.setattr(recording, "_median_us", median_us)
    return measured


@pytest.fixture
def two_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer to compile, with no table that names the others."""
    monkeypatch.setattr(tiles, "TILE_TOKENS", (SMALL.tile_tokens, LARGE.tile_tokens))
    monkeypatch.setattr(winners, "shipped", lambda device: {})


@pytest.mark.usefixtures("two_tiles")
def test_autotune(call: Any, h200: None, timed: list[int], tmp_path: Path) -> None:
    x, experts, ids, weights = call
    sizes = jnp.full(E, T // E, jnp.int32)
    path = tmp_path / "winners.json"
    problem = w4.Problem.of_layer("fused_moe", experts, ids.size)
    last = w4.tactics(problem)[-1]
    expected = w4.fused_moe(*call)
    assert not timed  # outside of a block nothing is measured
    with w4.autotune(path):
        jax.jit(w4.fused_moe)(*call)
        w4.fused_moe(*call, tactic=SMALL)
        w4.fused_moe(*call, implementation="xla")
        w4.fused_moe(x[:0], experts, ids[:0], weights[:0])
        assert not timed  # traced, told what to do, no kernel, or nothing to do
        assert_bitwise(w4.fused_moe(*call), expected)
        assert timed == [8] * len(w4.tactics(problem))
        w4.fused_moe(*call)
        assert len(timed) == len(w4.tactics(problem))  # known now
        assert w4.tuning.choose(problem) == (last, "autotune")
        w4.expert_mlp(x, experts, sizes)
        w4.grouped_matmul(x, experts.w13, sizes)
    assert len(timed) == 3 * len(w4.tactics(problem))
    assert {p.op for p in winners.load(path).entries} == set(w4.tuning.problem.OPS)
    assert w4.tuning.choose(problem) == (last, "autotune")  # still, after the block

    choice._loaded.set_global(choice._Loaded({}))  # as in the next process
    with w4.autotune(path):
        w4.fused_moe(*call)
        assert len(timed) == 3 * len(w4.tactics(problem))
        assert f"{last.tile_tokens} tokens at most, by autotune;" in w4.explain(x, experts, ids)


@pytest.mark.usefixtures("two_tiles")
def test_autotune_keeps_what_was_found_before_an_error(
    call: Any, h200: None, timed: list[int], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt), w4.autotune(tmp_path / "winners.json"):
        w4.fused_moe(*call)
        raise KeyboardInterrupt
    assert len(winners.load(tmp_path / "winners.json").entries) == 1


def test_rotated_calls_are_the_same_work_on_other_experts(
    call: Any, h200: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, experts, _, weights = call
    ids = jnp.asarray([[0, 1], [0, -1]] * (T // 2), jnp.int32)
    seen: list[np.ndarray] = []

    def median_us(op: Any, calls: Any) -> float:
        seen.extend(np.asarray(tokens.topk_ids) for tokens, _ in calls)
        return 1.0

    monkeypatch.setattr(recording, "_median_us", median_us)
    with w4.autotune(tmp_path / "winners.json"):
        w4.fused_moe(call[0], experts, ids, weights)
    np.testing.assert_array_equal(seen[0], ids)
    assert {int(s[0, 0]) for s in seen} == set(range(E))
    for rotated in seen:
        assert (rotated[::2, 1] == (rotated[::2, 0] + 1) % E).all()
        assert (rotated[1::2, 1] == -1).all()


@pytest.mark.matrix
@pytest.mark.usefixtures("two_tiles")
def test_autotune_measures(call: Any, h200: None, tmp_path: Path) -> None:
    """With the timing itself, on the CPU."""
    with w4.autotune(tmp_path / "winners.json"):
        w4.fused_moe(*call)
    [winner] = winners.load(tmp_path / "winners.json").entries.values()
    assert winner.time_us > 0


def test_autotune_refusals(h200: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match="nowhere does not exist; make it"),
        w4.autotune(tmp_path / "nowhere" / "winners.json"),
    ):
        pass
    winners.save(tmp_path / "h20.json", Winners("NVIDIA H20", {}))
    with (
        pytest.raises(ValueError, match="is for 'NVIDIA H20', this GPU is 'NVIDIA H200'"),
        w4.autotune(tmp_path / "h20.json"),
    ):
        pass
    monkeypatch.setattr(_ffi, "why_unavailable", lambda: "No GPU is here.")
    with (
        pytest.raises(RuntimeError, match="autotune measures on a Hopper GPU: No GPU is here."),
        w4.autotune(tmp_path / "winners.json"),
    ):
        pass
