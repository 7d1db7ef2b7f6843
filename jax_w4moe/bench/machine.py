"""Where and when figures were measured, and what the GPU did meanwhile."""

import datetime
import os
import pathlib
import subprocess
from collections.abc import Callable
from typing import Any

import jax

import jax_w4moe
from jax_w4moe import _ffi

# nvidia-smi numbers the GPUs of the machine, JAX those that it may see.
_SMI = ["nvidia-smi", "--format=csv,noheader,nounits"]


def header() -> dict[str, str]:
    """What every figure must be read with."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "driver": _output([*_SMI, "--query-gpu=driver_version"]) or "none",
        "jax": jax.__version__,
        "jax_w4moe": str(_ffi.build_info()["version"]),
        "commit": _commit() or "unknown",
    }


def under_load(run: Callable[[], Any]) -> tuple[int, float] | None:
    """The GPU's SM clock in MHz and its power in W while ``run`` is dispatched over and over.

    None where nvidia-smi does not say. It answers within a tenth of a second or so, so after a
    pause the figures are those of a burst.
    """
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    command = [*_SMI, f"--id={gpu}", "--query-gpu=clocks.sm,power.draw.instant"]
    try:
        query = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except FileNotFoundError:
        return None
    pending = run()
    while query.poll() is None:  # two programs in flight, so that the GPU never waits
        following = run()
        jax.block_until_ready(pending)
        pending = following
    jax.block_until_ready(pending)
    try:
        clock, power = query.communicate()[0].split(",")
        return int(clock), float(power)
    except ValueError:  # an error, or a GPU that says "[N/A]"
        return None


def _commit() -> str | None:
    """The commit of the package's source tree, if it is run from one."""
    folder = pathlib.Path(jax_w4moe.__file__).parent
    git = ["git", "-C", str(folder)]
    # An installed package may lie in some other repository's folder.
    if not _output([*git, "ls-files", "__init__.py"]):
        return None
    return _output([*git, "describe", "--always", "--dirty", "--exclude=*"])


def _output(command: list[str]) -> str | None:
    """The first line that a command prints; None if it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().partition("\n")[0]
