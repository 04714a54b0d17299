"""Instructions that reach across lanes: matrices, permutations, and EXEC itself."""

from __future__ import annotations

import re

import numpy as np

from vllm_mxfp4_gfx950.gfx950.driver import WAVE
from vllm_mxfp4_gfx950.gfx950.emulator.access import issue
from vllm_mxfp4_gfx950.gfx950.emulator.arithmetic import E2M1, E8M0, FORMATS, Array
from vllm_mxfp4_gfx950.gfx950.emulator.operands import (
    LANE,
    Effect,
    Form,
    Machine,
    Operand,
    Unknown,
    scalar_read,
    vector_read,
)
from vllm_mxfp4_gfx950.gfx950.emulator.waves import ALL, SCALAR_KEY, Outstanding, Waves, pack


def matrix(form: Form, rows: int, depth: int) -> Effect:
    """D = A B + C on bf16 matrices, for all lanes whatever EXEC says.

    A lane l holds 8 values along k, from k = 8 * (l // rows), of A's row and of B's column l % rows;
    and of D and C, in register r, row 8 * (r // 4) + 4 * (l // rows) + r % 4 of 32 (4 * (l // rows) + r
    of 16), column l % rows.
    """
    form.all_lanes = True
    d, a, b = form.target(), form.source(), form.source()
    c = form.source()
    groups = WAVE // rows

    def operand(waves: Waves, first: int) -> Array:
        raw = waves.v[first : first + 4].reshape(4, len(waves), groups, rows)
        values = np.empty((len(waves), rows, groups, 4, 2), np.float32)
        values[..., 0] = (raw << np.uint32(16)).view(np.float32).transpose(1, 3, 2, 0)
        values[..., 1] = (raw & np.uint32(0xFFFF0000)).view(np.float32).transpose(1, 3, 2, 0)
        return values.reshape(len(waves), rows, depth)

    def effect(waves: Waves, machine: Machine) -> None:
        product = operand(waves, a.register) @ operand(waves, b.register).transpose(0, 2, 1)
        add_matrix(waves, product, d, c)

    return effect


