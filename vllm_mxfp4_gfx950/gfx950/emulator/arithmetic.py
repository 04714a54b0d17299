"""What gfx950's arithmetic instructions compute, as functions on arrays of any shape.

VECTOR and SCALAR are the instruction set: for each mnemonic the types of its results, the types of its
operands, and the function between them. Rounding is to nearest even and denormals are kept, as
Triton's kernels ask for in their descriptor.

Source: AMD, "CDNA3" and "CDNA4" Instruction Set Architecture reference guides. The transcendental
instructions are correctly rounded here; hardware is allowed one unit in the last place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = Any
"""A NumPy array of any shape, or a number that stands for all of its elements."""

MIN_NORMAL = np.float32(2.0**-126)
QUIET = np.uint32(0x400000)
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Op:
    """One instruction's meaning.

    Args:
        results, operands: types: u16 i16 u32 i32 f32 u64 (a register pair), f32x2 (a pair of floats),
            mask (one bit per lane, in a pair of scalar registers), scc (a scalar condition), k16 (a
            constant of 16 bits with a sign, written without it).
        function: takes the operands as arrays and returns the result, or a tuple of them.
        modifiers: names of modifiers of which the function gets the values, as keywords.
    """

    results: tuple[str, ...]
    operands: tuple[str, ...]
    function: Callable[..., Any]
    modifiers: tuple[str, ...] = ()


def op(types: str, function: Callable[..., Any], *modifiers: str) -> Op:
    """An Op from "result result = operand operand"."""
    results, _, operands = types.partition("=")
    return Op(tuple(results.split()), tuple(operands.split()), function, modifiers)


# --- integers -------------------------------------------------------------------------------------


def shift_left(count: Array, x: Array) -> Array:
    """x << count, of whose bits only as many count as the width of x needs."""
    return x << (count.astype(x.dtype) & x.dtype.type(8 * x.itemsize - 1))


def shift_right(count: Array, x: Array) -> Array:
    """x >> count, with the sign where x has one."""
    return x >> (count.astype(x.dtype) & x.dtype.type(8 * x.itemsize - 1))


def bit_field(x: Array, offset: Array, width: Array) -> Array:
    """`width` bits of x from bit `offset` on, extended with the sign where x has one."""
    offset, width = offset & 31, np.minimum(width, 32)
    wide = x.astype(np.int64) >> offset.astype(np.int64)
    bits = wide & ((np.int64(1) << width.astype(np.int64)) - 1)
    if x.dtype == np.int32:
        sign = np.where(width > 0, np.int64(1) << (np.maximum(width, 1).astype(np.int64) - 1), 0)
        bits = (bits ^ sign) - sign
    return bits.astype(x.dtype)


def scalar_bit_field(x: Array, field: Array) -> Array:
    """The same with offset (bits 4:0) and width (bits 22:16) in one operand."""
    return bit_field(x, field & 31, (field >> 16) & 127)


def multiply_high(a: Array, b: Array) -> Array:
    """Upper half of the 64-bit product."""
    wide = np.int64 if a.dtype == np.int32 else np.uint64
    return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)


def multiply_add_64(a: Array, b: Array, c: Array) -> tuple[Array, Array]:
    """a * b + c in 64 bits, and whether it carried out."""
    product = a.astype(np.uint64) * b.astype(np.uint64)
    total = product + c
    return total, total < product


def multiply_add_signed_64(a: Array, b: Array, c: Array) -> tuple[Array, Array]:
    """a * b + c of signed numbers in 64 bits, and whether the sign is wrong."""
    product, addend = a.astype(np.int64) * b.astype(np.int64), c.astype(np.int64)
    total = product + addend
    return total.astype(np.uint64), ((product ^ total) & (addend ^ total)) < 0


def multiply_24(a: Array, b: Array) -> Array:
    """Product of the low 24 bits."""
    return (a & 0xFFFFFF) * (b & 0xFFFFFF)


def multiply_signed_24(a: Array, b: Array) -> Array:
    """The low 32 bits of the product of two signed numbers' low 24 bits."""
    return (a << 8 >> 8) * (b << 8 >> 8)


