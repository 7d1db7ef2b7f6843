"""The CI check of ptxas logs must fail on the logs it exists for."""

import importlib.util
import pathlib
from types import ModuleType

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / ".ci" / "check_ptxas.py"

KERNEL = """\
ptxas info    : Compiling entry function '{name}' for 'sm_90a'
ptxas info    : Function properties for {name}
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 1024 bytes smem
"""


@pytest.fixture(scope="module")
def check_ptxas() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_ptxas", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kernel(name: str = "_Z4gemmv", stack: int = 0, stores: int = 0, loads: int = 0) -> str:
    return KERNEL.format(name=name, stack=stack, stores=stores, loads=loads)


def test_clean_log(check_ptxas: ModuleType) -> None:
    kernels, warnings = check_ptxas.parse(kernel("_Z1av") + "[2/9] g++ -c x.cc\n" + kernel("_Z1bv"))
    assert [(k.name, k.registers, k.smem) for k in kernels] == [
        ("_Z1av", 168, 1024),
        ("_Z1bv", 168, 1024),
    ]
    assert check_ptxas.problems(kernels, warnings) == []


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (kernel(stores=8), "8 bytes of spill stores"),
        (kernel(loads=12), "12 bytes of spill loads"),
        (kernel(stack=16), "16 bytes of stack"),
        (
            kernel()
            + "ptxas info    : Function properties for _Z6helperv\n"
            + "    32 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n",
            "_Z6helperv: 32 bytes of stack",
        ),
        (
            kernel()
            + "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are"
            " serialized due to insufficient register resources in function '_Z4gemmv'\n",
            "C7510",
        ),
        (
            kernel()
            + "ptxas warning : setmaxnreg ignored to maintain minimum register requirements\n",
            "setmaxnreg",
        ),
        ("[1/9] g++ -c module.cc\n", "no kernel"),
    ],
)
def test_bad_log(check_ptxas: ModuleType, log: str, words: str) -> None:
    found = check_ptxas.problems(*check_ptxas.parse(log))
    assert len(found) == 1
    assert words in found[0]


def test_exit_code(
    check_ptxas: ModuleType, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "build.log"
    monkeypatch.setattr("sys.argv", ["check_ptxas.py", str(log)])
    log.write_text(kernel())
    assert check_ptxas.main() == 0
    log.write_text(kernel(stores=4))
    assert check_ptxas.main() == 1
