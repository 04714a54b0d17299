"""What each gfx950 instruction computes, against the ISA manual's words and Python's own arithmetic.

Expected values are literals worked by hand or formulas over plain integers and fractions; none comes from the
emulator. In the tables of vector instructions a formula is Python text over one lane's operands: `v0`..`v3`
(random), `q0` and `q2` (the pairs v[0:1], v[2:3]), `s4`, `s5` and their pair `s45`, `v10` (what the
destination held), `vcc` and `m` (this lane's bit of VCC and of s[6:7]), `VCC` (all of it).
"""

import itertools
import math
import operator
import re
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from gcn import METADATA, NOTES, run

from vllm_mxfp4_gfx950.gfx950.emulator.load import load
from vllm_mxfp4_gfx950.gfx950.emulator.operands import Unknown

M32, M64, ALL = 2**32 - 1, 2**64 - 1, 2**64 - 1
SOME = 0xF0F0_1234_8000_7FF5
"""An EXEC mask with both kinds of lanes in every row of 16."""
LANE = np.arange(64, dtype=np.uint32)
WAIT = "\ns_waitcnt vmcnt(0) lgkmcnt(0)"
INF, NAN, ONE, NEGATIVE_ZERO = 0x7F800000, 0x7FC00000, 0x3F800000, 0x80000000
EDGES = [0, 1, 2, 31, 32, 33, 255, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 1 << 31, M32 - 1, M32]


def bit(mask: int, lane: int) -> int:
    """This lane's bit of a mask."""
    return mask >> lane & 1


def signed(value: int, width: int = 32) -> int:
    """The two's complement reading of the low bits."""
    value &= (1 << width) - 1
    return value - (1 << width) if value >> (width - 1) else value


def f(word: int) -> float:
    """The binary32 number with these bits."""
    return float(struct.unpack("<f", struct.pack("<I", word))[0])


def bits(number: float) -> int:
    """The bits of a number that binary32 holds."""
    return int(struct.unpack("<I", struct.pack("<f", number))[0])


def isnan(word: int) -> bool:
    """Whether these are a binary32 NaN's bits."""
    return word & 0x7FFFFFFF > INF


def nearest(exact: Fraction, precision: int = 24) -> float:
    """`exact` rounded once, to nearest even, to binary32's exponents and `precision` bits."""
    size = abs(exact)
    if not size:
        return 0.0
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > size
    unit = Fraction(2) ** (max(exponent, -126) - precision + 1)
    rounded = round(size / unit) * unit
    return math.copysign(math.inf if rounded >= 2**128 else float(rounded), exact)


def fma(a: int, b: int, c: int) -> int:
    """The bits of a * b + c under one rounding; Python's double product of two binary32 numbers is exact."""
    product, addend = f(a) * f(b), f(c)
    if not (math.isfinite(product) and math.isfinite(addend)):
        return bits(product + addend)
    exact = Fraction(product) + Fraction(addend)
    return bits(nearest(exact) if exact else product + addend)


def add(a: int, b: int) -> int:
    """The bits of a + b."""
    return fma(a, ONE, b)


def mul(a: int, b: int) -> int:
    """The bits of a * b."""
    return fma(a, b, NEGATIVE_ZERO)


def neg(word: int) -> int:
    """The sign bit flipped."""
    return word ^ NEGATIVE_ZERO


def fmax(*words: int) -> int:
    """The largest number, +0 above -0; quiet NaNs lose to numbers."""
    numbers = [w for w in words if not isnan(w)]
    return max(numbers, key=lambda w: (f(w), -(w >> 31)), default=NAN)


def fmin(*words: int) -> int:
    """The smallest number, -0 below +0; quiet NaNs lose to numbers."""
    return neg(fmax(*map(neg, words)))


def ldexp(word: int, exponent: int) -> int:
    """The bits of word * 2 ** exponent under one rounding."""
    if not math.isfinite(f(word)) or not f(word):
        return word
    return bits(nearest(Fraction(f(word)) * Fraction(2) ** exponent))


def to_u32(word: int) -> int:
    """Truncated toward zero and clamped; NaN gives 0."""
    number = f(word)
    return 0 if math.isnan(number) or number < 0 else M32 if number >= 2**32 else int(number)


def byte_permute(high: int, low: int, selector: int) -> int:
    """V_PERM_B32 for selectors 0-7 (a byte of {high, low}), 8-11 (a half's sign), 12 (0x00), 13+ (0xff)."""
    data = (high << 32 | low).to_bytes(8, "little")
    signs = {s: 0xFF * (data[2 * s - 15] >> 7) for s in range(8, 12)}
    choice = [s if s < 8 else None for s in selector.to_bytes(4, "little")]
    picked = [
        data[c] if c is not None else signs.get(s, 0 if s == 12 else 0xFF)
        for c, s in zip(choice, selector.to_bytes(4, "little"), strict=True)
    ]
    return int.from_bytes(bytes(picked), "little")


def truth(table: int, a: int, b: int, c: int) -> int:
    """V_BITOP3: bit 4a + 2b + c of the table, for each bit position."""
    return sum((table >> (4 * bit(a, i) + 2 * bit(b, i) + bit(c, i)) & 1) << i for i in range(32))


def generator(text: str) -> np.random.Generator:
    """A random generator that depends on the text alone."""
    return np.random.default_rng(zlib.crc32(text.encode()))


def integers(rng: np.random.Generator) -> np.ndarray:
    """uint32[64]: half random, half values at which something overflows."""
    some = rng.integers(0, 2**32, 64, dtype=np.uint32)
    return np.where(rng.random(64) < 0.5, some, rng.choice(np.array(EDGES, np.uint32), 64))


def floats(rng: np.random.Generator) -> np.ndarray:
    """uint32[64]: binary32 bits of any size, of like sizes, subnormal and special; NaNs are quiet."""
    word = rng.integers(0, 2**32, 64, dtype=np.uint32)
    alike = word & 0x807FFFFF | rng.integers(115, 140, 64).astype(np.uint32) << 23
    few = word & 0x80700001 | 0x3F800000
    special = np.array([0, NEGATIVE_ZERO, INF, INF | 1 << 31, NAN, 1, 0x807FFFFF, 0x00800000, 0x7F7FFFFF])
    kinds = [word, alike, few, word & 0x807FFFFF, rng.choice(special, 64).astype(np.uint32)]
    out = np.choose(rng.choice(5, 64, p=[0.2, 0.3, 0.2, 0.15, 0.15]), kinds).astype(np.uint32)
    return np.where(out & 0x7FFFFFFF > INF, out | 0x400000, out).astype(np.uint32)


def check_lanes(code: str, formula: str, *, real: bool = False, exec_mask: int = SOME) -> None:
    """Run `code` on random lanes: v10 (or v[10:11]) is the formula where EXEC is on, else kept."""
    rng = generator(code)
    draw = floats if real else integers
    v = {n: draw(rng) for n in (0, 1, 2, 3, 10, 11)}
    s = {n: int(rng.choice(draw(rng))) for n in (4, 5)}
    if real:
        s = {4: bits(-2.718), 5: bits(0.3)}
    m, vcc = (int(rng.integers(0, 2**63)) << 1 | 1 for _ in range(2))
    got = run(code, v=v, s={**s, 6: m & M32, 7: m >> 32}, vcc=vcc, exec_mask=exec_mask)
    wide = any(line.split(",")[0].endswith("v[10:11]") for line in code.splitlines())
    for lane in range(64):
        one = {f"v{n}": int(x[lane]) for n, x in v.items()}
        one |= {"q0": one["v1"] << 32 | one["v0"], "q2": one["v3"] << 32 | one["v2"]}
        one |= {"s4": s[4], "s5": s[5], "s45": s[5] << 32 | s[4]}
        one |= {"vcc": bit(vcc, lane), "m": bit(m, lane), "VCC": vcc, "EXEC": exec_mask}
        want = [one["v10"], one["v11"]]
        if bit(exec_mask, lane):
            value = eval(formula, globals(), one)
            if isinstance(value, tuple):
                want = list(value)
            else:
                want = [value & M32, value >> 32 & M32] if wide else [value & M32, one["v11"]]
        have = [int(got.v[10][lane]), int(got.v[11][lane])]
        same = [h == w or (real and isnan(h) and isnan(w)) for h, w in zip(have, want, strict=True)]
        assert all(same), (
            f"lane {lane}: {[*map(hex, have)]}, not {[*map(hex, want)]}; "
            f"{ {k: hex(x) for k, x in one.items()} }"
        )


SCALAR = [
    # code (s4 from s0 and s2), s0, s2, s4, SCC (None: kept)
    ("s_abs_i32 s4, s0", -5 & M32, 0, 5, 1),
    ("s_abs_i32 s4, s0", 1 << 31, 0, 1 << 31, 1),
    ("s_abs_i32 s4, s0", 0, 0, 0, 0),
    ("s_add_i32 s4, s0, s2", 0x7FFFFFFF, 1, 0x80000000, 1),
    ("s_add_i32 s4, s0, s2", M32, 1, 0, 0),
    ("s_add_i32 s4, s0, s2", 0x80000000, M32, 0x7FFFFFFF, 1),
    ("s_add_i32 m0, s0, 0x2100\ns_mov_b32 s4, m0", 0x11, 0, 0x2111, 0),
    ("s_add_u32 s4, s0, s2", M32, 1, 0, 1),
    ("s_add_u32 s4, s0, s2", 0x7FFFFFFF, 1, 0x80000000, 0),
    ("s_mov_b32 s4, s0\ns_addk_i32 s4, 0xff00", 0x101, 0, 1, 0),
    ("s_mov_b32 s4, s0\ns_addk_i32 s4, 0xff00", 0x80000000, 0, 0x7FFFFF00, 1),
    ("s_mov_b32 s4, s0\ns_addk_i32 s4, 0x7ff", 0x7FFFFFFF, 0, 0x800007FE, 1),
    ("s_and_b32 s4, s0, 0xffff", 0x12345678, 0, 0x5678, 1),
    ("s_and_b32 s4, s0, 4", 0xFFFFFFFB, 0, 0, 0),
    ("s_and_b32 s4, s0, -16", 0x1234567F, 0, 0x12345670, 1),
    ("s_andn2_b32 s4, s0, 31", 0xABCDEF7F, 0, 0xABCDEF60, 1),
    ("s_andn2_b32 s4, s0, s2", 0x0F, 0xFF, 0, 0),
    ("s_ashr_i32 s4, s0, 31", 0x80000000, 0, M32, 1),
    ("s_ashr_i32 s4, s0, s2", 0x80000010, 36, 0xF8000001, 1),
    ("s_ashr_i32 s4, s0, s2", 0x7FFFFFFF, 31, 0, 0),
    ("s_bfe_i32 s4, s0, 0x10018", 0x01000000, 0, M32, 1),
    ("s_bfe_i32 s4, s0, 0x10018", 0xFEFFFFFF, 0, 0, 0),
    ("s_bfe_i32 s4, s0, 0x80004", 0x00000840, 0, 0xFFFFFF84, 1),
    ("s_bfe_u32 s4, s0, 0x20006", 0xFFFFFF3F | 0x80, 0, 2, 1),
    ("s_bfe_u32 s4, s0, 0x20006", 0xFFFFFF3F, 0, 0, 0),
    ("s_lshl1_add_u32 s4, s0, s2", 0x80000003, 5, 0xB, 1),
    ("s_lshl1_add_u32 s4, s0, 0", 0x40000003, 0, 0x80000006, 0),
    ("s_lshl2_add_u32 s4, s0, s2", 3, 0xFFFFFFF4, 0, 1),
    ("s_lshl2_add_u32 s4, s0, s2", 3, 5, 17, 0),
    ("s_lshl3_add_u32 s4, s0, s2", 3, 5, 29, 0),
    ("s_lshl4_add_u32 s4, s0, s2", 3, 5, 53, 0),
    ("s_lshl4_add_u32 s4, s0, s2", 0x10000000, 5, 5, 1),
    ("s_lshl3_add_u32 s4, s0, s2", 0x20000000, 5, 5, 1),
    ("s_lshl_b32 s4, s0, 8", 0x01000000, 0, 0, 0),
    ("s_lshl_b32 s4, -1, s2", 0, 35, 0xFFFFFFF8, 1),
    ("s_lshr_b32 s4, s0, 29", 0xE0000000, 0, 7, 1),
    ("s_lshr_b32 s4, s0, s2", 0x80000000, 33, 0x40000000, 1),
    ("s_lshr_b32 s4, s0, 4", 15, 0, 0, 0),
    ("s_max_i32 s4, s0, s2", -2 & M32, 1, 1, 0),
    ("s_max_i32 s4, s0, s2", 1, -2 & M32, 1, 1),
    ("s_max_i32 s4, s0, 4", 4, 0, 4, 1),
    ("s_min_i32 s4, s0, s2", -2 & M32, 1, -2 & M32, 1),
    ("s_min_i32 s4, s0, s2", 1, -2 & M32, -2 & M32, 0),
    ("s_min_i32 s4, s0, 4", 4, 0, 4, 0),
    ("s_mov_b32 s4, s0", 0x87654321, 0, 0x87654321, None),
    ("s_mov_b32 s4, 0xc2fc0000", 0, 0, 0xC2FC0000, None),
    ("s_mov_b32 s4, -16", 0, 0, 0xFFFFFFF0, None),
    ("s_mov_b32 s4, 1.0", 0, 0, ONE, None),
    ("s_movk_i32 s4, 0xff00", 0, 0, 0xFFFFFF00, None),
    ("s_movk_i32 s4, 0x7fff", 0, 0, 0x7FFF, None),
    ("s_mul_hi_i32 s4, s0, 0x92492493", 0x80000000, 0, 0x36DB6DB6, None),
    ("s_mul_hi_i32 s4, s0, s2", -2 & M32, 3, M32, None),
    ("s_mul_hi_u32 s4, s0, s2", 0x80000000, 0x80000000, 0x40000000, None),
    ("s_mul_hi_u32 s4, s0, s2", M32, M32, 0xFFFFFFFE, None),
    ("s_mul_i32 s4, s0, s2", 0x12345, 0xFFFFFFFF, 0xFFFEDCBB, None),
    ("s_mul_i32 s4, s0, 0x420", 0x01000001, 0, 0x20000420, None),
    ("s_mov_b32 s4, s0\ns_mulk_i32 s4, 0xf000", 3, 0, 0xFFFFD000, None),
    ("s_mov_b32 s4, s0\ns_bitset0_b32 s4, 31", 0xF0000001, 0, 0x70000001, None),
    ("s_mov_b32 s4, s0\ns_bitset0_b32 s4, s2", 0xF, 34, 0xB, None),
    ("s_mov_b32 s4, s0\ns_bitset0_b32 s4, 0", 0x10, 0, 0x10, None),
    ("s_brev_b32 s4, s0", 0x80000012, 0, 0x48000001, None),
    ("s_not_b32 s4, s0", 0x0F0F00FF, 0, 0xF0F0FF00, 1),
    ("s_not_b32 s4, s0", M32, 0, 0, 0),
    ("s_or_b32 s4, s0, s2", 0x0F000001, 0x30000010, 0x3F000011, 1),
    ("s_or_b32 s4, s0, s2", 0, 0, 0, 0),
    ("s_sub_i32 s4, s0, s2", 0x80000000, 1, 0x7FFFFFFF, 1),
    ("s_sub_i32 s4, s0, s2", 1, 2, M32, 0),
    ("s_sub_i32 s4, 0, s2", 0, 0x80000000, 0x80000000, 1),
    ("s_xor_b32 s4, s0, 0x80000000", 0x80000001, 0, 1, 1),
    ("s_xor_b32 s4, s0, s2", 0x1234, 0x1234, 0, 0),
]