def align_bit(high: Array, low: Array, count: Array) -> Array:
    """32 bits of high:low from bit `count` on."""
    pair = (high.astype(np.uint64) << np.uint64(32)) | low
    return (pair >> (count & 31).astype(np.uint64)).astype(np.uint32)


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """Each byte of the selector picks one of b's bytes (0 to 3), of a's (4 to 7), zero (12) or 255."""
    a, b, selector = np.broadcast_arrays(a, b, selector)
    out = np.zeros(selector.shape, np.uint32)
    pair = (a.astype(np.uint64) << np.uint64(32)) | b
    for position in range(4):
        pick = (selector >> np.uint32(8 * position)) & 255
        byte = (pair >> (8 * (pick & 7)).astype(np.uint64)) & np.uint64(255)
        sign_bit = np.select([pick == 8, pick == 9, pick == 10, pick == 11], [15, 31, 47, 63], 0)
        sign = np.where((pair >> sign_bit.astype(np.uint64)) & np.uint64(1), 255, 0)
        chosen = np.where(pick >= 13, 255, np.where(pick == 12, 0, np.where(pick >= 8, sign, byte)))
        out |= chosen.astype(np.uint32) << np.uint32(8 * position)
    return out


def bit_operation(a: Array, b: Array, c: Array, bitop3: str) -> Array:
    """Any function of three bits: bit 4a + 2b + c of the table is the result."""
    table = int(bitop3, 0)
    out = np.zeros(np.broadcast_shapes(np.shape(a), np.shape(b), np.shape(c)), a.dtype)
    for row in range(8):
        if table >> row & 1:
            out |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return out


def reverse_bits(x: Array) -> Array:
    """Bit 31 becomes bit 0."""
    for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0xFFFF)):
        x = ((x >> np.uint32(shift)) & np.uint32(mask)) | ((x & np.uint32(mask)) << np.uint32(shift))
    return x


def add_carry(a: Array, b: Array, carry: Array | None = None) -> tuple[Array, Array]:
    """a + b + carry, and the carry out."""
    wide = a.astype(np.uint64) + b + (0 if carry is None else carry.astype(np.uint64))
    return wide.astype(np.uint32), wide >> np.uint64(32) != 0


def subtract_borrow(a: Array, b: Array, borrow: Array) -> tuple[Array, Array]:
    """a - b - borrow, and the borrow out."""
    less = b.astype(np.uint64) + borrow.astype(np.uint64)
    return (a - less).astype(np.uint32), a < less


def subtract(a: Array, b: Array, clamp: str | None = None) -> Array:
    """a - b, not below zero when clamped."""
    return a - b if clamp is None else np.where(a < b, np.uint32(0), a - b)


