"""``bench`` from end to end on the tiny layer, and how it fails."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from typer.testing import CliRunner, Result

from jax_w4moe import _ffi, implementation, timing
from jax_w4moe.bench import backends, host, layers, machine, report, spread, stack, sweep
from jax_w4moe.cli import app
from jax_w4moe.tuning import choice, recording, winners

# In one process, that the fixture is run once.
pytestmark = pytest.mark.xdist_group("bench")


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """Two calls in a program, three measurements."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "calls", lambda *arguments: layers.calls(*arguments)[:2])
        patch.setattr(sweep, "REPEATS", 3)
        patch.setattr(sweep, "BURSTS", 3)
        patch.setattr(sweep, "PAUSE_S", 0.01)
        yield


def bench(*options: str) -> Result:
    return CliRunner().invoke(app, ["bench", "--shape", "tiny", *options])


HEADER = {
    **machine.header(),
    "format": "mxfp4",
    "act_dtype": "float8_e4m3fn",
    "clocks": "sustained",
}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's JSON with two token counts and one backend."""
    path = tmp_path_factory.mktemp("bench") / "old.json"
    tokens = ("--tokens", "1", "--tokens", "5")
    result = bench(*tokens, "--backend", "ragged_dot", "--json", str(path))
    assert result.exit_code == 0, result.output
    assert "No peer was measured on these layers." in result.output
    for heading in ("ratio", "TB/s", "TFLOPS", "best peer", "FP8 weights", "ragged_dot"):
        assert heading in result.output
    return path


def test_json(earlier: Path) -> None:
    rows = report.load(earlier, HEADER)
    assert [(r.shape, r.num_tokens, r.routing) for r in rows] == [
        ("tiny", 1, "balanced"),
        ("tiny", 5, "balanced"),
    ]
    for row in rows:
        assert row.time_us > 0 and 0 <= row.spread < 10
        assert row.moved_floor_us > row.floor_us > 5.5
        assert row.ratio == row.time_us / row.floor_us
        ragged = row.backends_us["ragged_dot"]
        assert ragged and ragged > 0
    assert rows[0].touched == 2


def _with_times(path: Path, earlier: Path, factor: float) -> None:
    rows = [
        dataclasses.replace(row, time_us=row.time_us * factor, spread=0.0)
        for row in report.load(earlier, HEADER)
    ]
    report.save(path, rows, HEADER)


def test_compare(earlier: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    _with_times(old, earlier, 1e3)
    result = bench("--tokens", "5", "--compare", str(old))
    assert result.exit_code == 0, result.output
    assert "1 cells compared: 0 slower, 1 faster." in result.output
    _with_times(old, earlier, 1e-3)
    result = bench("--tokens", "5", "--compare", str(old))
    assert result.exit_code == 1
    assert "slower: tiny T=5 balanced: " in result.output
    assert "1 cells compared: 1 slower, 0 faster." in result.output


def test_burst_zipf_one_and_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="a plot needs it")
    path = tmp_path / "plot.png"
    options = ("--routing", "zipf", "--routing", "one", "--format", "int4_g128", "--burst")
    result = bench("--tokens", "3", *options, "--act-dtype", "bfloat16", "--plot", str(path))
    assert result.exit_code == 0, result.output
    printed = " ".join(result.output.split())  # the title may be broken into lines
    assert "format int4_g128, act_dtype bfloat16, clocks burst" in printed and "zipf" in printed
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_backend_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokamax", None)
    monkeypatch.delitem(sys.modules, backends.BACKENDS["tokamax"], raising=False)
    result = bench("--tokens", "1", "--backend", "tokamax")
    assert result.exit_code == 0, result.output
    assert "Backend tokamax is left out: " in result.output


def test_a_backend_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any) -> Any:
        raise ValueError("no kernel for this\nand more")

    monkeypatch.setattr(f"{backends.BACKENDS['ragged_dot']}.run", run)
    result = bench("--tokens", "1", "--backend", "ragged_dot")
    assert result.exit_code == 0, result.output
    assert "ragged_dot on tiny, T=1: no kernel for this\n" in result.output


