"""The engine against greedy answers of Runner, request by request."""

import asyncio
import collections
import itertools
import threading
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("prometheus_client", reason="needs the extra [serve]")
pytest.importorskip("uvicorn", reason="needs the extra [serve]")

from jax_w4moe.serving import (
    Closed,
    Engine,
    Generation,
    Refused,
    Request,
    Steps,
    compilations,
    metrics,
)
from jax_w4moe.serving.steps import write_row
from tests.serving.common import (
    CAPACITY,
    CONFIG,
    LENGTHS,
    LIMIT_S,
    SLOTS,
    Offline,
    serve,
)

pytestmark = pytest.mark.xdist_group("serving")  # steps are compiled once


def random_request(rng: np.random.Generator, **options: Any) -> Request:
    length = rng.integers(1, max(LENGTHS) + 1)
    prompt = tuple(rng.integers(0, CONFIG.vocab_size, length).tolist())
    return Request(prompt, max_tokens=int(rng.integers(1, 30)), **options)


def is_prefix(tokens: list[int], answer: list[int]) -> bool:
    return tokens == answer[: len(tokens)]


def metric(engine: Engine, name: str, **labels: str) -> float:
    value = engine.metrics.registry.get_sample_value("jax_w4moe_" + name, labels)
    assert value is not None
    return value


async def cancelled_after(generation: Generation, count: int) -> Generation:
    async for _ in generation:
        if len(generation.tokens) >= count:
            break
    generation.cancel()
    return await generation.finished()


def test_every_request_gets_its_own_answer(
    steps: Steps, offline: Offline, rng: np.random.Generator
) -> None:
    """Many random requests over few slots, some the same, some with stop tokens, some cancelled."""
    requests = [random_request(rng, ignore_eos=i % 3 == 0) for i in range(40)]
    requests += [random_request(rng, stop_token_ids=(3, 4, 5, 6)) for _ in range(8)]
    requests += requests[:4]
    cancelled = {i: int(rng.integers(0, 4)) for i in range(2, len(requests), 5)}
    engine = Engine(steps)
    before = compilations()

    async def client(index: int, request: Request) -> Generation:
        await asyncio.sleep(0.002 * index)
        generation = engine.submit(request)
        if index in cancelled:
            return await cancelled_after(generation, cancelled[index])
        return await generation.finished()

    async def clients() -> list[Generation]:
        return await asyncio.gather(*(client(*item) for item in enumerate(requests)))

    generations = serve(engine, clients())
    assert compilations() == before
    reasons: collections.Counter[str] = collections.Counter()
    for index, generation in enumerate(generations):
        tokens, reason = offline.answer(requests[index])
        assert generation.finish_reason is not None
        reasons[generation.finish_reason] += 1
        if generation.finish_reason == "cancelled":
            assert index in cancelled and is_prefix(generation.tokens, tokens)
        else:
            assert (generation.tokens, generation.finish_reason) == (tokens, reason)
    assert min(reasons[reason] for reason in ("stop", "length", "cancelled")) >= 3, reasons
    for reason, count in reasons.items():
        assert metric(engine, "requests_total", outcome=reason) == count
    generated = sum(len(generation.tokens) for generation in generations)
    assert metric(engine, "generated_tokens_total") == generated
    assert metric(engine, "tokens_per_second") <= generated / 10 + 0.01  # of the last ten seconds

    firsts = sum(bool(generation.tokens) for generation in generations)
    assert metric(engine, "time_to_first_token_seconds_count") == firsts
    assert metric(engine, "inter_token_latency_seconds_count") == generated - firsts
    assert metric(engine, "queued_requests") == metric(engine, "running_requests") == 0


def test_the_rate_is_of_the_last_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now[0]))
    own = metrics.Metrics()

    def rate() -> float | None:
        return own.registry.get_sample_value("jax_w4moe_tokens_per_second")

    own.delivered(30)
    now[0] += 6
    own.delivered(20)
    assert rate() == pytest.approx(5.0)
    now[0] += 5
    assert rate() == pytest.approx(2.0)
    now[0] += 20
    assert rate() == 0