def add_overflow(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b of signed numbers, and whether the sign is wrong."""
    wide = a.astype(np.int64) + b
    return wide.astype(np.int32), wide != wide.astype(np.int32)


def subtract_overflow(a: Array, b: Array) -> tuple[Array, Array]:
    """a - b of signed numbers, and whether the sign is wrong."""
    wide = a.astype(np.int64) - b
    return wide.astype(np.int32), wide != wide.astype(np.int32)


def nonzero(function: Callable[..., Any]) -> Callable[..., Any]:
    """A scalar function that also tells whether its result is not zero."""

    def both(*operands: Array) -> tuple[Array, Array]:
        result = function(*operands)
        return result, result != 0

    return both


def shift_add(count: int) -> Callable[[Array, Array], tuple[Array, Array]]:
    """(a << count) + b, and the carry out."""

    def add(a: Array, b: Array) -> tuple[Array, Array]:
        wide = (a.astype(np.uint64) << np.uint64(count)) + b
        return wide.astype(np.uint32), wide >> np.uint64(32) != 0

    return add


def absolute(x: Array) -> Array:
    """|x|; the smallest number stays what it is."""
    return np.where(x < 0, ~x.view(np.uint32) + np.uint32(1), x.view(np.uint32)).view(np.int32)


# --- floats ---------------------------------------------------------------------------------------


def bits(x: Array) -> Array:
    """A float's bits."""
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


def flush(x: Array) -> Array:
    """Denormals to zero of the same sign."""
    return np.where(np.abs(x) < MIN_NORMAL, np.copysign(np.float32(0), x), x)


def fma_wide(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in float64, so that one more rounding to float32 is the only one."""
    product = a.astype(np.float64) * b  # Exact: 24 bits times 24 bits.
    wide = product + c
    # What the sum lost decides a tie on the way to float32: keep it as an odd last bit.
    back = wide - product
    lost = (product - (wide - back)) + (c - back)
    raw = wide.view(np.int64)
    inexact = np.isfinite(wide) & (lost != 0) & (raw & 1 == 0)
    raw = raw + np.where(inexact, np.where((lost > 0) == (wide > 0), 1, -1), 0)
    return raw.view(np.float64)


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, rounded once."""
    return fma_wide(a, b, c).astype(np.float32)


def extreme(pick: Callable[..., Any], tie: Callable[..., Any]) -> Callable[[Array, Array], Array]:
    """Minimum or maximum: a number beats a quiet NaN, a signalling NaN beats all, -0 is below 0."""

    def choose(a: Array, b: Array) -> Array:
        a, b = np.broadcast_arrays(a, b)
        result = np.where(a == b, tie(bits(a), bits(b)).view(np.float32), pick(a, b))
        if np.isnan(a).any() or np.isnan(b).any():
            for x in (b, a):
                signals = np.isnan(x) & (bits(x) & QUIET == 0)
                result = np.where(signals, (bits(x) | QUIET).view(np.float32), result)
        return result

    return choose


minimum = extreme(np.fmin, np.bitwise_or)
maximum = extreme(np.fmax, np.bitwise_and)


def propagating(choose: Callable[..., Array]) -> Callable[..., Array]:
    """The minimum or maximum of three of which a NaN is the result."""

    def three(a: Array, b: Array, c: Array) -> Array:
        nan = np.isnan(a) | np.isnan(b) | np.isnan(c)
        return np.where(nan, np.float32(np.nan), choose(choose(a, b), c))

    return three


def median(a: Array, b: Array, c: Array) -> Array:
    """The middle one; the smallest number when one is NaN."""
    nan = np.isnan(a) | np.isnan(b) | np.isnan(c)
    middle = maximum(minimum(a, b), minimum(maximum(a, b), c))
    return np.where(nan, minimum(minimum(a, b), c), middle)


def scale_by_power(x: Array, exponent: Array) -> Array:
    """x * 2 ** exponent, rounded once."""
    # Float64 holds every product exactly but those that round to zero or infinity in float32 anyway.
    return np.ldexp(x.astype(np.float64), np.clip(exponent, -400, 400)).astype(np.float32)


def reciprocal(x: Array) -> Array:
    """1 / x without denormals."""
    return flush((1.0 / flush(x).astype(np.float64)).astype(np.float32))


def exponential(x: Array) -> Array:
    """2 ** x without denormals."""
    return flush(np.exp2(flush(x).astype(np.float64)).astype(np.float32))


def to_unsigned(x: Array) -> Array:
    """Towards zero, within uint32; NaN is 0."""
    return np.clip(np.nan_to_num(np.trunc(x.astype(np.float64)), nan=0.0), 0, 2**32 - 1).astype(np.uint32)


def exponent_of(x: Array) -> Array:
    """The biased exponent."""
    return ((bits(x) >> 23) & 255).astype(np.int32)


def division_scale(x: Array, denominator: Array, numerator: Array) -> tuple[Array, Array]:
    """One of the two, scaled so that the division's steps neither overflow nor lose bits.

    Returns:
        the scaled x, and whether v_div_fmas has to scale back.

    Source: AMD's emulation library (ROCm/rocm-systems, rocjitsu, division.h); the manual's text overflows
    where the denominator is huge and the quotient subnormal.
    """
    x, denominator, numerator = np.broadcast_arrays(x, denominator, numerator)
    is_denominator, is_numerator = bits(x) == bits(denominator), bits(x) == bits(numerator)
    exponent = exponent_of(denominator)
    more = exponent_of(numerator) - exponent
    up, down = scale_by_power(x, np.int32(64)), scale_by_power(x, np.int32(-64))
    cases: list[tuple[Array, Array, bool]] = [
        ((numerator == 0) | (denominator == 0), np.full_like(x, np.nan), False),
        (more >= 96, np.where(is_denominator, up, x), True),
        (exponent == 0, up, False),
        ((exponent >= 253) & (more <= -96), np.where(is_denominator, down, x), True),
        (exponent >= 253, down, False),
        (more <= -96, np.where(is_numerator, up, x), True),
        (exponent_of(numerator) <= 24, up, False),
    ]
    where = [case[0] for case in cases]
    scaled = np.select(where, [case[1] for case in cases], x).astype(np.float32)
    return scaled, np.select(where, [np.bool_(case[2]) for case in cases], np.False_).astype(bool)


def division_fma(a: Array, b: Array, c: Array, scaled: Array) -> Array:
    """a * b + c, brought back to where it was before v_div_scale: up for a large c, down for a small one."""
    power = np.where(scaled, np.where(exponent_of(c) > 127, 64, -64), 0)
    return np.ldexp(fma_wide(a, b, c), power).astype(np.float32)


def division_fixup(quotient: Array, denominator: Array, numerator: Array) -> Array:
    """The quotient, with the special cases of a division put right."""
    quotient, denominator, numerator = np.broadcast_arrays(quotient, denominator, numerator)
    negative = np.signbit(denominator) ^ np.signbit(numerator)
    sign = np.where(negative, np.float32(-1), np.float32(1))
    invalid = (denominator == 0) & (numerator == 0) | np.isinf(denominator) & np.isinf(numerator)
    result = np.select(
        [
            np.isnan(numerator),
            np.isnan(denominator),
            invalid,
            (denominator == 0) | np.isinf(numerator),
            np.isinf(denominator) | (numerator == 0),
            exponent_of(numerator) - exponent_of(denominator) < -150,
            ~np.isfinite(quotient),
        ],
        [
            (bits(numerator) | QUIET).view(np.float32),
            (bits(denominator) | QUIET).view(np.float32),
            np.uint32(0xFFC00000).view(np.float32),
            np.copysign(np.float32(np.inf), sign),
            np.copysign(np.float32(0), sign),
            np.copysign(np.float32(0), sign),
            np.copysign(np.float32(np.inf), sign),
        ],
        np.copysign(np.abs(quotient), sign),
    )
    return result.astype(np.float32)


def to_bf16(x: Array) -> Array:
    """Bits of the nearest bf16, ties to even; NaN stays NaN."""
    raw = bits(x)
    rounded = (raw + np.uint32(0x7FFF) + ((raw >> 16) & 1)) >> 16
    return np.where(np.isnan(x), (raw | QUIET) >> 16, rounded)


def pack_bf16(low: Array, high: Array) -> Array:
    """Two floats as bf16 in one register."""
    return to_bf16(low) | (to_bf16(high) << np.uint32(16))


def _fp4_table() -> Array:
    """uint32[256 E8M0 scales, 256 bytes]: a byte's two FP4 values, the low one first, as two bf16."""
    values = np.array([*FP4_VALUES, *(-value for value in FP4_VALUES)])
    scales = np.ldexp(1.0, np.arange(256) - 127)
    scales[255] = np.nan
    with np.errstate(over="ignore"):
        one = to_bf16((scales[:, None] * values).astype(np.float32))
    code = np.arange(256)
    table: Array = one[:, code & 15] | (one[:, code >> 4] << np.uint32(16))
    return table


FP4_TABLE = _fp4_table()


def fp4_to_bf16(packed: Array, scale: Array, op_sel: str | None = None) -> Array:
    """Two FP4 values of one byte, times the power of two in the scale's exponent, as two bf16."""
    low, high, _ = (int(digit) for digit in (op_sel or "[0,0,0]").strip("[]").split(","))
    byte = (packed >> np.uint32(8 * (low + 2 * high))) & np.uint32(255)
    exponent = (bits(scale) >> np.uint32(23)) & np.uint32(255)
    result: Array = FP4_TABLE.reshape(-1)[(exponent << np.uint32(8)) | byte]
    return result


def _narrow(exponent_bits: int, mantissa_bits: int) -> Array:
    """float64[1 << bits], the finite values of a small float's codes."""
    code = np.arange(1 << (1 + exponent_bits + mantissa_bits))
    mantissa = code & ((1 << mantissa_bits) - 1)
    exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1)
    normal = exponent > 0
    size = np.ldexp(
        (mantissa + (normal << mantissa_bits)).astype(np.float64),
        np.maximum(exponent, 1) - (1 << (exponent_bits - 1)) + 1 - mantissa_bits,
    )
    return np.where(code >> (exponent_bits + mantissa_bits), -size, size)


def _formats() -> dict[int, Array]:
    """float64[256, values] of a byte, by the number of its format; a byte's low FP4 first."""
    e4m3, e5m2, e2m1 = _narrow(4, 3), _narrow(5, 2), _narrow(2, 1)
    code = np.arange(256)
    e4m3[code & 127 == 127] = np.nan
    e5m2[code & 127 == 124] *= np.inf
    e5m2[code & 127 > 124] = np.nan
    return {E4M3: e4m3[:, None], E5M2: e5m2[:, None], E2M1: np.stack([e2m1[code & 15], e2m1[code >> 4]], 1)}


E4M3, E5M2, E2M1 = 0, 1, 4
"""Formats of the scaled matrix instructions' operands, as cbsz and blgp number them."""

FORMATS = _formats()
E8M0 = np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan)
"""float64[256], what a scale multiplies by."""


