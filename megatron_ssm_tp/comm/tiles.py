"""The codes of codes.py in Triton: functions on tiles [BLOCKS, BLOCK_SIZE], for any kernel that moves payloads.

The format "bf16" has 16-bit codes, which are the values' own bits, and scales that nobody reads.

They compute what codes.py computes, bit for bit where fused multiply-add is off (launch with enable_fp_fusion=False).
A tile of ordinary blocks skips what NaN and Inf need: one reduction over the tile's scales decides.

Conversions are written out in integers: they are exact on every GPU (fp8 needs no sm_89) and in Triton's interpreter,
whose own do not round to nearest even.
"""

import triton
import triton.language as tl

from .codes import SMALLEST_SCALE, limits, steps

# Triton's functions see globals only if they are constexpr.
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
_INF_BITS = tl.constexpr(0x7F800000)
_STEPS = {name: steps(name) for name in ("int8", "fp8", "int4")}
_INT8_STEP, _INT8_SPECIAL_STEP = (tl.constexpr(step) for step in _STEPS["int8"])
_FP8_STEP, _FP8_SPECIAL_STEP = (tl.constexpr(step) for step in _STEPS["fp8"])
_INT4_STEP, _INT4_SPECIAL_STEP = (tl.constexpr(step) for step in _STEPS["int4"])
_INT8_LIMIT, _FP8_LIMIT, _INT4_LIMIT = (tl.constexpr(limits(name)[0]) for name in ("int8", "fp8", "int4"))
# Added to a small float32, these leave it, rounded to a multiple of 1 or of 2^-9, in the low bits of the mantissa.
_ROUND_TO_1 = tl.constexpr(1.5 * 2.0**23)
_ROUND_TO_FP8_SUBNORMAL = tl.constexpr(2.0**14)


@triton.jit
def addresses(blocks, row_length, row_stride, CONTIGUOUS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Each value's place in the flattened tensor and in memory, int64 [BLOCKS, BLOCK_SIZE]."""
    places = blocks[:, None].to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    if CONTIGUOUS:
        return places, places
    else:
        return places, places // row_length * row_stride + places % row_length


@triton.jit
def encode_tile(values, FORMAT: tl.constexpr):
    """values float32 [BLOCKS, BLOCK_SIZE] -> codes uint8 [BLOCKS, BLOCK_SIZE] (int4: half as wide), scales [BLOCKS]."""
    if FORMAT == "bf16":
        return values.to(tl.bfloat16).to(tl.int16, bitcast=True), tl.zeros((values.shape[0],), tl.float32)
    else:
        return _encode_in_blocks(values, FORMAT)


@triton.jit
def _encode_in_blocks(values, FORMAT: tl.constexpr):
    magnitudes = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # floats of one sign are ordered as integers
    largest = tl.max(magnitudes, axis=1)
    special = largest >= _INF_BITS
    any_special = tl.max(largest, axis=0) >= _INF_BITS
    if any_special:
        largest = tl.max(tl.where(magnitudes < _INF_BITS, magnitudes, 0), axis=1)
    scales = tl.maximum(largest.to(tl.float32, bitcast=True) * _step(special, FORMAT), _SMALLEST_SCALE)
    codes = _to_bits(values * tl.div_rn(1.0, scales)[:, None], FORMAT)
    if any_special:
        codes = _set_aside(codes, values, magnitudes, FORMAT)
        scales = tl.where(special, -scales, scales)
    if FORMAT == "int4":
        even, odd = tl.split(codes.reshape(codes.shape[0], codes.shape[1] // 2, 2))
        codes = even & 0xF | (odd & 0xF) << 4
    return codes.to(tl.uint8), scales


@triton.jit
def decode_tile(codes, scales, FORMAT: tl.constexpr):
    """codes and scales of `encode_tile` -> values float32 [BLOCKS, BLOCK_SIZE]."""
    if FORMAT == "bf16":
        return (codes.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return _decode_in_blocks(codes, scales, FORMAT)


@triton.jit
def _decode_in_blocks(codes, scales, FORMAT: tl.constexpr):
    units, limit = _from_bits(codes, FORMAT)
    values = units * tl.abs(scales)[:, None]
    if tl.min(scales, axis=0) < 0:
        magnitudes = tl.abs(units)
        aside = (scales < 0)[:, None] & (magnitudes >= limit)
        values = tl.where(aside, tl.where(magnitudes > limit, float("nan"), units * float("inf")), values)
    return values


@triton.jit
def _step(special, FORMAT: tl.constexpr):
    if FORMAT == "int8":
        return tl.where(special, _INT8_SPECIAL_STEP, _INT8_STEP)
    elif FORMAT == "fp8":
        return tl.where(special, _FP8_SPECIAL_STEP, _FP8_STEP)
    else:
        return tl.where(special, _INT4_SPECIAL_STEP, _INT4_STEP)


@triton.jit
def _to_bits(units, FORMAT: tl.constexpr):
    """Code bits, int32, of values in units of their scale; of int8 and int4 the bits above the code are garbage."""
    if FORMAT == "fp8":
        bits = units.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        # to 3 bits of mantissa, half to even, and from exponent bias 127 to 7: 120 << 23 less
        normal = (magnitude + (0x7FFFF - (120 << 23)) + ((magnitude >> 20) & 1)) >> 20
        subnormal = (tl.abs(units) + _ROUND_TO_FP8_SUBNORMAL).to(tl.int32, bitcast=True) & 0xF
        return tl.where(magnitude < (121 << 23), subnormal, normal) | ((bits >> 24) & 0x80)
    else:
        return (units + _ROUND_TO_1).to(tl.int32, bitcast=True) & 0xFF


@triton.jit
def _set_aside(codes, values, magnitudes, FORMAT: tl.constexpr):
    """The codes with those of NaN and Inf in their places."""
    negative = values.to(tl.int32, bitcast=True) < 0
    if FORMAT == "int8":
        inf, nan = tl.where(negative, -127, 127), -128
    elif FORMAT == "fp8":
        inf, nan = tl.where(negative, 0xFE, 0x7E), 0x7F
    else:
        inf, nan = tl.where(negative, -7, 7), -8
    return tl.where(magnitudes < _INF_BITS, codes, tl.where(magnitudes == _INF_BITS, inf, nan))


@triton.jit
def _from_bits(codes, FORMAT: tl.constexpr):
    """Codes as float32, and the format's largest."""
    if FORMAT == "int8":
        # code + 2^23 + 128, as bits: the conversion instruction is four times slower
        shifted = (codes.to(tl.int32) ^ 0x80) | 0x4B000000
        return shifted.to(tl.float32, bitcast=True) - 8388736.0, _INT8_LIMIT
    elif FORMAT == "fp8":
        bits = codes.to(tl.int32)
        bits = (bits & 0x80) << 24 | (bits & 0x7F) << 20
        # Subnormals of e4m3 are subnormals of float32 here, which Triton does not flush. NaN comes out as 480.
        return bits.to(tl.float32, bitcast=True) * 2.0**120, _FP8_LIMIT
    else:
        bits = tl.join(codes & 0xF, codes >> 4).reshape(codes.shape[0], codes.shape[1] * 2)
        # As for int8. Where 8 is subtracted from an integer, LLVM packs two in a word, and ptxas (of CUDA 12.8) makes
        # 0 of the constant of such an addition where one half is not used: codes would come out 8 too large.
        shifted = (bits.to(tl.int32) ^ 8) | 0x4B000000
        return shifted.to(tl.float32, bitcast=True) - 8388616.0, _INT4_LIMIT
