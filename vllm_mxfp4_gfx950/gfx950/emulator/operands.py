"""What an instruction's text names: registers, constants, modifiers, and how each is read and written."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from vllm_mxfp4_gfx950.gfx950.driver import WAVE
from vllm_mxfp4_gfx950.gfx950.emulator.assembly import Instruction, Program
from vllm_mxfp4_gfx950.gfx950.emulator.instructions.op import Array
from vllm_mxfp4_gfx950.gfx950.emulator.memory import Fault, GlobalMemory, Lds
from vllm_mxfp4_gfx950.gfx950.emulator.waves import EXEC, M0, SCALAR_KEY, VCC, Waves, expand, pack

Read: TypeAlias = Callable[[Waves], Array]
Write: TypeAlias = Callable[[Waves, Array], None]

REGISTER = re.compile(r"([vas])(?:(\d+)|\[(\d+):(\d+)\])$")
SPECIAL = {"vcc": VCC, "vcc_lo": VCC, "vcc_hi": VCC + 1, "m0": M0, "exec": EXEC}
DTYPES: dict[str, Any] = {
    "u32": np.uint32,
    "i32": np.int32,
    "f32": np.float32,
    "u16": np.uint16,
    "i16": np.int16,
}
LANE = np.arange(WAVE)
HINTS = {"sc0", "sc1", "nt"}
"""Cache policy: no effect on the values of loads and stores. An atomic with sc0 returns what was there."""


class Unknown(Fault):
    """An instruction, or a form of one, that is not implemented."""


@dataclass(frozen=True)
class Machine:
    """What instructions reach beyond their registers."""

    memory: GlobalMemory
    lds: Lds


Effect: TypeAlias = Callable[[Waves, Machine], None]
"""What an instruction does."""


@dataclass(frozen=True)
class Operand:
    """One operand.

    Args:
        kind: "v", "s" or "constant".
        register: the first register: accumulation registers follow the other vector ones.
        count: how many.
        constant: the value as written.
        negative, absolute, signed: modifiers of it.
    """

    kind: str
    register: int = 0
    count: int = 1
    constant: str = ""
    negative: bool = False
    absolute: bool = False
    signed: bool = False

    @property
    def registers(self) -> range:
        """The numbers of its registers."""
        return range(self.register, self.register + self.count)


@dataclass(frozen=True)
class Registers:
    """How many registers a kernel has.

    Args:
        vector: of a lane, accumulation registers included.
        accumulation: number of the first accumulation register among them.
        scalar: of a wave.
    """

    vector: int
    accumulation: int
    scalar: int

    @classmethod
    def of(cls, program: Program) -> Registers:
        """Those that the descriptor and the metadata ask for."""
        accumulation = program.descriptor["accum_offset"]
        vector = max(program.notes["vgpr_count"], accumulation + program.notes["agpr_count"])
        return cls(vector, accumulation, program.notes["sgpr_count"])


class Form:
    """The text of one instruction, taken apart piece by piece; it notes the registers that are touched.

    Args:
        instruction: what to decode.
        registers: those that its kernel has.
    """

    def __init__(self, instruction: Instruction, registers: Registers) -> None:
        self.instruction = instruction
        self.texts = list(instruction.operands)
        hints = () if "atomic" in instruction.mnemonic else HINTS
        self.modifiers = {key: value for key, value in instruction.modifiers.items() if key not in hints}
        self.registers = registers
        self.reads: dict[str, list[int]] = {"v": [], "s": []}
        self.writes: set[int] = set()
        self.all_lanes = False
        self.carries_unknown = False

    def parse(self, text: str) -> Operand:
        """An operand as written, with its modifiers."""
        signed = text.startswith("sext(")
        text = text.removeprefix("sext(").removesuffix(")") if signed else text
        negative = text.startswith("-") and not text[1:2].isdigit()
        text = text[1:] if negative else text
        absolute = text.startswith("|")
        text = text.strip("|")
        changes = {"negative": negative, "absolute": absolute, "signed": signed}
        if match := REGISTER.match(text):
            first = int(match[2] or match[3])
            count = int(match[4] or first) - first + 1
            if match[1] == "s":
                if first + count > self.registers.scalar:
                    raise Fault(
                        f"{text} is beyond the {self.registers.scalar} scalar registers of the kernel"
                    )
                return Operand("s", first, count, "", **changes)
            limit = self.registers.vector
            if match[1] == "v":
                limit = self.registers.accumulation
            else:
                first += self.registers.accumulation
            if first + count > limit:
                raise Fault(f"{text} is beyond the {limit} vector registers of the kernel")
            return Operand("v", first, count, "", **changes)
        if text in SPECIAL:
            return Operand("s", SPECIAL[text], 2 if text in ("vcc", "exec") else 1, "", **changes)
        if not re.fullmatch(r"-?(\d+|0x[0-9a-f]+|\d+\.\d+)", text):
            raise Unknown(f"{text} is not an operand that the emulator knows")
        return Operand("constant", constant=text, **changes)

    def source(self, text: str | None = None) -> Operand:
        """The next operand (or the one given), which is read."""
        operand = self.parse(self.texts.pop(0) if text is None else text)
        if operand.kind == "v" or (operand.kind == "s" and operand.register != EXEC):
            self.reads[operand.kind] += operand.registers
        return operand

    def target(self, text: str | None = None) -> Operand:
        """The next operand (or the one given), which is written."""
        operand = self.parse(self.texts.pop(0) if text is None else text)
        offset = SCALAR_KEY if operand.kind == "s" else 0
        self.writes.update(offset + register for register in operand.registers)
        return operand

    def number(self, key: str, default: int = 0) -> int:
        """A modifier's value."""
        return int(self.modifiers.pop(key, str(default)), 0)