def to_e4m3(x: Array) -> Array:
    """Codes of the nearest e4m3, ties to even, as uint32; NaN where that is beyond 448."""
    exponent = np.where(x == 0, -6, np.maximum(np.frexp(x)[1] - 1, -6))
    with np.errstate(invalid="ignore"):
        code = (exponent + 6) * 8 + np.rint(np.ldexp(np.abs(x), 3 - exponent))
        code = np.where(code <= 126, code, 127)
    return code.astype(np.uint32) | (bits(x) >> np.uint32(24) & np.uint32(128))


def pack_e4m3(low: Array, high: Array, scale: Array) -> tuple[Array, Array]:
    """Two floats over the power of two in the scale's exponent, as e4m3 in half a register.

    Returns:
        the codes, and where a number is beyond 448.
    """
    power = np.ldexp(np.float64(1), 127 - exponent_of(scale))
    low, high = np.broadcast_arrays(low * power, high * power)
    first, second = to_e4m3(low), to_e4m3(high)
    overflows = (first & 127 == 127) & ~np.isnan(low) | (second & 127 == 127) & ~np.isnan(high)
    return first | second << np.uint32(8), overflows


def e4m3_to_f32(packed: Array, scale: Array, op_sel: str = "[0,0,0]") -> Array:
    """float32[2, ...], the two e4m3 in half a register, times the power of two in the scale's exponent."""
    half = packed >> np.uint32(16 * int(op_sel[1]))
    power = np.ldexp(np.float64(1), exponent_of(scale) - 127)
    values = FORMATS[E4M3][:, 0]
    return np.stack([values[half & 255] * power, values[half >> 8 & 255] * power]).astype(np.float32)


