"""Packing is exact, jittable, shardable, and refuses what it cannot hold. For every format."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_w4moe as w4
from jax_w4moe.formats import formats
from jax_w4moe.formats.layout import round_up
from tests.helpers import data
from tests.helpers.compare import assert_bitwise
from tests.helpers.oracle import dequantize_mxfp4

every_format = pytest.mark.parametrize("format", formats(), ids=lambda f: f.name)
SIZES = [(32, 32), (64, 128), (96, 32), (32, 96), (192, 256), (320, 160), (2880, 2880)]


def _all_scale_bytes(q: w4.QuantizedTensor) -> w4.QuantizedTensor:
    """Scales that run through every byte 0..254, at most 14 apart within 128 of K."""
    num_experts, rows, groups = q.scales.shape
    blocks = -(-groups // 4)
    start = np.arange(num_experts * rows * blocks).reshape(num_experts, rows, blocks) * 7 % 241
    offsets = np.array([0, 14, 5, 9])
    scales = (start[..., None] + offsets).reshape(num_experts, rows, -1)[..., :groups]
    return dataclasses.replace(q, scales=jnp.asarray(scales, jnp.uint8))


@every_format
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_unpack_is_the_exact_inverse(
    rng: np.random.Generator, format: w4.WeightFormat, size: tuple[int, int]
) -> None:
    num_experts = 1 if size[0] > 1000 else 3
    size = (size[0], round_up(size[1], format.group_size))
    q = data.quantized(rng, (num_experts, *size), format)
    if format == w4.MXFP4:
        q = _all_scale_bytes(q)
        if q.scales.size > 4 * 241:
            assert set(np.asarray(q.scales).flat) == set(range(255))
    packed = w4.pack(q)
    assert packed.shape == (num_experts, *size)
    assert not np.asarray(packed.inexact_groups).any()
    restored = w4.unpack(packed)
    assert_bitwise(restored.codes, q.codes)
    assert_bitwise(restored.scales, q.scales)
    if size[0] % 64 == 0:
        restored = w4.unpack(w4.pack(q, row_order="gate_up"))
        assert_bitwise(restored.codes, q.codes)
        assert_bitwise(restored.scales, q.scales)


def test_all_codes_of_a_group_by_all_scales() -> None:
    """Every (code, E8M0 byte 0..254) pair, alone in its row with nothing beside it."""
    pairs = np.arange(16 * 256)
    codes = np.repeat(pairs % 16 * 17, 16).astype(np.uint8).reshape(1, -1, 16)
    scales = np.minimum(pairs // 16, 254).astype(np.uint8).reshape(1, -1, 1)
    q = w4.QuantizedTensor(jnp.asarray(codes), jnp.asarray(scales), w4.MXFP4)
    restored = w4.unpack(w4.pack(q))
    assert_bitwise(restored.codes, q.codes)
    zero = (codes[..., :1] & 7) == 0
    assert_bitwise(restored.scales, np.where(zero, 127, scales).astype(np.uint8))


@every_format
def test_pack_experts_round_trip(rng: np.random.Generator, format: w4.WeightFormat) -> None:
    hidden, intermediate = (round_up(size, format.group_size) for size in (96, 160))
    weights = data.expert_weights(rng, 3, hidden, intermediate, bias=True, format=format)
    experts = w4.pack_experts(weights)
    assert experts.w13.shape == (3, 2 * intermediate, hidden)
    assert experts.w2.shape == (3, hidden, intermediate)
    restored = w4.unpack_experts(experts)
    assert weights.w13_bias is not None and weights.w2_bias is not None
    assert_bitwise(restored.w13.codes, weights.w13.codes)
    assert_bitwise(restored.w2.scales, weights.w2.scales)
    assert_bitwise(restored.w13_bias, weights.w13_bias.astype(jnp.float32))
    assert_bitwise(restored.w2_bias, weights.w2_bias.astype(jnp.float32))
    # One K-block of w2 (128 of I) belongs to four row blocks of w13: TP can cut both alike.
    assert experts.w13.data.shape[1] == 4 * experts.w2.data.shape[2]


def test_jit_packs_the_same_bytes(rng: np.random.Generator) -> None:
    weights = data.expert_weights(rng, 2, 96, 64, bias=True)
    eager, jitted = w4.pack_experts(weights), jax.jit(w4.pack_experts)(weights)
    assert jax.tree.structure(eager) == jax.tree.structure(jitted)
    jax.tree.map(assert_bitwise, eager, jitted)


def test_other_dtypes_pack_to_the_same_bytes(rng: np.random.Generator) -> None:
    q = data.quantized(rng, (2, 64, 128))
    nibbles = jnp.stack([q.codes & 15, q.codes >> 4], axis=-1).reshape(2, 64, 128)
    codes = jax.lax.bitcast_convert_type(
        jnp.stack([nibbles[..., ::2], nibbles[..., 1::2]], -1).astype(jnp.uint4), jnp.uint8
    )
    fp4 = jax.lax.bitcast_convert_type(codes, jnp.float4_e2m1fn).reshape(2, 64, 128)
    e8m0 = jax.lax.bitcast_convert_type(q.scales, jnp.float8_e8m0fnu)
    expected = w4.pack(q).data
    assert_bitwise(w4.pack(w4.QuantizedTensor(fp4, e8m0, w4.MXFP4)).data, expected)
    f32 = e8m0.astype(jnp.float32)
    assert_bitwise(w4.pack(w4.QuantizedTensor(q.codes, f32, w4.MXFP4)).data, expected)


def test_dequantize_experts_is_exact(rng: np.random.Generator) -> None:
    weights = data.expert_weights(rng, 2, 64, 32)
    w_gate, w_up, w_down = w4.dequantize_experts(weights)
    w13 = dequantize_mxfp4(np.asarray(weights.w13.codes), np.asarray(weights.w13.scales))
    w2 = dequantize_mxfp4(np.asarray(weights.w2.codes), np.asarray(weights.w2.scales))
    assert_bitwise(w_gate, w13[:, :32].astype(np.float32))
    assert_bitwise(w_up, w13[:, 32:].astype(np.float32))
    assert_bitwise(w_down, w2.astype(np.float32))


def test_quantize_then_dequantize_is_idempotent(rng: np.random.Generator) -> None:
    kernels = [
        jnp.asarray(rng.standard_normal(s), jnp.float32)
        for s in ((2, 32, 64), (2, 32, 64), (2, 64, 32))
    ]
    once = w4.dequantize_experts(w4.quantize_experts(*kernels))
    twice = w4.dequantize_experts(w4.quantize_experts(*once))
    jax.tree.map(assert_bitwise, once, twice)


@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P(None, None, "x")], ids=str)
def test_packed_arrays_shard_on_their_block_axes(rng: np.random.Generator, spec: P) -> None:
    """Each block axis can be cut; a shard is what packing that part of the weights gives."""
    q = data.quantized(rng, (4, 256, 512))
    packed = w4.pack(q)
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    sharded = jax.device_put(packed.data, NamedSharding(mesh, spec))
    cut = len(spec) - 1
    for shard in sharded.addressable_shards:
        part = shard.index[cut]
        scale = (1, 64, 64)[cut]  # experts, rows, bytes of codes along K
        codes = [slice(None)] * 3
        codes[cut] = slice(part.start * scale, part.stop * scale)
        scales = list(codes)
        if cut == 2:
            scales[2] = slice(part.start * 4, part.stop * 4)
        local = w4.QuantizedTensor(q.codes[tuple(codes)], q.scales[tuple(scales)], w4.MXFP4)
        assert_bitwise(shard.data, w4.pack(local).data)


def test_inexact_scales_are_refused_eagerly_and_counted_under_jit(
    rng: np.random.Generator,
) -> None:
    q = data.quantized(rng, (3, 64, 256), low=120, high=121)
    codes = q.codes.at[1, 7].set(0x11)
    wide = dataclasses.replace(q, codes=codes, scales=q.scales.at[1, 7, 5].set(105))
    sentence = (
        r"weights: 1 scale groups cannot be packed exactly; the first is in expert 1, row 7, k"
        r" from 128: the E8M0 scale bytes of its groups are \[120, 105, 120, 120\], a spread over"
    )
    with pytest.raises(ValueError, match=sentence):
        w4.pack(wide)
    assert np.asarray(jax.jit(w4.pack)(wide).inexact_groups).tolist() == [0, 1, 0]
    nan = dataclasses.replace(q, codes=codes, scales=q.scales.at[1, 7, 5].set(255))
    with pytest.raises(
        ValueError, match=r"expert 1, row 7, k from 128: a scale is NaN \(E8M0 byte"
    ):
        w4.pack(nan)
    thirds = q.scales.astype(jnp.float32) * 0 + 3.0
    with pytest.raises(ValueError, match="or no power of two"):
        w4.pack(dataclasses.replace(q, scales=thirds))


def test_a_spread_of_exactly_14_is_legal(rng: np.random.Generator) -> None:
    q = data.quantized(rng, (1, 32, 128), low=120, high=121)
    q = dataclasses.replace(q, codes=q.codes | 1, scales=q.scales.at[..., 0].set(106))
    restored = w4.unpack(w4.pack(q))
    assert_bitwise(restored.scales, q.scales)


def _bad(**changes: object) -> w4.QuantizedTensor:
    q = w4.QuantizedTensor(
        jnp.zeros((2, 32, 32), jnp.uint8), jnp.full((2, 32, 2), 127, jnp.uint8), w4.MXFP4
    )
    return dataclasses.replace(q, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("q", "error", "sentence"),
    [
        (
            _bad(codes=jnp.zeros((32, 32), jnp.uint8)),
            ValueError,
            r"weights.codes: shape \(32, 32\) has rank 2, need u8\[E, N, K/2\]; reshape it",
        ),
        (
            _bad(codes=jnp.zeros((2, 32, 32), jnp.int32)),
            TypeError,
            r"weights.codes: dtype int32, need uint8 .* view the bytes as uint8",
        ),
        (
            _bad(codes=jnp.zeros((2, 33, 32), jnp.uint8)),
            ValueError,
            r"weights: N=33 is not a positive multiple of 32; zero-pad it to 64",
        ),
        (
            _bad(codes=jnp.zeros((2, 32, 24), jnp.uint8)),
            ValueError,
            r"weights: K=48 is not a positive multiple of 32; zero-pad it to 64",
        ),
        (
            _bad(scales=jnp.zeros((2, 32, 1), jnp.uint8)),
            ValueError,
            r"weights.scales: shape \(2, 32, 1\), need \(2, 32, 2\): one scale per 32 of K=64",
        ),
        (_bad(scales=jnp.zeros((2, 32, 2), jnp.int8)), TypeError, "scales: dtype int8 does not"),
        (_bad(codes=jnp.zeros((0, 32, 32), jnp.uint8)), ValueError, r"E=0 is not in 1\.\.1024"),
        (_bad(format="mxfp4"), TypeError, "weights.format: got 'mxfp4', need a WeightFormat"),
    ],
)
def test_pack_refuses(q: w4.QuantizedTensor, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        w4.pack(q)


def test_gate_up_needs_two_halves() -> None:
    with pytest.raises(ValueError, match="N=32 cannot be two halves of a multiple of 32 rows"):
        w4.pack(_bad(), row_order="gate_up")


def test_pack_experts_refuses_what_does_not_fit(rng: np.random.Generator) -> None:
    weights = data.expert_weights(rng, 2, 64, 32, bias=True)
    other = data.expert_weights(rng, 3, 64, 32)
    with pytest.raises(ValueError, match="w13 has E=2 experts and w2 has E=3; both must hold"):
        w4.pack_experts(dataclasses.replace(weights, w2=other.w2))
    wide = data.expert_weights(rng, 2, 96, 32)
    with pytest.raises(ValueError, match=r"need w13 \[E, 2I, H\]"):
        w4.pack_experts(dataclasses.replace(weights, w2=wide.w2))
    with pytest.raises(ValueError, match=r"w13_bias: shape \(2, 32\), need \(2, 64\)"):
        w4.pack_experts(dataclasses.replace(weights, w13_bias=jnp.zeros((2, 32))))
    with pytest.raises(TypeError, match="w2_bias: dtype int32 is not floating point"):
        w4.pack_experts(dataclasses.replace(weights, w2_bias=jnp.zeros((2, 64), jnp.int32)))


def test_unpack_refuses_another_layout_version(rng: np.random.Generator) -> None:
    packed = w4.pack(data.quantized(rng, (1, 32, 32)))
    with pytest.raises(ValueError, match="packed with layout version 99, this library reads"):
        w4.unpack(dataclasses.replace(packed, layout_version=99))


def test_quantize_experts_refuses() -> None:
    kernel = jnp.ones((2, 32, 64))
    with pytest.raises(ValueError, match=r"w_down: shape \(2, 32, 64\), need \(2, 64, 32\)"):
        w4.quantize_experts(kernel, kernel, kernel)
    with pytest.raises(ValueError, match="intermediate_size I=20 is not a positive multiple of 32"):
        w4.quantize_experts(kernel[:, :20], kernel[:, :20], jnp.ones((2, 64, 20)))
    with pytest.raises(TypeError, match="w_gate: dtype int32 is not floating point"):
        w4.quantize_experts(kernel.astype(jnp.int32), kernel, kernel)
