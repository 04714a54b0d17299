"""From an instruction to the function that executes it on Waves.

Everything that the text says is settled here, once: which registers, which halves, which lanes. What
these files do not know they refuse by name.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_mxfp4_gfx950.gfx950.driver import WAVE
from vllm_mxfp4_gfx950.gfx950.emulator import access, lanes
from vllm_mxfp4_gfx950.gfx950.emulator.arithmetic import (
    SCALAR,
    SCALAR_IN_PLACE,
    VECTOR,
    Array,
    Op,
    pack_e4m3,
)
from vllm_mxfp4_gfx950.gfx950.emulator.assembly import Instruction
from vllm_mxfp4_gfx950.gfx950.emulator.memory import Fault
from vllm_mxfp4_gfx950.gfx950.emulator.operands import (
    DTYPES,
    LANE,
    Effect,
    Form,
    Machine,
    Operand,
    Read,
    Registers,
    Unknown,
    Write,
    modified,
    scalar_read,
    scalar_write,
    vector_read,
    vector_write,
)
from vllm_mxfp4_gfx950.gfx950.emulator.waves import SCALAR_KEY, Waves, expand

ENCODINGS = ("_e32", "_e64", "_dpp", "_sdwa")


@dataclass(frozen=True)
class Step:
    """One instruction, ready to run.

    Args:
        instruction: where it came from.
        effect: what it does.
        vector, scalar: registers that it reads.
        touched: registers that it reads or writes; see SCALAR_KEY.
        all_lanes: whether it reads lanes that are off, too.
        kind: its class, for counting.
    """

    instruction: Instruction
    effect: Effect
    vector: tuple[int, ...]
    scalar: tuple[int, ...]
    touched: frozenset[int]
    all_lanes: bool
    kind: str

    def run(self, waves: Waves, machine: Machine) -> None:
        """Check what it reads, and execute it."""
        if waves.pending and not waves.pending.isdisjoint(self.touched) and self._too_early(waves):
            raise Fault("touches a register that a load is still to write: an s_waitcnt is missing")
        for register in self.vector:
            if not waves.v_all[register]:
                waves.check_known(self.vector, (), all_lanes=self.all_lanes)
                break
        for register in self.scalar:
            if not waves.s_all[register]:
                waves.check_known((), self.scalar)
                break
        if waves.idle and self.kind in ("vector", "fp4"):
            waves.idle_issued += waves.idle
        self.effect(waves, machine)

    def _too_early(self, waves: Waves) -> bool:
        """Whether it must not touch what is outstanding: a load may write where an older one is still to.

        Source: LLVM, SIInsertWaitcnts: loads that vmcnt counts come back in order.
        """
        after_loads = self.touched
        if self.kind in ("memory", "scratch"):
            after_loads = frozenset((*self.vector, *(SCALAR_KEY + register for register in self.scalar)))
        return any(not one.registers.isdisjoint(self.touched) for one in waves.lds) or any(
            not one.registers.isdisjoint(after_loads) for one in waves.memory
        )


def decode(instruction: Instruction, registers: Registers) -> Step:
    """The instruction, ready to run.

    Args:
        instruction: what the text says.
        registers: those that its kernel has.

    Raises:
        Unknown: it is not in the tables.
    """
    form = Form(instruction, registers)
    mnemonic = form.instruction.mnemonic
    base = mnemonic
    for encoding in ENCODINGS:
        base = base.removesuffix(encoding)
    if base in VECTOR:
        kind, effect = "vector", vector_op(form, VECTOR[base])
    elif base in SCALAR or base in SCALAR_IN_PLACE:
        kind, effect = "scalar", scalar_op(form, base)
    elif base in SPECIALS:
        kind, special = SPECIALS[base]
        effect = special(form)
    else:
        kind, effect = memory_op(form, base)
    left = [*form.texts, *form.modifiers]
    if left:
        raise Unknown(f"{mnemonic} with {', '.join(left)} is not something the emulator knows")
    touched = {*form.reads["v"], *form.writes, *(SCALAR_KEY + register for register in form.reads["s"])}
    if base.startswith("v_mfma"):
        kind = "matrix"
    elif base.startswith("v_cvt") and "fp4" in base:
        kind = "fp4"
    return Step(
        form.instruction,
        effect,
        tuple(dict.fromkeys(form.reads["v"])),
        tuple(dict.fromkeys(form.reads["s"])),
        frozenset(touched),
        form.all_lanes,
        kind,
    )


def memory_op(form: Form, base: str) -> tuple[str, Effect]:
    """A memory instruction, of which the name says the width and more."""
    for pattern, kind, special in MEMORY:
        if match := pattern.fullmatch(base):
            return kind, special(form, *match.groups())
    raise Unknown(f"{form.instruction.mnemonic} is not an instruction that the emulator knows")


def applied(writes: list[Write], function: Callable[..., Any], reads: list[Read]) -> Effect:
    """Read the operands, compute, and write the result, or each of several."""
    if len(writes) == 1:
        write = writes[0]
        return lambda waves, machine: write(waves, function(*[read(waves) for read in reads]))

    def effect(waves: Waves, machine: Machine) -> None:
        for write, result in zip(writes, function(*[read(waves) for read in reads]), strict=True):
            write(waves, result)

    return effect


def scalar_op(form: Form, base: str) -> Effect:
    """A scalar instruction of the table."""
    in_place = base in SCALAR_IN_PLACE
    op = SCALAR_IN_PLACE[base] if in_place else SCALAR[base]
    writes = [
        scalar_write(kind, None if kind == "scc" else form.target(form.texts[0] if in_place else None))
        for kind in op.results
    ]
    reads = [
        (lambda waves: waves.scc) if kind == "scc" else scalar_read(kind, form.source())
        for kind in op.operands
    ]
    return applied(writes, op.function, reads)


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


def set_mode(form: Form) -> Effect:
    """Set FP16_OVFL, which says what becomes of a number too large for FP8: see `pack_half`."""
    field, value = form.texts.pop(0), form.texts.pop(0)
    if field != "hwreg(HW_REG_MODE, 23, 1)" or value not in ("0", "1"):
        raise Unknown(f"{field} is not a mode that the emulator knows")
    return access.nothing(form)


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


SPECIALS: dict[str, tuple[str, Callable[[Form], Effect]]] = {
    "ds_bpermute_b32": ("lds", lanes.permute),
    "ds_swizzle_b32": ("lds", lanes.swizzle),
    "s_and_saveexec_b64": ("scalar", functools.partial(lanes.save_exec, operation="and")),
    "s_andn2_saveexec_b64": ("scalar", functools.partial(lanes.save_exec, operation="andn2")),
    "s_or_saveexec_b64": ("scalar", functools.partial(lanes.save_exec, operation="or")),
    "s_setreg_imm32_b32": ("scalar", set_mode),
    "s_nop": ("wait", access.nothing),
    "s_waitcnt": ("wait", access.wait),
    "v_cvt_scalef32_pk_fp8_f32": ("vector", pack_half),
    "v_mfma_f32_16x16x32_bf16": ("matrix", lambda form: lanes.matrix(form, 16, 32)),
    "v_mfma_f32_32x32x16_bf16": ("matrix", lambda form: lanes.matrix(form, 32, 16)),
    "v_mfma_scale_f32_16x16x128_f8f6f4": ("matrix", lambda form: lanes.scaled_matrix(form, 16)),
    "v_mfma_scale_f32_32x32x64_f8f6f4": ("matrix", lambda form: lanes.scaled_matrix(form, 32)),
    "v_permlane16_swap_b32": ("vector", lambda form: lanes.swap(form, 16)),
    "v_permlane32_swap_b32": ("vector", lambda form: lanes.swap(form, 32)),
    "v_pk_mov_b32": ("vector", lanes.move_pair),
    "v_readfirstlane_b32": ("vector", lanes.read_first_lane),
    "v_readlane_b32": ("vector", lanes.read_lane),
    "v_writelane_b32": ("vector", lanes.write_lane),
}

MEMORY: tuple[tuple[re.Pattern[str], str, Callable[..., Effect]], ...] = (
    (re.compile(r"s_load_dword(|x2|x4|x8|x16)"), "scalar", access.scalar_load),
    (re.compile(r"buffer_(load|store)_(\w+)"), "memory", access.buffer),
    (re.compile(r"buffer_(atomic_add)()"), "memory", access.buffer),
    (re.compile(r"global_(load)_(lds_)?(\w+)"), "memory", access.global_),
    (re.compile(r"global_(store)()_(\w+)"), "memory", access.global_),
    (re.compile(r"global_(atomic_add)()()"), "memory", access.global_),
    (re.compile(r"scratch_(load|store)_dword(|x2|x3|x4)"), "scratch", access.scratch),
    (re.compile(r"ds_read(2)?(st64)?_(\w+)"), "lds", access.lds_read),
    (re.compile(r"ds_write(2)?(st64)?_(b\d+)(_d16_hi)?"), "lds", access.lds_write),
)