@pytest.mark.parametrize("scc", [False, True])
@pytest.mark.parametrize(("code", "a", "b", "want", "want_scc"), SCALAR)
def test_scalar(code: str, a: int, b: int, want: int, want_scc: int | None, scc: bool) -> None:
    """A 32-bit scalar instruction writes its register (not the next one) and SCC as the manual says."""
    got = run(code, s={0: a, 1: 0xBAD, 2: b, 3: 0xBAD, 4: 0xBAD, 5: 0x5EED}, scc=scc)
    assert (got.s[4], got.s[5]) == (want, 0x5EED)
    assert got.scc == (scc if want_scc is None else bool(want_scc))


SCALAR_PAIRS = [
    # code (s[4:5] from s[0:1], s[2:3]; VCC is 5 << 40 | 9, EXEC is SOME), s[0:1], s[2:3], s[4:5], SCC
    ("s_and_b64 s[4:5], s[0:1], s[2:3]", 0xF0F0_0000_0000_0000, 0x3C3C_0000_1111_1111, 0x3030 << 48, 1),
    ("s_and_b64 s[4:5], s[0:1], s[2:3]", 0xF0F0_0000_0000_0000, 0x0F0F_0000_1111_1111, 0, 0),
    ("s_and_b64 s[4:5], vcc, s[2:3]", 0, 4 << 40 | 8, 4 << 40 | 8, 1),
    ("s_and_b64 vcc, exec, s[2:3]\ns_mov_b64 s[4:5], vcc", 0, M64, SOME, 1),
    ("s_andn2_b64 s[4:5], s[0:1], exec", M64, 0, ~SOME & M64, 1),
    ("s_andn2_b64 s[4:5], s[0:1], s[2:3]", 0xFF, 0x0FF, 0, 0),
    ("s_andn2_b64 vcc, exec, vcc\ns_mov_b64 s[4:5], vcc", 0, 0, SOME & ~(5 << 40 | 9), 1),
    ("s_or_b64 s[4:5], s[0:1], s[2:3]", 1 << 63, 1, 1 << 63 | 1, 1),
    ("s_or_b64 s[4:5], s[0:1], s[2:3]", 0, 0, 0, 0),
    ("s_xor_b64 s[4:5], s[0:1], vcc", 5 << 40 | 8, 0, 1, 1),
    ("s_xor_b64 s[4:5], exec, s[2:3]", 0, SOME, 0, 0),
    ("s_lshl_b64 s[4:5], s[0:1], 2", 0xC0000001_C0000001, 0, 0x00000007_00000004, 1),
    ("s_lshl_b64 s[4:5], s[0:1], s2", 3, 64 + 63, 1 << 63, 1),
    ("s_lshl_b64 s[4:5], s[0:1], 2", 0xC000_0000_0000_0000, 0, 0, 0),
    ("s_mov_b64 s[4:5], -1", 0, 0, M64, None),
    ("s_mov_b64 s[4:5], 0x9000", 0, 0, 0x9000, None),
    ("s_mov_b64 s[4:5], s[2:3]", 0, 0x0123456789ABCDEF, 0x0123456789ABCDEF, None),
    ("s_mov_b64 vcc, s[2:3]\ns_or_b64 s[4:5], vcc, s[0:1]", 4, 1 << 35, 1 << 35 | 4, 1),
    ("s_xor_b64 vcc, vcc, s[2:3]\ns_mov_b64 s[4:5], vcc", 0, 1 << 35 | 1, 5 << 40 | 1 << 35 | 8, 1),
    ("s_mov_b64 s[4:5], exec", 0, 0, SOME, None),
    ("s_mov_b64 exec, s[0:1]\ns_mov_b64 s[4:5], exec", 0x80000001_00000002, 0, 0x80000001_00000002, None),
]


@pytest.mark.parametrize("scc", [False, True])
@pytest.mark.parametrize(("code", "a", "b", "want", "want_scc"), SCALAR_PAIRS)
def test_scalar_pair(code: str, a: int, b: int, want: int, want_scc: int | None, scc: bool) -> None:
    """A 64-bit scalar instruction treats a pair as one number, for its result and for SCC."""
    s = {0: a & M32, 1: a >> 32, 2: b & M32, 3: b >> 32}
    got = run(code, s=s, vcc=5 << 40 | 9, exec_mask=SOME, scc=scc)
    assert got.s[5] << 32 | got.s[4] == want
    assert got.scc == (scc if want_scc is None else bool(want_scc))


@pytest.mark.parametrize(
    ("code", "a", "want"),
    [
        ("s_cmp_eq_u32 s0, -1", M32, 1),
        ("s_cmp_eq_u32 s0, 0", 1, 0),
        ("s_cmp_ge_i32 s0, s1", -3 & M32, 0),
        ("s_cmp_ge_i32 s0, s1", 7, 1),
        ("s_cmp_ge_u32 s0, s1", -3 & M32, 1),
        ("s_cmp_ge_u32 s0, s1", 6, 0),
        ("s_cmp_gt_i32 s0, -2", M32, 1),
        ("s_cmp_gt_i32 s0, 5", 0x80000000, 0),
        ("s_cmp_gt_u32 s0, 0x7ffffffe", 0x80000000, 1),
        ("s_cmp_gt_u32 s0, 1", 1, 0),
        ("s_cmp_lg_u32 s0, s1", 8, 1),
        ("s_cmp_lg_u32 s0, s1", 7, 0),
        ("s_cmp_lt_i32 s0, s1", 0x80000000, 1),
        ("s_cmp_lt_i32 s0, 1", 1, 0),
        ("s_cmp_lt_u32 s0, 2", 1, 1),
        ("s_cmp_lt_u32 s0, 2", M32, 0),
        ("s_cmpk_gt_i32 s0, 0xff", 0x100, 1),
        ("s_cmpk_gt_i32 s0, 0x8000", 0, 1),  # 0x8000 is -32768
        ("s_cmpk_gt_i32 s0, 0xff", 0x80000000, 0),
        ("s_cmpk_lt_i32 s0, 0x100", M32, 1),
        ("s_cmpk_lt_i32 s0, 0x100", 0x100, 0),
        ("s_cmpk_lt_u32 s0, 0x101", 0x100, 1),
        ("s_cmpk_lt_u32 s0, 0xffff", M32, 0),  # zero-extended
        ("s_bitcmp0_b32 s0, 1", 2, 0),
        ("s_bitcmp0_b32 s0, 1", ~2 & M32, 1),
        ("s_bitcmp1_b32 s0, s1", 0x80, 1),
        ("s_bitcmp1_b32 s0, s1", 0x7F, 0),
        ("s_cmp_lg_u64 s[0:1], -1", M32, 1),
        ("s_mov_b32 s1, -1\ns_cmp_lg_u64 s[0:1], -1", M32, 0),
        ("s_mov_b32 s1, -1\ns_cmp_lg_u64 s[0:1], -1", M32 - 1, 1),
    ],
)
def test_scalar_compare(code: str, a: int, want: int) -> None:
    """A scalar comparison of s0 with a constant, or with s1 = 7, sets SCC and no register."""
    for scc in (False, True):
        got = run(code, s={0: a, 1: 7}, scc=scc)
        assert (got.scc, got.s[0]) == (bool(want), a)


@pytest.mark.parametrize("scc", [0, 1])
def test_scalar_reads_scc(scc: int) -> None:
    """S_CSELECT takes its first source when SCC is 1, S_ADDC adds SCC and sets it to the carry."""
    code = """
        s_cselect_b32 s2, s0, s1
        s_cselect_b32 s3, 0x104, s1
        s_cselect_b64 s[4:5], -1, 0
        s_cselect_b64 vcc, 0, -1
        s_addc_u32 s6, s0, 0xfffffff0
        s_addc_u32 s7, s0, s0"""
    got = run(code, s={0: 15, 1: 22}, scc=bool(scc))
    assert (got.s[2], got.s[3]) == ((15, 0x104) if scc else (22, 22))
    assert (got.s[5] << 32 | got.s[4], got.vcc) == ((M64, 0) if scc else (0, M64))
    assert (got.s[6], got.s[7], got.scc) == ((0, 31, False) if scc else (M32, 30, False))


@pytest.mark.parametrize(("source", "scc"), [(0xFF00000000000F00, 1), (0, 0), (~SOME & M64, 0)])
def test_saveexec(source: int, scc: int) -> None:
    """S_AND_SAVEEXEC keeps the old EXEC in its destination and sets SCC if a lane stays on."""
    got = run("s_and_saveexec_b64 s[2:3], s[0:1]", s={0: source & M32, 1: source >> 32}, exec_mask=SOME)
    assert (got.s[3] << 32 | got.s[2], got.exec, got.scc) == (SOME, SOME & source, bool(scc))
    got = run("s_and_saveexec_b64 s[2:3], vcc", vcc=source, exec_mask=SOME)
    assert (got.s[3] << 32 | got.s[2], got.exec, got.scc) == (SOME, SOME & source, bool(scc))
    got = run("s_or_saveexec_b64 s[2:3], s[0:1]", s={0: source & M32, 1: source >> 32}, exec_mask=SOME)
    assert (got.s[3] << 32 | got.s[2], got.exec, got.scc) == (SOME, SOME | source, True)
    got = run("s_andn2_saveexec_b64 s[2:3], s[0:1]", s={0: source & M32, 1: source >> 32}, exec_mask=SOME)
    left = source & ~SOME & M64
    assert (got.s[3] << 32 | got.s[2], got.exec, got.scc) == (SOME, left, left != 0)


TWO = [  # instructions of two sources a and b
    ("v_add_u16_e32", "a + b & 0xFFFF"),
    ("v_add_u32_e32", "a + b"),
    ("v_and_b32_e32", "a & b"),
    ("v_ashrrev_i32_e32", "signed(b) >> (a & 31)"),
    ("v_lshlrev_b16_e32", "b << (a & 15) & 0xFFFF"),
    ("v_lshrrev_b16_e32", "(b & 0xFFFF) >> (a & 15)"),
    ("v_lshlrev_b32_e32", "b << (a & 31)"),
    ("v_lshlrev_b32_e64", "b << (a & 31)"),
    ("v_lshrrev_b32_e32", "b >> (a & 31)"),
    ("v_bcnt_u32_b32", "a.bit_count() + b"),
    ("v_max_u32_e32", "max(a, b)"),
    ("v_max_i32_e32", "max(signed(a), signed(b))"),
    ("v_min_i32_e32", "min(signed(a), signed(b))"),
    ("v_mul_i32_i24_e32", "signed(a & 0xFFFFFF, 24) * signed(b & 0xFFFFFF, 24)"),
    ("v_min_u32_e32", "min(a, b)"),
    ("v_mul_hi_i32", "signed(a) * signed(b) >> 32"),
    ("v_mul_hi_u32", "a * b >> 32"),
    ("v_mul_lo_u32", "a * b"),
    ("v_mul_u32_u24_e32", "(a & 0xFFFFFF) * (b & 0xFFFFFF)"),
    ("v_or_b32_e32", "a | b"),
    ("v_sub_u32_e32", "a - b"),
    ("v_sub_u32_e64 clamp", "max(a - b, 0)"),
    ("v_subrev_u32_e32", "b - a"),
    ("v_xor_b32_e32", "a ^ b"),
]
TABLES = (0x1E, 0x28, 0x36, 0x6C, 0x78, 0xC, 0xC8, 0xDE, 0xEC, 0xF6, 0xF8)
THREE = [  # instructions of three sources a, b and c
    ("v_add3_u32", "a + b + c"),
    ("v_add_lshl_u32", "a + b << (c & 31)"),
    ("v_alignbit_b32", "(a << 32 | b) >> (c & 31)"),
    ("v_and_or_b32", "a & b | c"),
    ("v_bfe_i32", "signed(signed(a) >> (b & 31), c & 31) if c & 31 else 0"),
    ("v_bfe_u32", "a >> (b & 31) & (1 << (c & 31)) - 1"),
    ("v_bfi_b32", "a & b | ~a & c"),
    *((f"v_bitop3_b32 bitop3:{table:#x}", f"truth({table}, a, b, c)") for table in TABLES),
    ("v_bitop3_b32 bitop3:0x36", "(a | c) ^ b"),
    ("v_bitop3_b32 bitop3:0xf8", "a | b & c"),
    ("v_mad_u32_u24", "(a & 0xFFFFFF) * (b & 0xFFFFFF) + c"),
    ("v_mad_i32_i24", "signed(a & 0xFFFFFF, 24) * signed(b & 0xFFFFFF, 24) + c"),
    ("v_lshl_add_u32", "(a << (b & 31)) + c"),
    ("v_lshl_or_b32", "a << (b & 31) | c"),
    ("v_max3_i32", "max(signed(a), signed(b), signed(c))"),
    ("v_max3_u32", "max(a, b, c)"),
    ("v_or3_b32", "a | b | c"),
    ("v_perm_b32", "byte_permute(a, b, c)"),
    ("v_xad_u32", "(a ^ b) + c"),
]


@pytest.mark.parametrize(("instruction", "formula"), TWO + THREE)
def test_operands(instruction: str, formula: str) -> None:
    """Integer instructions take vectors, scalars and constants, in their order; e32 takes a literal first."""
    name, _, modifier = instruction.partition(" ")
    kinds: list[tuple[str, ...]] = [("v0", "s4", "5"), ("v1", "s4", "-16"), ("v2", "s4", "12")]
    if name.endswith("e32"):
        kinds = [("v0", "s4", "5", "0x18c0"), ("v1",)]
    elif not re.search(r"\bc\b", formula):
        kinds = kinds[:2]
    for operands in itertools.product(*kinds):
        text = formula
        for source, operand in zip("abc", operands, strict=False):
            text = re.sub(rf"\b{source}\b", f"({operand} & M32)", text)
        check_lanes(f"{name} v10, {', '.join(operands)} {modifier}", text)


