"""What instructions compute on floats of 32 bits, and bf16, as functions on arrays of any shape.

Rounding is to nearest even and denormals are kept, as Triton's kernels ask for in their descriptor.

Source: AMD, "CDNA3" and "CDNA4" Instruction Set Architecture reference guides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from vllm_mxfp4_gfx950.gfx950.emulator.instructions.op import Array

MIN_NORMAL = np.float32(2.0**-126)
QUIET = np.uint32(0x400000)


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
