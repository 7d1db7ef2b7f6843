"""gpt-oss layers against transformers, which loads and dequantises our files by itself."""
# ruff: noqa: E402 - without the judge's packages the rest need not be imported

import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the judge needs torch: pip install '.[judge]'")
transformers = pytest.importorskip(
    "transformers", reason="the judge needs transformers: pip install '.[judge]'"
)
pytest.importorskip("accelerate", reason="the judge needs accelerate: pip install '.[judge]'")

from jax_w4moe import dequantize_experts, reference, topk_routing, unpack_experts
from jax_w4moe.checkpoint import MoELayer, load_experts, load_router, moe_config, save_gpt_oss
from tests.helpers.compare import EXACT_RMS, MIRRORED_RMS, assert_bitwise, relative_rms
from tests.helpers.data import expert_weights

pytestmark = pytest.mark.judge

# (E, H, I, k): plain, odd sizes with expert 10 after 9, H > I and I > H beyond one K-block.
SHAPES = [(4, 64, 64, 2), (11, 96, 32, 3), (5, 160, 288, 4), (11, 32, 96, 1)]
NUM_TOKENS = 24
X_NORM = 130.0  # of a token: gates and ups then have a standard deviation of about 6


class Judge:
    """One written checkpoint of two layers, and transformers' model of it."""

    def __init__(self, folder: Path, shape: tuple[int, int, int, int]) -> None:
        num_experts, hidden, intermediate, top_k = shape
        rng = np.random.default_rng(shape)
        layers = []
        for _ in range(2):
            weights = expert_weights(rng, num_experts, hidden, intermediate, bias=True)
            # Logits of order one, so that all k experts of a token count.
            router = [
                rng.standard_normal((num_experts, hidden)) / X_NORM,
                rng.standard_normal(num_experts),
            ]
            layers.append(MoELayer(weights, *(jnp.asarray(r, jnp.bfloat16) for r in router)))
        save_gpt_oss(folder, layers, top_k=top_k)
        self.folder = folder
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not ours
            self.model, self.info = transformers.GptOssForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                experts_implementation="eager",
                output_loading_info=True,
            )
        # transformers dequantises to bf16, which holds every MXFP4 weight, whatever dtype says.
        self.model = self.model.float()
        # Large enough for gates and ups beyond the limit of 7, and exact in bf16.
        x = X_NORM / np.sqrt(hidden) * rng.standard_normal((NUM_TOKENS, hidden))
        self.x = jnp.asarray(x, jnp.bfloat16)

    def mlp(self, layer: int) -> Any:
        return self.model.model.layers[layer].mlp

    def expected(self, layer: int) -> np.ndarray:
        """transformers' own layer on x, in float32."""
        x = torch.from_numpy(np.asarray(self.x).astype(np.float32))
        with torch.no_grad():
            return self.mlp(layer)(x[None])[0][0].numpy()

    def routing(self, layer: int) -> tuple[jax.Array, jax.Array]:
        weight, bias = map(jnp.asarray, load_router(self.folder, layer)[:2])
        logits = jnp.dot(
            self.x.astype(jnp.float32),
            weight.astype(jnp.float32).T,
            precision=jax.lax.Precision.HIGHEST,
        )
        config = moe_config(self.folder)
        return topk_routing(
            logits + bias.astype(jnp.float32)[None], config.top_k, scoring=config.scoring
        )


@pytest.fixture(scope="module", params=SHAPES, ids=lambda s: "E{}-H{}-I{}-k{}".format(*s))
def judge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Judge:
    return Judge(tmp_path_factory.mktemp("gpt_oss"), request.param)


def test_transformers_finds_every_tensor(judge: Judge) -> None:
    """Nothing of the MoE layers is missing, unexpected or of another shape."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not [key for key in judge.info[kind] if "mlp" in str(key)], kind
    assert "model.embed_tokens.weight" in judge.info["missing_keys"]  # the list is not just empty
    assert type(judge.mlp(0).experts).__name__ == "GptOssExperts"  # float weights: dequantised


@pytest.mark.parametrize("layer", [0, 1])
def test_dequantized_weights(judge: Judge, layer: int) -> None:
    """Every weight and bias is transformers' own, bit for bit."""
    canonical = unpack_experts(load_experts(judge.folder, layer))
    w_gate, w_up, w_down = dequantize_experts(canonical)
    experts = judge.mlp(layer).experts
    gate_up = experts.gate_up_proj.detach().numpy()  # [E, H, 2I], interleaved
    assert_bitwise(w_gate, np.ascontiguousarray(gate_up[:, :, 0::2].swapaxes(1, 2)))
    assert_bitwise(w_up, np.ascontiguousarray(gate_up[:, :, 1::2].swapaxes(1, 2)))
    down = experts.down_proj.detach().numpy()
    assert_bitwise(w_down, np.ascontiguousarray(down.swapaxes(1, 2)))
    bias = experts.gate_up_proj_bias.detach().numpy()
    expected = np.concatenate([bias[:, 0::2], bias[:, 1::2]], axis=1)
    assert_bitwise(canonical.w13_bias, expected)
    assert_bitwise(canonical.w2_bias, experts.down_proj_bias.detach().numpy())


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("mode", "bound"), [("exact", EXACT_RMS), ("mirrored", MIRRORED_RMS)])
def test_layer(judge: Judge, layer: int, mode: reference.Mode, bound: float) -> None:
    experts = load_experts(judge.folder, layer)
    activation = moe_config(judge.folder).activation
    actual = reference.fused_moe(
        judge.x, experts, *judge.routing(layer), activation=activation, mode=mode
    )
    assert relative_rms(actual, judge.expected(layer)) <= bound


def test_input_reaches_the_clamp(judge: Judge) -> None:
    """Without the clamp the result would be another one: the test above sees it."""
    w_gate, w_up, _ = dequantize_experts(unpack_experts(load_experts(judge.folder, 0)))
    x = np.asarray(judge.x).astype(np.float32)
    for kernel in (w_gate, w_up):
        values = np.einsum("th,eih->eti", x, np.asarray(kernel))
        assert 0.02 < (values > 7).mean() and 0.02 < (values < -7).mean()


def test_flax_layer(judge: Judge) -> None:
    """The whole way of a user, router included, with FP8 activations."""
    pytest.importorskip("flax", reason="the layer needs flax: pip install '.[flax]'")
    from jax_w4moe.flax import FusedMoE

    for layer in (0, 1):
        module = FusedMoE.from_checkpoint(judge.folder, layer, implementation="xla")
        error = relative_rms(module(judge.x), judge.expected(layer))
        assert 1e-4 < error <= MIRRORED_RMS
