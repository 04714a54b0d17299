"""Vector instructions that work lane by lane: VECTOR is those that compute, TABLE is all of them.

Source: AMD, "CDNA3" and "CDNA4" Instruction Set Architecture reference guides.
"""

from __future__ import annotations

import functools

import numpy as np

from vllm_mxfp4_gfx950.gfx950.emulator.instructions.encodings import (
    dpp,
    masked_write,
    packed_reads,
    sdwa_read,
    sdwa_write,
)
from vllm_mxfp4_gfx950.gfx950.emulator.instructions.floats import (
    division_fixup,
    division_fma,
    division_scale,
    exponential,
    fma,
    maximum,
    median,
    minimum,
    pack_bf16,
    propagating,
    reciprocal,
    scale_by_power,
    to_unsigned,
)
from vllm_mxfp4_gfx950.gfx950.emulator.instructions.integers import (
    add_carry,
    align_bit,
    bit_field,
    bit_operation,
    by_halves,
    identity,
    multiply_24,
    multiply_add_64,
    multiply_add_signed_64,
    multiply_high,
    multiply_signed_24,
    permute_bytes,
    reverse_bits,
    select,
    shift_left,
    shift_right,
    subtract,
    subtract_borrow,
)
from vllm_mxfp4_gfx950.gfx950.emulator.instructions.op import COMPARISONS, F32, I32, U16, U32, Op, op
from vllm_mxfp4_gfx950.gfx950.emulator.instructions.small_floats import e4m3_to_f32, fp4_to_bf16, pack_e4m3
from vllm_mxfp4_gfx950.gfx950.emulator.operands import (
    Effect,
    Entry,
    Form,
    Machine,
    Unknown,
    applied,
    vector_read,
    vector_write,
)
from vllm_mxfp4_gfx950.gfx950.emulator.waves import Waves

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
"""By mnemonic, without the suffix of the encoding."""

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


def vector_op(form: Form, op: Op) -> Effect:
    """A vector instruction of the table, in any of its encodings."""
    targets = [form.target() for _ in op.results]
    mnemonic = form.instruction.mnemonic
    texts, form.texts = form.texts, []
    if mnemonic.startswith("v_fmac"):
        texts.append(form.instruction.operands[0])
    if mnemonic.startswith("v_div_fmas"):
        texts.append("vcc")
    keywords = {name: form.modifiers.pop(name) for name in op.modifiers if name in form.modifiers}
    function = functools.partial(op.function, **keywords) if keywords else op.function
    if mnemonic.endswith("_dpp"):
        first, allowed = dpp(form, op.operands[0], texts.pop(0))
        reads = [first, *map(vector_read, op.operands[1:], map(form.source, texts))]
        write = masked_write(form, op.results[0], targets[0], allowed)
        return applied([write], function, reads)
    sources = [form.source(text) for text in texts]
    if len(sources) != len(op.operands):
        raise Unknown(f"{mnemonic} with {len(sources)} operands is not something the emulator knows")
    if mnemonic.endswith("_sdwa"):
        reads = [
            sdwa_read(form, *each) for each in zip(range(len(sources)), op.operands, sources, strict=True)
        ]
        if op.results[0] != "mask":
            write = sdwa_write(form, targets[0])
            return applied([write], function, reads)
    elif "f32x2" in op.operands:
        reads = packed_reads(form, sources)
    else:
        reads = list(map(vector_read, op.operands, sources))
    writes = list(map(vector_write, op.results, targets))
    effects = applied(writes, function, reads)
    if mnemonic.startswith("v_mad_u64_u32") and sources[2].kind == "v":
        return unknown_upper_half(form, effects, targets[0].register + 1, sources[2].register + 1)
    return effects


def unknown_upper_half(form: Form, effects: Effect, result: int, addend: int) -> Effect:
    """LLVM multiplies and adds 32 bits with 64-bit instructions: what is unknown above stays unknown."""
    form.reads["v"].remove(addend)
    form.writes.add(addend)

    def effect(waves: Waves, machine: Machine) -> None:
        known = waves.v_known[addend] | ~waves.exec
        effects(waves, machine)
        if (~known).any():
            waves.v_known[result] &= known
            waves.v_all[result] = False

    return effect


def pack_half(form: Form) -> Effect:
    """Two floats as e4m3, in the half of a register that the last op_sel chooses; the other half stays."""
    target = form.target()
    reads = [vector_read("f32", form.source()) for _ in range(3)]
    *others, high = (int(x) for x in form.modifiers.pop("op_sel", "[0,0,0,0]")[1:-1].split(","))
    if any(others):
        raise Unknown("op_sel of an operand of 32 bits is not something the emulator knows")
    kept, shift = np.uint32(0xFFFF if high else 0xFFFF0000), np.uint32(16 * high)

    def effect(waves: Waves, machine: Machine) -> None:
        packed, overflows = pack_e4m3(*(read(waves) for read in reads))
        if (overflows & waves.lanes).any():
            raise Unknown("an e4m3 beyond 448, which FP16_OVFL decides, is not something the emulator knows")
        waves.write_v(target.register, waves.v[target.register] & kept | packed << shift)

    return effect


TABLE: dict[str, Entry] = {
    **{
        name: ("fp4" if "fp4" in name else "vector", functools.partial(vector_op, op=meaning))
        for name, meaning in VECTOR.items()
    },
    "v_cvt_scalef32_pk_fp8_f32": ("vector", pack_half),
}
