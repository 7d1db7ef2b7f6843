"""Plans between processes, and processes that are gone, over sockets of one process."""

import queue
import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("prometheus_client", reason="needs the extra [serve]")
pytest.importorskip("uvicorn", reason="needs the extra [serve]")

from jax_w4moe.serving.peers import Leader, follow
from jax_w4moe.serving.steps import COLUMNS

TOKEN = b"0123456789abcdef"
LIMIT_S = 10.0


class FakeSteps:
    """Keeps the plans that it is given."""

    def __init__(self) -> None:
        self.plans: list[np.ndarray] = []

    def empty_plan(self, length: int) -> np.ndarray:
        return np.zeros((3, COLUMNS + length), np.int32)

    def run(self, plan: np.ndarray) -> Any:
        self.plans.append(plan)
        return SimpleNamespace(block_until_ready=lambda: None)


class Pair:
    """Process 0 and process 1, and what each says of the other."""

    def __init__(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        address = listener.getsockname()
        self.lost: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.steps: Any = FakeSteps()
        stranger = socket.create_connection(address)
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        self.connection = socket.create_connection(address)
        arguments = (self.connection, TOKEN, 1, self.steps, self.lost.put)
        self.follower = threading.Thread(target=follow, args=arguments)
        self.follower.start()
        self.leader = Leader(listener, TOKEN, 1, self.lost.put)
        stranger.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    for connection in (pair.connection, *pair.leader._connections):
        connection.close()


def test_plans_arrive_as_they_were_sent(pair: Pair, rng: np.random.Generator) -> None:
    """Whatever their size; after the last one the follower returns, and nobody is lost."""
    plans = [
        rng.integers(-1, 2**31, (3, COLUMNS + length)).astype(np.int32)
        for length in (0, 8, 100_000, 0)
    ]
    for plan in plans:
        pair.leader.announce(plan)
    pair.leader.stop()
    pair.follower.join(LIMIT_S)
    assert not pair.follower.is_alive() and pair.lost.empty()
    for sent, received in zip(plans, pair.steps.plans, strict=True):
        np.testing.assert_array_equal(received, sent)


def test_a_follower_that_is_gone(pair: Pair) -> None:
    pair.connection.shutdown(socket.SHUT_RDWR)
    sentences = {pair.lost.get(timeout=LIMIT_S) for _ in range(2)}
    assert any(s.startswith("Process 1 is gone; process 0 ends, ") for s in sentences)
    pair.leader.announce(np.zeros((3, COLUMNS), np.int32))  # raises nothing
    pair.follower.join(LIMIT_S)


def test_a_leader_that_is_gone(pair: Pair) -> None:
    """In the middle of a plan."""
    pair.leader._connections[0].sendall(b"\x08\0\0\0 and no more")
    pair.leader._connections[0].shutdown(socket.SHUT_RDWR)
    sentences = {pair.lost.get(timeout=LIMIT_S) for _ in range(2)}
    assert any(s.startswith("Process 0 is gone; process 1 ends, ") for s in sentences)
    pair.follower.join(LIMIT_S)
    assert not pair.follower.is_alive() and pair.steps.plans == []
