"""``python -m tests.helpers.several_processes NUMBER COUNT PORT [some|all]``: one process of them.

Each has four CPU devices, or its own GPU. Layers are spread over all of them; every process
compares the rows that it holds, and prints "equal" and how many cases there were.
"""

import os
import sys

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax

from tests.helpers.spread import BF16, CASES, Case, check

FEW = [
    Case((8, 1), token_axes=("expert",), exchange="slot_rows"),
    Case((4, 2), token_axes=("expert",)),
    Case((2, 2)),
]


def main(number: int, count: int, port: int, which: str = "few") -> None:
    jax.distributed.initialize(
        f"127.0.0.1:{port}", num_processes=count, process_id=number, initialization_timeout=60
    )
    devices, is_cpu = jax.device_count(), jax.default_backend() == "cpu"
    assert devices == (4 * count if is_cpu else count)
    chosen = [case for case, is_always in CASES.items() if is_always or which == "all"]
    cases = [
        case
        for case in (FEW if which == "few" else chosen)
        if case.shape[0] * case.shape[1] <= devices
        # Every process holds a part.
        and case.shape[0] * case.shape[1] >= count
        and (is_cpu or case.act_dtype != BF16)
    ]
    for case in cases:
        check(case)
    print("equal", len(cases), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), *sys.argv[4:])