INTEGER = [
    ("v_bfrev_b32_e32 v10, v0", "int(f'{v0:032b}'[::-1], 2)"),
    ("v_bfrev_b32_e32 v10, 1", "1 << 31"),
    ("v_cndmask_b32_e32 v10, v0, v1, vcc", "v1 if vcc else v0"),
    ("v_cndmask_b32_e32 v10, -1, v1, vcc", "v1 if vcc else M32"),
    ("v_cndmask_b32_e64 v10, v0, v1, s[6:7]", "v1 if m else v0"),
    ("v_cndmask_b32_e64 v10, 0, v1, s[6:7]", "v1 if m else 0"),
    ("v_cndmask_b32_e64 v10, v0, 0, s[6:7]", "0 if m else v0"),
    ("v_cndmask_b32_e64 v10, 0, 1, vcc", "vcc"),
    ("v_cvt_f32_i32_e32 v10, v0", "bits(nearest(Fraction(signed(v0))))"),
    ("v_cvt_f32_i32_e32 v10, s4", "bits(nearest(Fraction(signed(s4))))"),
    ("v_cvt_f32_u32_e32 v10, v0", "bits(nearest(Fraction(v0)))"),
    ("v_cvt_f32_u32_e32 v10, s4", "bits(nearest(Fraction(s4)))"),
    ("v_mov_b32_e32 v10, v0", "v0"),
    ("v_mov_b32_e32 v10, s4", "s4"),
    ("v_mov_b32_e32 v10, 0xff80ff80", "0xFF80FF80"),
    ("v_mov_b32_e32 v10, -6", "-6"),
    ("v_not_b32_e32 v10, v0", "~v0"),
    ("v_not_b32_e32 v10, 63", "0xFFFFFFC0"),
    ("s_mov_b32 s4, 0x0c0d0703\nv_perm_b32 v10, v0, v1, s4", "byte_permute(v0, v1, 0x0C0D0703)"),
    ("s_mov_b32 s4, 0x05040100\nv_perm_b32 v10, v0, v1, s4", "(v0 & 0xFFFF) << 16 | v1 & 0xFFFF"),
    ("s_mov_b32 s4, 0x0b0a0908\nv_perm_b32 v10, v0, v1, s4", "byte_permute(v0, v1, 0x0B0A0908)"),
    ("v_accvgpr_write_b32 a3, v0\nv_accvgpr_mov_b32 a5, a3\nv_accvgpr_read_b32 v10, a5", "v0"),
    ("v_accvgpr_write_b32 a3, 7\nv_accvgpr_read_b32 v10, a3", "7"),
]
WIDE = [
    ("v_lshl_add_u64 v[10:11], v[0:1], 0, s[4:5]", "q0 + s45"),
    ("v_lshl_add_u64 v[10:11], s[4:5], 3, v[2:3]", "(s45 << 3) + q2"),
    ("v_lshl_add_u64 v[10:11], v[0:1], 1, v[2:3]", "(q0 << 1) + q2"),
    ("v_lshl_add_u64 v[10:11], v[0:1], 0, 16", "q0 + 16"),
    ("v_lshlrev_b64 v[10:11], 1, v[2:3]", "q2 << 1"),
    ("v_lshlrev_b64 v[10:11], v0, v[2:3]", "q2 << (v0 & 63)"),
    ("v_lshrrev_b64 v[10:11], v0, vcc", "VCC >> (v0 & 63)"),
    ("v_lshrrev_b64 v[10:11], v0, s[4:5]", "s45 >> (v0 & 63)"),
    ("v_lshrrev_b64 v[10:11], v0, exec", "EXEC >> (v0 & 63)"),
    ("v_mov_b64_e32 v[10:11], v[2:3]", "q2"),
    ("v_mov_b64_e32 v[10:11], 0x400", "0x400"),
    ("v_mov_b64_e32 v[10:11], 0", "0"),
    ("v_mov_b64_e32 v[10:11], s[4:5]", "s45"),
]


@pytest.mark.parametrize(("code", "formula"), INTEGER + WIDE)
def test_integer(code: str, formula: str) -> None:
    """An integer vector instruction, of 32 or 64 bits, in every active lane."""
    check_lanes(code, formula, exec_mask=ALL if "accvgpr" in code else SOME)


@pytest.mark.parametrize(
    ("code", "table", "third"),
    [
        ("v_bitop3_b16 v10, v0, v1, s4 bitop3:0xec", 0xEC, "s4"),
        ("v_bitop3_b16 v10, s4, v1, 63 bitop3:0xf8", 0xF8, "63"),
    ],
)
def test_bitop3_of_halves(code: str, table: int, third: str) -> None:
    """V_BITOP3_B16 combines the low halves; what it leaves above them is not specified."""
    rng = generator(code)
    a, b = integers(rng), integers(rng)
    got = run(code, v={0: a, 1: b, 10: 0}, s={4: 0xA5C31234})
    first = a if "v10, v0" in code else np.full(64, 0xA5C31234)
    c = 0xA5C31234 if third == "s4" else 63
    want = [truth(table, int(x), int(y), c) & 0xFFFF for x, y in zip(first, b, strict=True)]
    assert [int(x) & 0xFFFF for x in got.v[10]] == want


@pytest.mark.parametrize(
    ("operation", "operands", "to", "first", "second", "formula"),
    [
        ("v_add_u32", "v10, v0, s4", "DWORD", "WORD_0", "DWORD", "(v0 & 0xFFFF) + s4"),
        ("v_add_u32", "v10, v0, v1", "DWORD", "DWORD", "BYTE_3", "v0 + (v1 >> 24)"),
        ("v_and_b32", "v10, v0, s4", "DWORD", "WORD_1", "DWORD", "v0 >> 16 & s4"),
        ("v_cndmask_b32", "v10, v0, v1, vcc", "DWORD", "DWORD", "WORD_0", "v1 & 0xFFFF if vcc else v0"),
        ("v_lshlrev_b16", "v10, v0, v1", "DWORD", "DWORD", "BYTE_0", "(v1 & 255) << (v0 & 15) & 0xFFFF"),
        ("v_lshlrev_b16", "v10, v0, v1", "DWORD", "DWORD", "BYTE_3", "(v1 >> 24) << (v0 & 15) & 0xFFFF"),
        ("v_lshlrev_b32", "v10, v0, v1", "DWORD", "DWORD", "BYTE_0", "(v1 & 255) << (v0 & 31)"),
        ("v_lshlrev_b32", "v10, v0, v1", "DWORD", "DWORD", "BYTE_3", "(v1 >> 24) << (v0 & 31)"),
        ("v_lshlrev_b32", "v10, v0, v1", "DWORD", "DWORD", "WORD_0", "(v1 & 0xFFFF) << (v0 & 31)"),
        ("v_max_u16", "v10, v0, v1", "WORD_1", "DWORD", "DWORD", "max(v0 & 0xFFFF, v1 & 0xFFFF) << 16"),
        ("v_or_b32", "v10, s4, v1", "DWORD", "DWORD", "BYTE_0", "s4 | v1 & 255"),
        ("v_or_b32", "v10, s4, v1", "DWORD", "DWORD", "WORD_0", "s4 | v1 & 0xFFFF"),
        ("v_sub_u32", "v10, v0, v1", "DWORD", "DWORD", "WORD_1", "v0 - (v1 >> 16)"),
        ("v_sub_u32", "v10, s4, v1", "DWORD", "DWORD", "WORD_0", "s4 - (v1 & 0xFFFF)"),
        ("v_xor_b32", "v10, v0, v1", "WORD_1", "DWORD", "DWORD", "(v0 ^ v1) << 16"),
        ("v_xor_b32", "v10, v0, v1", "WORD_1", "DWORD", "WORD_1", "(v0 ^ v1 >> 16) << 16"),
        ("v_xor_b32", "v10, v0, v1", "DWORD", "DWORD", "BYTE_0", "v0 ^ v1 & 255"),
        ("v_xor_b32", "v10, v0, v10", "WORD_1", "DWORD", "DWORD", "(v0 ^ v10) << 16"),
        ("v_add_u32", "v10, sext(v0), v1", "DWORD", "WORD_1", "DWORD", "signed(v0 >> 16, 16) + v1"),
        ("v_add_u32", "v10, v0, sext(v1)", "DWORD", "DWORD", "BYTE_2", "v0 + signed(v1 >> 16 & 255, 8)"),
    ],
)
def test_sdwa(operation: str, operands: str, to: str, first: str, second: str, formula: str) -> None:
    """SDWA takes a byte or a half of each source, zero-extended, and pads the result with zeros."""
    select = f"dst_sel:{to} dst_unused:UNUSED_PAD src0_sel:{first} src1_sel:{second}"
    check_lanes(f"{operation}_sdwa {operands} {select}", formula)


@pytest.mark.parametrize(
    ("code", "formula"),
    [
        (
            "v_pk_lshlrev_b16 v10, v0, v1",
            "(v1 << (v0 & 15)) & 0xFFFF | ((v1 >> 16) << (v0 >> 16 & 15)) << 16",
        ),
        ("v_pk_lshlrev_b16 v10, 7, v1 op_sel_hi:[0,1]", "(v1 << 7) & 0xFFFF | ((v1 >> 16) << 7) << 16"),
        (
            "v_pk_lshlrev_b16 v10, v0, v1 op_sel:[1,0] op_sel_hi:[0,0]",
            "(v1 << (v0 >> 16 & 15)) & 0xFFFF | (v1 << (v0 & 15)) << 16",
        ),
        ("v_pk_max_u16 v10, v0, v1", "max(v0 & 0xFFFF, v1 & 0xFFFF) | max(v0 >> 16, v1 >> 16) << 16"),
        ("v_pk_max_u16 v10, v0, 64 op_sel_hi:[1,0]", "max(v0 & 0xFFFF, 64) | max(v0 >> 16, 64) << 16"),
    ],
)
def test_packed_halves(code: str, formula: str) -> None:
    """Two halves, each by a half."""
    check_lanes(code, formula)


CARRY = [
    ("v_add_co_u32_e32 v10, vcc, 0x4000, v1", "0x4000 + v1"),
    ("v_add_co_u32_e32 v10, vcc, s4, v1", "s4 + v1"),
    ("v_addc_co_u32_e32 v10, vcc, 0, v1, vcc", "v1 + vcc"),
    ("v_addc_co_u32_e64 v10, s[8:9], v0, v1, vcc", "v0 + v1 + vcc"),
    ("v_addc_co_u32_e64 v10, s[8:9], 0, v1, s[6:7]", "v1 + m"),
    ("v_subb_co_u32_e32 v10, vcc, v0, v1, vcc", "v0 - v1 - vcc"),
    ("v_subb_co_u32_e64 v10, s[8:9], v0, v1, s[6:7]", "v0 - v1 - m"),
    ("v_subbrev_co_u32_e32 v10, vcc, 0, v1, vcc", "v1 - vcc"),
    ("v_subbrev_co_u32_e64 v10, s[8:9], v0, v1, s[6:7]", "v1 - v0 - m"),
    ("v_sub_co_u32_e64 v10, s[8:9], s4, 1", "s4 - 1"),
    ("v_sub_co_u32_e64 v10, s[8:9], v0, v1", "v0 - v1"),
    ("v_mad_u64_u32 v[10:11], s[8:9], v0, s4, v[2:3]", "v0 * s4 + q2"),
    ("v_mad_u64_u32 v[10:11], s[8:9], v0, v1, 0", "v0 * v1"),
    ("v_mad_u64_u32 v[10:11], s[8:9], s4, v1, v[2:3]", "s4 * v1 + q2"),
    ("v_mad_u64_u32 v[10:11], s[8:9], s4, 12, v[2:3]", "s4 * 12 + q2"),
]


@pytest.mark.parametrize(("code", "formula"), CARRY)
def test_carry(code: str, formula: str) -> None:
    """The carry (borrow) out of 32 or 64 bits lands in the lane's bit of VCC or of a scalar pair."""
    check_lanes(code, formula)
    for s4, a in ((0, 0), (0, M32), (M32, 1), (M32, M32), (0x80000000, 0x80000000), (7, 3)):
        lanes = {"v0": LANE * 0 + a, "v1": LANE * 0x08000000 + a, "v2": ~LANE, "v3": LANE * 0 + M32}
        m, vcc = 0xA5A5_0FF0_1234_FFFF, 0x5A5A_F00F_FEDC_0001
        s = {4: s4, 6: m & M32, 7: m >> 32, 8: 0, 9: 0}
        got = run(code, v={int(n[1]): x for n, x in lanes.items()}, s=s, vcc=vcc)
        carry = got.vcc if code.split(", ")[1] == "vcc" else got.s[9] << 32 | got.s[8]
        for lane in range(64):
            one = {n: int(x[lane]) for n, x in lanes.items()}
            one |= {"q2": one["v3"] << 32 | one["v2"], "s4": s4, "vcc": bit(vcc, lane), "m": bit(m, lane)}
            assert bit(carry, lane) == bit(eval(formula, globals(), one), 64 if "mad" in code else 32), one


@pytest.mark.parametrize("addend", [0, 5, 1 << 63, (1 << 63) - 1, M64])
def test_signed_multiply_add(addend: int) -> None:
    """64 bits of a signed product and sum, and in the mask whether the sum has lost its sign."""
    edges = np.array([*EDGES, *(-2 & M32 >> n for n in range(4))], np.uint32)
    v0, v1 = np.resize(edges, 64), np.resize(np.roll(edges, 7), 64)
    low, high = (np.full(64, word, np.uint32) for word in (addend & M32, addend >> 32))
    got = run("v_mad_i64_i32 v[10:11], s[8:9], v0, v1, v[2:3]", v={0: v0, 1: v1, 2: low, 3: high})
    for lane in range(64):
        exact = signed(int(v0[lane])) * signed(int(v1[lane])) + signed(addend, 64)
        assert int(got.v[11, lane]) << 32 | int(got.v[10, lane]) == exact & M64
        assert bit(got.s[9] << 32 | got.s[8], lane) == (exact != signed(exact, 64))


COMPARE = [
    ("v_cmp_eq_u32", "a == b"),
    ("v_cmp_ge_i32", "signed(a) >= signed(b)"),
    ("v_cmp_gt_f32", "f(a) > f(b)"),
    ("v_cmp_gt_i32", "signed(a) > signed(b)"),
    ("v_cmp_gt_u32", "a > b"),
    ("v_cmp_le_i32", "signed(a) <= signed(b)"),
    ("v_cmp_le_u32", "a <= b"),
    ("v_cmp_lt_i16", "signed(a, 16) < signed(b, 16)"),
    ("v_cmp_lt_i32", "signed(a) < signed(b)"),
    ("v_cmp_lt_u32", "a < b"),
    ("v_cmp_ne_u32", "a != b"),
    ("v_cmp_gt_i16_sdwa src0_sel:WORD_1 src1_sel:DWORD", "signed(a >> 16, 16) > signed(b, 16)"),
    ("v_cmp_ne_u16_sdwa src0_sel:BYTE_0 src1_sel:DWORD", "a & 255 != b & 0xFFFF"),
    ("v_cmp_ne_u32_sdwa src0_sel:WORD_0 src1_sel:DWORD", "a & 0xFFFF != b"),
]


