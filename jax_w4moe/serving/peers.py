"""One server over several processes: process 0 announces every step's plan, the others follow.

Plans go over a TCP connection to each process, not through the devices: a broadcast there would
queue behind the step that is running, and no step could be started ahead of it. A connection that
ends without having said so means that a process is gone, and its experts with it.
"""

import os
import queue
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from jax_w4moe.launcher import LAUNCHED
from jax_w4moe.serving.steps import COLUMNS, Steps

_HEADER = struct.Struct("<i")  # the length that a plan's prompts are padded to
_STOP = _HEADER.pack(-1)
_TOKEN_BYTES = 16
_CONNECT_S = 60.0
_LAUNCHER_S = 1.0  # what a launcher has to say it, and to end this process
DEVICE_ERROR_S = 3.0  # a process that is gone is said after less


def _lost(sentence: str) -> None:
    """Ends this process: its devices may wait for ever in an exchange with one that is gone."""
    if LAUNCHED in os.environ:
        time.sleep(_LAUNCHER_S)
    print(sentence, flush=True)
    os._exit(1)


class Leader:
    """Process 0's connections to all others."""

    def __init__(
        self,
        listener: socket.socket,
        token: bytes,
        count: int,
        lost: Callable[[str], None] = _lost,
    ) -> None:
        """Waits for all of them.

        Args:
          listener: a socket that listens; it is closed.
          token: what each says first.
          count: how many there are.
          lost: called in a thread with a sentence when one of them is gone.

        Raises:
          TimeoutError: one did not come.
        """
        self._lost = lost
        self._stopped = False
        self._connections: list[socket.socket] = []
        with listener:
            listener.settimeout(_CONNECT_S)
            while len(self._connections) < count:
                connection, _ = listener.accept()
                connection.settimeout(_CONNECT_S)
                if not secrets.compare_digest(_receive(connection, _TOKEN_BYTES), token):
                    connection.close()  # somebody else
                    continue
                (number,) = _HEADER.unpack(_receive(connection, _HEADER.size))
                _prepare(connection)
                self._connections.append(connection)
                threading.Thread(target=self._watch, args=(connection, number), daemon=True).start()

    def announce(self, plan: np.ndarray) -> None:
        """Sends a plan to all."""
        message = _HEADER.pack(plan.shape[1] - COLUMNS) + plan.tobytes()
        for connection in self._connections:
            try:
                connection.sendall(message)
            except OSError:
                return  # the thread that watches it ends this process

    def stop(self) -> None:
        """Tells all that there are no more plans."""
        self._stopped = True
        for connection in self._connections:
            connection.sendall(_STOP)

    def _watch(self, connection: socket.socket, number: int) -> None:
        _receive(connection, 1)  # nothing ever comes but the end
        if not self._stopped:
            self._lost(
                f"Process {number} is gone; process 0 ends, since the experts are spread over both."
                " Start all again."
            )


def follow(
    connection: socket.socket,
    token: bytes,
    number: int,
    steps: Steps,
    lost: Callable[[str], None] = _lost,
) -> None:
    """Runs what process 0 announces until it says that there is no more.

    Args:
      connection: to process 0; it is closed.
      token: what it expects first.
      number: of this process.
      steps: the model's programs here, warmed up.
      lost: called with a sentence if process 0 is gone.
    """
    _prepare(connection)
    connection.sendall(token + _HEADER.pack(number))
    plans: queue.SimpleQueue[np.ndarray | None] = queue.SimpleQueue()

    def read() -> None:
        # In a thread: while this process waits for its devices, it must see the connection end.
        with connection:
            while (header := _receive(connection, _HEADER.size)) != _STOP:
                plan = steps.empty_plan(*_HEADER.unpack(header)) if header else None
                message = b"" if plan is None else _receive(connection, plan.nbytes)
                if plan is None or not message:
                    lost(
                        f"Process 0 is gone; process {number} ends, since the experts are spread"
                        " over both. Start all again."
                    )
                    break
                plans.put(np.frombuffer(message, np.int32).reshape(plan.shape))
            plans.put(None)

    threading.Thread(target=read, daemon=True).start()
    last: jax.Array | None = None
    while (plan := plans.get()) is not None:
        ids = steps.run(plan)
        if last is not None:
            last.block_until_ready()  # an error shows here
        last = ids


def lead_or_follow(steps: Steps, host: str) -> Leader | None:
    """Connects all processes.

    Args:
      steps: the model's programs here, warmed up.
      host: what the others call process 0's.

    Returns:
      In process 0 the connections. In all others None, when process 0 has said that it is over.
    """
    is_first = jax.process_index() == 0
    address = np.zeros(1 + _TOKEN_BYTES, np.int32)
    if is_first:
        listener = socket.create_server((host, 0))
        address[:] = listener.getsockname()[1], *secrets.token_bytes(_TOKEN_BYTES)
    address = np.asarray(multihost_utils.broadcast_one_to_all(address))
    token = bytes(address[1:].tolist())
    if is_first:
        return Leader(listener, token, jax.process_count() - 1)
    connection = socket.create_connection((host, int(address[0])), timeout=_CONNECT_S)
    follow(connection, token, jax.process_index(), steps)
    return None


def _prepare(connection: socket.socket) -> None:
    connection.settimeout(None)
    # Plans are small, and each is waited for.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _receive(connection: socket.socket, size: int) -> bytes:
    """So many bytes, or none if the connection ends before."""
    parts = bytearray()
    while len(parts) < size:
        try:
            part = connection.recv(size - len(parts))
        except OSError:
            part = b""
        if not part:
            return b""
        parts += part
    return bytes(parts)
