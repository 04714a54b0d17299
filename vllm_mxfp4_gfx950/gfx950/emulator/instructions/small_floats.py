"""What instructions compute on floats of 4 and 8 bits and their scales, as functions on arrays of any shape.

Source: AMD, "CDNA4" Instruction Set Architecture reference guide.
"""

from __future__ import annotations

import numpy as np

from vllm_mxfp4_gfx950.gfx950.emulator.instructions.floats import bits, exponent_of, to_bf16
from vllm_mxfp4_gfx950.gfx950.emulator.instructions.op import Array

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


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