@pytest.mark.parametrize("exec_mask", [ALL, SOME])
@pytest.mark.parametrize(("instruction", "formula"), COMPARE)
def test_compare(instruction: str, formula: str, exec_mask: int) -> None:
    """A vector comparison writes all 64 bits: the outcome in active lanes, 0 in the others."""
    rng = generator(instruction)
    name, _, modifier = instruction.partition(" ")
    v0, v1 = (floats(rng) if "f32" in name else integers(rng) for _ in range(2))
    v1[::3] = v0[::3]
    s4 = int(v1[1])
    v0[5:8], v1[12:15], v1[15:17], v0[20:24], v1[20:24] = s4, s4, M32, 3, range(2, 6)
    v0[24:28], v1[24:28] = 0x00050005, (0x50005, 5, 0x60005, 6)
    last = "0" if "f32" in name else "-1"
    forms = ["{0} vcc, v0, v1", "{0} s[8:9], v0, v1", "{0} s[8:9], v0, s4"]
    if "sdwa" not in name:
        pair = ["v0, v1", "s4, v1", "3, v1", f"{last}, v1"]
        forms = [f"{{0}}_e32 vcc, {x}" for x in pair] + [f"{{0}}_e64 s[8:9], {x}" for x in [*pair, "s4, 0"]]
    for form in forms:
        a, b = form.split(", ")[1:]
        code = f"{form.format(name)} {modifier}"
        got = run(code, v={0: v0, 1: v1}, s={4: s4, 8: M32, 9: M32}, vcc=ALL, exec_mask=exec_mask)
        want = 0
        for lane in range(64):
            values = {"v0": int(v0[lane]), "v1": int(v1[lane]), "s4": s4, "3": 3, "0": 0, "-1": M32}
            both = {"a": values[a], "b": values[b]}
            want |= (bit(exec_mask, lane) and int(eval(formula, globals(), both))) << lane
        have = (got.vcc, got.s[9] << 32 | got.s[8])
        assert have == ((want, ALL) if " vcc" in form else (ALL, want)), code


REAL = [
    ("v_add_f32_e32 v10, v0, v1", "add(v0, v1)"),
    ("v_sub_f32_e32 v10, v0, v1", "add(v0, neg(v1))"),
    ("v_sub_f32_e64 v10, 0, s4", "add(0, neg(s4))"),
    ("v_subrev_f32_e32 v10, v0, v1", "add(v1, neg(v0))"),
    ("v_mul_f32_e32 v10, 0x3fb8aa3b, v1", "mul(0x3FB8AA3B, v1)"),
    ("v_mul_f32_e32 v10, v0, v1", "mul(v0, v1)"),
    ("v_mul_f32_e64 v10, -s4, v1", "mul(neg(s4), v1)"),
    ("v_fma_f32 v10, v0, v1, v2", "fma(v0, v1, v2)"),
    ("v_fma_f32 v10, -v0, v1, v2", "fma(neg(v0), v1, v2)"),
    ("v_fma_f32 v10, -v0, v1, 1.0", "fma(neg(v0), v1, ONE)"),
    ("v_fmac_f32_e32 v10, v0, v1", "fma(v0, v1, v10)"),
    ("v_fmac_f32_e32 v10, 0x3fb8aa3b, v1", "fma(0x3FB8AA3B, v1, v10)"),
    ("v_div_fmas_f32 v10, v0, v1, v2", "fma(v0, v1, v2)"),
    ("v_max_f32_e32 v10, v0, v1", "fmax(v0, v1)"),
    ("v_max_f32_e64 v10, -s4, v1", "fmax(neg(s4), v1)"),
    ("v_max_f32_e64 v10, s4, s4", "s4"),
    ("v_max_f32_e64 v10, -s4, -s4", "neg(s4)"),
    ("v_min_f32_e32 v10, v0, v1", "fmin(v0, v1)"),
    ("v_max3_f32 v10, v0, v1, v2", "fmax(v0, v1, v2)"),
    ("v_maximum3_f32 v10, v0, v1, v2", "NAN if any(map(isnan, (v0, v1, v2))) else fmax(v0, v1, v2)"),
    ("v_minimum3_f32 v10, v0, s4, s4", "NAN if isnan(v0) else fmin(v0, s4)"),
    ("v_minimum3_f32 v10, v0, v1, v2", "NAN if any(map(isnan, (v0, v1, v2))) else fmin(v0, v1, v2)"),
    ("v_med3_f32 v10, v0, -s4, s4", "s4 if isnan(v0) else fmax(s4, fmin(v0, neg(s4)))"),  # s4 < 0
    ("v_bfe_i32 v3, v1, 0, 9\nv_ldexp_f32 v10, v0, v3", "ldexp(v0, signed(v1, 9))"),
    ("v_ldexp_f32 v10, v0, -3", "ldexp(v0, -3)"),
    ("v_cvt_u32_f32_e32 v10, v0", "to_u32(v0)"),
    ("v_pk_add_f32 v[10:11], v[0:1], v[2:3]", "add(v0, v2), add(v1, v3)"),
    ("v_pk_add_f32 v[10:11], v[0:1], 1.0 op_sel_hi:[1,0]", "add(v0, ONE), add(v1, ONE)"),
    ("v_pk_add_f32 v[10:11], v[0:1], 0 op_sel_hi:[1,0]", "add(v0, 0), add(v1, 0)"),
    (
        "v_pk_add_f32 v[10:11], v[0:1], v[2:3] neg_lo:[0,1] neg_hi:[0,1]",
        "add(v0, neg(v2)), add(v1, neg(v3))",
    ),
    (
        "v_pk_add_f32 v[10:11], v[0:1], v[2:3] op_sel_hi:[1,0] neg_lo:[0,1] neg_hi:[0,1]",
        "add(v0, neg(v2)), add(v1, neg(v2))",
    ),
    ("v_pk_mul_f32 v[10:11], v[0:1], v[2:3] op_sel_hi:[1,0]", "mul(v0, v2), mul(v1, v2)"),
    ("v_pk_mul_f32 v[10:11], v[0:1], s[4:5]", "mul(v0, s4), mul(v1, s5)"),
    ("v_pk_mul_f32 v[10:11], v[0:1], s[4:5] op_sel_hi:[1,0]", "mul(v0, s4), mul(v1, s4)"),
    (
        "v_pk_mul_f32 v[10:11], v[0:1], s[4:5] op_sel_hi:[1,0] neg_lo:[0,1] neg_hi:[0,1]",
        "mul(v0, neg(s4)), mul(v1, neg(s4))",
    ),
    ("v_pk_fma_f32 v[10:11], v[0:1], v[2:3], v[10:11]", "fma(v0, v2, v10), fma(v1, v3, v11)"),
]


@pytest.mark.parametrize("round_", range(4))
@pytest.mark.parametrize(("code", "formula"), REAL)
def test_real(code: str, formula: str, round_: int) -> None:
    """A binary32 instruction rounds once, to nearest even, keeps subnormals, and handles NaN and infinity."""
    clear = "s_mov_b64 vcc, 0\n" if "div_fmas" in code else ""
    check_lanes("\n" * round_ + clear + code, formula, real=True)


def test_fma_rounds_once() -> None:
    """(1 + 2^-12)^2 - 1 is exact in an FMA; rounding the product first would lose 2^-24."""
    x, less = bits(1 + 2**-12), bits(-1.0)
    got = run("v_fma_f32 v10, v0, v0, v1\nv_mul_f32_e32 v11, v0, v0", v={0: x, 1: less})
    assert (f(int(got.v[10][3])), f(int(got.v[11][3]))) == (2**-11 + 2**-24, 1 + 2**-11)


def test_medians_and_signalling_nans() -> None:
    """V_MED3 is the middle one, or the smallest number beside a NaN; MIN and MAX quieten a signalling NaN."""
    a, b, c = (np.array([bits(x) for x in row] * 8, np.uint32) for row in zip(*[
        (1.0, 2.0, 3.0), (3.0, 1.0, 2.0), (2.0, 3.0, 1.0), (-1.0, -3.0, -2.0),
        (math.inf, -math.inf, 7.0), (math.nan, 5.0, 4.0), (5.0, math.nan, 4.0), (5.0, 4.0, math.nan),
    ], strict=True))  # fmt: skip
    signalling = 0x7F800001
    code = "v_med3_f32 v10, v0, v1, v2\nv_max_f32_e64 v11, s4, s4\nv_min_f32_e32 v12, v3, v0"
    got = run(code, v={0: a, 1: b, 2: c, 3: signalling}, s={4: signalling})
    assert [f(int(x)) for x in got.v[10][:8]] == [2, 2, 2, -2, 7, 4, 4, 4]
    assert (got.v[11] & 0x7FC00000 == NAN).all()
    assert (got.v[12] & 0x7FC00000 == NAN).all()


def halves(word: int) -> tuple[int, int]:
    """The binary32 bits of the two bf16 numbers in a register."""
    return (word & 0xFFFF) << 16, word & 0xFFFF0000


def to_bf16(word: int) -> int:
    """The binary32 bits of the bf16 number nearest to a binary32 number."""
    return bits(nearest(Fraction(f(word)), 8)) if math.isfinite(f(word)) and f(word) else word


@pytest.mark.parametrize("round_", range(4))
def test_to_bf16(round_: int) -> None:
    """V_CVT_PK_BF16_F32 rounds to nearest even, src0 in the low half, subnormals and overflow included."""
    rng = np.random.default_rng(round_)
    a, b = floats(rng), floats(rng)
    a[::4] = a[::4] & 0xFFFF0000 | 0x8000  # halfway
    b[::4] = b[::4] & 0xFFFF0000 | rng.choice([0x7FFF, 0x8000, 0x8001], 16).astype(np.uint32)
    a[:2], b[0] = (0x7F7FFFFF, 0x7F7F7FFF), 0xFF7F8000
    code = "v_cvt_pk_bf16_f32 v10, v0, v1\nv_cvt_pk_bf16_f32 v11, v0, s4"
    got = run(code, v={0: a, 1: b}, s={4: 0x40490FDB})
    for lane in range(64):
        for have, word in zip(halves(int(got.v[10][lane])), (int(a[lane]), int(b[lane])), strict=True):
            assert have == to_bf16(word) or (isnan(have) and isnan(word)), (hex(word), hex(have))
    assert (got.v[11] >> 16 == 0x4049).all()


FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@pytest.mark.parametrize(
    ("modifier", "byte"),
    [("", 0), (" op_sel:[1,0,0]", 1), (" op_sel:[0,1,0]", 2), (" op_sel:[1,1,0]", 3)],
)
@pytest.mark.parametrize("exponent", [0, 1, 2, 100, 127, 128, 200, 252, 255])
def test_fp4_to_bf16(exponent: int, modifier: str, byte: int) -> None:
    """A byte's low and high E2M1 codes times 2^(e - 127), e being the scale's exponent field (255: NaN)."""
    codes = generator(modifier).permutation(256)[:64].astype(np.uint32)
    codes[:16] = np.arange(16) * 17 ^ (np.arange(16) & 1) * 0xF0
    word = codes << 8 * byte | ~codes % 251 << 8 * ((byte + 1) % 4)
    scale = np.uint32(exponent << 23) | (LANE & 1) * np.uint32(0x80000000) | LANE * np.uint32(0x10001)
    code = f"v_cvt_scalef32_pk_bf16_fp4 v10, v0, v1{modifier}"
    got = run(code, v={0: word, 1: scale, 10: 0xBAD}, exec_mask=SOME)
    for lane in range(64):
        have = halves(int(got.v[10][lane]))
        if not bit(SOME, lane):
            assert got.v[10][lane] == 0xBAD
        elif exponent == 255:
            assert all(map(isnan, have))
        else:
            for part, nibble in zip(have, (codes[lane] & 15, codes[lane] >> 4), strict=True):
                sign = -1.0 if nibble & 8 else 1.0
                assert part == bits(math.copysign(FP4[nibble & 7] * 2.0 ** (exponent - 127), sign))


@pytest.mark.parametrize("name", ["v_rcp_f32_e32", "v_rcp_iflag_f32_e32", "v_exp_f32_e32"])
def test_approximations(name: str) -> None:
    """The reciprocal and 2^x are within one ulp, and exact at powers of two, 0 and infinity."""
    rng = np.random.default_rng(0)
    if "rcp" in name:
        x = floats(rng)
        normal = (x >> 23 & 255 > 2) & (x >> 23 & 255 < 250)
        x = np.where(normal, x, bits(-3.0)).astype(np.uint32)
        x[:6] = [0, NEGATIVE_ZERO, INF, INF | 1 << 31, bits(-8.0), bits(2.0**-100)]
        exact = [math.inf, -math.inf, 0.0, -0.0, -0.125, 2.0**100]
    else:
        x = rng.uniform(-120, 120, 64).astype(np.float32).view(np.uint32)
        x[:6] = [0, INF, INF | 1 << 31, bits(-3.0), bits(127.0), bits(128.0)]
        exact = [1.0, math.inf, 0.0, 0.125, 2.0**127, math.inf]
    got = run(f"{name} v10, v0", v={0: x})
    assert [int(w) for w in got.v[10][:6]] == [bits(e) for e in exact]
    for have, word in zip(got.v[10][6:], x[6:], strict=True):
        want = 1 / f(int(word)) if "rcp" in name else 2.0 ** f(int(word))
        assert abs(f(int(have)) - want) <= math.ulp(abs(want)) * 2**29, (hex(word), hex(have))
    assert isnan(int(run(f"{name} v10, v0", v={0: NAN}).v[10][0]))


DIVISION = """
    v_div_scale_f32 v3, s[0:1], v1, v1, v0
    v_div_scale_f32 v4, vcc, v0, v1, v0
    v_rcp_f32_e32 v5, v3
    v_fma_f32 v6, -v3, v5, 1.0
    v_fmac_f32_e32 v5, v6, v5
    v_mul_f32_e32 v6, v4, v5
    v_fma_f32 v7, -v3, v6, v4
    v_fmac_f32_e32 v6, v7, v5
    v_fma_f32 v3, -v3, v6, v4
    v_div_fmas_f32 v3, v3, v5, v6
    v_div_fixup_f32 v10, v3, v1, v0"""
"""v10 = v0 / v1, as LLVM divides binary32 numbers when subnormals are on."""


def quotient(a: int, b: int) -> int:
    """The bits of the quotient nearest to a / b."""
    x, y = f(a), f(b)
    sign = math.copysign(1, x) * math.copysign(1, y)
    if math.isnan(x) or math.isnan(y) or (x == 0 == y) or (math.isinf(x) and math.isinf(y)):
        return NAN
    if y == 0 or math.isinf(x):
        return bits(sign * math.inf)
    if x == 0 or math.isinf(y):
        return bits(sign * 0.0)
    return bits(math.copysign(nearest(abs(Fraction(x) / Fraction(y))), sign))


