#!/usr/bin/env python3
"""Fails if ptxas reports something that makes a kernel slow; prints one line per kernel.

Reads the log of a build with ``-Xptxas=-v``. Refused are spills, stack frames, and every warning
of ptxas, above all C7510 (WGMMA serialised) and C7508 (setmaxnreg ignored), which keep results
right and speed wrong. A log without kernels is refused too.

    pip wheel -v --no-deps . > build.log 2>&1 ; .ci/check_ptxas.py build.log
"""

import argparse
import dataclasses
import pathlib
import re
import shutil
import subprocess
import sys

ENTRY = re.compile(r"Compiling entry function '(\S+)'")
PROPERTIES = re.compile(r"Function properties for (\S+)")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SMEM = re.compile(r"(\d+) bytes smem")
# NOTE: C75xx come as "info" as well as "warning", depending on the version of ptxas.
WARNING = re.compile(
    r"ptxas.*\bwarning\b|\bC75\d\d\b|wgmma\S* instructions are serialized|setmaxnreg.*ignored"
)


@dataclasses.dataclass
class Kernel:
    """What ptxas said of one function."""

    name: str
    registers: int = 0
    smem: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0


def parse(log: str) -> tuple[list[Kernel], list[str]]:
    """Returns the functions and the warning lines of a build log."""
    kernels: list[Kernel] = []
    warnings: list[str] = []
    entry = function = None
    for line in log.splitlines():
        if WARNING.search(line):
            warnings.append(line.strip())
        if match := ENTRY.search(line):
            entry = function = Kernel(match[1])
            kernels.append(entry)
        elif match := PROPERTIES.search(line):
            if entry is None or match[1] != entry.name:  # a device function that was not inlined
                function = Kernel(match[1])
                kernels.append(function)
        elif (match := FRAME.search(line)) and function:
            function.stack, function.spill_stores, function.spill_loads = map(int, match.groups())
        elif (match := USED.search(line)) and entry:
            entry.registers = int(match[1])
            smem = SMEM.search(line)
            entry.smem = int(smem[1]) if smem else 0
            function = entry
    return kernels, warnings


def problems(kernels: list[Kernel], warnings: list[str]) -> list[str]:
    """Returns one sentence per thing that must not be."""
    found = [f"ptxas warns: {line}" for line in warnings]
    for kernel in kernels:
        for what in ("stack", "spill_stores", "spill_loads"):
            if size := getattr(kernel, what):
                text = what.replace("_", " ")
                found.append(f"{kernel.name}: {size} bytes of {text}, need 0; use less registers.")
    if not kernels:
        found.append("The log has no kernel; build from scratch with -Xptxas=-v and pip's -v.")
    return found


def demangle(name: str) -> str:
    """Returns the C++ name without its parameters, or the symbol where there is no c++filt."""
    if not shutil.which("c++filt"):
        return name
    text = subprocess.run(
        ["c++filt", name], check=True, capture_output=True, text=True
    ).stdout.strip()
    return text.removeprefix("void ").split("(", 1)[0] or name


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=pathlib.Path, help="log of a build with -Xptxas=-v")
    kernels, warnings = parse(parser.parse_args().log.read_text(errors="replace"))
    print(f"{'registers':>9} {'smem':>7} {'stack':>6} {'stores':>7} {'loads':>6}  kernel")
    for k in kernels:
        print(
            f"{k.registers:9} {k.smem:7} {k.stack:6} {k.spill_stores:7} {k.spill_loads:6}"
            f"  {demangle(k.name)}"
        )
    found = problems(kernels, warnings)
    print(*found, sep="\n", end="\n" if found else "", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
