"""The packed bytes land where a kernel's threads read them: a numpy model of the WGMMA operand.

Nothing here uses the packer's own index arithmetic. The model reads a record as a thread does (two
16-byte loads, and its scales), decodes as a thread does (mask, PRMT, shifts, signs), and puts the
four bytes of each register where PTX says that matrix A of wgmma.m64nNk32 has them.
"""

from collections.abc import Callable

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_w4moe as w4
from jax_w4moe.formats import formats
from jax_w4moe.formats.layout import record_bytes
from tests.helpers import data
from tests.helpers.oracle import DEQUANTIZE, E2M1, dequantize_mxfp4


def _prmt(table: bytes, selector: int) -> bytes:
    """PTX prmt.b32 in its default mode for selectors without the sign bit: four table look-ups."""
    return bytes(table[selector >> 4 * i & 7] for i in range(4))


def _table(index: int) -> bytes:
    """The kernel's 8-byte table of a group: E4M3 of the eight magnitudes times 2**(index - 9)."""
    values = E2M1[:8] * 2.0 ** (index - 9) if index else np.zeros(8)
    return values.astype(ml_dtypes.float8_e4m3fn).tobytes()


def _decode_mxfp4(code: int, scale_word: int, quad: int) -> list[int]:
    """A word's two registers, for lane ``quad`` of four."""
    table = _table((scale_word >> 4 * quad & 0x78) // 8)
    select = code & 0x77777777
    first = int.from_bytes(_prmt(table, select), "little") | code & 0x80808080
    second = int.from_bytes(_prmt(table, select >> 16), "little") | code << 4 & 0x80808080
    return [first, second]


def _decode_mxfp4_wide(code: int, _scale_word: int, quad: int) -> list[int]:
    """With the table of the magnitudes themselves."""
    return _decode_mxfp4(code, 9 * 8 << 4 * quad, quad)


def _e8m0_scales(words: np.ndarray) -> np.ndarray:
    """A word of four bytes, one for each instruction."""
    return words.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)


def _e4m3_scales(words: np.ndarray) -> np.ndarray:
    """Eight bytes, one for each half of an instruction, times the third word's f32."""
    own = words[:2].view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return own * words[2:].view(np.float32)


def _decode_int4(code: int, _scale_word: int, _quad: int) -> list[int]:
    return [
        (half & 0x0E0E0E0E) + (half & 0x01010101) * 0x82 & 0xFFFFFFFF for half in (code, code >> 4)
    ]


def _masked_scales(mask: int) -> Callable[[np.ndarray], np.ndarray]:
    """A scale word's f32, for all instructions."""
    return lambda words: np.repeat((words & np.uint32(mask)).view(np.float32), 4)


def _bf16_scales(words: np.ndarray) -> np.ndarray:
    """Two words of two bf16 each, one for each instruction."""
    return words.view(ml_dtypes.bfloat16).astype(np.float32)


def _by_lane(j: np.ndarray, h: np.ndarray, t: np.ndarray, b: np.ndarray) -> np.ndarray:
    return 32 * t + 8 * j + 4 * h + b


def _in_order(j: np.ndarray, h: np.ndarray, t: np.ndarray, b: np.ndarray) -> np.ndarray:
    return 32 * j + 16 * h + 4 * t + b


# What the kernel of each format does: decode codes, take the f32 scale of each of four instructions
# from a row's words, and the k of instruction j, half h, quad lane t, byte b.
KERNELS = {
    "mxfp4": (_decode_mxfp4, _masked_scales(0x7F800000), _by_lane),
    "mxfp4_wide": (_decode_mxfp4_wide, _e8m0_scales, _in_order),
    "nvfp4": (_decode_mxfp4_wide, _e4m3_scales, _in_order),
    "int4_g128": (_decode_int4, _masked_scales(0xFFFFFFFF), _by_lane),
    "int4_g32": (_decode_int4, _bf16_scales, _in_order),
}


