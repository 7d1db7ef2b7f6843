"""The programs in examples/, as a user starts them."""

import subprocess
import sys
from pathlib import Path

SERVE = Path(__file__).parents[1] / "examples" / "serve_multihost.py"


def serve(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SERVE), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)


def test_serving_on_two_processes() -> None:
    result = serve("--steps", "3")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 devices of 2 processes, 2 layers of 16 experts, 32 tokens a step" in result.stdout
    assert "step 3 of 3: " in result.stdout and "tokens/s" in result.stdout


def test_a_lost_process_ends_all() -> None:
    result = serve("--steps", "1000000", "--lose-after", "2")
    assert result.returncode == 1
    last = "Process 1 ended with code -9; all others are stopped, since its experts are gone."
    assert last in result.stdout
