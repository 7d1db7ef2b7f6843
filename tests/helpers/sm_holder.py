"""Holds SMs of the GPU in this process, beside what JAX runs."""

import contextlib
import ctypes
import importlib.util
import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterator

import pytest

SOURCE = pathlib.Path(__file__).parents[1] / "csrc" / "sm_holder.cu"


def _nvcc() -> str | None:
    """A CUDA compiler: CUDACXX, the PATH, the usual folder, or the nvidia-cuda-nvcc package."""
    spec = importlib.util.find_spec("nvidia")
    packages = list(spec.submodule_search_locations or []) if spec else []
    places = [
        os.environ.get("CUDACXX"),
        shutil.which("nvcc"),
        "/usr/local/cuda/bin/nvcc",
        *(f"{package}/cu13/bin/nvcc" for package in packages),
    ]
    return next((place for place in places if place and pathlib.Path(place).is_file()), None)


def load(folder: pathlib.Path) -> ctypes.CDLL:
    """The library: JAX_W4MOE_SM_HOLDER if that names one, else compiled into ``folder``."""
    built = os.environ.get("JAX_W4MOE_SM_HOLDER")
    if not built:
        compiler = _nvcc()
        if compiler is None:
            pytest.skip("no nvcc: pip install nvidia-cuda-nvcc, or set CUDACXX")
        built = str(folder / "libsm_holder.so")
        library_folder = pathlib.Path(compiler).resolve().parents[1] / "lib"
        options = ["-shared", "-Xcompiler=-fPIC", "-cudart=static", "-arch=sm_90", "-O2"]
        command = [compiler, *options, f"-L{library_folder}", "-o", built, str(SOURCE)]
        subprocess.run(command, check=True)
    return ctypes.CDLL(built)


@contextlib.contextmanager
def held(library: ctypes.CDLL, num_sms: int) -> Iterator[None]:
    """``num_sms`` SMs are occupied inside the block."""
    assert library.sm_holder_start(num_sms) == 0
    try:
        yield
    finally:
        assert library.sm_holder_stop(num_sms) == 0, "the block took longer than 10 s"