def _registers(
    record: bytes, thread: int, format: w4.WeightFormat
) -> tuple[np.ndarray, list[np.ndarray]]:
    """What thread 0..127 of a warpgroup holds: A registers [4 instructions, 4 registers, 4 bytes]
    as E4M3 bytes, and the f32 scales of its rows g and g + 8, by instruction or half of one."""
    warp, lane = divmod(thread, 32)
    group, quad = divmod(lane, 4)
    decode, scales, _ = KERNELS[format.name]
    words = np.frombuffer(record, np.uint32)
    plane0 = words[thread * 4 : thread * 4 + 4]
    plane1 = words[(2048 + thread * 16) // 4 :][:4]
    codes = [int(c) for c in (*plane0, *plane1)]
    each = format.scale_words
    first = 4096 // 4 + (8 * warp + group) * 2 * each
    scale_words = [words[first : first + each], words[first + each : first + 2 * each]]
    registers = np.zeros((4, 4), np.uint32)
    for instruction in range(4):
        for high in range(2):
            code = codes[2 * instruction + high]
            registers[instruction, high::2] = decode(code, int(scale_words[high][0]), quad)
    return registers.view(np.uint8).reshape(4, 4, 4), [scales(w) for w in scale_words]


def _weights(record: bytes, format: w4.WeightFormat = w4.MXFP4) -> np.ndarray:
    """The 64 x 128 weights in logical K order: operands times scales."""
    matrix, scales = np.full((64, 128), np.nan), np.full((64, 8), np.nan)
    for thread in range(128):
        registers, row_scales = _registers(record, thread, format)
        values = registers.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        warp, lane = divmod(thread, 32)
        group, quad = divmod(lane, 4)
        for instruction in range(4):
            for register in range(4):
                # PTX: row = group + 8 for odd registers, column = 4 * quad + byte + 16 from 2 on.
                row = 16 * warp + group + 8 * (register % 2)
                column = 32 * instruction + 4 * quad + 16 * (register // 2)
                matrix[row, column : column + 4] = values[instruction, register]
        low, high = (np.repeat(s, 8 // len(s)) for s in row_scales)
        scales[16 * warp + group], scales[16 * warp + group + 8] = low, high
    logical = np.empty_like(matrix)
    logical[:, _logical_k(format)] = matrix * np.repeat(scales, 16, axis=1)
    return logical


def _logical_k(format: w4.WeightFormat) -> np.ndarray:
    """The k of every hardware position (instruction j, half h, quad lane t, byte b)."""
    position = np.arange(128)
    digits = position // 32, position // 16 % 2, position // 4 % 4, position % 4
    return KERNELS[format.name][2](*digits)


@pytest.mark.parametrize("format", formats(), ids=lambda f: f.name)
def test_every_thread_decodes_its_fragment(
    rng: np.random.Generator, format: w4.WeightFormat
) -> None:
    """Every code occurs, and every weight is exact in float64."""
    q = data.quantized(rng, (2, 128, 256), format, low=100, high=115)
    codes, scales = np.asarray(q.codes), np.asarray(q.scales)
    expected = DEQUANTIZE[format.name](codes, scales)
    assert set((codes & 15).flat) == set(range(16))
    records = np.asarray(w4.pack(q).data)
    assert records.shape == (2, 2, 2, record_bytes(format.scale_words))
    for expert, block, k_block in np.ndindex(2, 2, 2):
        record = records[expert, block, k_block].tobytes()
        part = expected[expert, 64 * block : 64 * block + 64, 128 * k_block : 128 * k_block + 128]
        np.testing.assert_array_equal(_weights(record, format), part)


def test_one_scale_group_is_one_lane_or_one_instruction() -> None:
    """The reason for the K orders: codes that share a scale meet."""
    position = np.arange(128)
    assert (_logical_k(w4.MXFP4) // 32 == position // 4 % 4).all()
    for format in (w4.INT4_G32, w4.MXFP4_WIDE):
        assert (_logical_k(format) // 32 == position // 32).all()


def test_gate_and_up_meet_in_one_thread(rng: np.random.Generator) -> None:
    """Rows g and g + 8 of a warp are gate j and up j: the activation needs no shuffle."""
    intermediate = 160  # pads to 256
    q = data.quantized(rng, (1, 2 * intermediate, 128))
    expected = dequantize_mxfp4(np.asarray(q.codes), np.asarray(q.scales))[0]
    records = np.asarray(w4.pack(q, row_order="gate_up").data)[0]
    assert records.shape[:2] == (8, 1)
    for block in range(8):
        logical = _weights(records[block, 0].tobytes())
        for warp, group in np.ndindex(4, 8):
            j = 32 * block + 8 * warp + group
            gate, up = logical[16 * warp + group], logical[16 * warp + group + 8]
            if j < intermediate:
                np.testing.assert_array_equal(gate, expected[j])
                np.testing.assert_array_equal(up, expected[intermediate + j])
            else:
                assert not gate.any() and not up.any()


def test_loads_are_free_of_bank_conflicts() -> None:
    """A quarter-warp's 16-byte loads, and a warp's 8-byte ones, touch each of 32 banks once."""
    for quarter in range(4):
        lanes = range(8 * quarter, 8 * quarter + 8)
        banks = [(lane * 16 // 4 + word) % 32 for lane in lanes for word in range(4)]
        assert sorted(banks) == list(range(32))
    for warp in range(4):
        addresses = {4096 + (8 * warp + lane // 4) * 8 for lane in range(32)}
        banks = [(a // 4 + word) % 32 for a in addresses for word in range(2)]
        assert len(banks) == len(set(banks)) == 16


@pytest.mark.parametrize("format", formats(), ids=lambda f: f.name)
def test_a_record_of_zero_bytes_is_a_record_of_zero_weights(format: w4.WeightFormat) -> None:
    """So that padding and sharding may append zeros."""
    q = w4.QuantizedTensor(
        jnp.zeros((1, 64, 64), jnp.uint8),
        jnp.full((1, 64, format.num_scales(128)), 127, format.scale_dtype),
        format,
    )
    assert not np.asarray(w4.pack(q).data).any()
