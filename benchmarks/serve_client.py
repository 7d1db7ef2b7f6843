"""A client of the server, and a server that is started for it."""

import contextlib
import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

_EXAMPLE = Path(__file__).parents[1] / "examples" / "serve.py"


@dataclasses.dataclass
class Answer:
    """What came back, and when, in seconds of ``time.perf_counter``.

    Attributes:
      prompt_tokens: that were sent.
      began: when the request was sent.
      status: of HTTP.
      tokens: ids that came.
      times: of every token.
      finish_reason: as the server says, or "error"; None if the client left before.
    """

    prompt_tokens: int
    began: float
    status: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    times: list[float] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None


async def complete(
    session: aiohttp.ClientSession,
    prompt: list[int],
    max_tokens: int,
    leave_after: int | None = None,
    **options: Any,
) -> Answer:
    """A greedy completion, streamed; the client may leave after some tokens."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    answer = Answer(len(prompt), time.perf_counter())
    async with session.post("/v1/completions", json=body | options) as response:
        answer.status = response.status
        if leave_after == 0:
            return answer
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[len(b"data: ") :])
            if "error" in event:
                answer.finish_reason = "error"
                break
            (choice,) = event["choices"]
            now = time.perf_counter()
            answer.tokens += choice["token_ids"]
            answer.times += [now] * len(choice["token_ids"])
            answer.finish_reason = choice["finish_reason"]
            if leave_after is not None and len(answer.tokens) >= leave_after:
                break
    return answer


def session_for(address: str) -> aiohttp.ClientSession:
    """Connections without limits of number and time."""
    return aiohttp.ClientSession(
        address,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None),
        read_bufsize=2**20,
    )


async def model_of(session: aiohttp.ClientSession) -> dict[str, Any]:
    """What the server says of its model."""
    async with session.get("/v1/models") as response:
        model: dict[str, Any] = (await response.json())["data"][0]
    return model


async def metrics_of(session: aiohttp.ClientSession) -> dict[str, float]:
    """The server's metrics, without its prefix."""
    async with session.get("/metrics") as response:
        text = await response.text()
    found = re.findall(r"^jax_w4moe_(\S+) (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


@dataclasses.dataclass(frozen=True)
class Started:
    """A server that runs.

    Attributes:
      process: that was started.
      address: http://HOST:PORT.
    """

    process: "subprocess.Popen[str]"
    address: str

    def resident_bytes(self) -> int:
        """Memory of its processes, B."""
        pids, total = [self.process.pid], 0
        while pids:
            pid = pids.pop()
            with contextlib.suppress(OSError):
                pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
                status = Path(f"/proc/{pid}/status").read_text()
                if found := re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE):
                    total += 1024 * int(found[1])
        return total


@contextlib.contextmanager
def start(options: list[str]) -> Iterator[Started]:
    """Runs examples/serve.py on a free port, and in the end asks it to finish.

    Raises:
      RuntimeError: it did not come up, or did not end well.
    """
    command = [sys.executable, str(_EXAMPLE), *options, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"^Serving .* on (http://\S+)$", line):
                yield Started(process, found[1])
                break
        else:
            raise RuntimeError(f"The server ended with code {process.wait()}.")
        process.send_signal(signal.SIGTERM)
        if process.wait(60):
            raise RuntimeError(f"The server ended with code {process.returncode}.")
    finally:
        process.kill()