def test_a_full_row_ends(steps: Steps, offline: Offline) -> None:
    """A row of C tokens gives C + 1 - S: the last one is not computed with."""
    request = Request((1, 2, 3), max_tokens=1000, ignore_eos=True)
    engine = Engine(steps)

    async def client() -> Generation:
        return await engine.submit(request).finished()

    generation = serve(engine, client())
    assert generation.tokens == offline.answer(request)[0]
    assert len(generation.tokens) == CAPACITY + 1 - 3 and generation.finish_reason == "length"


def test_sampling_does_not_see_its_company(steps: Steps, rng: np.random.Generator) -> None:
    """Alone, among others, and in another order: the same tokens."""
    own = [
        Request((1, 2, 3), 12, temperature=1.0, seed=11, ignore_eos=True),
        Request((1, 2, 3), 12, temperature=1.0, seed=12, ignore_eos=True),
        Request((9, 8), 12, temperature=2.0, top_p=0.7, seed=2**32 - 1, ignore_eos=True),
    ]
    others = [random_request(rng, temperature=3.0, top_p=0.5, seed=i) for i in range(9)]
    others[4:4] = [random_request(rng) for _ in range(3)]

    def answers(requests: list[Request]) -> list[list[int]]:
        engine = Engine(steps)

        async def clients() -> list[Generation]:
            submitted = [engine.submit(request) for request in requests]
            return [await generation.finished() for generation in submitted]

        return [generation.tokens for generation in serve(engine, clients())]

    alone = [answers([request])[0] for request in own]
    assert len({tuple(tokens) for tokens in alone}) == 3
    assert answers(own + others)[:3] == alone
    assert answers(others + own[::-1])[-3:] == alone[::-1]


def test_a_draw_is_of_its_position(steps: Steps) -> None:
    """Almost pure noise: another at every position, the same wherever the prompt ends."""
    engine = Engine(steps)
    noise = {"temperature": 1e6, "seed": 3, "ignore_eos": True}

    async def clients() -> list[list[int]]:
        whole = await engine.submit(Request((1, 2, 3), 12, **noise)).finished()
        begun = (1, 2, 3, *whole.tokens[:4])
        return [whole.tokens, (await engine.submit(Request(begun, 8, **noise)).finished()).tokens]

    whole, rest = serve(engine, clients())
    assert len(set(whole)) > 5 and whole[4:] == rest


def test_prefills_do_not_stop_running_requests(steps: Steps, rng: np.random.Generator) -> None:
    """Between two prefills comes a decoding step; prompts of one length go together, in order."""
    plans: list[np.ndarray] = []
    engine = Engine(steps, announce=plans.append)
    requests = [Request((index,) * length, 6, ignore_eos=True) for index, length in enumerate(
        (7, 3, 3, 3, 4, 4, 10, 3, 7, 7, 7, 3)
    )]  # fmt: skip

    async def clients() -> list[Generation]:
        submitted = [engine.submit(request) for request in requests]
        return [await generation.finished() for generation in submitted]

    serve(engine, clients())
    prefills = [plan for plan in plans if plan.shape[1] > 5]
    for plan in prefills:
        padded = [next(size for size in LENGTHS if size >= n) for n in plan[plan[:, 0] >= 0, 1]]
        assert set(padded) == {plan.shape[1] - 5}
    order = [plan[row, 5] for plan in prefills for row in range(len(plan)) if plan[row, 0] >= 0]
    assert order == list(range(len(requests)))
    is_prefill = [plan.shape[1] > 5 for plan in plans]
    assert not any(a and b for a, b in itertools.pairwise(is_prefill))
    assert (plans[0].shape, plans[0][:, 0].tolist()) == ((2, 13), [0, -1])
    assert (prefills[1].shape, prefills[1][:, 0].tolist()) == ((4, 9), [1, 2, 3, -1])
    by_length = {4: 4, 8: 2, 16: 1}
    assert all(len(plan) == by_length[plan.shape[1] - 5] for plan in prefills)
    assert all(len(plan) == SLOTS for plan in plans if plan.shape[1] == 5)


