"""What the encodings of vector instructions add: other lanes (DPP), parts of registers (SDWA), pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from vllm_mxfp4_gfx950.gfx950.driver import WAVE
from vllm_mxfp4_gfx950.gfx950.emulator.instructions.op import Array
from vllm_mxfp4_gfx950.gfx950.emulator.memory import Fault
from vllm_mxfp4_gfx950.gfx950.emulator.operands import (
    DTYPES,
    LANE,
    Form,
    Operand,
    Read,
    Unknown,
    Write,
    modified,
    vector_read,
)
from vllm_mxfp4_gfx950.gfx950.emulator.waves import Waves, expand


def packed_reads(form: Form, sources: list[Operand]) -> list[Read]:
    """Operands of a packed instruction: [2, W, 64], of halves that op_sel and op_sel_hi choose."""

    def flags(name: str, default: int) -> list[int]:
        text = form.modifiers.pop(name, None)
        return [default] * len(sources) if text is None else [int(x) for x in text.strip("[]").split(",")]

    low, high = flags("op_sel", 0), flags("op_sel_hi", 1)
    negate_low, negate_high = flags("neg_lo", 0), flags("neg_hi", 0)
    for operand, *chosen in zip(sources, low, high, strict=True):
        for other in {0, 1}.difference(chosen) if operand.kind != "constant" else ():
            form.reads[operand.kind].remove(operand.register + other)

    def half(operand: Operand, which: int, negate: int) -> Read:
        if operand.kind == "constant" and which:
            raise Unknown("the upper half of a packed constant is not something the emulator knows")
        one = Operand(operand.kind, operand.register + which, 1, operand.constant)
        read = vector_read("f32", one)
        return (lambda waves: np.negative(read(waves))) if negate else read

    def both(index: int) -> Read:
        first = half(sources[index], low[index], negate_low[index])
        second = half(sources[index], high[index], negate_high[index])
        return lambda waves: np.stack(np.broadcast_arrays(np.atleast_2d(first(waves)), second(waves)))

    return [both(index) for index in range(len(sources))]


def dpp(form: Form, kind: str, text: str) -> tuple[Read, Callable[[Waves], Array]]:
    """A first operand taken from other lanes, and the lanes that then write."""
    operand = form.parse(text)
    from_lane, inside = dpp_lanes(form.modifiers)
    rows, banks = form.number("row_mask", 15), form.number("bank_mask", 15)
    zero = form.modifiers.pop("bound_ctrl", None) is not None
    writes = np.array([rows >> lane // 16 & 1 and banks >> lane // 4 % 4 & 1 for lane in LANE], bool)
    register, view = operand.register, DTYPES[kind]

    def usable(waves: Waves) -> Array:
        return inside & (True if waves.whole else waves.lanes[:, from_lane])

    def read(waves: Waves) -> Array:
        if not waves.v_all[register]:
            known = expand(waves.v_known[register])[:, from_lane]
            if (~known & usable(waves) & writes & waves.lanes).any():
                raise Fault(f"reads vector register {register} of a lane that nothing has written")
        moved = np.where(usable(waves), waves.v[register][:, from_lane], np.uint32(0))
        return moved.view(view)

    def allowed(waves: Waves) -> Array:
        return writes & waves.lanes if zero else writes & waves.lanes & usable(waves)

    form.writes.add(register)  # Not a read of all active lanes, but its load must have come back.
    return modified(kind, operand, read), allowed


def masked_write(form: Form, kind: str, target: Operand, allowed: Callable[[Waves], Array]) -> Write:
    """How an instruction writes in some of the lanes."""
    if kind not in ("u32", "i32", "f32"):
        raise Unknown(f"{form.instruction.mnemonic} is not something the emulator knows")
    register = target.register
    return lambda waves, value: waves.write_lanes(
        register, np.ascontiguousarray(value).view(np.uint32), allowed(waves)
    )


def sdwa_read(form: Form, index: int, kind: str, operand: Operand) -> Read:
    """An operand of which only a byte or a word is read."""
    if kind == "mask":
        return vector_read(kind, operand)
    name = form.modifiers.pop(f"src{index}_sel", "DWORD")
    whole = vector_read("u32", dataclasses.replace(operand, signed=False))
    shift, mask = sub_dword(name)
    sign = np.uint32((mask + 1) >> 1 if operand.signed else 0)
    dtype = DTYPES[kind]

    def read(waves: Waves) -> Array:
        part = (whole(waves) >> np.uint32(shift)) & np.uint32(mask)
        part = (part ^ sign) - sign
        return part.astype(np.uint16).view(dtype) if np.dtype(dtype).itemsize == 2 else part.view(dtype)

    return read


def sdwa_write(form: Form, target: Operand) -> Write:
    """A result of which a byte or a word is written, the rest of the register being cleared."""
    name = form.modifiers.pop("dst_sel", "DWORD")
    if form.modifiers.pop("dst_unused", "UNUSED_PAD") != "UNUSED_PAD":
        raise Unknown("dst_unused is UNUSED_PAD in what the emulator knows")
    shift, mask = sub_dword(name)
    register = target.register

    def write(waves: Waves, value: Array) -> None:
        raw = np.asarray(value)
        raw = raw.astype(np.uint32) if raw.dtype.itemsize == 2 else raw.view(np.uint32)
        waves.write_v(register, (raw & np.uint32(mask)) << np.uint32(shift))

    return write


def sub_dword(name: str) -> tuple[int, int]:
    """Shift and mask of a part of a register."""
    if name == "DWORD":
        return 0, 0xFFFFFFFF
    part, _, index = name.partition("_")
    width = {"BYTE": 8, "WORD": 16}[part]
    return width * int(index), (1 << width) - 1


def dpp_lanes(modifiers: dict[str, str]) -> tuple[Array, Array]:
    """The lane from which each lane takes its operand, and whether there is one."""
    row, at = LANE // 16 * 16, LANE % 16
    for name, source in (("row_mirror", row + 15 - at), ("row_half_mirror", LANE // 8 * 8 + 7 - LANE % 8)):
        if name in modifiers:
            del modifiers[name]
            return source, at >= 0
    if "quad_perm" in modifiers:
        quad = np.array([int(x) for x in modifiers.pop("quad_perm").strip("[]").split(",")])
        return LANE // 4 * 4 + quad[LANE % 4], at >= 0
    for name in ("row_shr", "row_shl", "row_ror", "row_newbcast", "row_bcast"):
        if name in modifiers:
            count = int(modifiers.pop(name))
            if name == "row_bcast":
                source = LANE // (count + 1) * (count + 1) - 1
                # 15: each row from the one before it; 31: the upper half from lane 31.
                inside = source >= 0
                return np.where(inside, source, 0), inside
            moved = {
                "row_shr": at - count,
                "row_shl": at + count,
                "row_ror": (at - count) % 16,
                "row_newbcast": np.full(WAVE, count),
            }[name]
            inside = (moved >= 0) & (moved < 16)
            return row + np.where(inside, moved, 0), inside
    raise Unknown(f"{' '.join(modifiers)} is not a movement of lanes that the emulator knows")