def vector_read(kind: str, operand: Operand) -> Read:
    """How a vector instruction reads an operand: [W, 64], [W, 1] or a number."""
    register = operand.register
    if kind == "mask":
        return lambda waves: expand(waves.read_pair(register))
    if kind == "u64":
        if operand.kind == "v":
            return lambda waves: (
                waves.v[register].astype(np.uint64) | waves.v[register + 1].astype(np.uint64) << np.uint64(32)
            )
        read = scalar_read("u64", operand)
        return read if operand.kind == "constant" else lambda waves: read(waves)[:, None]
    dtype = DTYPES[kind]
    narrow = np.dtype(dtype).itemsize == 2
    if operand.kind == "constant":
        value = constant(kind, operand.constant)
        plain: Read = lambda waves: value  # noqa: E731
    elif operand.kind == "v" and narrow:
        plain = lambda waves: waves.v[register].astype(np.uint16).view(dtype)  # noqa: E731
    elif operand.kind == "v":
        plain = lambda waves: waves.v[register].view(dtype)  # noqa: E731
    else:
        scalar = scalar_read("u32", operand)
        if narrow:
            plain = lambda waves: scalar(waves)[:, None].astype(np.uint16).view(dtype)  # noqa: E731
        else:
            plain = lambda waves: scalar(waves)[:, None].view(dtype)  # noqa: E731
    return modified(kind, operand, plain)


def modified(kind: str, operand: Operand, plain: Read) -> Read:
    """An operand with its sign or magnitude changed on the way."""
    if operand.signed or (kind != "f32" and (operand.negative or operand.absolute)):
        raise Unknown("this change of an operand is not one that the emulator knows")
    if operand.absolute and operand.negative:
        return lambda waves: np.negative(np.abs(plain(waves)))
    if operand.absolute:
        return lambda waves: np.abs(plain(waves))
    return (lambda waves: np.negative(plain(waves))) if operand.negative else plain


def constant(kind: str, text: str) -> Any:
    """A constant operand: the bits that hardware sees."""
    if "." in text:
        if kind not in ("f32", "u32", "i32"):
            raise Unknown(f"the constant {text} for {kind} is not something the emulator knows")
        return np.float32(text).view(DTYPES[kind])
    value = int(text, 0)
    if kind == "k16":
        return np.uint16(value % 2**16).view(np.int16).astype(np.int32)
    if kind == "u64":
        if text.startswith("0x") and value >> 31:
            raise Unknown(f"the constant {text} for {kind} is not something the emulator knows")
        return np.uint64(value % 2**64)
    if kind in ("u16", "i16"):
        return np.uint16(value % 2**16).view(DTYPES[kind])
    return np.uint32(value % 2**32).view(DTYPES[kind])


def scalar_read(kind: str, operand: Operand) -> Read:
    """How a scalar instruction reads an operand: [W] or a number."""
    register = operand.register
    if operand.kind == "constant":
        value = constant(kind, operand.constant)
        return lambda waves: value
    if operand.kind == "v":
        raise Unknown("a vector register as a scalar operand is not something the emulator knows")
    if kind == "u64":
        return lambda waves: waves.read_pair(register)
    if register >= EXEC:
        raise Unknown("half of EXEC is not something the emulator knows")
    dtype = DTYPES[kind]
    return lambda waves: waves.s[register].view(dtype)


def scalar_write(kind: str, target: Operand | None) -> Write:
    """How a scalar instruction writes a result."""
    if target is None:
        return lambda waves, value: waves.write_scc(value)
    register = target.register
    if kind == "u64":
        return lambda waves, value: waves.write_pair(register, value)
    return lambda waves, value: waves.write_s(register, np.asarray(value).view(np.uint32))


def vector_write(kind: str, target: Operand) -> Write:
    """How a vector instruction writes a result; lanes that are off give 0 in a mask."""
    register = target.register
    if kind == "mask":

        def write_mask(waves: Waves, value: Array) -> None:
            lanes = np.broadcast_to(value, waves.lanes.shape)
            waves.write_pair(register, pack(lanes if waves.whole else lanes & waves.lanes))

        return write_mask
    if kind == "u64":

        def write_wide(waves: Waves, value: Array) -> None:
            value = np.asarray(value)
            waves.write_v(register, value.astype(np.uint32))
            waves.write_v(register + 1, (value >> np.uint64(32)).astype(np.uint32))

        return write_wide
    if kind == "f32x2":

        def write_pair(waves: Waves, value: Array) -> None:
            waves.write_v(register, value[0].view(np.uint32))
            waves.write_v(register + 1, value[1].view(np.uint32))

        return write_pair
    if kind in ("u16", "i16"):
        return lambda waves, value: waves.write_v(register, np.asarray(value).astype(np.uint32))
    return lambda waves, value: waves.write_v(register, np.asarray(value).view(np.uint32))


def applied(writes: list[Write], function: Callable[..., Any], reads: list[Read]) -> Effect:
    """Read the operands, compute, and write the result, or each of several."""
    if len(writes) == 1:
        write = writes[0]
        return lambda waves, machine: write(waves, function(*[read(waves) for read in reads]))

    def effect(waves: Waves, machine: Machine) -> None:
        for write, result in zip(writes, function(*[read(waves) for read in reads]), strict=True):
            write(waves, result)

    return effect


Entry: TypeAlias = tuple[str, Callable[[Form], Effect]]
"""An instruction in the tables: its kind, for counting, and what makes of its text what it does."""
