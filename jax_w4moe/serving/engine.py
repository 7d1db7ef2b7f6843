"""Continuous batching: requests join and leave the batch between steps.

The engine is one coroutine, and everything but waiting for the device happens on its event loop, so
there are no locks. A step is a prefill of a few prompts or one more token for every running
request; after a prefill comes a decoding step, so that running requests wait for one prefill at
most. A step is started before the tokens of the one before it are read. What ends a request is
therefore known a step late, except where it can be counted ahead: the step that it took part in
meanwhile is wasted, its token dropped.
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
from jax_w4moe.serving.steps import Steps, write_row

_AHEAD = 1  # steps that are started before the tokens of an earlier one are read


@dataclasses.dataclass(eq=False)
class _Sequence:
    """A request inside the engine.

    Attributes:
      generation: what its caller sees.
      limit: tokens to generate at most.
      padded: the length that its prompt is padded to.
      planned: tokens that have been asked of the device.
      asked_at: when it came, s.
      token_at: when it got its last token, s.
    """

    generation: Generation
    limit: int
    padded: int
    planned: int = 0
    asked_at: float = 0.0
    token_at: float | None = None


@dataclasses.dataclass
class _Started:
    """A step on the device: its tokens, and which of them is whose."""

    ids: jax.Array
    rows: list[tuple[int, _Sequence]]


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
        started: collections.deque[_Started] = collections.deque()
        with ThreadPoolExecutor(1, "read tokens") as reader:
            loop = asyncio.get_running_loop()
            try:
                while True:
                    is_started = self._start(started)
                    if len(started) > _AHEAD or (started and not is_started):
                        step = started.popleft()
                        self._deliver(step, await loop.run_in_executor(reader, _read, step.ids))
                    elif not is_started:
                        if self._closed:
                            return
                        await self._wake.wait()
                        self._wake.clear()
            finally:
                self._closed = True
                for sequence in list(self._sequences.values()):
                    self._finish(sequence, "error")

    def _start(self, started: collections.deque[_Started]) -> bool:
        """Starts a step, if there is one to do."""
        planned = self._plan()
        if planned is None:
            return False
        plan, rows = planned
        if self._announce is not None:
            self._announce(plan)
        started.append(_Started(self.steps.run(plan), rows))
        for slot, sequence in enumerate(self._slots):
            if sequence is not None and sequence.planned == sequence.limit:
                self._slots[slot] = None
        return True

    def _plan(self) -> tuple[np.ndarray, list[tuple[int, _Sequence]]] | None:
        free = [slot for slot, sequence in enumerate(self._slots) if sequence is None]
        is_idle = len(free) == len(self._slots)
        if self._waiting and free and (is_idle or not self._prefilled):
            self._prefilled = True
            return self._plan_prefill(free)
        self._prefilled = False
        return None if is_idle else self._plan_decode()

    def _plan_prefill(self, free: list[int]) -> tuple[np.ndarray, list[tuple[int, _Sequence]]]:
        """The first prompts of the queue, as many in a row as are padded to the same length."""
        padded = self._waiting[0].padded
        plan = self.steps.empty_plan(padded)
        rows: list[tuple[int, _Sequence]] = []
        for (index, row), slot in zip(enumerate(plan), free, strict=False):
            if not self._waiting or self._waiting[0].padded != padded:
                break
            sequence = self._waiting.popleft()
            request = sequence.generation.request
            sampling = (request.seed, request.temperature, request.top_p)
            write_row(row, slot, *sampling, request.prompt)
            self._slots[slot] = sequence
            self.metrics.prompt_tokens.inc(len(request.prompt))
            rows.append((index, sequence))
            sequence.planned = 1
        self._changed()
        return plan, rows

    def _plan_decode(self) -> tuple[np.ndarray, list[tuple[int, _Sequence]]]:
        plan = self.steps.empty_plan()
        rows: list[tuple[int, _Sequence]] = []
        for slot, sequence in enumerate(self._slots):
            if sequence is not None:
                request = sequence.generation.request
                write_row(plan[slot], slot, request.seed, request.temperature, request.top_p)
                rows.append((slot, sequence))
                sequence.planned += 1
        return plan, rows

    def _deliver(self, step: _Started, ids: np.ndarray) -> None:
        now = time.monotonic()
        count = 0
        for index, sequence in step.rows:
            generation, token = sequence.generation, int(ids[index])
            if generation.finish_reason is not None:
                continue  # cancelled, or ended by the step before
            if token < 0:
                self._finish(sequence, "error")
            elif self._ends(generation.request, token):
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

    def _ends(self, request: Request, token: int) -> bool:
        is_eos = token in self.steps.eos_token_ids and not request.ignore_eos
        return is_eos or token in request.stop_token_ids

    def _cancel(self, generation: Generation) -> None:
        sequence = self._sequences.get(generation)
        if sequence is not None:
            if sequence in self._waiting:
                self._waiting.remove(sequence)
            self._finish(sequence, "cancelled")

    def _finish(self, sequence: _Sequence, reason: FinishReason) -> None:
        generation = sequence.generation
        del self._sequences[generation]
        if sequence in self._slots:
            self._slots[self._slots.index(sequence)] = None
        generation.finish_reason = reason
        generation.notify()
        self.metrics.requests.labels(reason).inc()
        self._changed()

    def _changed(self) -> None:
        self.metrics.queued.set(len(self._waiting))
        self.metrics.running.set(len(self._sequences) - len(self._waiting))
        self._wake.set()


def _read(ids: jax.Array) -> np.ndarray:
    return np.asarray(ids)
