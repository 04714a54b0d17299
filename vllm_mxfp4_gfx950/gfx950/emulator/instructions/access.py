"""Instructions that reach memory or LDS, and the one that waits for them; PATTERNS is all of the former."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_mxfp4_gfx950.gfx950.emulator.instructions.op import Array
from vllm_mxfp4_gfx950.gfx950.emulator.memory import Fault, GlobalMemory
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
from vllm_mxfp4_gfx950.gfx950.emulator.waves import M0, SCALAR_KEY, Outstanding, Waves

WIDTHS: dict[str, tuple[int, int, Any]] = {
    "ubyte": (1, 1, np.uint8),
    "sbyte": (1, 1, np.int8),
    "ushort": (2, 1, np.uint16),
    "sshort": (2, 1, np.int16),
    "byte": (1, 1, np.uint8),
    "short": (2, 1, np.uint16),
    "short_d16_hi": (2, 1, np.uint16),
    "dword": (4, 1, np.uint32),
    "dwordx2": (8, 2, np.uint32),
    "dwordx3": (12, 3, np.uint32),
    "dwordx4": (16, 4, np.uint32),
    "u8": (1, 1, np.uint8),
    "i8": (1, 1, np.int8),
    "u16": (2, 1, np.uint16),
    "i16": (2, 1, np.int16),
    "b8": (1, 1, np.uint8),
    "b16": (2, 1, np.uint16),
    "b32": (4, 1, np.uint32),
    "b64": (8, 2, np.uint32),
    "b96": (12, 3, np.uint32),
    "b128": (16, 4, np.uint32),
    "": (4, 1, np.uint32),
}
"""Bytes, registers and type of each width that a memory instruction's name has."""


def wait(form: Form) -> Effect:
    """Wait until at most so many memory instructions of each kind are outstanding."""
    text = form.instruction.text
    counts = form.instruction.counters
    # What 7 of expcnt, its largest, waits for is nothing.
    known = {"vmcnt", "lgkmcnt"} | ({"expcnt"} if counts.get("expcnt") == 7 else set())
    if set(counts) - known or not counts:
        raise Unknown(f"{text} is not something the emulator knows")
    form.texts, form.modifiers = [], {}
    memory, lds = counts.get("vmcnt"), counts.get("lgkmcnt")

    def effect(waves: Waves, machine: Machine) -> None:
        if memory is not None:
            for done in waves.wait(waves.memory, memory):
                if done.lds is not None:
                    there = done.lds >= 0
                    machine.lds.arrive(done.lds[there], done.size, waves.lane_wave[there])
        if lds is not None:
            waves.wait(waves.lds, lds)

    return effect


def scalar_load(form: Form, words: str) -> Effect:
    """s_load: from a pair of registers plus a constant or a register, and a constant."""
    count = int(words.removeprefix("x") or 1)
    target, base = form.target(), scalar_read("u64", form.source())
    offset = scalar_read("u32", form.source())
    more = form.number("offset")
    registers = frozenset(SCALAR_KEY + register for register in target.registers)

    def effect(waves: Waves, machine: Machine) -> None:
        start = (base(waves) + offset(waves).astype(np.uint64)).astype(np.int64) + more
        values = machine.memory.load(np.broadcast_to(start, (len(waves),)), 4 * count)
        words = values.reshape(len(waves), count, 4).view(np.uint32)[..., 0]
        for i in range(count):
            waves.write_s(target.register + i, words[:, i])
        issue(waves, waves.lds, Outstanding("smem", registers))

    return effect