@pytest.mark.parametrize("kind", ["alike", "any", "huge denominators", "subnormal quotients"])
@pytest.mark.parametrize("round_", range(6))
def test_division(kind: str, round_: int) -> None:
    """The division sequence gives the correctly rounded quotient, whatever the sizes of its operands."""
    rng = np.random.default_rng(round_)
    a, b = (rng.integers(0, 2**32, 64, dtype=np.uint32) for _ in range(2))
    if kind == "alike":
        a, b = (x & 0x807FFFFF | rng.integers(100, 150, 64).astype(np.uint32) << 23 for x in (a, b))
    elif kind == "any":
        a, b = np.where(LANE < 32, a, floats(rng)), np.where(LANE < 48, b, floats(rng))
        a, b = (np.where(x & 0x7FFFFFFF > INF, NAN, x).astype(np.uint32) for x in (a, b))
    elif kind == "huge denominators":  # 1 / denominator is subnormal
        b = b & 0x807FFFFF | rng.integers(252, 255, 64).astype(np.uint32) << 23
        a = np.where(a & INF == INF, ONE, a).astype(np.uint32)
    else:  # almost halfway between two subnormals: rounding to 24 bits first would make it a tie
        halfway = [
            (2 * int(rng.integers(2 ** int(n))) + 1) * Fraction(2) ** -150 for n in rng.integers(0, 20, 64)
        ]
        b = b & 0x007FFFFF | rng.integers(150, 220, 64).astype(np.uint32) << 23
        products = [bits(nearest(h * Fraction(f(int(y))))) for h, y in zip(halfway, b, strict=True)]
        a = np.array(products, np.uint32) ^ a & np.uint32(1 << 31)
    got = run(DIVISION, v={0: a, 1: b})
    for x, y, have in zip(a.tolist(), b.tolist(), got.v[10].tolist(), strict=True):
        want = quotient(x, y)
        assert have == want or (isnan(have) and isnan(want)), [hex(n) for n in (x, y, have, want)]


def test_division_steps() -> None:
    """V_DIV_SCALE leaves middling operands alone and clears VCC; V_DIV_FIXUP settles special quotients."""
    v = {0: bits(3.0), 1: bits(2.0)}
    code = "v_div_scale_f32 v3, s[0:1], v1, v1, v0\nv_div_scale_f32 v4, vcc, v0, v1, v0"
    got = run(code, v=v, s={0: M32, 1: M32}, vcc=ALL)
    assert (got.v[3][0], got.v[4][63], got.vcc, got.s[0], got.s[1]) == (v[1], v[0], 0, 0, 0)
    rows = [  # rough quotient, denominator, numerator, quotient
        (1.5, 2.0, 3.0, 1.5), (1.5, -2.0, 3.0, -1.5), (-1.5, 2.0, 3.0, 1.5), (9.0, 0.0, 1.0, math.inf),
        (9.0, -0.0, 1.0, -math.inf), (9.0, math.inf, 1.0, 0.0), (9.0, math.inf, -1.0, -0.0),
        (9.0, 2.0, -math.inf, -math.inf), (9.0, -3.0, 0.0, -0.0), (math.nan, 1e-30, -1e30, -math.inf),
        (9.0, -(2.0**100), 2.0**-60, -0.0),
    ]  # fmt: skip
    columns = [np.array([*map(bits, column), *[0] * 53], np.uint32) for column in zip(*rows, strict=True)]
    got = run("v_div_fixup_f32 v10, v0, v1, v2", v=dict(enumerate(columns[:3])))
    assert got.v[10][:11].tolist() == columns[3][:11].tolist()
    assert isnan(int(got.v[10][11]))


def dpp_source(control: str, lane: int) -> int | None:
    """The lane that a DPP control reads for this lane; None where it points outside."""
    name, _, argument = control.partition(":")
    row, place = lane & 0x30, lane & 15
    if name == "quad_perm":
        return lane & 0x3C | [int(c) for c in argument if c.isdigit()][lane & 3]
    shifted = {"row_shr": -1, "row_shl": 1, "row_ror": -1}
    if name in shifted:
        to = place + shifted[name] * int(argument)
        return row | to & 15 if name == "row_ror" or 0 <= to < 16 else None
    if name == "row_bcast":
        return None if lane <= int(argument) else row - 1 if argument == "15" else 31
    return row | (15 - place) if name == "row_mirror" else lane ^ 7


CONTROLS = [
    *("quad_perm:[1,0,3,2]", "quad_perm:[2,3,0,1]", "quad_perm:[3,2,1,0]", "quad_perm:[0,0,2,1]"),
    *("row_half_mirror", "row_mirror", "row_ror:8", "row_ror:3", "row_bcast:15", "row_bcast:31"),
    *(f"row_shr:{n}" for n in (1, 2, 4, 8)),
    *("row_shl:4", "row_shl:8", "row_shl:1"),
]


def dpp(code: str, control: str, old: np.ndarray, src0: np.ndarray, exec_mask: int, **mask: int) -> None:
    """Check `code`, an instruction with DPP that moves v0, or adds v1 = `old` to it, into `old`."""
    rows, banks, zero = mask.get("rows", 15), mask.get("banks", 15), mask.get("zero", 0)
    text = f"{code} {control} row_mask:{rows:#x} bank_mask:{banks:#x}{' bound_ctrl:1' * zero}"
    got = run(text, v={0: src0, 1: old}, exec_mask=exec_mask)
    want = old.copy()
    for lane in range(64):
        if not (bit(exec_mask, lane) and bit(rows, lane >> 4) and bit(banks, lane >> 2 & 3)):
            continue
        source = dpp_source(control, lane)
        outside = source is None or not bit(exec_mask, source)
        if zero or not outside:
            value = 0 if outside else int(src0[source])
            want[lane] = (value + (int(old[lane]) if "add" in code else 0)) & M32
    assert got.v[1].tolist() == want.tolist()


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("control", CONTROLS)
def test_dpp(control: str, zero: int) -> None:
    """DPP takes src0 from another lane; outside, bound_ctrl:1 reads 0 and without it nothing is written."""
    rng = generator(control)
    a, b = integers(rng), integers(rng)
    for code in ("v_mov_b32_dpp v1, v0", "v_add_u32_dpp v1, v0, v1"):
        dpp(code, control, a, b, ALL, zero=zero)
        dpp(code, control, a, b, ALL, zero=zero, rows=0xA, banks=0x5)
        dpp(code, control, a, b, ALL, zero=zero, rows=0x7, banks=0xC)
    dpp("v_mov_b32_dpp v1, v1", control, a, a, ALL, zero=zero)
    dpp("v_add_u32_dpp v1, v1, v1", control, a, a, ALL, zero=zero)


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("control", ["quad_perm:[1,0,3,2]", "row_shr:1", "row_half_mirror", "row_ror:8"])
def test_dpp_of_inactive_lanes(control: str, zero: int) -> None:
    """An inactive lane is outside too, for a lane that would read it."""
    dpp("v_mov_b32_dpp v1, v0", control, LANE + 1000, LANE + 2000, SOME, zero=zero)


@pytest.mark.parametrize(
    ("operation", "formula"),
    [
        ("v_add_f32", "add(x, y)"),
        ("v_add_u32", "x + y & M32"),
        ("v_max_u32", "max(x, y)"),
        ("v_or_b32", "x | y"),
        ("v_xor_b32", "x ^ y"),
    ],
)
def test_dpp_operations(operation: str, formula: str) -> None:
    """DPP moves src0 and leaves src1 in its lane, also when both are the destination."""
    x = (LANE * 0x9E3779B9 & 0x3FFFFFFF | 0x20000000).astype(np.uint32)
    y = (LANE * 0x85EBCA6B & 0x3FFFFFFF | 0x20000000).astype(np.uint32)
    control = "quad_perm:[2,3,0,1] row_mask:0xf bank_mask:0xf bound_ctrl:1"
    got = run(f"{operation}_dpp v2, v0, v1 {control}\n{operation}_dpp v0, v0, v0 {control}", v={0: x, 1: y})
    for lane in range(64):
        a, b, own = int(x[lane ^ 2]), int(y[lane]), int(x[lane])
        assert got.v[2][lane] == eval(formula, globals(), {"x": a, "y": b})
        assert got.v[0][lane] == eval(formula, globals(), {"x": a, "y": own})