def test_steps_are_started_ahead(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of a step are read when the next one has been started, and no later."""
    order: list[str] = []
    run = steps.run

    class Ids:
        def __init__(self, ids: jax.Array) -> None:
            self.number = sum(event.startswith("run") for event in order)
            self.ids = ids
            order.append(f"run {self.number}")

        def __array__(self, *_: Any, **__: Any) -> np.ndarray:
            order.append(f"read {self.number}")
            return np.asarray(self.ids)

    monkeypatch.setattr(steps, "run", lambda plan: Ids(run(plan)))
    engine = Engine(steps)

    async def client() -> Generation:
        return await engine.submit(Request((1,), 4, ignore_eos=True)).finished()

    assert len(serve(engine, client()).tokens) == 4
    expected = ["run 0", "run 1", "read 0", "run 2", "read 1", "run 3", "read 2", "read 3"]
    assert order == expected


def test_starting_a_step_does_not_hold_up_the_event_loop(
    steps: Steps, offline: Offline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that waits for something that the event loop does meanwhile."""
    done = threading.Event()
    run = steps.run

    def start(plan: np.ndarray) -> jax.Array:
        assert done.wait(LIMIT_S / 2)
        return run(plan)

    monkeypatch.setattr(steps, "run", start)
    engine, request = Engine(steps), Request((1,), 4)

    async def client() -> Generation:
        generation = engine.submit(request)
        asyncio.get_running_loop().call_later(0.05, done.set)
        return await generation.finished()

    assert serve(engine, client()).tokens == offline.answer(request)[0]


def test_rows_may_pause(steps: Steps, offline: Offline) -> None:
    """A row that a decoding step leaves out goes on afterwards with its own token."""
    prompts = [(1, 2, 3), (9, 8)]
    plan = steps.empty_plan(LENGTHS[0])
    for slot, prompt in enumerate(prompts):
        write_row(plan[slot], slot, 0, 0.0, 1.0, prompt)
    tokens = [[int(token)] for token in np.asarray(steps.run(plan))[:2]]
    for active in ([0], [0], [0, 1], [1], [1]):
        plan = steps.empty_plan()
        for slot in active:
            write_row(plan[slot], slot, 0, 0.0, 1.0)
        ids = np.asarray(steps.run(plan))
        assert (np.delete(ids, active) == -1).all()
        for slot in active:
            tokens[slot].append(int(ids[slot]))
    for prompt, own in zip(prompts, tokens, strict=True):
        assert own == offline.answer(Request(prompt, 4, ignore_eos=True))[0]


def test_a_full_queue_refuses(steps: Steps) -> None:
    engine = Engine(steps, max_queue=3)

    async def clients() -> list[Generation]:
        submitted = [engine.submit(Request((1,), 2)) for _ in range(3)]
        with pytest.raises(Refused, match="^3 requests are waiting, which is as many as may; "):
            engine.submit(Request((1,), 2))
        submitted[1].cancel()  # makes room
        submitted.append(engine.submit(Request((1,), 2)))
        return [await generation.finished() for generation in submitted]

    reasons = [generation.finish_reason for generation in serve(engine, clients())]
    assert reasons.count("cancelled") == 1 and reasons[1] == "cancelled"
    assert metric(engine, "requests_total", outcome="refused") == 1


def test_cancelling_frees_the_slot_by_the_next_step(steps: Steps, offline: Offline) -> None:
    """All slots taken by long requests: one is cancelled, and the next prompt takes its place."""
    plans: list[np.ndarray] = []
    engine = Engine(steps, announce=plans.append)
    new = Request((5, 6), 4)

    async def clients() -> Generation:
        long = [engine.submit(Request((1, i), 20, ignore_eos=True)) for i in range(SLOTS)]
        waiting = engine.submit(new)
        async for _ in long[2]:
            break
        seen = len(plans)
        long[2].cancel()
        assert long[2].finish_reason == "cancelled"
        await waiting.finished()
        assert plans[seen].shape[1] > 5 and plans[seen][0, 0] == 2
        for generation in long:
            generation.cancel()
            generation.cancel()  # does nothing
        return waiting

    generation = serve(engine, clients())
    assert (generation.tokens, generation.finish_reason) == offline.answer(new)


def test_closing_finishes_what_was_accepted(steps: Steps, offline: Offline) -> None:
    engine = Engine(steps)
    requests = [Request((i, i + 1), 9) for i in range(3 * SLOTS)]

    async def clients() -> list[Generation]:
        submitted = [engine.submit(request) for request in requests]
        engine.close()
        with pytest.raises(Closed, match="^The server is shutting down; "):
            engine.submit(requests[0])
        return submitted

    for request, generation in zip(requests, serve(engine, clients()), strict=True):
        assert (generation.tokens, generation.finish_reason) == offline.answer(request)


def test_a_device_that_fails_ends_all(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(steps)
    submitted: list[Generation] = []

    def fail(_: np.ndarray) -> jax.Array:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(steps, "run", fail)

    async def clients() -> None:
        submitted.extend(engine.submit(Request((1,))) for _ in range(SLOTS + 2))
        for generation in submitted:
            await generation.finished()
        with pytest.raises(Closed):
            engine.submit(Request((1,)))

    with pytest.raises(RuntimeError, match="out of memory"):
        serve(engine, clients())
    assert [generation.finish_reason for generation in submitted] == ["error"] * (SLOTS + 2)


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (Request(()), "prompt: it has no token; pass at least one."),
        (Request((1,) * 17), "prompt: 17 tokens are more than this server's 16; shorten it."),
        (Request((1, 48)), "prompt: token id 48 is not in 0..47; use the model's own tokenizer."),
        (Request((-1, 48)), "prompt: token id -1 is not in 0..47; "),
        (Request((1,), stop_token_ids=(99,)), "stop_token_ids: token id 99 is not in 0..47; "),
        (Request((1,), max_tokens=0), "max_tokens=0 is below 1; ask for at least one token."),
        (Request((1,), temperature=-0.5), "temperature=-0.5 is not a number from 0 on; "),
        (Request((1,), temperature=float("nan")), "temperature=nan is not a number from 0 on; "),
        (Request((1,), top_p=0.0), "top_p=0.0 is not in (0, 1]; 1 draws among all tokens."),
        (Request((1,), seed=-1), "seed=-1 is not in 0..4294967295; take one that is."),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else "",
)
def test_requests_that_are_refused(steps: Steps, request_: Request, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        Engine(steps).submit(request_)
    assert str(caught.value).startswith(sentence)


def test_sizes_that_are_refused(steps: Steps, offline: Offline) -> None:
    model = offline.runner.model
    for options, sentence in (
        ({"slots": 0}, "slots=0 is below 1; "),
        ({"prefill_tokens": 0}, "prefill_tokens=0 is below 1; "),
        ({"prompt_lengths": (0, 8)}, "prompt_lengths=0 is below 1; "),
        ({"prompt_lengths": (8, 30)}, "prompt_lengths: 30 is more than capacity=24, "),
        ({"capacity": 65}, "capacity=65 is not in 1..64 "),
    ):
        with pytest.raises(ValueError) as caught:
            Steps(model, **({"slots": 2, "capacity": 24} | options))
        assert str(caught.value).startswith(sentence)
    with pytest.raises(ValueError, match="^max_queue=0 is below 1; "):
        Engine(steps, max_queue=0)
    assert tuple(Steps(model, slots=2, capacity=24).prompts) == (24,)


def test_compilations_are_counted() -> None:
    """Those of any new program, wherever it comes from."""
    before = compilations()
    jax.jit(lambda x: x * 3 + 1)(np.arange(5, dtype=np.float32))
    assert compilations() == before + 1
