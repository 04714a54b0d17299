"""Scalar instructions: SCALAR and SCALAR_IN_PLACE are those that compute, TABLE is all of them.

Source: AMD, "CDNA3" and "CDNA4" Instruction Set Architecture reference guides.
"""

from __future__ import annotations

import functools

import numpy as np

from vllm_mxfp4_gfx950.gfx950.emulator.instructions.integers import (
    absolute,
    add_carry,
    add_overflow,
    identity,
    multiply_high,
    nonzero,
    reverse_bits,
    scalar_bit_field,
    shift_add,
    shift_left,
    shift_right,
    subtract_overflow,
)
from vllm_mxfp4_gfx950.gfx950.emulator.instructions.op import COMPARISONS, I32, U32, Op, op
from vllm_mxfp4_gfx950.gfx950.emulator.operands import (
    Effect,
    Entry,
    Form,
    Machine,
    Unknown,
    applied,
    scalar_read,
    scalar_write,
)
from vllm_mxfp4_gfx950.gfx950.emulator.waves import Waves

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
"""Those that read their operands and write their results, by mnemonic."""

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
"""Those that read what they write, too, as their first operand."""


def scalar_op(form: Form, op: Op, *, in_place: bool) -> Effect:
    """A scalar instruction of SCALAR, or of SCALAR_IN_PLACE."""
    writes = [
        scalar_write(kind, None if kind == "scc" else form.target(form.texts[0] if in_place else None))
        for kind in op.results
    ]
    reads = [
        (lambda waves: waves.scc) if kind == "scc" else scalar_read(kind, form.source())
        for kind in op.operands
    ]
    return applied(writes, op.function, reads)


def save_exec(form: Form, operation: str) -> Effect:
    """Save EXEC, then AND or OR it with a mask, or turn off in the mask what was on ("andn2")."""
    target, source = form.target(), form.source()
    read = scalar_read("u64", source)

    def effect(waves: Waves, machine: Machine) -> None:
        mask = read(waves)
        before = waves.exec
        waves.write_pair(target.register, before)
        waves.set_exec({"and": before & mask, "or": before | mask, "andn2": mask & ~before}[operation])
        waves.write_scc(waves.exec != 0)

    return effect


def set_mode(form: Form) -> Effect:
    """Set FP16_OVFL, which says what becomes of a number too large for FP8: see `pack_half`."""
    field, value = form.texts.pop(0), form.texts.pop(0)
    if field != "hwreg(HW_REG_MODE, 23, 1)" or value not in ("0", "1"):
        raise Unknown(f"{field} is not a mode that the emulator knows")
    return nothing(form)


def nothing(form: Form) -> Effect:
    """Timing only."""
    form.texts, form.modifiers = [], {}
    return lambda waves, machine: None


TABLE: dict[str, Entry] = {
    **{name: ("scalar", functools.partial(scalar_op, op=op, in_place=False)) for name, op in SCALAR.items()},
    **{
        name: ("scalar", functools.partial(scalar_op, op=op, in_place=True))
        for name, op in SCALAR_IN_PLACE.items()
    },
    "s_and_saveexec_b64": ("scalar", functools.partial(save_exec, operation="and")),
    "s_andn2_saveexec_b64": ("scalar", functools.partial(save_exec, operation="andn2")),
    "s_or_saveexec_b64": ("scalar", functools.partial(save_exec, operation="or")),
    "s_setreg_imm32_b32": ("scalar", set_mode),
    "s_nop": ("wait", nothing),
}