def test_scan() -> None:
    """The kernels' prefix sum: four row_shr steps, then the rows' and the half's last lanes."""
    add, masks = "v_add_u32_dpp v0, v0, v0", "row_mask:0xf bank_mask:0xf bound_ctrl:1"
    steps = [f"{add} row_shr:{n} {masks}" for n in (1, 2, 4, 8)]
    rows = """
        v_mov_b32_e32 v1, 0
        s_nop 1
        v_mov_b32_dpp v1, v0 row_bcast:15 row_mask:0xa bank_mask:0xf bound_ctrl:1
        v_add_u32_e32 v0, v0, v1
        s_nop 1
        v_add_u32_dpp v0, v0, v0 row_bcast:31 row_mask:0xf bank_mask:0xf bound_ctrl:1"""
    got = run("\ns_nop 1\n".join(steps) + rows, v={0: LANE + 1})
    assert got.v[0].tolist() == [n * (n + 1) // 2 for n in range(1, 65)]


def test_readlane() -> None:
    """V_READLANE ignores EXEC; V_READFIRSTLANE takes the lowest active lane, or lane 0 if there is none."""
    code = "v_readlane_b32 s0, v0, 63\nv_readlane_b32 s1, v0, 5\nv_readfirstlane_b32 s2, v0"
    for mask, first in ((ALL, 0), (0b11000, 3), (1 << 63, 63), (0, 0)):
        got = run(code, v={0: LANE * 3 + 100}, exec_mask=mask)
        assert (got.s[0], got.s[1], got.s[2]) == (289, 115, 100 + 3 * first)


@pytest.mark.parametrize("halves", list(itertools.product((0, 1), (0, 1))))
def test_pk_mov(halves: tuple[int, int]) -> None:
    """V_PK_MOV_B32: op_sel[0] chooses the low result's half of S0, op_sel[1] the high one's of S1."""
    select = f"op_sel:[{halves[0]},{halves[1]}]"
    v = {0: LANE, 1: LANE + 100, 2: LANE + 200, 3: LANE + 300, 4: 7, 5: 7}
    got = run(f"v_pk_mov_b32 v[4:5], v[0:1], v[2:3] {select}", v=v, exec_mask=SOME)
    overlap = run(f"v_pk_mov_b32 v[0:1], v[2:3], v[0:1] {select}", v=v)
    scalar = run(f"v_pk_mov_b32 v[4:5], s[2:3], v[2:3] {select}", v=v, s={2: 8, 3: 9})
    for lane in range(64):
        low, high = 100 * halves[0] + lane, 200 + 100 * halves[1] + lane
        assert (got.v[4][lane], got.v[5][lane]) == ((low, high) if bit(SOME, lane) else (7, 7))
        assert (overlap.v[0][lane], overlap.v[1][lane]) == (200 + low, high - 200)
        assert (scalar.v[4][lane], scalar.v[5][lane]) == (8 + halves[0], high)


def test_pk_mov_reads_what_it_chooses() -> None:
    """The halves that stay behind may be unknown."""
    code = "v_pk_mov_b32 v[4:5], v[0:1], v[2:3] op_sel:[1,0]"
    assert run(code, v={1: 5, 2: 6}).v[4:6, 0].tolist() == [5, 6]
    for known in ({0: 5, 2: 6}, {1: 5, 3: 6}):
        with pytest.raises(RuntimeError, match="which nothing has written"):
            run(code, v=known)


def test_writelane() -> None:
    """V_WRITELANE writes one lane, whatever EXEC says; of the lane's number the low six bits count."""
    code = """
        v_writelane_b32 v0, s0, 63
        v_writelane_b32 v0, 42, s2
        v_writelane_b32 v0, -7, 0
        v_writelane_b32 v0, vcc_hi, 1
        v_writelane_b32 v0, m0, 2"""
    for mask in (ALL, 0b11000, 0):
        got = run(code, v={0: LANE * 3}, s={0: 500, 2: 64 + 5}, vcc=502 << 32, m0=503, exec_mask=mask)
        want = (LANE * 3).tolist()
        want[63], want[5], want[0], want[1], want[2] = 500, 42, M32 - 6, 502, 503
        assert got.v[0].tolist() == want


def test_writelane_of_each_wave() -> None:
    """Each wave's own scalar, to its own lane; and a spilled register comes back."""
    code = """
        v_readfirstlane_b32 s0, v0
        s_add_i32 m0, s0, 7
        v_writelane_b32 v1, s0, m0
        s_mov_b32 s0, 0
        v_readlane_b32 s2, v1, m0
        v_mov_b32_e32 v2, s2"""
    wave = np.arange(10, 13, dtype=np.uint32)[:, None]
    got = run(code, v={0: np.repeat(wave, 64, 1), 1: 5}, waves=3)
    for index in range(3):
        want = [5] * 64
        want[17 + index] = 10 + index
        assert got.v[1][index].tolist() == want
        assert got.v[2][index].tolist() == [10 + index] * 64


@pytest.mark.parametrize("size", [16, 32])
def test_permlane_swap(size: int) -> None:
    """The first register's odd rows (of 16 or 32) change places with the second's even ones."""
    got = run(f"v_permlane{size}_swap_b32_e32 v0, v1", v={0: LANE + 100, 1: LANE + 200})
    for lane in range(64):
        odd = lane & size
        assert got.v[0][lane] == (200 + lane - size if odd else 100 + lane)
        assert got.v[1][lane] == (200 + lane if odd else 100 + lane + size)


@pytest.mark.parametrize("exec_mask", [ALL, SOME])
def test_bpermute(exec_mask: int) -> None:
    """DS_BPERMUTE reads lane (address + offset) / 4 mod 64; inactive lanes give 0 and keep what they have."""
    address = generator("bpermute").integers(0, 2**32, 64, dtype=np.uint32)
    code = "ds_bpermute_b32 v2, v0, v1\nds_bpermute_b32 v3, v0, v1 offset:8" + WAIT
    got = run(code, v={0: address, 1: LANE + 500, 2: 1, 3: 2}, exec_mask=exec_mask)
    for register, offset in ((2, 0), (3, 8)):
        for lane in range(64):
            source = (int(address[lane]) + offset) // 4 % 64
            read = 500 + source if bit(exec_mask, source) else 0
            assert got.v[register][lane] == (read if bit(exec_mask, lane) else register - 1)


@pytest.mark.parametrize("exec_mask", [ALL, SOME])
@pytest.mark.parametrize("distance", [16, 8, 1])
def test_swizzle(distance: int, exec_mask: int) -> None:
    """DS_SWIZZLE in SWAP mode exchanges neighbouring groups; an inactive lane reads as 0."""
    code = f"ds_swizzle_b32 v1, v0 offset:swizzle(SWAP,{distance})" + WAIT
    got = run(code, v={0: LANE + 500, 1: 7}, exec_mask=exec_mask)
    for lane in range(64):
        read = 500 + (lane ^ distance) if bit(exec_mask, lane ^ distance) else 0
        assert got.v[1][lane] == (read if bit(exec_mask, lane) else 7)


def packed_bf16(matrix: np.ndarray) -> list[np.ndarray]:
    """Rows of 8 k to lanes: lane i + rows * g holds matrix[i, 8g:8g+8] in four registers, lower k lower."""
    rows = len(matrix)
    word = matrix.astype(np.float32).view(np.uint32) >> 16
    lanes = np.stack([word[lane % rows, 8 * (lane // rows) :][:8] for lane in range(64)])
    return [lanes[:, 2 * r] | lanes[:, 2 * r + 1] << 16 for r in range(4)]


MFMA = [
    # destination, A, B, C; registers 0-3 hold A, 4-7 hold B, the last ones hold C
    ("v[20:23]", "v[0:3]", "v[4:7]", "v[8:11]"),
    ("a[20:23]", "v[0:3]", "v[4:7]", "a[8:11]"),
    ("v[20:23]", "v[0:3]", "a[4:7]", "v[8:11]"),
    ("a[20:23]", "a[0:3]", "v[4:7]", "a[8:11]"),
    ("a[20:23]", "v[0:3]", "a[4:7]", "a[8:11]"),
    ("v[8:11]", "a[0:3]", "a[4:7]", "v[8:11]"),
    ("v[0:3]", "v[0:3]", "v[4:7]", "v[8:11]"),
    ("v[4:7]", "v[0:3]", "v[4:7]", "v[8:11]"),
    ("v[20:23]", "v[0:3]", "v[4:7]", "0"),
    ("a[20:23]", "v[0:3]", "v[4:7]", "0"),
]


@pytest.mark.parametrize("exec_mask", [ALL, 0x5])
@pytest.mark.parametrize(
    ("operands", "size"),
    [(row, 16) for row in MFMA] + [(row, 32) for row in MFMA if row[0] not in ("v[0:3]", "v[4:7]")],
)
def test_mfma(operands: tuple[str, str, str, str], size: int, exec_mask: int) -> None:
    """D = A B + C is exact for small integers, with CDNA4's lane layouts, whatever EXEC is."""
    rng = np.random.default_rng(size)
    depth = 512 // size
    a, b = rng.integers(-100, 101, (size, depth)), rng.integers(-100, 101, (depth, size))
    c = rng.integers(-5000, 5000, (size, size))
    if size == 16:  # lane j + 16 g holds rows 4 g .. 4 g + 3 of column j
        where = [(4 * (n // 16) + r, n % 16) for r in range(4) for n in range(64)]
        code = "v_mfma_f32_16x16x32_bf16 " + ", ".join(operands)
    else:  # register r of lane j + 32 g holds row 8 (r / 4) + 4 g + r mod 4 of column j
        where = [(8 * (r // 4) + 4 * (n // 32) + r % 4, n % 32) for r in range(16) for n in range(64)]
        operands = tuple(x.replace("20:23", "24:39").replace("8:11", "8:23") for x in operands)
        code = "v_mfma_f32_32x32x16_bf16 " + ", ".join(operands)
    count = len(where) // 64
    rows, columns = (np.array(x) for x in zip(*where, strict=True))
    registers = dict(enumerate(packed_bf16(a) + packed_bf16(b.T)))
    layout = c[rows, columns].astype(np.float32).view(np.uint32).reshape(count, 64)
    registers |= {8 + r: layout[r] for r in range(count)}
    got = run(code + "\ns_nop 15\ns_nop 7", v=registers, a=registers, exec_mask=exec_mask)
    target, first = operands[0][0], int(operands[0][2:].split(":")[0])
    have = np.concatenate([(got.a if target == "a" else got.v)[first + r] for r in range(count)])
    want = (a @ b + (0 if operands[3] == "0" else c))[rows, columns]
    assert have.astype(np.uint32).view(np.float32).tolist() == want.tolist()


def small_float(code: int, exponent_bits: int, mantissa_bits: int) -> Fraction:
    """A finite OCP float of 4 or 8 bits: an exponent of 0 is that of 1, without its leading 1."""
    mantissa = code & ((1 << mantissa_bits) - 1)
    exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1)
    size = Fraction(mantissa + (bool(exponent) << mantissa_bits), 1 << mantissa_bits)
    value = size * Fraction(2) ** (max(exponent, 1) - (1 << exponent_bits - 1) + 1)
    return -value if code >> (exponent_bits + mantissa_bits) else value


FORMATS = {"e4m3": (0, 8, 4, 3), "e5m2": (1, 8, 5, 2), "e2m1": (4, 4, 2, 1)}
"""Number, bits, and bits of the exponent and the mantissa."""


def test_small_floats() -> None:
    """The ends of each format and its first denormals, by the OCP specification's tables."""
    assert [small_float(code, 2, 1) for code in range(8)] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert [small_float(code, 4, 3) for code in (1, 8, 0x38, 0x7E, 0xFE)] == [2**-9, 2**-6, 1, 448, -448]
    assert [small_float(code, 5, 2) for code in (1, 4, 0x3C, 0x7B, 0xFB)] == [
        2**-16,
        2**-14,
        1,
        57344,
        -57344,
    ]


def scaled_operand(codes: Any, kind: str, scales: Any, byte: int) -> tuple[list[Any], Any]:
    """Registers of a matrix [rows, k] of codes, and the register with its scales [rows, k / 32] in a byte."""
    rows = len(codes)
    groups = 64 // rows
    if FORMATS[kind][1] == 4:  # lane row + rows * g: from k = 32 g on, the first of two in the low half
        k = [[32 * (n // rows) + i for i in range(32)] for n in range(64)]
    else:  # 16 from k = 16 g on, then 16 from the same place in the second half
        k = [[16 * (n // rows) + i % 16 + i // 16 * 16 * groups for i in range(32)] for n in range(64)]
    lanes = np.array([[int(codes[n % rows, each]) for each in k[n]] for n in range(64)], np.uint64)
    per = 32 // FORMATS[kind][1]
    shifts = np.arange(per, dtype=np.uint64) * np.uint64(32 // per)
    words = (lanes.reshape(64, -1, per) << shifts).sum(2).astype(np.uint32)
    scale = np.array(
        [int(scales[n % rows, n // rows]) << 8 * byte | 0x5A << 8 * (byte ^ 1) for n in range(64)]
    )
    return list(words.T), scale.astype(np.uint32)


@pytest.mark.parametrize("exec_mask", [ALL, 0x5])
@pytest.mark.parametrize("bytes_", [(0, 1), (2, 3), (3, 0)], ids=str)
@pytest.mark.parametrize(
    "kinds", [("e4m3", "e2m1"), ("e2m1", "e4m3"), ("e5m2", "e4m3"), ("e2m1", "e2m1")], ids=str
)
@pytest.mark.parametrize("size", [16, 32])
def test_scaled_mfma(size: int, kinds: tuple[str, str], bytes_: tuple[int, int], exec_mask: int) -> None:
    """Every element of D, with other codes and another scale in each place, whatever EXEC is."""
    rng = np.random.default_rng([size, *bytes_])
    depth, registers, matrices = 2048 // size, {}, []
    for kind, byte, first in zip(kinds, bytes_, (0, 8), strict=True):
        _, width, *layout = FORMATS[kind]
        codes = rng.integers(0, 1 << width, (size, depth))
        finite = 126 if kind == "e4m3" else 123
        codes = codes if width == 4 else np.where(codes % 128 > finite, codes - 16, codes)
        scales = rng.integers(122, 133, (size, depth // 32))
        words, scale = scaled_operand(codes, kind, scales, byte)
        registers |= {first + i: word for i, word in enumerate(words)} | {60 + first: scale}
        exact = [[small_float(int(code), *layout) for code in row] for row in codes]
        matrices.append(
            [
                [x * Fraction(2) ** (int(scales[i, k // 32]) - 127) for k, x in enumerate(row)]
                for i, row in enumerate(exact)
            ]
        )
    count = size * size // 64
    c = rng.integers(-50, 50, (size, size))
    where = [
        (8 * (r // 4) + 4 * (n // size) + r % 4 if size == 32 else 4 * (n // 16) + r, n % size)
        for r in range(count)
        for n in range(64)
    ]
    laid_out = np.array([c[place] for place in where], np.float32).view(np.uint32).reshape(count, 64)
    registers |= {20 + r: laid_out[r] for r in range(count)}
    last = [first + (3 if FORMATS[kind][1] == 4 else 7) for kind, first in zip(kinds, (0, 8), strict=True)]
    low, high = ([byte >> bit & 1 for byte in bytes_] for bit in (0, 1))
    code = (
        f"v_mfma_scale_f32_{size}x{size}x{depth}_f8f6f4 a[40:{39 + count}], v[0:{last[0]}], v[8:{last[1]}], "
        f"a[20:{19 + count}], v60, v68 op_sel:[{low[0]},{low[1]},0] op_sel_hi:[{high[0]},{high[1]},0] "
        f"cbsz:{FORMATS[kinds[0]][0]} blgp:{FORMATS[kinds[1]][0]}"
    )
    got = run(code + "\ns_nop 15\ns_nop 7", v=registers, a=registers, exec_mask=exec_mask)
    have = np.concatenate([got.a[40 + r] for r in range(count)]).astype(np.uint32).view(np.float32).tolist()
    a, b = matrices
    want = [
        nearest(sum((x * y for x, y in zip(a[i], b[j], strict=True)), Fraction(int(c[i, j]))))
        for i, j in where
    ]
    assert have == want


SCALED = "v_mfma_scale_f32_16x16x128_f8f6f4 v[20:23], v[0:7], v[8:11], 0, v60, v68 op_sel_hi:[0,0,0] blgp:4"


@pytest.mark.parametrize(
    ("register", "word"),
    [(60, 255), (68, 255), (3, 0x7F), (3, 0xFF000000)],
    ids=["scale a", "scale b", "+", "-"],
)
def test_scaled_mfma_nan(register: int, word: int) -> None:
    """A scale of 255 and an e4m3 of 127 or 255 are NaN, and spoil their row or column, even times 0."""
    zeros = {i: np.zeros(64, np.uint32) for i in range(12)} | {
        i: np.full(64, 127, np.uint32) for i in (60, 68)
    }
    zeros[register][5] = word
    got = run(SCALED + "\ns_nop 15", v=zeros)
    nan = np.isnan(np.stack([got.v[20 + r] for r in range(4)]).view(np.float32))
    # Row 5 is register 1 of lanes 16 to 31; column 5 is lane 5 of each 16.
    want = np.zeros((4, 64), bool)
    if register == 68:
        want[:, 5::16] = True
    else:
        want[1, 16:32] = True
    assert (nan == want).all()


@pytest.mark.parametrize(
    "other",
    [
        SCALED.replace("v60", "s4"),
        SCALED.replace("v60", "1.0"),
        SCALED.replace("v[0:7]", "v[0:5]") + " cbsz:2",
    ],
    ids=["scalar scale", "constant scale", "e2m3"],
)
def test_scaled_mfma_refused(other: str) -> None:
    """What the hardware reads otherwise, or what no kernel has, is not computed."""
    # Not assembled first: only older releases of LLVM take a scalar scale.
    with pytest.raises(Unknown, match="matrix of this format"):
        load("snippet", f"{other}\ns_endpgm\n{METADATA}{NOTES}")


def nearest_e4m3(word: int) -> int:
    """The code of the e4m3 nearest to a float, ties to the even code."""
    sign, x = word >> 24 & 128, abs(f(word))
    if math.isnan(x):
        return sign | 127
    values = [small_float(code, 4, 3) for code in range(127)]
    exact = Fraction(x)
    return sign | min(range(127), key=lambda code: (abs(values[code] - exact), code & 1))


@pytest.mark.parametrize("exec_mask", [ALL, SOME])
@pytest.mark.parametrize("half", [0, 1])
def test_pack_e4m3(half: int, exec_mask: int) -> None:
    """Every code, the middles between two, the ends and NaN; the register's other half stays."""
    values = [small_float(code, 4, 3) for code in range(127)]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(values)]
    finite = [bits(float(x)) for x in [*values, *middles, 463]]
    words = finite + [1, 0x00400000, NAN] + [neg(word) for word in finite]
    words += [bits(nearest(Fraction(f(word)))) + step for word in finite[1:40] for step in (-1, 1)]
    for first in range(0, len(words), 64):
        chunk = np.array((words[first : first + 64] * 64)[:64], np.uint32)
        old = np.full(64, 0xABCD1234, np.uint32)
        op_sel = " op_sel:[0,0,0,1]" if half else ""
        code = f"v_cvt_scalef32_pk_fp8_f32 v10, v0, v1, 1.0{op_sel}"
        got = run(code, v={0: chunk, 1: chunk[::-1], 10: old}, exec_mask=exec_mask).v[10]
        for lane in range(64):
            low, high = nearest_e4m3(int(chunk[lane])), nearest_e4m3(int(chunk[63 - lane]))
            packed = low | high << 8
            want = 0xABCD1234 & (0xFFFF if half else 0xFFFF0000) | packed << 16 * half
            assert got[lane] == (want if bit(exec_mask, lane) else 0xABCD1234), (lane, hex(chunk[lane]))


@pytest.mark.parametrize("number", [465.0, -500.0, math.inf])
def test_beyond_e4m3(number: float) -> None:
    """What FP16_OVFL decides is refused but in lanes that are off; no other mode is set."""
    words = np.full(64, bits(1.0), np.uint32)
    words[3] = bits(number)
    code = "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 23, 1), 1\nv_cvt_scalef32_pk_fp8_f32 v10, v0, v0, 1.0"
    with pytest.raises(Unknown, match="FP16_OVFL"):
        run(code, v={0: words, 10: words})
    run(code, v={0: words, 10: words}, exec_mask=ALL ^ 8)
    with pytest.raises(Unknown, match="not a mode"):
        run("s_setreg_imm32_b32 hwreg(HW_REG_MODE, 4, 2), 0")


@pytest.mark.parametrize("half", [0, 1])
def test_unpack_e4m3(half: int) -> None:
    """Every code, in either half; 127 and 255 are NaN."""
    codes = np.arange(256, dtype=np.uint32).reshape(4, 64)
    op_sel = " op_sel:[1,0,0]" if half else ""
    for row in codes:
        word = (row | (255 - row) << np.uint32(8)) << np.uint32(16 * half)
        got = run(f"v_cvt_scalef32_pk_f32_fp8 v[10:11], v0, 1.0{op_sel}", v={0: word}).v[10:12]
        for lane, each in itertools.product(range(64), range(2)):
            code = int(row[lane]) if each == 0 else 255 - int(row[lane])
            if code & 127 == 127:
                assert isnan(int(got[each, lane]))
            else:
                want = bits(float(small_float(code, 4, 3)))
                assert got[each, lane] == want | (NEGATIVE_ZERO if code == 128 else 0)


@pytest.mark.parametrize(("scale", "power"), [("2.0", 1), ("0.5", -1), ("4.0", 2)])
def test_scale_of_e4m3(scale: str, power: int) -> None:
    """Packing divides by the scale, unpacking multiplies by it."""
    three = np.full(64, bits(3.0), np.uint32)
    packed = run(f"v_cvt_scalef32_pk_fp8_f32 v10, v0, v0, {scale}", v={0: three, 10: three * 0}).v[10]
    assert packed[0] == nearest_e4m3(bits(3.0 / 2**power)) * 0x101
    got = run(f"v_cvt_scalef32_pk_f32_fp8 v[10:11], v0, {scale}", v={0: np.full(64, 0x38, np.uint32)}).v[10]
    assert f(int(got[0])) == 2.0**power


BUFFER = "v0, s[8:11], 0 offen"
LOADS = [
    # code (v0: offset or LDS address, v[2:3]: address, s[6:7]: base), [(bytes further on, size), ...]
    (f"buffer_load_ubyte v10, {BUFFER} offset:257", [(257, 1)]),
    (f"buffer_load_ushort v10, {BUFFER} offset:2", [(2, 2)]),
    (f"buffer_load_dword v10, {BUFFER}", [(0, 4)]),
    (f"buffer_load_dwordx2 v[10:11], {BUFFER} sc0 nt", [(0, 8)]),
    (f"buffer_load_dwordx4 v[10:13], {BUFFER} offset:4080", [(4080, 16)]),
    (f"buffer_load_dwordx4 a[10:13], {BUFFER}", [(0, 16)]),
    ("global_load_ubyte v10, v[2:3], off offset:3", [(3, 1)]),
    ("global_load_ushort v10, v[2:3], off offset:2048", [(2048, 2)]),
    ("global_load_ushort v10, v0, s[6:7]", [(0, 2)]),
    ("global_load_dword v10, v[2:3], off offset:4", [(4, 4)]),
    ("global_load_dword v10, v0, s[6:7] offset:-8", [(-8, 4)]),
    ("global_load_dwordx2 v[10:11], v[2:3], off offset:128 nt", [(128, 8)]),
    ("global_load_dwordx2 a[10:11], v[2:3], off nt", [(0, 8)]),
    ("global_load_dwordx4 v[10:13], v[2:3], off offset:-16", [(-16, 16)]),
    ("global_load_dwordx4 a[10:13], v[2:3], off offset:2560", [(2560, 16)]),
    ("ds_read_b32 v10, v0 offset:128", [(128, 4)]),
    ("ds_read_b96 v[10:12], v0", [(0, 12)]),
    ("ds_read_b128 v[10:13], v0 offset:1040", [(1040, 16)]),
    ("ds_read_b128 a[10:13], v0", [(0, 16)]),
    ("ds_read_i8 v10, v0 offset:1281", [(1281, 1)]),
    ("ds_read_u16 v10, v0 offset:2", [(2, 2)]),
    ("ds_read2_b32 v[10:11], v0 offset0:32 offset1:7", [(128, 4), (28, 4)]),
    ("ds_read2_b32 v[10:11], v0 offset1:255", [(0, 4), (1020, 4)]),
    ("ds_read2_b64 v[10:13], v0 offset0:192 offset1:208", [(1536, 8), (1664, 8)]),
    ("ds_read2st64_b32 v[10:11], v0 offset1:1", [(0, 4), (256, 4)]),
    ("ds_read2st64_b64 v[10:13], v0 offset0:3 offset1:1", [(1536, 8), (512, 8)]),
]


def setting(code: str) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Random bytes in memory and in LDS, a place of 64 bytes for each lane, registers that point there."""
    rng = generator(code)
    memory = rng.integers(0, 256, 16384, dtype=np.uint8)
    place = (256 + 64 * rng.permutation(64)).astype(np.uint32)
    base = memory.ctypes.data
    address = base + place.astype(np.uint64)
    v = {n: rng.integers(0, 2**32, 64, dtype=np.uint32) for n in range(10, 16)}
    a = dict(v)
    v |= {0: place, 2: address.astype(np.uint32), 3: (address >> np.uint64(32)).astype(np.uint32)}
    s = {6: base & M32, 7: base >> 32, 8: base & M32, 9: base >> 32, 10: memory.nbytes, 11: 0x27000}
    return memory, place, {"v": v, "a": a, "s": s, "memory": [memory], "lds": memory.copy()}


@pytest.mark.parametrize("exec_mask", [ALL, SOME])
@pytest.mark.parametrize(("code", "pieces"), LOADS)
def test_load(code: str, pieces: list[tuple[int, int]], exec_mask: int) -> None:
    """A load finds its bytes, extends them to words, and leaves inactive lanes and other registers alone."""
    memory, place, inputs = setting(code)
    got = run(code + WAIT, **inputs, exec_mask=exec_mask)
    for lane in range(64):
        data = b"".join(memory[int(place[lane]) + at :][:size].tobytes() for at, size in pieces)
        if len(data) < 4:
            data += (b"\xff" if "_i8" in code and data[-1] > 127 else b"\0") * (4 - len(data))
        want = [int(inputs["v"][n][lane]) for n in range(10, 16)]
        if bit(exec_mask, lane):
            want[: len(data) // 4] = struct.unpack(f"<{len(data) // 4}I", data)
        file = got.a if " a[" in code else got.v
        assert [int(file[n][lane]) for n in range(10, 16)] == want


STORES = [
    # code, [(bytes further on, size, first register, how far it is shifted right), ...]
    (f"buffer_store_short v10, {BUFFER}", [(0, 2, 10, 0)]),
    (f"buffer_store_dword v10, {BUFFER} offset:8", [(8, 4, 10, 0)]),
    (f"buffer_store_dwordx2 v[10:11], {BUFFER}", [(0, 8, 10, 0)]),
    (f"buffer_store_dwordx4 v[10:13], {BUFFER}", [(0, 16, 10, 0)]),
    ("global_store_short v[2:3], v10, off", [(0, 2, 10, 0)]),
    ("global_store_short_d16_hi v[2:3], v10, off", [(0, 2, 10, 16)]),
    ("global_store_dword v[2:3], v10, off offset:768", [(768, 4, 10, 0)]),
    ("global_store_dword v0, v10, s[6:7]", [(0, 4, 10, 0)]),
    ("global_store_dwordx2 v[2:3], v[10:11], off offset:-64", [(-64, 8, 10, 0)]),
    ("global_store_dwordx2 v0, v[10:11], s[6:7]", [(0, 8, 10, 0)]),
    ("global_store_dwordx4 v[2:3], v[10:13], off offset:1536", [(1536, 16, 10, 0)]),
    ("ds_write_b8 v0, v10 offset:5", [(5, 1, 10, 0)]),
    ("ds_write_b8_d16_hi v0, v10 offset:1", [(1, 1, 10, 16)]),
    ("ds_write_b16 v0, v10 offset:32", [(32, 2, 10, 0)]),
    ("ds_write_b16_d16_hi v0, v10 offset:194", [(194, 2, 10, 16)]),
    ("ds_write_b32 v0, v10 offset:4096", [(4096, 4, 10, 0)]),
    ("ds_write_b64 v0, v[10:11]", [(0, 8, 10, 0)]),
    ("ds_write_b128 v0, v[10:13] offset:16", [(16, 16, 10, 0)]),
    ("ds_write_b128 v0, a[10:13]", [(0, 16, 10, 0)]),
    ("ds_write2_b32 v0, v10, v14 offset0:12 offset1:3", [(48, 4, 10, 0), (12, 4, 14, 0)]),
    ("ds_write2_b64 v0, v[10:11], v[14:15] offset1:4", [(0, 8, 10, 0), (32, 8, 14, 0)]),
    ("ds_write2st64_b32 v0, v10, v14 offset0:16 offset1:8", [(4096, 4, 10, 0), (2048, 4, 14, 0)]),
    ("ds_write2st64_b64 v0, v[10:11], v[14:15] offset1:8", [(0, 8, 10, 0), (4096, 8, 14, 0)]),
]


@pytest.mark.parametrize("exec_mask", [ALL, SOME])
@pytest.mark.parametrize(("code", "pieces"), STORES)
def test_store(code: str, pieces: list[tuple[int, int, int, int]], exec_mask: int) -> None:
    """A store changes the active lanes' bytes and no others."""
    memory, place, inputs = setting(code)
    want = memory.copy()
    got = run(code + WAIT, **inputs, exec_mask=exec_mask)
    for at, size, register, shift in pieces:
        for lane in filter(lambda n: bit(exec_mask, n), range(64)):
            data = b"".join(inputs["v"][n][lane].tobytes() for n in range(register, min(register + 4, 16)))
            start = int(place[lane]) + at
            want[start : start + size] = np.frombuffer(data[shift // 8 :][:size], np.uint8)
    assert (got.lds if code.startswith("ds") else memory)[: len(want)].tolist() == want.tolist()


def test_scalar_base() -> None:
    """A global access with a scalar base adds its vector offset as an unsigned 32-bit number."""
    memory = np.arange(64, dtype=np.uint32)
    base = memory.ctypes.data - 0xFFFFFF00 & M64
    code = "global_load_dword v1, v0, s[0:1]" + WAIT
    got = run(code, v={0: LANE * 4 + 0xFFFFFF00}, s={0: base & M32, 1: base >> 32}, memory=[memory])
    assert got.v[1].tolist() == memory.tolist()


def buffer(memory: np.ndarray, size: int) -> dict[int, int]:
    """s[8:11], a raw buffer of the array's first `size` bytes."""
    base = memory.ctypes.data
    return {8: base & M32, 9: base >> 32, 10: size, 11: 0x27000}


def test_buffer_range() -> None:
    """Beyond a buffer's records loads give 0 and stores and atomics do nothing, each dword on its own."""
    memory = np.arange(1, 129, dtype=np.uint32)
    v = {0: LANE * 4, 20: 77, 21: 88}
    v[0][60:] = 0x80000000, 0xFFFFFF00, 0x7FFFFFF0, 0x80000010
    reached = [i if i < 60 else 1 << 29 for i in range(64)]
    code = f"""
        buffer_load_dword v4, {BUFFER}
        buffer_load_dwordx4 v[8:11], {BUFFER}
        buffer_load_ushort v5, {BUFFER}
        buffer_load_ubyte v6, {BUFFER} offset:96{WAIT}"""
    got = run(code, v=v, s=buffer(memory, 100), memory=[memory])
    for lane, index in enumerate(reached):
        assert [int(got.v[8 + r][lane]) for r in range(4)] == [
            index + r + 1 if index + r < 25 else 0 for r in range(4)
        ]
        assert got.v[4][lane] == got.v[5][lane] == (index + 1 if index < 25 else 0)
        assert got.v[6][lane] == (25 if index == 0 else 0)
    cut = run(f"buffer_load_dwordx4 v[8:11], {BUFFER}\nbuffer_load_ushort v5, {BUFFER}{WAIT}", v=v,
              s=buffer(memory, 98), memory=[memory], exec_mask=1 << 23)  # fmt: skip
    assert [int(cut.v[n][23]) for n in (8, 9, 10, 5)] == [24, 0, 0, 24]
    rest = memory[25:].tolist()
    for code, size, exec_mask, want in [
        ("buffer_store_dword v20", 100, ALL, [77] * 25),
        ("buffer_atomic_add v20", 100, ALL, [154] * 25),
        ("buffer_store_dwordx2 v[20:21]", 100, 1 << 24, [154] * 24 + [77]),
        ("buffer_store_short v20", 0x7FFFFFFE, 1 << 60, [154] * 24 + [77]),
    ]:
        run(f"{code}, {BUFFER}{WAIT}", v=v, s=buffer(memory, size), memory=[memory], exec_mask=exec_mask)
        assert memory.tolist() == want + rest


@pytest.mark.parametrize("m0", [0x220, 0x11220])
@pytest.mark.parametrize("exec_mask", [ALL, SOME])
@pytest.mark.parametrize(
    "code",
    [
        f"buffer_load_dword {BUFFER} lds",
        f"buffer_load_dword {BUFFER} sc0 nt lds",
        f"buffer_load_dwordx4 {BUFFER} lds",
        "global_load_lds_dword v[2:3], off",
        "global_load_lds_dwordx4 v[2:3], off",
    ],
)
def test_load_to_lds(code: str, exec_mask: int, m0: int) -> None:
    """Loads to LDS put lane n's words at M0 + n times their size, and 0 for what is beyond the buffer."""
    memory, place, inputs = setting(code)
    inputs["s"][10] = size = 2952 if "buffer" in code else memory.nbytes
    inputs["lds"] = np.resize(memory, 0x14000)  # more than 16 bits of M0 count: LDS is 160 KiB
    want = inputs["lds"].copy()
    got = run(code + WAIT, **inputs, m0=m0, exec_mask=exec_mask)
    words = 4 if "x4" in code else 1
    for lane in filter(lambda n: bit(exec_mask, n), range(64)):
        for start in range(0, 4 * words, 4):
            at, to = int(place[lane]) + start, m0 + lane * 4 * words + start
            want[to : to + 4] = memory[at : at + 4] if at < size else 0
    assert got.lds[: len(want)].tolist() == want.tolist()


@pytest.mark.parametrize("exec_mask", [ALL, SOME])
@pytest.mark.parametrize("code", [f"buffer_atomic_add v1, {BUFFER}", "global_atomic_add v[2:3], v1, off"])
def test_atomic(code: str, exec_mask: int) -> None:
    """Every active lane's addend counts, also where lanes and waves share an address; sums wrap."""
    memory = np.array([0, M32, 0x80000000, 5], np.uint32)
    want = [int(x) for x in memory]
    place = LANE * 4 % 16
    address = memory.ctypes.data + place.astype(np.uint64)
    addend = LANE * 0x01234567 + 1
    for lane in filter(lambda n: bit(exec_mask, n), range(64)):
        want[lane % 4] = want[lane % 4] + 2 * int(addend[lane]) & M32
    v = {0: place, 1: addend, 2: address.astype(np.uint32), 3: (address >> np.uint64(32)).astype(np.uint32)}
    run(code + WAIT, v=v, s=buffer(memory, 16), memory=[memory], exec_mask=exec_mask, waves=2)
    assert memory.tolist() == want


def test_scratch() -> None:
    """Scratch is a lane's own memory: stores of 1, 2 and 4 words, loads that straddle them, EXEC."""
    v = {n: LANE * 16 + n for n in range(16)}
    code = f"""
        scratch_store_dword off, v0, off
        scratch_store_dword off, v1, off offset:4
        scratch_store_dwordx2 off, v[2:3], off offset:8
        scratch_store_dwordx4 off, v[4:7], off offset:16
        s_mov_b64 exec, 0xff
        scratch_store_dword off, v15, off offset:12
        scratch_store_dwordx2 off, v[14:15], off offset:24
        s_mov_b64 exec, -1
        scratch_store_dwordx4 off, v[8:11], off offset:32{WAIT}
        scratch_load_dwordx4 v[20:23], off, off
        scratch_load_dwordx4 v[24:27], off, off offset:20
        scratch_load_dwordx2 v[28:29], off, off offset:36
        scratch_load_dword v30, off, off offset:44
        s_mov_b64 exec, 0xff00
        scratch_load_dword v31, off, off{WAIT}"""
    got = run(code, v={**v, 31: 9}, scratch_bytes=64)
    for lane in range(64):
        few = lane < 8
        want = [0, 1, 2, 15 if few else 3, 5, 14 if few else 6, 15 if few else 7, 8, 9, 10, 11]
        assert [int(got.v[20 + i][lane]) - 16 * lane for i in range(11)] == want
        assert got.v[31][lane] == (16 * lane if 8 <= lane < 16 else 9)


def test_scalar_load() -> None:
    """S_LOAD reads 1 to 8 consecutive words at its base plus a constant and a register."""
    memory = np.arange(100, 164, dtype=np.uint32)
    base = memory.ctypes.data
    code = f"""
        s_load_dword s4, s[0:1], 0x68
        s_load_dword s5, s[0:1], s2 offset:0x0
        s_load_dword s6, s[0:1], s2 offset:0x8
        s_load_dwordx2 s[8:9], s[0:1], 0x6c
        s_load_dwordx4 s[12:15], s[0:1], 0x0
        s_load_dwordx8 s[16:23], s[0:1], 0x70
        s_waitcnt lgkmcnt(0)
        s_load_dwordx2 s[0:1], s[0:1], 0x4{WAIT}"""
    got = run(code, s={0: base & M32, 1: base >> 32, 2: 40}, memory=[memory])
    assert [got.s[n] for n in (4, 5, 6, 8, 9)] == [126, 110, 112, 127, 128]
    assert [got.s[n] for n in range(12, 24)] == [100, 101, 102, 103, *range(128, 136)]
    assert (got.s[0], got.s[1]) == (101, 102)


@pytest.mark.parametrize(
    ("branch", "state", "taken"),
    [
        ("s_branch", {}, True),
        ("s_cbranch_scc0", {"scc": False}, True),
        ("s_cbranch_scc0", {"scc": True}, False),
        ("s_cbranch_scc1", {"scc": False}, False),
        ("s_cbranch_scc1", {"scc": True}, True),
        ("s_cbranch_vccz", {"vcc": 0}, True),
        ("s_cbranch_vccz", {"vcc": 1 << 63}, False),
        ("s_cbranch_vccz", {"vcc": 1 << 63, "exec_mask": 1}, False),
        ("s_cbranch_vccnz", {"vcc": 0}, False),
        ("s_cbranch_vccnz", {"vcc": 1 << 40}, True),
        ("s_cbranch_execz", {"exec_mask": 0}, True),
        ("s_cbranch_execz", {"exec_mask": 1 << 63}, False),
        ("s_cbranch_execnz", {"exec_mask": 0}, False),
        ("s_cbranch_execnz", {"exec_mask": 1 << 32}, True),
    ],
)
def test_branch(branch: str, state: dict[str, int], taken: bool) -> None:
    """A branch goes by all of its condition: SCC, or every bit of VCC or EXEC."""
    got = run(f"s_mov_b32 s0, 1\n{branch} .LBB0_1\ns_mov_b32 s0, 2\n.LBB0_1:\ns_mov_b32 s1, s0", **state)
    assert got.s[1] == (1 if taken else 2)


def test_divergent_lanes() -> None:
    """If-else over lanes: each side runs with its part of EXEC, which is whole again afterwards."""
    code = """
        v_cmp_gt_u32_e32 vcc, 20, v0
        s_and_saveexec_b64 s[0:1], vcc
        s_xor_b64 s[2:3], exec, s[0:1]
        s_cbranch_execz .LBB0_2
        v_add_u32_e32 v1, 100, v0
    .LBB0_2:
        s_mov_b64 exec, s[2:3]
        s_cbranch_execz .LBB0_3
        v_add_u32_e32 v1, 0x1000, v0
    .LBB0_3:
        s_or_b64 exec, exec, s[0:1]
        v_add_u32_e32 v1, 1, v1"""
    got = run(code, v={0: LANE, 1: 0}, exec_mask=M64 ^ 1 << 30)
    want = [101 + n if n < 20 else 0x1001 + n for n in range(64)]
    want[30] = 0
    assert (got.v[1].tolist(), got.exec) == (want, M64 ^ 1 << 30)


def test_divergent_waves() -> None:
    """Waves loop for their own numbers of turns, take their own branches, and meet again."""
    code = """
        v_readfirstlane_b32 s0, v0
        s_mov_b32 s1, 0
    .LBB0_1:
        s_add_i32 s1, s1, s0
        s_sub_i32 s0, s0, 1
        s_cmp_lg_u32 s0, 0
        s_cbranch_scc1 .LBB0_1
        s_bitcmp1_b32 s1, 0
        s_cbranch_scc0 .LBB0_2
        s_add_i32 s1, s1, 0x1000
    .LBB0_2:
        v_add_u32_e32 v1, s1, v1"""
    turns = np.arange(1, 6, dtype=np.uint32)
    got = run(code, v={0: np.repeat(turns[:, None], 64, 1), 1: np.tile(LANE, (5, 1))}, waves=5)
    sums = [0x1001, 0x1003, 6, 10, 0x100F]
    assert got.v[1].tolist() == [[total + lane for lane in range(64)] for total in sums]


def test_barrier() -> None:
    """After s_barrier a wave reads what the others wrote to LDS, also when it comes to the barrier first."""
    code = f"""
        v_readfirstlane_b32 s0, v0
    .LBB0_1:
        s_cmp_eq_u32 s0, 0
        s_cbranch_scc1 .LBB0_2
        s_sub_i32 s0, s0, 1
        s_branch .LBB0_1
    .LBB0_2:
        ds_write_b32 v1, v2{WAIT}
        s_barrier
        ds_read_b32 v4, v3{WAIT}
        s_barrier
        ds_write_b32 v1, v4{WAIT}
        s_barrier
        ds_read_b32 v5, v3{WAIT}"""
    wave = np.arange(4, dtype=np.uint32)[:, None]
    own, other = wave * 256 + LANE * 4, (wave + 1) % 4 * 256 + (63 - LANE) * 4
    got = run(code, v={0: wave * 5 + LANE * 0, 1: own, 2: wave * 1000 + LANE, 3: other}, waves=4)
    assert got.v[4].tolist() == ((wave + 1) % 4 * 1000 + 63 - LANE).tolist()
    assert got.v[5].tolist() == ((wave + 2) % 4 * 1000 + LANE).tolist()


@pytest.mark.parametrize(
    "code",
    [
        "v_add_u32_e32 v10, v0, v9",
        "s_add_u32 s4, s0, s9",
        "ds_read_b32 v10, v0" + WAIT,
        "global_load_dword v10, v[2:3], off offset:2048" + WAIT,
        "global_store_dword v[2:3], v0, off offset:-4" + WAIT,
        "global_load_dword v10, v[2:3], off\nv_add_u32_e32 v10, v10, v10" + WAIT,
        "s_load_dword s4, s[0:1], 0x0\ns_add_u32 s5, s4, s4" + WAIT,
        "s_mov_b64 exec, 1\nv_mov_b32_e32 v9, v0\ns_mov_b64 exec, -1\nv_add_u32_e32 v10, v9, v9",
        "global_load_lds_dword v[2:3], off\nds_read_b32 v10, v0" + WAIT,
        "scratch_load_dword v10, off, off" + WAIT,
    ],
)
def test_faults(code: str) -> None:
    """What hardware would leave to chance is an error: unset state, foreign memory, a load under way."""
    memory = np.zeros(256, np.uint32)
    base = memory.ctypes.data
    v = {0: LANE * 4, 2: base & M32, 3: base >> 32}
    with pytest.raises(RuntimeError):
        run(code, v=v, s={0: base & M32, 1: base >> 32}, m0=0, memory=[memory], scratch_bytes=64)


def test_large_lds() -> None:
    """LDS addresses are wider than the 16 bits of an offset: gfx950 has 160 KiB."""
    code = f"ds_write_b32 v0, v1 offset:0xff00{WAIT}\nds_read_b32 v2, v3{WAIT}"
    lds = np.zeros(160 * 1024, np.uint8)
    got = run(code, v={0: 0x17F00 + LANE * 4, 1: LANE + 7, 3: 0x27E00 + (63 - LANE) * 4}, lds=lds)
    assert got.v[2].tolist() == (LANE[::-1] + 7).tolist()


@pytest.mark.parametrize(("used", "ready"), [("v10", True), ("v11", False)])
def test_waiting_for_some(used: str, ready: bool) -> None:
    """s_waitcnt vmcnt(1) waits for all loads but the latest one."""
    memory = np.arange(128, dtype=np.uint32)
    code = f"""
        buffer_load_dword v10, {BUFFER}
        buffer_load_dword v11, {BUFFER} offset:4
        s_waitcnt vmcnt(1)
        v_add_u32_e32 v12, 1, {used}{WAIT}"""
    inputs = {"v": {0: LANE * 4}, "s": buffer(memory, 512), "memory": [memory]}
    if ready:
        assert run(code, **inputs).v[12].tolist() == (LANE + 1).tolist()
    else:
        with pytest.raises(RuntimeError):
            run(code, **inputs)


def test_waiting_for_nothing() -> None:
    """Each counter's largest number lets everything stay outstanding."""
    memory = np.arange(64, dtype=np.uint32)
    inputs = {"v": {0: LANE * 4}, "s": buffer(memory, 256), "memory": [memory]}
    load = f"buffer_load_dword v10, {BUFFER}\ns_waitcnt vmcnt(63) expcnt(7) lgkmcnt(15)\n"
    run(load, **inputs)
    with pytest.raises(RuntimeError, match="an s_waitcnt is missing"):
        run(f"{load}v_mov_b32_e32 v11, v10", **inputs)
    with pytest.raises(RuntimeError, match="is not something the emulator knows"):
        run("s_waitcnt expcnt(0)")


@pytest.mark.parametrize("barrier", ["", "s_barrier"])
def test_race(barrier: str) -> None:
    """Reading what another wave has written to LDS is an error unless a barrier lies between."""
    own = np.arange(128, dtype=np.uint32).reshape(2, 64) * 4
    code = f"ds_write_b32 v0, v0{WAIT}\n{barrier}\nds_read_b32 v2, v1{WAIT}"
    if barrier:
        assert run(code, v={0: own, 1: own[::-1]}, waves=2).v[2].tolist() == own[::-1].tolist()
    else:
        with pytest.raises(RuntimeError):
            run(code, v={0: own, 1: own[::-1]}, waves=2)


COMPARE: dict[str, Callable[[int, int], bool]] = {
    name: getattr(operator, name) for name in ("eq", "ge", "gt", "le", "lt", "ne")
}


@pytest.mark.parametrize(("name", "kind"), list(itertools.product(COMPARE, ("i16", "u16", "i32", "u32"))))
def test_every_comparison(name: str, kind: str) -> None:
    """Each pair of edges, as numbers with or without a sign and of both widths."""
    width = int(kind[1:])
    pairs = list(itertools.product(EDGES, EDGES))
    pairs += [(0, 0)] * (-len(pairs) % 64)
    for at in range(0, len(pairs), 64):
        a, b = (np.array(column, np.uint32) for column in zip(*pairs[at : at + 64], strict=True))
        got = run(f"v_cmp_{name}_{kind}_e32 vcc, v0, v1", v={0: a, 1: b})
        read = signed if kind[0] == "i" else (lambda value, width: value & ((1 << width) - 1))
        want = [COMPARE[name](read(int(x), width), read(int(y), width)) for x, y in pairs[at : at + 64]]
        assert [bool(bit(got.vcc, lane)) for lane in range(64)] == want


@pytest.mark.parametrize("form", ["v[2:3], v[4:5]", "s[4:5], v[4:5]", "-1, v[4:5]"])
@pytest.mark.parametrize(("name", "kind"), list(itertools.product(COMPARE, ("i64", "u64"))))
def test_comparison_of_pairs(name: str, kind: str, form: str) -> None:
    """64 bits, of which either half may decide."""
    a, b = zip(*itertools.islice(itertools.cycle(itertools.product(EDGES, EDGES)), 4096), strict=True)
    rng = generator(form)
    order = rng.permutation(4096)
    a_high, b_high = (np.array([each[i] for i in order], np.uint32) for each in (a, b))
    a_low, b_low = (rng.choice(np.array(EDGES, np.uint32), 4096) for _ in range(2))
    for at in range(0, 4096, 64):
        some = slice(at, at + 64)
        v = {2: a_low[some], 3: a_high[some], 4: b_low[some], 5: b_high[some]}
        s = {4: int(a_low[at]), 5: int(a_high[at]), 8: M32, 9: M32}
        got = run(f"v_cmp_{name}_{kind}_e64 s[8:9], {form}", v=v, s=s)
        for lane in range(64):
            pair = {"v": (3, 2), "s": (5, 4)}.get(form[0])
            first = (1 << 64) - 1
            if pair:
                high, low = (int(v[n][lane]) if form[0] == "v" else s[n] for n in pair)
                first = high << 32 | low
            second = int(v[5][lane]) << 32 | int(v[4][lane])
            if kind == "i64":
                first, second = signed(first, 64), signed(second, 64)
            assert bool(bit(got.s[9] << 32 | got.s[8], lane)) == COMPARE[name](first, second)


ORDER: dict[str, Callable[[float, float], bool]] = {
    "o": lambda a, b: not (math.isnan(a) or math.isnan(b)),
    "u": lambda a, b: math.isnan(a) or math.isnan(b),
}


@pytest.mark.parametrize("name", ["eq", "ge", "gt", "le", "lt", *ORDER])
def test_every_comparison_of_floats(name: str) -> None:
    """NaN is not even equal to itself, and both zeros are; "o" is true of two numbers, "u" of all else."""
    numbers = [0.0, -0.0, 1.5, -1.5, math.inf, -math.inf, math.nan, 2.0**-149]
    a, b = zip(*itertools.product(numbers, numbers), strict=True)
    v = {0: np.array([*map(bits, a)], np.uint32), 1: np.array([*map(bits, b)], np.uint32)}
    got = run(f"v_cmp_{name}_f32_e32 vcc, v0, v1", v=v)
    assert [bool(bit(got.vcc, lane)) for lane in range(64)] == [*map((COMPARE | ORDER)[name], a, b)]


@pytest.mark.parametrize(
    ("name", "kind"), list(itertools.product(("eq", "ge", "gt", "le", "lt", "lg"), ("i32", "u32")))
)
def test_every_scalar_comparison(name: str, kind: str) -> None:
    """Of two registers, and of one and a constant of 16 bits, which has a sign where the kind has one."""
    compare = COMPARE["ne" if name == "lg" else name]
    for a, b in itertools.product(EDGES, EDGES):
        number = [signed(each) if kind == "i32" else each for each in (a, b)]
        assert run(f"s_cmp_{name}_{kind} s0, s1", s={0: a, 1: b}).scc == compare(*number)
        if b < 1 << 16:
            number[1] = signed(b, 16) if kind == "i32" else b
            assert run(f"s_cmpk_{name}_{kind} s0, {b:#x}", s={0: a}).scc == compare(*number)
