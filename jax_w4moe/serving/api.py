"""HTTP: completions in OpenAI's form, as a whole or as server-sent events."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import jax
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from jax_w4moe.serving.engine import Engine
from jax_w4moe.serving.parameters import parse
from jax_w4moe.serving.requests import Closed, Generation, Refused
from jax_w4moe.serving.text import Text

_FAILED = "The model gave logits that are not numbers, or its device failed; see the server's log."


def application(engine: Engine, text: Text, name: str) -> Starlette:
    """The routes of a server; the engine is run by the caller, on the same event loop.

    Args:
      engine: what generates.
      text: the model's tokenizer.
      name: the model's.

    Returns:
      An ASGI application.
    """
    api = _Api(engine, text, name)
    return Starlette(
        routes=[
            Route("/v1/completions", api.completions, methods=["POST"]),
            Route("/v1/models", api.models),
            Route("/health", api.health),
            Route("/metrics", api.metrics),
        ]
    )


class _Api:
    def __init__(self, engine: Engine, text: Text, name: str) -> None:
        self._engine = engine
        self._text = text
        self._name = name
        self._created = int(time.time())

    async def models(self, _: HttpRequest) -> Response:
        steps = self._engine.steps
        model = {
            "id": self._name,
            "object": "model",
            "created": self._created,
            "max_model_len": steps.capacity,
            "vocab_size": steps.vocab_size,
            "slots": steps.slots,
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self, _: HttpRequest) -> Response:
        if self._engine.is_closed:
            return _error(503, "The server is shutting down.")
        return JSONResponse({"status": "ok"})

    async def metrics(self, _: HttpRequest) -> Response:
        return Response(self._engine.metrics.text(), media_type="text/plain; version=0.0.4")

    async def completions(self, request: HttpRequest) -> "Response | _Stream":
        try:
            parameters = parse(json.loads(await request.body()), self._text)
            if parameters.model not in (None, self._name):
                return _error(404, f"model={parameters.model!r} is not here; use {self._name!r}.")
            generation = self._engine.submit(parameters.request)
        except (json.JSONDecodeError, UnicodeDecodeError):
            return _error(400, "The body is no JSON; send an object with a prompt.")
        except ValueError as error:
            return _error(400, str(error))
        except ClientDisconnect:
            return _error(400, "The client left before the body had come.")
        except Refused as error:
            return _error(429, str(error))
        except Closed as error:
            return _error(503, str(error))
        answer = _Answer(generation, self._text, self._name)
        if parameters.stream:
            return _Stream(answer, parameters.include_usage)
        return await answer.whole(request)


class _Answer:
    """One completion on its way to its client."""

    def __init__(self, generation: Generation, text: Text, name: str) -> None:
        self.generation = generation
        self._pieces = text.pieces()
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": name,
        }
        # Of the events of tokens, only the text and the ids differ.
        head = json.dumps({**self._head, "choices": []}).removesuffix("]}")
        choice = json.dumps({"index": 0, "logprobs": None, "finish_reason": None})
        self._event_begin = f"data: {head}{choice.removesuffix('}')}"

    async def whole(self, request: HttpRequest) -> Response:
        """All at once."""
        async with _cancelled_with(request.receive, self.generation):
            await self.generation.finished()
        if self.generation.finish_reason == "error":
            return _error(500, _FAILED)
        tokens = self.generation.tokens
        choice = self._choice(self._pieces.add(tokens) + self._pieces.rest(), tokens)
        return JSONResponse({**self._head, "choices": [choice], "usage": self._usage()})

    def event(self, tokens: list[int]) -> str:
        """Tokens that have come."""
        text = json.dumps(self._pieces.add(tokens))
        return f'{self._event_begin}, "text": {text}, "token_ids": {tokens}}}]}}\n\n'

    def last_events(self, include_usage: bool) -> str:
        """The reason of the end."""
        if self.generation.finish_reason == "error":
            events = [_error_body(500, _FAILED)]
        else:
            events = [{**self._head, "choices": [self._choice(self._pieces.rest(), [])]}]
        if include_usage:
            events.append({**self._head, "choices": [], "usage": self._usage()})
        data = [*map(json.dumps, events), "[DONE]"]
        return "".join(f"data: {each}\n\n" for each in data)

    def _choice(self, text: str, tokens: list[int]) -> dict[str, Any]:
        return {
            "index": 0,
            "text": text,
            "token_ids": tokens,
            "logprobs": None,
            "finish_reason": self.generation.finish_reason,
        }

    def _usage(self) -> dict[str, int]:
        prompt, new = len(self.generation.request.prompt), len(self.generation.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


class _Stream:
    """An ASGI response of server-sent events: tokens as they come."""

    def __init__(self, answer: _Answer, include_usage: bool) -> None:
        self._answer = answer
        self._include_usage = include_usage

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        async def write(events: str, more: bool = True) -> None:
            body = events.encode()
            await send({"type": "http.response.body", "body": body, "more_body": more})

        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        generation = self._answer.generation
        async with _cancelled_with(receive, generation):
            async for tokens in generation:
                await write(self._answer.event(tokens))
            if generation.finish_reason != "cancelled":  # else nobody is there
                await write(self._answer.last_events(self._include_usage), more=False)


@contextlib.asynccontextmanager
async def _cancelled_with(receive: Receive, generation: Generation) -> AsyncIterator[None]:
    """Cancels the generation when its client goes, and when the block is left."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        generation.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        generation.cancel()


def _error(status: int, sentence: str) -> Response:
    return JSONResponse(_error_body(status, sentence), status_code=status)


def _error_body(status: int, sentence: str) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": sentence, "type": kind, "code": status}}
