"""Continuous batching: requests join and leave the batch between steps.

The engine is one coroutine, and everything but the device happens on its event loop, so there are
no locks. A thread starts the steps and waits for their tokens: to start a program of many kernels
may take the host milliseconds, in which the event loop writes the tokens of the step before. A step
is a prefill of a few prompts or one more token for every running request; after a prefill comes a
decoding step, so that running requests wait for one prefill at most. A step is started before the
tokens of the one before it are read. What ends a request is therefore known a step late, except
where it can be counted ahead: the step that it took part in meanwhile is wasted, its token dropped.
"""

import asyncio
import collections
import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from jax_w4moe.serving import checks
from jax_w4moe.serving.metrics import Metrics
from jax_w4moe.serving.requests import Closed, FinishReason, Generation, Refused, Request
from jax_w4moe.serving.steps import NOWHERE, Steps, write_row


@dataclasses.dataclass(eq=False)
class _Sequence:
    """A request inside the engine.

    Attributes:
      generation: what its caller sees.
      limit: tokens to generate at most.
      padded: the length that its prompt is padded to.
      stops: tokens that end it.
      planned: tokens that have been asked of the device.
      asked_at: when it came, s.
      token_at: when it got its last token, s.
    """

    generation: Generation
    limit: int
    padded: int
    stops: frozenset[int]
    planned: int = 0
    asked_at: float = 0.0
    token_at: float | None = None


# Which token of a step is whose.
_Rows = list[tuple[int, _Sequence]]


