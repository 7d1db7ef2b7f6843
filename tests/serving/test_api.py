"""Completions over HTTP, without a network."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("starlette", reason="needs the extra [serve]")
import httpx
import tokenizers

from jax_w4moe.serving import Engine, Request, Steps
from jax_w4moe.serving.api import application
from jax_w4moe.serving.text import Text
from tests.serving.common import CAPACITY, CONFIG, SLOTS, Offline, serve

pytestmark = pytest.mark.xdist_group("serving")  # steps are compiled once

GREEDY = {"temperature": 0, "max_tokens": 9}


def ask(
    engine: Engine,
    folder: Path,
    clients: Callable[[httpx.AsyncClient], Coroutine[Any, Any, Any]],
) -> Any:
    """Runs the clients beside the engine."""
    transport = httpx.ASGITransport(application(engine, Text(folder), "tiny"))

    async def connected() -> Any:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await clients(client)

    return serve(engine, connected())


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The data of a stream that ended well."""
    *parts, last, empty = response.text.split("\n\n")
    assert (last, empty) == ("data: [DONE]", "")
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def word_tokenizer(folder: Path) -> None:
    words = {f"w{number}": number for number in range(CONFIG.vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("has_tokenizer", [False, True])
def test_completions(steps: Steps, offline: Offline, tmp_path: Path, has_tokenizer: bool) -> None:
    """As a whole and as a stream: the same answer, which is the offline one."""
    if has_tokenizer:
        word_tokenizer(tmp_path)
    text_of = "w{}" if has_tokenizer else "{}"
    prompts = [[5, 6], [9, 1, 40, 3, 3]]

    async def clients(client: httpx.AsyncClient) -> list[httpx.Response]:
        as_text = " ".join(text_of.format(token) for token in prompts[1])
        bodies = [
            body
            for prompt in (prompts[0], as_text)
            for body in (
                {"prompt": prompt, **GREEDY},
                {
                    "prompt": prompt,
                    "model": "tiny",
                    "stream": True,
                    "stream_options": {"include_usage": True},
                    "n": 1,
                    "stop": None,
                    **GREEDY,
                },
            )
        ]
        return await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))

    responses = ask(Engine(steps), tmp_path, clients)
    for prompt, whole, stream in zip(prompts, responses[::2], responses[1::2], strict=True):
        tokens, reason = offline.answer(Request(tuple(prompt), 9))
        text = " ".join(text_of.format(token) for token in tokens)
        size = {"prompt_tokens": len(prompt), "completion_tokens": len(tokens)}
        usage = {**size, "total_tokens": len(prompt) + len(tokens)}
        assert whole.status_code == stream.status_code == 200
        body = whole.json()
        (choice,) = body["choices"]
        assert (choice["text"], choice["token_ids"]) == (text, tokens)
        assert (choice["finish_reason"], body["usage"], body["model"]) == (reason, usage, "tiny")
        assert stream.headers["content-type"].startswith("text/event-stream")
        *parts, last = events(stream)
        assert last["usage"] == usage and last["choices"] == []
        choices = [part["choices"][0] for part in parts]
        assert "".join(choice["text"] for choice in choices) == text
        assert [token for choice in choices for token in choice["token_ids"]] == tokens
        assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + [reason]
        assert len({part["id"] for part in parts}) == 1


def test_sampling_options(steps: Steps, tmp_path: Path) -> None:
    """The seed decides; without one every answer is another; stop tokens and eos."""
    sampled = {"prompt": [1, 2], "max_tokens": 12, "temperature": 2.0, "ignore_eos": True}
    bodies = [
        *[{**sampled, "seed": 5}] * 2,
        {**sampled, "seed": 5, "top_p": 0.01},
        *[sampled] * 2,
        {**GREEDY, "prompt": [1, 2]},
        {**sampled, "stop_token_ids": list(range(CONFIG.vocab_size))},
    ]

    async def clients(client: httpx.AsyncClient) -> list[list[int]]:
        posts = (client.post("/v1/completions", json=body) for body in bodies)
        choices = [response.json()["choices"][0] for response in await asyncio.gather(*posts)]
        assert choices[-1]["finish_reason"] == "stop"
        return [choice["token_ids"] for choice in choices]

    one, same, nucleus, other, another, greedy, stopped = ask(Engine(steps), tmp_path, clients)
    assert one == same != nucleus and other != another and stopped == []
    assert nucleus[: len(greedy)] == greedy[: len(nucleus)] != []


