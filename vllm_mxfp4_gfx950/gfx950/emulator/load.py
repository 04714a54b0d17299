"""Loading a kernel: its assembly, decoded and cut into blocks where waves may part."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from vllm_mxfp4_gfx950.gfx950.emulator.assembly import Instruction, Program, parse
from vllm_mxfp4_gfx950.gfx950.emulator.decode import Step, decode
from vllm_mxfp4_gfx950.gfx950.emulator.memory import Fault
from vllm_mxfp4_gfx950.gfx950.emulator.operands import Registers, Unknown
from vllm_mxfp4_gfx950.gfx950.emulator.waves import VCC, Waves

MODE = {
    "float_denorm_mode_32": 3,
    "float_denorm_mode_16_64": 3,
    "float_round_mode_32": 0,
    "float_round_mode_16_64": 0,
    "ieee_mode": 1,
}
"""What the descriptor must ask for: `instructions.floats` computes that and nothing else."""

Condition = Callable[[Waves], NDArray[np.bool_]]
CONDITIONS: dict[str, Condition] = {
    "s_cbranch_scc0": lambda waves: ~waves.scc,
    "s_cbranch_scc1": lambda waves: waves.scc,
    "s_cbranch_vccz": lambda waves: waves.read_pair(VCC) == 0,
    "s_cbranch_vccnz": lambda waves: waves.read_pair(VCC) != 0,
    "s_cbranch_execz": lambda waves: waves.exec == 0,
    "s_cbranch_execnz": lambda waves: waves.exec != 0,
}
"""Which waves take a conditional branch: bool[waves]."""

ENDS = (*CONDITIONS, "s_branch", "s_barrier", "s_endpgm")
"""Instructions behind which waves may part."""


@dataclass(frozen=True)
class Block:
    """Instructions without a way in or out but at the ends.

    Args:
        first: position of its first instruction.
        steps: what is executed.
        end: the instruction that ends it; None where the next block just follows.
        target: the block that the end may branch to.
        kinds, mnemonics: how many instructions of each kind it has, the end included.
    """

    first: int
    steps: tuple[Step, ...]
    end: Instruction | None
    target: int
    kinds: Mapping[str, int]
    mnemonics: Mapping[str, int]


@dataclass(frozen=True)
class Kernel:
    """A program, decoded.

    Args:
        program: what it was decoded from.
        blocks: in the order of the text.
        entry: the block at which waves start.
    """

    program: Program
    blocks: tuple[Block, ...]
    entry: int


@functools.lru_cache(maxsize=256)
def load(name: str, assembly: str) -> Kernel:
    """Take a kernel apart and decode it.

    Raises:
        Fault: it has an instruction, or asks for a mode, that the emulator does not know.
    """
    program = parse(name, assembly)
    for key, value in MODE.items():
        if program.descriptor.get(key) != value:
            raise Fault(f"{name}: {key} is {program.descriptor.get(key)}; the emulator computes {value} only")
    registers = Registers.of(program)
    starts = {program.entry, *program.labels.values()}
    starts |= {i + 1 for i, one in enumerate(program.instructions) if one.mnemonic in ENDS}
    bounds = sorted(start for start in starts if start < len(program.instructions))
    number = {start: index for index, start in enumerate(bounds)}
    blocks = []
    for start, stop in zip(bounds, [*bounds[1:], len(program.instructions)], strict=True):
        part = program.instructions[start:stop]
        end = part[-1] if part[-1].mnemonic in ENDS else None
        target = -1
        if end is not None and end.operands:
            position = program.labels.get(end.operands[0], -1)
            if position not in number:
                raise located(Fault(f"there is nothing at {end.operands[0]}"), name, end)
            target = number[position]
        if stop == len(program.instructions) and (
            end is None or end.mnemonic not in ("s_endpgm", "s_branch")
        ):
            raise located(Fault("runs over the kernel's end"), name, part[-1])
        steps = tuple(_step(name, one, registers) for one in (part[:-1] if end else part))
        kinds = Counter(step.kind for step in steps)
        if end is not None:
            kinds["barrier" if end.mnemonic == "s_barrier" else "branch"] += 1
        mnemonics = Counter(instruction.mnemonic for instruction in part)
        counts = MappingProxyType(kinds), MappingProxyType(mnemonics)
        blocks.append(Block(start, steps, end, target, *counts))
    return Kernel(program, tuple(blocks), number[program.entry])


def _step(name: str, instruction: Instruction, registers: Registers) -> Step:
    """The instruction, decoded. What the emulator does not know is an error that names the line."""
    try:
        return decode(instruction, registers)
    except Fault as fault:
        raise located(fault, name, instruction) from fault
    except (KeyError, IndexError, ValueError) as error:
        unknown = Unknown(f"not something the emulator knows ({error!r})")
        raise located(unknown, name, instruction) from error


def located(fault: Fault, name: str, instruction: Instruction) -> Fault:
    """The fault with the kernel and the line where it happened."""
    return type(fault)(f"{name}, line {instruction.line}: {instruction.text}: {fault}")
