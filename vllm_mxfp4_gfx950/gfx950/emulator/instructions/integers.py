"""What instructions compute on integers and bits, as functions on arrays of any shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from vllm_mxfp4_gfx950.gfx950.emulator.instructions.op import Array


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