def identity(x: Array) -> Array:
    """x."""
    return x


def by_halves(function: Callable[..., Array]) -> Callable[..., Array]:
    """A function of 16 bits on both halves of registers; op_sel and op_sel_hi choose each operand's."""

    def packed(a: Array, b: Array, op_sel: str = "[0,0]", op_sel_hi: str = "[1,1]") -> Array:
        halves = []
        for chosen in (op_sel, op_sel_hi):
            upper = chosen.strip("[]").split(",")
            pair = [x >> np.uint32(16) if u == "1" else x for x, u in zip((a, b), upper, strict=True)]
            halves.append(function(*(x.astype(np.uint16) for x in pair)).astype(np.uint32))
        return halves[0] | halves[1] << np.uint32(16)

    return packed


def select(a: Array, b: Array, mask: Array) -> Array:
    """b where the mask is set, else a."""
    return np.where(mask, b, a)


# --- the instruction set --------------------------------------------------------------------------

U16, U32, I32, F32 = "u16 = u16 u16", "u32 = u32 u32", "i32 = i32 i32", "f32 = f32 f32"

VECTOR: dict[str, Op] = {
    "v_accvgpr_mov_b32": op("u32 = u32", identity),
    "v_accvgpr_read_b32": op("u32 = u32", identity),
    "v_accvgpr_write_b32": op("u32 = u32", identity),
    "v_add3_u32": op("u32 = u32 u32 u32", lambda a, b, c: a + b + c),
    "v_add_co_u32": op("u32 mask = u32 u32", add_carry),
    "v_add_f32": op(F32, np.add),
    "v_add_lshl_u32": op("u32 = u32 u32 u32", lambda a, b, c: shift_left(c, a + b)),
    "v_add_u16": op(U16, np.add),
    "v_add_u32": op(U32, np.add),
    "v_addc_co_u32": op("u32 mask = u32 u32 mask", add_carry),
    "v_alignbit_b32": op("u32 = u32 u32 u32", align_bit),
    "v_and_b32": op(U32, np.bitwise_and),
    "v_and_or_b32": op("u32 = u32 u32 u32", lambda a, b, c: a & b | c),
    "v_ashrrev_i32": op("i32 = u32 i32", shift_right),
    "v_bcnt_u32_b32": op(U32, lambda a, b: np.bitwise_count(a) + b),
    "v_bfe_i32": op("i32 = i32 u32 u32", lambda x, offset, width: bit_field(x, offset, width & 31)),
    "v_bfe_u32": op("u32 = u32 u32 u32", lambda x, offset, width: bit_field(x, offset, width & 31)),
    "v_bfi_b32": op("u32 = u32 u32 u32", lambda a, b, c: a & b | ~a & c),
    "v_bfrev_b32": op("u32 = u32", reverse_bits),
    "v_bitop3_b16": op("u16 = u16 u16 u16", bit_operation, "bitop3"),
    "v_bitop3_b32": op("u32 = u32 u32 u32", bit_operation, "bitop3"),
    "v_cndmask_b32": op("u32 = u32 u32 mask", select),
    "v_cvt_f32_i32": op("f32 = i32", lambda x: x.astype(np.float32)),
    "v_cvt_f32_u32": op("f32 = u32", lambda x: x.astype(np.float32)),
    "v_cvt_pk_bf16_f32": op("u32 = f32 f32", pack_bf16),
    "v_cvt_scalef32_pk_bf16_fp4": op("u32 = u32 f32", fp4_to_bf16, "op_sel"),
    "v_cvt_scalef32_pk_f32_fp8": op("f32x2 = u32 f32", e4m3_to_f32, "op_sel"),
    "v_cvt_u32_f32": op("u32 = f32", to_unsigned),
    "v_div_fixup_f32": op("f32 = f32 f32 f32", division_fixup),
    "v_div_fmas_f32": op("f32 = f32 f32 f32 mask", division_fma),
    "v_div_scale_f32": op("f32 mask = f32 f32 f32", division_scale),
    "v_exp_f32": op("f32 = f32", exponential),
    "v_fma_f32": op("f32 = f32 f32 f32", fma),
    "v_fmac_f32": op("f32 = f32 f32 f32", fma),
    "v_ldexp_f32": op("f32 = f32 i32", scale_by_power),
    "v_lshl_add_u32": op("u32 = u32 u32 u32", lambda a, b, c: shift_left(b, a) + c),
    "v_lshl_add_u64": op("u64 = u64 u32 u64", lambda a, b, c: shift_left(b, a) + c),
    "v_lshl_or_b32": op("u32 = u32 u32 u32", lambda a, b, c: shift_left(b, a) | c),
    "v_lshlrev_b16": op(U16, shift_left),
    "v_lshlrev_b32": op(U32, shift_left),
    "v_lshlrev_b64": op("u64 = u32 u64", shift_left),
    "v_lshrrev_b16": op(U16, shift_right),
    "v_lshrrev_b32": op(U32, shift_right),
    "v_lshrrev_b64": op("u64 = u32 u64", shift_right),
    "v_mad_i32_i24": op("i32 = i32 i32 i32", lambda a, b, c: multiply_signed_24(a, b) + c),
    "v_mad_i64_i32": op("u64 mask = i32 i32 u64", multiply_add_signed_64),
    "v_mad_u32_u24": op("u32 = u32 u32 u32", lambda a, b, c: multiply_24(a, b) + c),
    "v_mad_u64_u32": op("u64 mask = u32 u32 u64", multiply_add_64),
    "v_max3_f32": op("f32 = f32 f32 f32", lambda a, b, c: maximum(maximum(a, b), c)),
    "v_max3_u32": op("u32 = u32 u32 u32", lambda a, b, c: np.maximum(np.maximum(a, b), c)),
    "v_max_f32": op(F32, maximum),
    "v_max3_i32": op("i32 = i32 i32 i32", lambda a, b, c: np.maximum(np.maximum(a, b), c)),
    "v_max_i32": op(I32, np.maximum),
    "v_max_u16": op(U16, np.maximum),
    "v_max_u32": op(U32, np.maximum),
    "v_maximum3_f32": op("f32 = f32 f32 f32", propagating(maximum)),
    "v_med3_f32": op("f32 = f32 f32 f32", median),
    "v_min_f32": op(F32, minimum),
    "v_min_i32": op(I32, np.minimum),
    "v_min_u32": op(U32, np.minimum),
    "v_minimum3_f32": op("f32 = f32 f32 f32", propagating(minimum)),
    "v_mov_b32": op("u32 = u32", identity),
    "v_mov_b64": op("u64 = u64", identity),
    "v_mul_f32": op(F32, np.multiply),
    "v_mul_hi_i32": op(I32, multiply_high),
    "v_mul_hi_u32": op(U32, multiply_high),
    "v_mul_i32_i24": op(I32, multiply_signed_24),
    "v_mul_lo_u32": op(U32, np.multiply),
    "v_mul_u32_u24": op(U32, multiply_24),
    "v_not_b32": op("u32 = u32", np.invert),
    "v_or3_b32": op("u32 = u32 u32 u32", lambda a, b, c: a | b | c),
    "v_or_b32": op(U32, np.bitwise_or),
    "v_perm_b32": op("u32 = u32 u32 u32", permute_bytes),
    "v_pk_add_f32": op("f32x2 = f32x2 f32x2", np.add),
    "v_pk_fma_f32": op("f32x2 = f32x2 f32x2 f32x2", fma),
    "v_pk_lshlrev_b16": op(U32, by_halves(lambda a, b: b << (a & 15)), "op_sel", "op_sel_hi"),
    "v_pk_max_u16": op(U32, by_halves(np.maximum), "op_sel", "op_sel_hi"),
    "v_pk_mul_f32": op("f32x2 = f32x2 f32x2", np.multiply),
    "v_rcp_f32": op("f32 = f32", reciprocal),
    "v_rcp_iflag_f32": op("f32 = f32", reciprocal),
    "v_subb_co_u32": op("u32 mask = u32 u32 mask", subtract_borrow),
    "v_subbrev_co_u32": op("u32 mask = u32 u32 mask", lambda a, b, c: subtract_borrow(b, a, c)),
    "v_sub_co_u32": op("u32 mask = u32 u32", lambda a, b: (a - b, a < b)),
    "v_sub_f32": op(F32, np.subtract),
    "v_sub_u32": op(U32, subtract, "clamp"),
    "v_subrev_f32": op(F32, lambda a, b: b - a),
    "v_subrev_u32": op(U32, lambda a, b: b - a),
    "v_xad_u32": op("u32 = u32 u32 u32", lambda a, b, c: (a ^ b) + c),
    "v_xor_b32": op(U32, np.bitwise_xor),
}
"""Vector instructions that work lane by lane, by mnemonic without the suffix of the encoding."""