def test_clients_that_go(steps: Steps, tmp_path: Path) -> None:
    """Streaming and waiting for the whole: their slots are free again, nobody else notices."""
    engine = Engine(steps)
    app = application(engine, Text(tmp_path), "tiny")
    body = {"prompt": [1], "max_tokens": 20, "temperature": 0, "ignore_eos": True}

    async def go_away(stream: bool) -> list[bytes]:
        """A request whose client leaves when its first token is there."""
        messages = [
            {"type": "http.request", "body": json.dumps({**body, "stream": stream}).encode()}
        ]
        sent: list[bytes] = []

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            while not engine.metrics.registry.get_sample_value("jax_w4moe_generated_tokens_total"):
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        scope |= {"query_string": b"", "root_path": "", "server": ("test", 80)}
        await app({**scope, "asgi": {"version": "3.0", "spec_version": "2.3"}}, receive, send)
        return sent

    async def clients() -> list[int]:
        gone = [asyncio.create_task(go_away(number % 2 == 0)) for number in range(2 * SLOTS)]
        staying = engine.submit(Request((1,), 20, ignore_eos=True))
        sent = await asyncio.gather(*gone)
        assert not any(b"DONE" in part for parts in sent for part in parts)
        return (await staying.finished()).tokens

    assert len(serve(engine, clients())) == 20
    registry = engine.metrics.registry
    cancelled = registry.get_sample_value("jax_w4moe_requests_total", {"outcome": "cancelled"})
    assert cancelled == 2 * SLOTS
    assert registry.get_sample_value("jax_w4moe_generated_tokens_total") < 20 * 3


REFUSALS: list[tuple[Any, int, str]] = [
    (b"{", 400, "The body is no JSON; send an object with a prompt."),
    (b"\xff", 400, "The body is no JSON; send an object with a prompt."),
    ([], 400, "The body is no JSON object; send one with a prompt."),
    ({}, 400, "prompt: it is missing; pass text or a list of token ids."),
    ({"prompt": 3}, 400, "prompt: got int, need str or list."),
    ({"prompt": [1, "a"]}, 400, "prompt: it holds something that is no integer; "),
    ({"prompt": [[1]]}, 400, "prompt: it holds something that is no integer; "),
    ({"prompt": [True]}, 400, "prompt: it holds something that is no integer; "),
    ({"prompt": "words"}, 400, "prompt: it is text, but the model's folder has no tokenizer.json"),
    ({"prompt": []}, 400, "prompt: it has no token; "),
    ({"prompt": [48]}, 400, "prompt: token id 48 is not in 0..47; "),
    ({"prompt": [1], "max_tokens": True}, 400, "max_tokens: got bool, need int."),
    ({"prompt": [1], "max_tokens": 0}, 400, "max_tokens=0 is below 1; "),
    ({"prompt": [1], "temperature": "hot"}, 400, "temperature: got str, need int or float."),
    ({"prompt": [1], "n": 2}, 400, "n=2 is not supported; leave it out."),
    ({"prompt": [1], "stop": ["x"]}, 400, "stop=['x'] is not supported; leave it out."),
    ({"prompt": [1], "top_k": 2}, 400, "'top_k' is unknown; leave it out."),
    ({"prompt": [1], "model": "other"}, 404, "model='other' is not here; use 'tiny'."),
]


