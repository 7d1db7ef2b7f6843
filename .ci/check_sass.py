#!/usr/bin/env python3
"""Fails if a kernel of the extension uses local memory; prints what the kernels are made of.

Local memory (LDL, STL) is where spills and dynamically indexed register arrays go. Disassembles
with cuobjdump, which comes with the CUDA toolkit or from PyPI, and needs no GPU:

    pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm ; .ci/check_sass.py _sm90.abi3.so
"""

import argparse
import collections
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

FUNCTION = re.compile(r"^\s*Function : (\S+)")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
LOCAL = ("LDL", "STL")
SHOWN = (*LOCAL, "QGMMA", "HGMMA", "UBLKCP", "F2FP")


def parse(sass: str) -> dict[str, collections.Counter[str]]:
    """Returns how often each kernel uses each opcode."""
    kernels: dict[str, collections.Counter[str]] = {}
    name = ""
    for line in sass.splitlines():
        if match := FUNCTION.match(line):
            name = match[1]
            kernels[name] = collections.Counter()
        elif name and (match := INSTRUCTION.match(line)):
            kernels[name][match[1]] += 1
    return kernels


def problems(kernels: dict[str, collections.Counter[str]]) -> list[str]:
    """Returns one sentence per thing that must not be."""
    found = [
        f"{name}: {counts[opcode]} {opcode} instructions, need 0; keep its arrays in registers."
        for name, counts in kernels.items()
        for opcode in LOCAL
        if counts[opcode]
    ]
    if not sum(counts.total() for counts in kernels.values()):
        found.append("The file holds no kernel; was it built with JAX_W4MOE_CUDA=ON?")
    return found


def disassemble(path: pathlib.Path) -> str:
    """Returns the SASS of an extension, by cuobjdump from PyPI or from the PATH."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or []) if spec else []
    folders = os.pathsep.join([*(f"{root}/cu13/bin" for root in roots), os.environ["PATH"]])
    tool = shutil.which("cuobjdump", path=folders)
    if tool is None:
        sys.exit("cuobjdump was not found; pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm.")
    result = subprocess.run(
        [tool, "-sass", path],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": folders},
    )
    return result.stdout


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("extension", type=pathlib.Path, help="the compiled _sm90 module")
    kernels = parse(disassemble(parser.parse_args().extension))
    print(" ".join(f"{opcode:>6}" for opcode in ("all", *SHOWN)), " kernel")
    for name, counts in kernels.items():
        row = (counts.total(), *(counts[opcode] for opcode in SHOWN))
        print(" ".join(f"{count:6}" for count in row), f" {name}")
    found = problems(kernels)
    print(*found, sep="\n", end="\n" if found else "", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