COMPARISONS: dict[str, Callable[..., Any]] = {
    "eq": np.equal,
    "ge": np.greater_equal,
    "gt": np.greater,
    "le": np.less_equal,
    "lt": np.less,
    "ne": np.not_equal,
}
VECTOR |= {
    f"v_cmp_{name}_{kind}": op(f"mask = {kind} {kind}", function)
    for name, function in COMPARISONS.items()
    for kind in ("i16", "u16", "i32", "u32", "f32")
    if (name, kind) != ("ne", "f32")  # Its name is neq, and no kernel has it.
}
VECTOR |= {
    "v_cmp_o_f32": op("mask = f32 f32", lambda a, b: ~(np.isnan(a) | np.isnan(b))),
    "v_cmp_u_f32": op("mask = f32 f32", lambda a, b: np.isnan(a) | np.isnan(b)),
}
VECTOR |= {
    f"v_cmp_{name}_{kind}64": op(
        "mask = u64 u64", lambda a, b, f=function, t=dtype: f(a.astype(t), b.astype(t))
    )
    for name, function in COMPARISONS.items()
    for kind, dtype in (("i", np.int64), ("u", np.uint64))
}

SCALAR: dict[str, Op] = {
    "s_abs_i32": op("i32 scc = i32", nonzero(absolute)),
    "s_add_i32": op("i32 scc = i32 i32", add_overflow),
    "s_add_u32": op("u32 scc = u32 u32", add_carry),
    "s_addc_u32": op("u32 scc = u32 u32 scc", add_carry),
    "s_and_b32": op("u32 scc = u32 u32", nonzero(np.bitwise_and)),
    "s_and_b64": op("u64 scc = u64 u64", nonzero(np.bitwise_and)),
    "s_andn2_b32": op("u32 scc = u32 u32", nonzero(lambda a, b: a & ~b)),
    "s_andn2_b64": op("u64 scc = u64 u64", nonzero(lambda a, b: a & ~b)),
    "s_ashr_i32": op("i32 scc = i32 u32", nonzero(lambda a, b: shift_right(b, a))),
    "s_bfe_i32": op("i32 scc = i32 u32", nonzero(scalar_bit_field)),
    "s_bfe_u32": op("u32 scc = u32 u32", nonzero(scalar_bit_field)),
    "s_bitcmp0_b32": op("scc = u32 u32", lambda a, b: shift_right(b, a) & 1 == 0),
    "s_bitcmp1_b32": op("scc = u32 u32", lambda a, b: shift_right(b, a) & 1 == 1),
    "s_cmp_lg_u64": op("scc = u64 u64", np.not_equal),
    "s_cselect_b32": op("u32 = u32 u32 scc", lambda a, b, scc: np.where(scc, a, b)),
    "s_cselect_b64": op("u64 = u64 u64 scc", lambda a, b, scc: np.where(scc, a, b)),
    "s_lshl1_add_u32": op("u32 scc = u32 u32", shift_add(1)),
    "s_lshl2_add_u32": op("u32 scc = u32 u32", shift_add(2)),
    "s_lshl3_add_u32": op("u32 scc = u32 u32", shift_add(3)),
    "s_lshl4_add_u32": op("u32 scc = u32 u32", shift_add(4)),
    "s_lshl_b32": op("u32 scc = u32 u32", nonzero(lambda a, b: shift_left(b, a))),
    "s_lshl_b64": op("u64 scc = u64 u32", nonzero(lambda a, b: shift_left(b, a))),
    "s_lshr_b32": op("u32 scc = u32 u32", nonzero(lambda a, b: shift_right(b, a))),
    "s_max_i32": op("i32 scc = i32 i32", lambda a, b: (np.maximum(a, b), a >= b)),
    "s_min_i32": op("i32 scc = i32 i32", lambda a, b: (np.minimum(a, b), a < b)),
    "s_mov_b32": op("u32 = u32", identity),
    "s_mov_b64": op("u64 = u64", identity),
    "s_movk_i32": op("i32 = k16", identity),
    "s_mul_hi_i32": op(I32, multiply_high),
    "s_mul_hi_u32": op(U32, multiply_high),
    "s_mul_i32": op(I32, np.multiply),
    "s_brev_b32": op("u32 = u32", reverse_bits),
    "s_not_b32": op("u32 scc = u32", nonzero(np.invert)),
    "s_or_b32": op("u32 scc = u32 u32", nonzero(np.bitwise_or)),
    "s_or_b64": op("u64 scc = u64 u64", nonzero(np.bitwise_or)),
    "s_sub_i32": op("i32 scc = i32 i32", subtract_overflow),
    "s_xor_b32": op("u32 scc = u32 u32", nonzero(np.bitwise_xor)),
    "s_xor_b64": op("u64 scc = u64 u64", nonzero(np.bitwise_xor)),
}
"""Scalar instructions. Those that read and write their first operand are in SCALAR_IN_PLACE."""

SCALAR_COMPARISONS = {name: function for name, function in COMPARISONS.items() if name != "ne"}
SCALAR |= {
    f"s_cmp{short}_{name}_{kind}": op(f"scc = {kind} {other}", function)
    for name, function in (SCALAR_COMPARISONS | {"lg": np.not_equal}).items()
    for short, kind, other in (
        ("", "i32", "i32"),
        ("", "u32", "u32"),
        ("k", "i32", "k16"),
        ("k", "u32", "u32"),
    )
}

SCALAR_IN_PLACE: dict[str, Op] = {
    "s_addk_i32": op("i32 scc = i32 k16", add_overflow),
    "s_bitset0_b32": op("u32 = u32 u32", lambda d, bit: d & ~shift_left(bit, np.ones_like(d))),
    "s_mulk_i32": op("i32 = i32 k16", np.multiply),
}
