"""The command line: what demo and doctor say, and how they fail."""

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from jax_w4moe import _ffi, doctor, implementation
from jax_w4moe.bench.sweep import Row
from jax_w4moe.cli import app

RUNNER = CliRunner()


def lines() -> dict[str, str]:
    return dict(doctor.rows())


# --- doctor ---------------------------------------------------------------------------------------


def test_doctor_prints_every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    result = RUNNER.invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    for name, value in doctor.rows():
        assert name in result.output
        for line in value.splitlines():
            assert line in result.output


def test_doctor_without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """The true reason, brackets included: rich would take [cuda13] for markup."""
    reason = "No compiler was found; run pip install 'jax_w4moe[cuda13]'."
    monkeypatch.setattr(_ffi, "targets", frozenset)
    monkeypatch.setattr(_ffi, "extension_error", lambda: reason)
    monkeypatch.setattr(_ffi, "why_unavailable", lambda: reason)
    monkeypatch.setenv("COLUMNS", "500")
    result = RUNNER.invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert result.output.count(reason) == 2
    assert lines()["ops with kernels"] == "none"


def test_doctor_with_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu = "No CUDA device is visible to JAX."
    monkeypatch.setattr(_ffi, "targets", lambda: frozenset({"quantize_fp8", "fused_moe"}))
    monkeypatch.setattr(_ffi, "extension_error", lambda: None)
    monkeypatch.setattr(_ffi, "why_unavailable", lambda: no_gpu)
    monkeypatch.setattr(_ffi, "build_info", lambda: {"extension": "/some/where/_sm90.so"})
    shown = lines()
    assert shown["extension"] == "/some/where/_sm90.so"
    assert shown["ops with kernels"] == "fused_moe, quantize_fp8"
    assert shown["the kernels"] == no_gpu


def test_doctor_says_what_fused_moe_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(op: str, requested: str | None, unsupported: str | None = None) -> str:
        raise NotImplementedError(f"{op}: no kernel in this version.")

    monkeypatch.setattr(implementation, "choose", lambda *_: "xla")
    assert lines()["fused_moe runs as"].startswith("xla")
    monkeypatch.setattr(implementation, "choose", lambda *_: "both")
    assert lines()["fused_moe runs as"].startswith("cuda_sm90 on a Hopper GPU")
    monkeypatch.setattr(implementation, "choose", refuse)
    assert "fused_moe: no kernel in this version." in lines()["fused_moe runs as"]


def test_doctor_measures_where_the_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row("flash_ep8", 4, "balanced", 90.0, 0.0, 60.0, 61.0, 17.4, 3.0, 9.0, None, None, {})
    monkeypatch.setattr(_ffi, "why_unavailable", lambda: None)
    monkeypatch.setattr(doctor, "sweep", lambda *_: iter([row]))
    assert lines()["fused_moe, T=4"] == (
        "90.0 us, floor 60.0 us, ratio 1.50 (H=4096, I=2048, 17 of 32 experts)"
    )


def test_doctor_names_missing_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: None if "orbax" in package else "1.0")
    shown = lines()
    remedy = "orbax-checkpoint not installed; run pip install 'jax_w4moe[flax]'."
    assert shown["extra [flax]"] == remedy
    assert shown["extra [checkpoint]"] == "safetensors 1.0"


# --- demo -----------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    pytest.importorskip("flax", reason="the demo needs flax")
    pytest.importorskip("safetensors", reason="the demo needs safetensors")
    from jax_w4moe import demo

    sizes = demo.Sizes(hidden_size=64, intermediate_size=96, num_experts=5, top_k=2)
    demo._write(tmp_path, sizes, 2, demo._progress(Console()))
    return tmp_path


def test_demo(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """End to end on a given checkpoint, with figures that can be checked."""
    from jax_w4moe import demo

    monkeypatch.setattr(implementation, "choose", lambda *_: "xla")
    result = demo.run(checkpoint, layers=None, tokens=6, batches=2, console=Console())
    assert (result.layers, result.config.top_k, result.implementation) == (2, 2, "xla")
    biases = 5 * (2 * 96 + 64)
    assert result.bf16_bytes == 2 * 2 * (3 * 5 * 64 * 96 + biases)
    # FP8 activations: a little error, not none (compared with itself) and not much (wrong).
    assert 1e-2 < result.relative_error < 6e-2
    assert result.tokens_per_second > 0
    console = Console(width=200)
    with console.capture() as captured:
        console.print(demo.table(result))
    ratio = result.bf16_bytes / result.packed_bytes
    assert f"{ratio:.2f} x less" in captured.get()
    assert f"{result.relative_error:.2%} against float64" in captured.get()


def test_demo_command(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Hopper GPU without a kernel it says so and goes on."""

    def refuse(op: str, requested: str | None, unsupported: str | None = None) -> str:
        if requested == "xla":
            return "xla"
        raise NotImplementedError(f"{op}: no kernel in this version.")

    monkeypatch.setattr(implementation, "choose", refuse)
    monkeypatch.setenv("COLUMNS", "500")
    arguments = ["demo", "--checkpoint", str(checkpoint), "--layers", "1", "--tokens", "3"]
    result = RUNNER.invoke(app, [*arguments, "--batches", "2"])
    assert result.exit_code == 0, result.output
    assert "fused_moe: no kernel in this version. The demo goes on with xla." in result.output
    for text in (
        "1 x 5 experts, top 2, H=64, I=96, MXFP4",
        "MiB",
        "% against float64",
        "batches of 3",
    ):
        assert text in result.output


def test_demo_writes_its_own_checkpoint(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jax_w4moe import demo

    sizes = demo.Sizes(64, 32, num_experts=3, top_k=1, layers=1)
    result = demo.run(None, layers=None, tokens=2, batches=1, console=Console(), sizes=sizes)
    assert (result.layers, result.config.num_experts) == (1, 3)


def test_demo_sees_wrong_weights(checkpoint: Path) -> None:
    """The float64 comparison can fail: here the layer is another one than the file's."""
    import jax

    from jax_w4moe import checkpoint as checkpoints
    from jax_w4moe import demo
    from jax_w4moe.flax import FusedMoE

    config = checkpoints.moe_config(checkpoint)
    x = jax.random.normal(jax.random.key(0), (3, 64), "bfloat16")
    layer = FusedMoE.from_checkpoint(checkpoint, 1, implementation="xla")
    assert demo._relative_error(checkpoint, config, 1, layer, x) < 6e-2
    assert demo._relative_error(checkpoint, config, 0, layer, x) > 0.5


def test_demo_fails_in_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("flax", reason="the demo needs flax")
    result = RUNNER.invoke(app, ["demo", "--checkpoint", str(tmp_path / "nowhere")])
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1 and "nowhere' does not exist" in result.stderr


@pytest.mark.parametrize("module", ["flax", "safetensors", "orbax"])
def test_demo_without_an_extra(module: str) -> None:
    """In a process of its own, where the module cannot be imported."""
    code = (
        f"import sys; sys.modules[{module!r}] = None\nfrom jax_w4moe.cli import app; app(['demo'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        f"The demo needs {module}, which is not installed; run"
        " pip install 'jax_w4moe[flax,checkpoint]'.\n"
    )


def test_package_imports_without_extras() -> None:
    """``import jax_w4moe`` loads none of the extras, nor the command line's libraries."""
    code = (
        "import sys, jax_w4moe\n"
        "print([m for m in ('typer', 'rich', 'flax', 'orbax', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