def add_matrix(waves: Waves, product: Array, d: Operand, c: Operand) -> None:
    """D = C + a product [waves, rows, columns], rounded to float32."""
    count, _, columns = product.shape
    parts = product.reshape(count, d.count // 4, WAVE // columns, 4, columns).transpose(1, 3, 0, 2, 4)
    out = parts.reshape(d.count, count, WAVE)
    if c.kind == "v":
        out = out + waves.v[c.register : c.register + c.count].view(np.float32)
    elif c.constant != "0":
        raise Unknown(f"a matrix of {c.constant} is not something the emulator knows")
    waves.v[d.register : d.register + d.count] = out.astype(np.float32, copy=False).view(np.uint32)
    for register in d.registers:
        if not waves.v_all[register]:
            waves.v_known[register] = ~np.uint64(0)
            waves.v_all[register] = True


def scaled_matrix(form: Form, rows: int) -> Effect:
    """D = A B + C on matrices of 4 or 8 bits, each 32 values along k times a power of two, for all lanes.

    A lane l holds 32 values of A's row and of B's column l % rows: of 4 bits those from k = 32 * (l // rows)
    on; of 8 bits 16 from k = 16 * (l // rows) on, and the same of the second half of k. It holds the scale of
    the 32 values from k = 32 * (l // rows) on of the same row or column, in the byte of a register that
    op_sel (its low bit) and op_sel_hi (its high one) choose. D and C are as in `matrix`.

    The sum over k is exact here, and rounded once, with C. What the hardware does inside is not published.

    Source: AMD, "CDNA4" Instruction Set Architecture reference guide, and Triton's layouts of the operands
    (test/TritonGPU/amd/accelerate-amd-matmul-mfma-gfx950.mlir). A scale in a scalar register or a constant is
    read from other bits by the hardware (LLVM pull request 158117), and refused.
    """
    form.all_lanes = True
    d, a, b, c = form.target(), form.source(), form.source(), form.source()
    scales = form.source(), form.source()
    formats = form.number("cbsz"), form.number("blgp")
    low, high = (
        form.modifiers.pop(name, default) for name, default in (("op_sel", "[0,0,0]"), ("op_sel_hi", ""))
    )
    chosen = [int(x) + 2 * int(y) for x, y in zip(low[1:-1].split(","), high[1:-1].split(","), strict=True)]
    groups = WAVE // rows
    for operand, kind, scale in zip((a, b), formats, scales, strict=True):
        if kind not in FORMATS or operand.count != (4 if kind == E2M1 else 8) or scale.kind != "v":
            raise Unknown("a matrix of this format is not something the emulator knows")

    def values(waves: Waves, which: int) -> Array:
        operand, kind = (a, b)[which], formats[which]
        raw = waves.v[operand.register : operand.register + operand.count]
        codes = raw.view(np.uint8).reshape(-1, 4, len(waves), groups, rows, 4)
        found = FORMATS[kind][codes]  # [half, register, wave, group, row, byte, value]
        found = found.transpose(2, 4, 0, 3, 1, 5, 6).reshape(len(waves), rows, groups, 32)
        scale = waves.v[scales[which].register] >> np.uint32(8 * chosen[which]) & np.uint32(255)
        power = E8M0[scale].reshape(len(waves), groups, rows, 1).transpose(0, 2, 1, 3)
        return (found * power).reshape(len(waves), rows, 32 * groups)

    def effect(waves: Waves, machine: Machine) -> None:
        add_matrix(waves, values(waves, 0) @ values(waves, 1).transpose(0, 2, 1), d, c)

    return effect


def read_first_lane(form: Form) -> Effect:
    """A vector register's first active lane, to a scalar register."""
    target, source = form.target(), form.source()

    def effect(waves: Waves, machine: Machine) -> None:
        first = np.where(waves.exec != 0, waves.lanes.argmax(axis=1), 0)
        waves.write_s(target.register, waves.v[source.register][np.arange(len(waves)), first])

    return effect


def read_lane(form: Form) -> Effect:
    """A vector register's lane of a given number, to a scalar register, which stays unknown if it is."""
    target, source, lane = form.target(), form.parse(form.texts.pop(0)), form.source()
    form.writes.add(source.register)
    number = scalar_read("u32", lane)

    def effect(waves: Waves, machine: Machine) -> None:
        lanes = np.broadcast_to(number(waves) & 63, (len(waves),)).astype(np.int64)
        known = waves.v_known[source.register] >> lanes.astype(np.uint64) & np.uint64(1)
        value = waves.v[source.register][np.arange(len(waves)), lanes]
        waves.write_s(target.register, value, known.astype(bool))

    return effect


def write_lane(form: Form) -> Effect:
    """A scalar, to a vector register's lane of a given number; the others, and EXEC, do not matter.

    The compiler spills so, and it spills undefined registers, too: the lane is as unknown then.
    """
    target, value = form.target(), form.parse(form.texts.pop(0))
    form.writes.update(SCALAR_KEY + register for register in value.registers if value.kind == "s")
    read, number = scalar_read("u32", value), scalar_read("u32", form.source())

    def effect(waves: Waves, machine: Machine) -> None:
        written = np.broadcast_to(number(waves) & 63, (len(waves),))[:, None] == LANE
        waves.write_lanes(target.register, np.broadcast_to(read(waves), (len(waves),))[:, None], written)
        if value.kind == "s" and not waves.s_all[value.register]:
            unknown = pack(written & ~waves.s_known[value.register][:, None])
            waves.v_known[target.register] &= ~unknown
            waves.v_all[target.register] = bool((waves.v_known[target.register] == ALL).all())

    return effect


def move_pair(form: Form) -> Effect:
    """A half of the first pair, then a half of the second, as op_sel says, to a pair."""
    target, sources = form.target(), (form.source(), form.source())
    form.modifiers.pop("op_sel_hi", None)
    halves = form.modifiers.pop("op_sel", "[0,0]").strip("[]").split(",")
    reads = []
    for operand, half in zip(sources, map(int, halves), strict=True):
        if operand.kind == "constant":
            raise Unknown(f"{form.instruction.text} is not something the emulator knows")
        form.reads[operand.kind].remove(operand.register + 1 - half)
        reads.append(vector_read("u32", Operand(operand.kind, operand.register + half)))

    def effect(waves: Waves, machine: Machine) -> None:
        low, high = (np.array(read(waves)) for read in reads)
        waves.write_v(target.register, low)
        waves.write_v(target.register + 1, high)

    return effect


def swap(form: Form, size: int) -> Effect:
    """Exchange odd rows of `size` lanes of the first register with even rows of the second."""
    form.all_lanes = True
    first, second = form.source().register, form.source().register
    odd = LANE // size % 2 == 1

    def effect(waves: Waves, machine: Machine) -> None:
        if not waves.whole:
            raise Unknown("a swap of lanes of which some are off is not something the emulator knows")
        a, b = waves.v[first].copy(), waves.v[second].copy()
        waves.v[first][:, odd] = b[:, ~odd]
        waves.v[second][:, ~odd] = a[:, odd]

    return effect


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


def permute(form: Form) -> Effect:
    """Every lane reads the register of the lane that it names, times 4; a lane that is off gives 0."""
    target, index, data = form.target(), form.source(), form.source()
    offset = form.number("offset")
    registers = frozenset(target.registers)

    def effect(waves: Waves, machine: Machine) -> None:
        lanes = ((waves.v[index.register] + np.uint32(offset)) >> np.uint32(2)) & np.uint32(63)
        values = waves.v[data.register]
        values = values if waves.whole else np.where(waves.lanes, values, 0)
        waves.write_v(target.register, np.take_along_axis(values, lanes.astype(np.int64), axis=1))
        issue(waves, waves.lds, Outstanding("lds", registers))

    return effect


def swizzle(form: Form) -> Effect:
    """Every lane reads the register of the lane whose number differs in a bit; an idle lane is 0."""
    target, source = form.target(), form.source()
    match = re.fullmatch(r"swizzle\(SWAP,(\d+)\)", form.modifiers.pop("offset", ""))
    if match is None:
        raise Unknown(f"{form.instruction.text} is not a swizzle that the emulator knows")
    lanes, registers = LANE ^ int(match[1]), frozenset(target.registers)

    def effect(waves: Waves, machine: Machine) -> None:
        values = waves.v[source.register]
        values = values if waves.whole else np.where(waves.lanes, values, 0)
        waves.write_v(target.register, values[:, lanes])
        issue(waves, waves.lds, Outstanding("lds", registers))

    return effect
