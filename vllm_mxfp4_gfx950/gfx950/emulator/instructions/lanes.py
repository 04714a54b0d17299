"""Instructions that move values between lanes, or to and from scalar registers; TABLE is all of them."""

from __future__ import annotations

import functools
import re

import numpy as np

from vllm_mxfp4_gfx950.gfx950.emulator.instructions.access import issue
from vllm_mxfp4_gfx950.gfx950.emulator.operands import (
    LANE,
    Effect,
    Entry,
    Form,
    Machine,
    Operand,
    Unknown,
    scalar_read,
    vector_read,
)
from vllm_mxfp4_gfx950.gfx950.emulator.waves import ALL, SCALAR_KEY, Outstanding, Waves, pack


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


TABLE: dict[str, Entry] = {
    "ds_bpermute_b32": ("lds", permute),
    "ds_swizzle_b32": ("lds", swizzle),
    "v_permlane16_swap_b32": ("vector", functools.partial(swap, size=16)),
    "v_permlane32_swap_b32": ("vector", functools.partial(swap, size=32)),
    "v_pk_mov_b32": ("vector", move_pair),
    "v_readfirstlane_b32": ("vector", read_first_lane),
    "v_readlane_b32": ("vector", read_lane),
    "v_writelane_b32": ("vector", write_lane),
}
