"""What is asked of the engine, and what comes back."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]


class Refused(RuntimeError):
    """The queue is full: try again later."""


class Closed(RuntimeError):
    """The engine takes no more requests."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    Attributes:
      prompt: token ids, at least one.
      max_tokens: tokens to generate at most; a full row ends earlier.
      temperature: 0 takes the likeliest token.
      top_p: in (0, 1]: draws among the likeliest tokens that together have this probability.
      seed: of the draws, in [0, 2^32).
      stop_token_ids: tokens that end the text, beside the model's own.
      ignore_eos: whether the model's own are tokens as any other.
    """

    prompt: tuple[int, ...]
    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


class Generation:
    """The answer to a request, as it grows. Belongs to the engine's event loop.

    Attributes:
      request: what was asked.
      tokens: so far, without the one that ended the text.
      finish_reason: None while there may be more; then "stop" (a token that ends the text),
        "length" (``max_tokens``, or a full row), "cancelled", or "error" (logits that are NaN, or
        an engine that failed).
    """

    def __init__(self, request: Request, cancel: Callable[["Generation"], None]) -> None:
        self.request = request
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._cancel = cancel
        self._changed = asyncio.Event()

    def cancel(self) -> None:
        """Gives the slot back by the next step; nothing happens if it is finished."""
        self._cancel(self)

    async def __aiter__(self) -> AsyncIterator[list[int]]:
        """New tokens as they come, one or more at a time; for one reader."""
        seen = 0
        while True:
            self._changed.clear()
            if seen < len(self.tokens):
                new = self.tokens[seen:]
                seen += len(new)
                yield new
            elif self.finish_reason is not None:
                return
            else:
                await self._changed.wait()

    async def finished(self) -> "Generation":
        """Waits for the end."""
        async for _ in self:
            pass
        return self

    def notify(self) -> None:
        """Wakes the reader: the engine has changed something."""
        self._changed.set()