def test_autotune(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As though this were an H200."""
    monkeypatch.setattr(_ffi, "why_unavailable", lambda: None)
    monkeypatch.setattr(implementation, "device_kind", lambda: "NVIDIA H200")
    monkeypatch.setattr(recording, "_PLATFORM", jax.default_backend())
    monkeypatch.setattr(recording, "_median_us", lambda *_: 1.0)
    path = tmp_path / "winners.json"
    result = bench("--tokens", "1", "--tokens", "3", "--autotune", str(path))
    choice._loaded.set_global(choice._Loaded({}))
    assert result.exit_code == 0, result.output
    assert [problem.num_rows for problem in winners.load(path).entries] == [2, 6]


def test_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_REPEATS", 2)
    result = bench("--host")
    assert result.exit_code == 0, result.output
    assert "us to dispatch a jitted fused_moe at T = 1, without waiting" in result.output


def _short_program(op: Any, inputs: Any, shared: Any = (), calls: int = 1) -> timing.Program:
    return timing.Program(op, inputs, shared, calls=1)


@pytest.mark.matrix
def test_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 1e-4)
    monkeypatch.setattr(spread, "Program", _short_program)
    monkeypatch.setattr(spread, "calls", lambda *arguments: layers.calls(*arguments)[:1])
    result = bench("--spread", "--tokens", "2", "--devices", "2")
    assert result.exit_code == 0, result.output
    for kind in ("expert", "tensor"):
        assert f"tiny, {kind} axis of 2, 2 tokens a device: " in result.output
    assert result.output.count("; bf16 sent ") == 1 and "; dispatched " not in result.output
    result = bench("--spread", "--devices", "9")
    assert result.exit_code == 1 and "over 9 devices, here are 8; use 2 to 8." in result.output


def test_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "LAYERS", 3)
    monkeypatch.setattr(stack, "SETS", 2)
    monkeypatch.setattr(timing, "SECONDS", 1e-4)
    monkeypatch.setattr(stack, "Program", _short_program)
    monkeypatch.setattr(stack, "calls", lambda *arguments: layers.calls(*arguments)[:1])
    result = bench("--stack", "--tokens", "2")
    assert result.exit_code == 0, result.output
    assert "tiny, T = 2: " in result.output
    assert "us per layer in a program of 3 layers over 0.0 GB of weights" in result.output


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--shape", "huge"], "shape 'huge' is unknown; use one of flash, flash_ep8, "),
        (["--format", "int5"], "format 'int5' is unknown; use one of "),
        (["--act-dtype", "int8"], "act-dtype 'int8' is unknown; use float8_e4m3fn or bfloat16."),
        (["--routing", "skewed"], "routing 'skewed' is unknown; use one of balanced, zipf, one."),
        (["--tokens", "0"], "tokens=0 is below 1; leave it out."),
        (["--backend", "torch"], "backend 'torch' is unknown; use one of ragged_dot, tokamax."),
        (["--json", "/nowhere/at/all.json"], "/nowhere/at does not exist; make it"),
        (["--compare", "/nowhere.json"], "No such file"),
        (["--stack", "--format", "nvfp4"], "bench --stack takes no --format; leave it out."),
        (["--act-dtype", "bfloat16", "--host"], "bench --host takes no --act-dtype; leave it out."),
        (["--host", "--spread"], "bench --host takes no --spread; leave it out."),
        (["--devices", "2"], "bench without --spread takes no --devices; leave it out."),
        (["--autotune", "winners.json"], "autotune measures on a Hopper GPU: No GPU is here."),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_refusals(options: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ffi, "why_unavailable", lambda: "No GPU is here.")
    result = bench(*options)
    assert result.exit_code == 1
    assert sentence in result.stderr and result.stderr.count("\n") == 1


def test_runs_of_another_kind_are_not_compared(earlier: Path, tmp_path: Path) -> None:
    result = bench("--burst", "--compare", str(earlier))
    assert "clocks is 'sustained', of this run 'burst'; compare runs of one" in result.stderr
    other = tmp_path / "other.json"
    other.write_text('{"rows": [{"op": "fused_moe"}], "header": {}}')
    result = bench("--compare", str(other))
    assert "was not written by this version's bench --json" in result.stderr


def test_without_a_hopper_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ffi, "why_unavailable", lambda: "No GPU is here.")
    result = CliRunner().invoke(app, ["bench"])
    assert result.exit_code == 1
    assert "needs a Hopper GPU and the kernels: No GPU is here. Or pass --shape tiny" in (
        result.stderr
    )


def test_plot_without_matplotlib() -> None:
    """In a process of its own, where it cannot be imported."""
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from jax_w4moe.cli import app; app(['bench', '--shape', 'tiny', '--plot', 'x.png'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "A plot needs matplotlib, which is not installed; run pip install 'jax_w4moe[bench]'.\n"
    )