def buffer(form: Form, verb: str, width: str) -> Effect:
    """buffer_load, buffer_store and buffer_atomic_add: a range-checked base in four scalar registers."""
    to_lds = "lds" in form.modifiers
    form.modifiers.pop("lds", None)
    data = None if to_lds else (form.target() if verb == "load" else form.source())
    index = form.source()
    descriptor = form.source()
    if form.texts.pop(0) != "0" or form.modifiers.pop("offen", None) is None:
        raise Unknown(f"{form.instruction.text}: the emulator knows offen and no scalar offset")
    offset = form.number("offset")
    s = descriptor.register

    def addresses(waves: Waves) -> tuple[Array, Array]:
        low, high, records, flags = (waves.s[s + i].astype(np.int64)[:, None] for i in range(4))
        if (high >> 16).any() or ((flags >> 21) & 3).any() or ((flags >> 23) & 1).any():
            raise Unknown("a buffer with a stride or a swizzle is not something the emulator knows")
        at = waves.v[index.register].astype(np.int64) + offset
        return (low | high << 32) + at, records - at

    return transfer(form, verb, width, data, addresses)


def global_(form: Form, verb: str, lds: str | None, width: str) -> Effect:
    """global_load, global_store and global_atomic_add: an address of 64 bits in vector registers, or a
    base in scalar ones and an offset of 32 bits."""
    to_lds = bool(lds)
    data = form.target() if verb == "load" and not to_lds else None
    address = form.source()
    if verb != "load":
        data = form.source()
    base = form.texts.pop(0)
    offset = form.number("offset")
    if base == "off":
        read = vector_read("u64", address)
    else:
        start = scalar_read("u64", form.source(base))
        register = address.register
        read = lambda waves: start(waves)[:, None] + waves.v[register].astype(np.uint64)  # noqa: E731

    def addresses(waves: Waves) -> tuple[Array, None]:
        return read(waves).astype(np.int64) + offset, None

    return transfer(form, verb, width, data, addresses)


def transfer(
    form: Form,
    verb: str,
    width: str,
    data: Operand | None,
    addresses: Callable[[Waves], tuple[Array, Array | None]],
) -> Effect:
    """A load, a store or an atomic addition of every active lane.

    Args:
        verb: "load", "store" or "atomic_add".
        width: "dword", "ubyte" and so on; "short_d16_hi" stores the upper half of the register.
        data: the registers; None for a load that goes to LDS.
        addresses: gives int64[W, 64] addresses and, for buffers, how many bytes lie between each and the
            buffer's end: beyond it a load gives 0 and a store is dropped, dword by dword.
    """
    size, count, dtype = WIDTHS[width]
    if verb == "load" and data is None:
        form.reads["s"].append(M0)
        offset = int(form.instruction.modifiers.get("offset", "0"), 0)

        def load_lds(waves: Waves, machine: Machine) -> None:
            lanes = waves.lanes
            where, room = addresses(waves)
            values = load_within(machine.memory, where[lanes], None if room is None else room[lanes], size)
            # All of M0: Triton puts addresses beyond 64 KiB there, which older GPUs do not have.
            base = waves.s[M0].astype(np.int64)[:, None] + offset
            at = np.full(lanes.shape, -1)
            at[lanes] = machine.lds.store(
                (base + LANE * size)[lanes],
                values,
                waves.lane_workgroup[lanes],
                waves.lane_wave[lanes],
                in_flight=True,
                reading=any(one.kind == "lds read" for one in waves.lds),
            )
            issue(waves, waves.memory, Outstanding("load", frozenset(), at, size))

        return load_lds

    assert data is not None
    first, skipped = data.register, 2 if width.endswith("_d16_hi") else 0
    if verb == "load" and skipped:
        raise Unknown(f"{form.instruction.text}: the emulator knows _d16_hi of stores only")

    def load(waves: Waves, machine: Machine) -> None:
        where, room = addresses(waves)
        where, room = active(waves, where), None if room is None else active(waves, room)
        got = load_within(machine.memory, where, room, size)
        for i in range(count):
            waves.write_v(first + i, spread(waves, narrow(got[:, 4 * i : 4 * i + 4], dtype)))
        issue(waves, waves.memory, Outstanding("load", frozenset(data.registers)))

    def store(waves: Waves, machine: Machine) -> None:
        where, room = addresses(waves)
        where, room = active(waves, where), None if room is None else active(waves, room)
        words = np.stack([active(waves, waves.v[first + i]) for i in range(count)], axis=1)
        values = words.view(np.uint8)[:, skipped : skipped + size]
        for part in [slice(0, size)] if room is None else pieces(room, size):
            inside = slice(None) if room is None else room >= part.stop
            machine.memory.store(where[inside] + part.start, np.ascontiguousarray(values[inside, part]))
        issue(waves, waves.memory, Outstanding("store"))

    def add(waves: Waves, machine: Machine) -> None:
        where, room = addresses(waves)
        inside = waves.lanes if room is None else waves.lanes & (room >= size)
        machine.memory.add(where[inside], waves.v[first][inside])
        issue(waves, waves.memory, Outstanding("store"))

    return {"load": load, "store": store, "atomic_add": add}[verb]


