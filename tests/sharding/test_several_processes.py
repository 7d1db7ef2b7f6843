"""Layers spread over processes: two of four CPU devices each, over gloo."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.spread import CASES

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.mark.parametrize(
    ("which", "count"),
    [("few", 3), pytest.param("all", len(CASES), marks=pytest.mark.matrix)],
)
def test_two_processes(which: str, count: int) -> None:
    command = [sys.executable, "-m", "tests.helpers.several_processes"]
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [*command, str(number), "2", port, which],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=900)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
        assert output.splitlines()[-1] == f"equal {count}"