class Engine:
    """Serves requests with the slots of a model. All of it belongs to one event loop."""

    def __init__(
        self,
        steps: Steps,
        *,
        max_queue: int = 256,
        metrics: Metrics | None = None,
        announce: Callable[[np.ndarray], None] | None = None,
    ) -> None:
        """Makes an engine that nothing runs yet.

        Args:
          steps: the model's programs, warmed up.
          max_queue: requests that may wait; any more are refused.
          metrics: what to count in.
          announce: called with every plan before it is run here, to run it elsewhere, too.

        Raises:
          ValueError: a queue that holds nothing.
        """
        checks.max_queue(max_queue)
        self.steps = steps
        self.metrics = metrics or Metrics()
        self._max_queue = max_queue
        self._announce = announce
        self._waiting: collections.deque[_Sequence] = collections.deque()
        self._slots: list[_Sequence | None] = [None] * steps.slots
        self._decoding = steps.empty_plan()  # of what is in the slots
        self._sequences: dict[Generation, _Sequence] = {}
        self._prefilled = False  # by the last step
        self._closed = False
        self._wake = asyncio.Event()

    def submit(self, request: Request) -> Generation:
        """Puts a request into the queue.

        Args:
          request: what to generate.

        Returns:
          The answer, which grows while :meth:`run` runs.

        Raises:
          ValueError: a request that this model or its slots cannot do.
          Refused: the queue is full.
          Closed: no more requests are taken.
        """
        lengths = self.steps.prompts
        checks.request(request, self.steps.vocab_size, max(lengths))
        if self._closed:
            raise Closed("The server is shutting down; send the request to another.")
        if len(self._waiting) >= self._max_queue:
            self.metrics.requests.labels("refused").inc()
            raise Refused(
                f"{len(self._waiting)} requests are waiting, which is as many as may; try again"
                " later."
            )
        generation = Generation(request, self._cancel)
        length = len(request.prompt)
        sequence = _Sequence(
            generation,
            # The last token is given, but not computed with: it needs no place in the row.
            limit=min(request.max_tokens, self.steps.capacity + 1 - length),
            padded=next(padded for padded in lengths if padded >= length),
            stops=frozenset(request.stop_token_ids)
            | (frozenset() if request.ignore_eos else frozenset(self.steps.eos_token_ids)),
            asked_at=time.monotonic(),
        )
        self._sequences[generation] = sequence
        self._waiting.append(sequence)
        self._changed()
        return generation

    def close(self) -> None:
        """Takes no more requests; :meth:`run` returns when those that are here are finished."""
        self._closed = True
        self._wake.set()

    @property
    def is_closed(self) -> bool:
        """Whether no more requests are taken."""
        return self._closed

    async def run(self) -> None:
        """Serves until it is closed and nothing is left to do.

        Raises:
          Exception: what the device raised; all requests have ended with "error" then.
        """
        loop = asyncio.get_running_loop()
        started: tuple[jax.Array, _Rows] | None = None  # its tokens have not been read
        with ThreadPoolExecutor(1, "device") as device:
            try:
                while True:
                    plan, rows = self._plan()
                    if plan is not None or started is not None:
                        before, whose = started or (None, [])
                        ids, tokens = await loop.run_in_executor(
                            device, self._advance, plan, before
                        )
                        started = None if ids is None else (ids, rows)
                        self._deliver(whose, tokens)
                    elif self._closed:
                        return
                    else:
                        await self._wake.wait()
                        self._wake.clear()
            finally:
                self._closed = True
                for sequence in list(self._sequences.values()):
                    self._finish(sequence, "error")

    def _advance(
        self, plan: np.ndarray | None, before: jax.Array | None
    ) -> tuple[jax.Array | None, list[int]]:
        """Starts a step, and waits for the tokens of the one before; in the device's thread."""
        ids = None if plan is None else self.steps.run(plan)
        return ids, [] if before is None else np.asarray(before).tolist()

    def _plan(self) -> tuple[np.ndarray | None, _Rows]:
        """The next step, if there is one to do, and whose its tokens will be."""
        free = [slot for slot, sequence in enumerate(self._slots) if sequence is None]
        is_idle = len(free) == len(self._slots)
        self._prefilled = bool(self._waiting and free and (is_idle or not self._prefilled))
        if not self._prefilled and is_idle:
            return None, []
        plan, rows = self._plan_prefill(free) if self._prefilled else self._plan_decode()
        if self._announce is not None:
            self._announce(plan)
        for _, sequence in rows:
            sequence.planned += 1
            if sequence.planned == sequence.limit:
                self._free(sequence)
        return plan, rows

    def _plan_prefill(self, free: list[int]) -> tuple[np.ndarray, _Rows]:
        """The first prompts of the queue, as many in a row as are padded to the same length."""
        padded = self._waiting[0].padded
        plan = self.steps.empty_plan(padded)
        rows: _Rows = []
        for (index, row), slot in zip(enumerate(plan), free, strict=False):
            if not self._waiting or self._waiting[0].padded != padded:
                break
            sequence = self._waiting.popleft()
            request = sequence.generation.request
            sampling = (request.seed, request.temperature, request.top_p)
            write_row(row, slot, *sampling, request.prompt)
            write_row(self._decoding[slot], slot, *sampling)
            self._slots[slot] = sequence
            self.metrics.prompt_tokens.inc(len(request.prompt))
            rows.append((index, sequence))
        self._changed()
        return plan, rows

    def _plan_decode(self) -> tuple[np.ndarray, _Rows]:
        rows = [(slot, each) for slot, each in enumerate(self._slots) if each is not None]
        return self._decoding.copy(), rows

    def _deliver(self, rows: _Rows, tokens: list[int]) -> None:
        now = time.monotonic()
        count = 0
        for index, sequence in rows:
            generation, token = sequence.generation, tokens[index]
            if generation.finish_reason is not None:
                continue  # cancelled, or ended by the step before
            if token < 0:
                self._finish(sequence, "error")
            elif token in sequence.stops:
                self._finish(sequence, "stop")
            else:
                count += 1
                if sequence.token_at is None:
                    self.metrics.ttft.observe(now - sequence.asked_at)
                else:
                    self.metrics.itl.observe(now - sequence.token_at)
                sequence.token_at = now
                generation.tokens.append(token)
                if len(generation.tokens) == sequence.limit:
                    self._finish(sequence, "length")
                generation.notify()
        self.metrics.delivered(count)

    def _cancel(self, generation: Generation) -> None:
        sequence = self._sequences.get(generation)
        if sequence is not None:
            if sequence in self._waiting:
                self._waiting.remove(sequence)
            self._finish(sequence, "cancelled")

    def _finish(self, sequence: _Sequence, reason: FinishReason) -> None:
        generation = sequence.generation
        del self._sequences[generation]
        self._free(sequence)
        generation.finish_reason = reason
        generation.notify()
        self.metrics.requests.labels(reason).inc()
        self._changed()

    def _free(self, sequence: _Sequence) -> None:
        """Gives its slot back, if it has one."""
        if sequence in self._slots:
            slot = self._slots.index(sequence)
            self._slots[slot] = None
            self._decoding[slot] = 0
            self._decoding[slot, 0] = NOWHERE

    def _changed(self) -> None:
        self.metrics.queued.set(len(self._waiting))
        self.metrics.running.set(len(self._sequences) - len(self._waiting))
        self._wake.set()