def scratch(form: Form, verb: str, words: str) -> Effect:
    """scratch_load and scratch_store, at a constant address.

    LLVM spills pairs of which it has written one half: what is unknown stays so on its way through scratch.
    """
    count = int(words.removeprefix("x") or 1)
    data = form.target() if verb == "load" else None
    places = [form.texts.pop(0)]
    if verb == "store":
        data = form.source()
    places.append(form.texts.pop(0))
    offset = form.number("offset")
    if places != ["off", "off"] or offset % 4 or data is None:
        raise Unknown(f"{form.instruction.text} is not something the emulator knows")
    at, first = offset // 4, data.register
    registers = frozenset(data.registers) if verb == "load" else frozenset()
    form.carries_unknown = True

    def effect(waves: Waves, machine: Machine) -> None:
        if at + count > len(waves.scratch):
            raise Fault(f"scratch access at {offset}, and a lane has {4 * len(waves.scratch)} bytes")
        for i in range(count):
            if verb == "load":
                if (~waves.scratch_known[at + i] & waves.exec).any():
                    raise Fault("reads scratch memory that nothing has written")
                waves.write_v(first + i, waves.scratch[at + i])
                waves.forget_v(first + i, ~waves.scratch_sound[at + i] & waves.exec)
            else:
                sound = waves.v_known[first + i] & waves.exec
                waves.scratch_sound[at + i] = waves.scratch_sound[at + i] & ~waves.exec | sound
                np.copyto(waves.scratch[at + i], waves.v[first + i], where=waves.lanes)
                waves.scratch_known[at + i] |= waves.exec
        issue(waves, waves.memory, Outstanding(verb, registers))

    return effect


def lds_read(form: Form, two: str | None, stride: str | None, width: str) -> Effect:
    """ds_read: one or two values of LDS."""
    size, count, dtype = WIDTHS[width]
    target, address = form.target(), form.source()
    offsets = lds_offsets(form, two, stride, size)
    registers = frozenset(target.registers)

    def effect(waves: Waves, machine: Machine) -> None:
        base = active(waves, waves.v[address.register]).astype(np.int64)
        owners = active(waves, waves.lane_workgroup), active(waves, waves.lane_wave)
        for j, offset in enumerate(offsets):
            where = base + offset
            machine.lds.count_passes(where, size, *owners)
            if size == 12:
                parts = [machine.lds.load(where + 4 * i, 4, *owners) for i in range(3)]
                got = np.concatenate(parts, axis=1)
            else:
                got = machine.lds.load(where, size, *owners)
            for i in range(count):
                value = spread(waves, narrow(got[:, 4 * i : 4 * i + 4], dtype))
                waves.write_v(target.register + j * count + i, value)
        issue(waves, waves.lds, Outstanding("lds read", registers))

    return effect


def lds_write(form: Form, two: str | None, stride: str | None, width: str, high: str | None) -> Effect:
    """ds_write: one or two values to LDS; "_d16_hi" writes the upper half of the register."""
    size, count, _ = WIDTHS[width]
    address = form.source()
    sources = [form.source() for _ in range(2 if two else 1)]
    offsets = lds_offsets(form, two, stride, size)
    shift = np.uint32(16 if high else 0)

    def effect(waves: Waves, machine: Machine) -> None:
        base = active(waves, waves.v[address.register]).astype(np.int64)
        owners = active(waves, waves.lane_workgroup), active(waves, waves.lane_wave)
        for source, offset in zip(sources, offsets, strict=True):
            machine.lds.count_passes(base + offset, size, *owners)
            words = [active(waves, waves.v[source.register + i]) >> shift for i in range(count)]
            values = np.stack(words, axis=1).view(np.uint8)[:, :size]
            machine.lds.store(base + offset, np.ascontiguousarray(values), *owners)
        issue(waves, waves.lds, Outstanding("lds store"))

    return effect


