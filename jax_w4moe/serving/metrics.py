"""What a server counts and times, for Prometheus."""

import collections
import itertools
import time
from typing import Any

import jax
import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_PREFIX = "jax_w4moe_"
_WINDOW_S = 10.0  # of tokens per second
_SECONDS = tuple(base * 10**power for power in range(-3, 3) for base in (1.0, 2.5, 5.0))

_compilations = itertools.count()
_last_compilation = next(_compilations)


def _on_event(event: str, duration_secs: float, **_: str | int) -> None:
    global _last_compilation
    if event == "/jax/core/compile/backend_compile_duration":
        _last_compilation = next(_compilations)


jax.monitoring.register_event_duration_secs_listener(_on_event)


def compilations() -> int:
    """Programs that XLA has compiled in this process since this module was imported."""
    return _last_compilation


class Metrics:
    """Of one engine.

    Attributes:
      requests: finished requests by outcome: "stop", "length", "cancelled", "error", "refused".
      prompt_tokens: of prompts that went into a slot.
      generated_tokens: that were delivered.
      ttft: seconds from a request to its first token.
      itl: seconds between two tokens of a request.
      queued: requests that wait for a slot.
      running: requests in a slot.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def add(kind: Any, name: str, text: str, **options: Any) -> Any:
            return kind(_PREFIX + name, text, registry=self.registry, **options)

        self.requests: Counter = add(
            Counter, "requests", "Requests that are over, by outcome.", labelnames=("outcome",)
        )
        self.prompt_tokens: Counter = add(Counter, "prompt_tokens", "Tokens of started prompts.")
        self.generated_tokens: Counter = add(Counter, "generated_tokens", "Tokens delivered.")
        self.ttft: Histogram = add(
            Histogram, "time_to_first_token_seconds", "From request to token.", buckets=_SECONDS
        )
        self.itl: Histogram = add(
            Histogram, "inter_token_latency_seconds", "Between tokens.", buckets=_SECONDS
        )
        self.queued: Gauge = add(Gauge, "queued_requests", "Requests that wait for a slot.")
        self.running: Gauge = add(Gauge, "running_requests", "Requests in a slot.")
        add(Gauge, "compilations", "Programs compiled so far.").set_function(compilations)
        add(
            Gauge, "tokens_per_second", f"Tokens delivered, mean of {_WINDOW_S:.0f} s."
        ).set_function(self._tokens_per_second)
        self._recent: collections.deque[tuple[float, int]] = collections.deque()

    def delivered(self, count: int) -> None:
        """Counts the tokens of a step."""
        self.generated_tokens.inc(count)
        self._recent.append((time.monotonic(), count))
        self._forget()

    def text(self) -> bytes:
        """All of it in Prometheus' format."""
        return prometheus_client.generate_latest(self.registry)

    def _tokens_per_second(self) -> float:
        self._forget()
        return sum(count for _, count in self._recent) / _WINDOW_S

    def _forget(self) -> None:
        while self._recent and self._recent[0][0] < time.monotonic() - _WINDOW_S:
            self._recent.popleft()
