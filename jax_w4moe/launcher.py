"""Starts a program once per process of this machine; one that ends takes all others with it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

LAUNCHED = "JAX_W4MOE_LAUNCHED"  # set in the processes: there is one that watches them
_POLL_S = 0.1


def run_processes(
    program: Sequence[str], processes: int, *, cpu_devices: int = 2, lose_after_s: float = 0.0
) -> int:
    """Runs ``python PROGRAM --coordinator HOST:PORT --processes N --process NUMBER`` N times.

    Each gets a GPU or, where there are none, CPU devices. SIGINT and SIGTERM are passed on to
    process 0 alone, which is to tell the others.

    Args:
      program: a file and its options.
      processes: how many.
      cpu_devices: of each process, where there are no GPUs.
      lose_after_s: kills the last process after so many seconds, to see what happens; 0: never.

    Returns:
      An exit code: 0 if all ended well. If one did not, the others are stopped, and one sentence
      says which it was.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{listener.getsockname()[1]}"
    children = []
    for number in range(processes):
        own = f"--coordinator {coordinator} --processes {processes} --process {number}".split()
        children.append(
            subprocess.Popen(
                [sys.executable, *program, *own],
                env={**os.environ, LAUNCHED: "1", **_devices(number, cpu_devices)},
                start_new_session=True,  # a terminal's Ctrl-C comes here only
            )
        )

    def pass_on(received: int, _: Any) -> None:
        children[0].send_signal(received)

    former = {which: signal.signal(which, pass_on) for which in (signal.SIGINT, signal.SIGTERM)}
    began = time.monotonic()
    try:
        while any(child.poll() is None for child in children):
            for number, child in enumerate(children):
                if child.poll():  # ended, and not well
                    print(
                        f"Process {number} ended with code {child.returncode}; all others are"
                        " stopped, since its experts are gone. Start again.",
                        flush=True,
                    )
                    return 1
            if lose_after_s and time.monotonic() - began > lose_after_s:
                children[-1].kill()
            time.sleep(_POLL_S)
    finally:
        for child in children:
            child.kill()
            child.wait()
        for which, handler in former.items():
            signal.signal(which, handler)
    return max(child.returncode for child in children)


def _devices(number: int, cpu_devices: int) -> dict[str, str]:
    """Environment variables that give a process its devices."""
    if os.path.exists("/dev/nvidia0") and os.environ.get("JAX_PLATFORMS") != "cpu":
        return {"CUDA_VISIBLE_DEVICES": str(number)}
    flag = f"--xla_force_host_platform_device_count={cpu_devices}"
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag}