def lds_offsets(form: Form, two: str | None, stride: str | None, size: int) -> list[int]:
    """Byte offsets of an LDS instruction: those of a pair count in elements, or in 64 of them."""
    if not two:
        return [form.number("offset")]
    unit = size * (64 if stride else 1)
    return [unit * form.number("offset0"), unit * form.number("offset1")]


def issue(waves: Waves, queue: list[Outstanding], what: Outstanding) -> None:
    """Note a memory instruction that has been issued."""
    queue.append(what)
    waves.pending |= what.registers


def active(waves: Waves, values: Array) -> Array:
    """[W, 64] to [n]: the values of the active lanes."""
    return values.reshape(-1) if waves.whole else values[waves.lanes]


def spread(waves: Waves, values: Array) -> Array:
    """uint32[n] of the active lanes to [W, 64]."""
    if waves.whole:
        return values.reshape(waves.lanes.shape)
    out = np.zeros(waves.lanes.shape, np.uint32)
    out[waves.lanes] = values
    return out


def pieces(room: Array, size: int) -> list[slice]:
    """An access whole, or dword by dword where a lane's lies only partly within its buffer."""
    whole = not ((room > 0) & (room < size)).any()
    return [slice(0, size)] if whole else [slice(i, i + 4) for i in range(0, size, 4)]


def load_within(memory: GlobalMemory, where: Array, room: Array | None, size: int) -> NDArray[np.uint8]:
    """uint8[n, size] from int64[n] addresses, zero where `room` bytes are too few."""
    if room is None or (room >= size).all():
        return memory.load(where, size)
    got = np.zeros((len(where), size), np.uint8)
    for part in pieces(room, size):
        inside = room >= part.stop
        got[inside, part] = memory.load(where[inside] + part.start, part.stop - part.start)
    return got


def narrow(raw: NDArray[np.uint8], dtype: Any) -> Array:
    """uint8[n, size] to uint32[n], with the sign of what is narrower."""
    values = np.ascontiguousarray(raw).view(dtype)[:, 0]
    result: Array = values if dtype == np.uint32 else values.astype(np.int32).view(np.uint32)
    return result


TABLE: dict[str, Entry] = {"s_waitcnt": ("wait", wait)}

PATTERNS: tuple[tuple[re.Pattern[str], str, Callable[..., Effect]], ...] = (
    (re.compile(r"s_load_dword(?P<words>|x2|x4|x8|x16)"), "scalar", scalar_load),
    (re.compile(r"buffer_(?P<verb>load|store)_(?P<width>\w+)"), "memory", buffer),
    (re.compile(r"buffer_(?P<verb>atomic_add)(?P<width>)"), "memory", buffer),
    (re.compile(r"global_(?P<verb>load)_(?P<lds>lds_)?(?P<width>\w+)"), "memory", global_),
    (re.compile(r"global_(?P<verb>store)(?P<lds>)_(?P<width>\w+)"), "memory", global_),
    (re.compile(r"global_(?P<verb>atomic_add)(?P<lds>)(?P<width>)"), "memory", global_),
    (re.compile(r"scratch_(?P<verb>load|store)_dword(?P<words>|x2|x3|x4)"), "scratch", scratch),
    (re.compile(r"ds_read(?P<two>2)?(?P<stride>st64)?_(?P<width>\w+)"), "lds", lds_read),
    (re.compile(r"ds_write(?P<two>2)?(?P<stride>st64)?_(?P<width>b\d+)(?P<high>_d16_hi)?"), "lds", lds_write),
)
"""Memory instructions, of which the name says the width and more: a pattern, the kind, and the decoder, which
gets the pattern's groups."""