def test_what_is_refused(steps: Steps, tmp_path: Path) -> None:
    async def clients(client: httpx.AsyncClient) -> None:
        for body, status, sentence in REFUSALS:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            response = await client.post("/v1/completions", content=content)
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (status, status), error
            assert error["message"].startswith(sentence), (error["message"], sentence)
        assert (await client.get("/v1/completions")).status_code == 405

    ask(Engine(steps), tmp_path, clients)


def test_backpressure_and_shutdown(steps: Steps, tmp_path: Path) -> None:
    """429 when the queue is full, 503 when closed; what was accepted is answered."""
    engine = Engine(steps, max_queue=2)
    body = {"prompt": [1, 2], **GREEDY}

    async def clients(client: httpx.AsyncClient) -> None:
        posts = (client.post("/v1/completions", json=body) for _ in range(6 * SLOTS))
        responses = await asyncio.gather(*posts)
        refused = [response for response in responses if response.status_code == 429]
        assert 0 < len(refused) < len(responses)
        sentence = "2 requests are waiting, which is as many as may; try again later."
        assert {response.json()["error"]["message"] for response in refused} == {sentence}
        answers = {r.json()["choices"][0]["text"] for r in responses if r.status_code == 200}
        assert len(answers) == 1
        assert (await client.get("/health")).json() == {"status": "ok"}
        last = asyncio.create_task(client.post("/v1/completions", json=body))
        await asyncio.sleep(0.01)
        engine.close()
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == (await client.get("/health")).status_code == 503
        assert (await last).json()["choices"][0]["text"] in answers

    ask(engine, tmp_path, clients)


def test_metrics_and_models(steps: Steps, tmp_path: Path) -> None:
    async def clients(client: httpx.AsyncClient) -> None:
        await client.post("/v1/completions", json={"prompt": [1, 2], **GREEDY})
        lines = (await client.get("/metrics")).text.splitlines()
        assert "jax_w4moe_prompt_tokens_total 2.0" in lines
        assert "jax_w4moe_time_to_first_token_seconds_count 1.0" in lines
        assert any(line.startswith("jax_w4moe_compilations ") for line in lines)
        models = (await client.get("/v1/models")).json()["data"]
        expected = {"id": "tiny", "max_model_len": CAPACITY, "vocab_size": 48, "slots": SLOTS}
        assert len(models) == 1 and expected.items() <= models[0].items()

    ask(Engine(steps), tmp_path, clients)


def test_logits_that_are_no_numbers(
    steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That request ends with an error, whole or in the stream; the server goes on."""
    run = steps.run
    monkeypatch.setattr(steps, "run", lambda plan: spoiled(plan, run(plan)))

    def spoiled(plan: np.ndarray, ids: jax.Array) -> Any:
        return np.where(plan[:, 2] == 13, -1, np.asarray(ids))

    async def clients(client: httpx.AsyncClient) -> None:
        for stream in (False, True):
            body = {"prompt": [1], "stream": stream, **GREEDY}
            bad = await client.post("/v1/completions", json={**body, "seed": 13})
            error = events(bad)[-1] if stream else bad.json()
            assert error["error"]["message"].startswith("The model gave logits that are not num")
            good = await client.post("/v1/completions", json={**body, "seed": 12})
            assert good.status_code == 200 and "error" not in good.text

    ask(Engine(steps), tmp_path, clients)


def test_characters_of_several_tokens(tmp_path: Path) -> None:
    """Are given when they are whole; what never becomes whole comes at the end."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    alphabet = {letter: number for number, letter in enumerate(sorted(byte_level.alphabet()))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = Text(tmp_path)
    ids = list(text.encode("aé b"))
    pieces = text.pieces()
    assert [pieces.add([token]) for token in ids] == ["a", "", "é", " ", "b"]
    assert pieces.rest() == ""
    pieces = text.pieces()
    assert pieces.add(ids[:2]) == "a" and pieces.rest() == "\N{REPLACEMENT CHARACTER}"
