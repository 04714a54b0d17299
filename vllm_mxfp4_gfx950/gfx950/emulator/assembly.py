"""The one reader of gfx950 assembly, for the emulator and for reports: instructions, labels, loops, metadata.

Source: LLVM, AMDGPUUsage (code object V5 metadata, kernel descriptor directives, kernarg preload) and
the assembler syntax of AMDGPU operands and modifiers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

LABEL = re.compile(r"([.$\w]+):$")
MNEMONIC = re.compile(r"([a-z]\w+)(?:\s+(.*))?$")
DIRECTIVE = re.compile(r"^\s*\.amdhsa_(\w+) (\d+)$", re.MULTILINE)
REMARK = re.compile(r"^; (\w+): (\d+)", re.MULTILINE)
NOTE = re.compile(r"^[ -]+\.(\w+):\s+(\d+)$", re.MULTILINE)
ARGUMENT = re.compile(r"\.offset:\s+(\d+)\s+\.size:\s+(\d+)\s+\.value_kind:\s+(\w+)")
COUNTER = re.compile(r"(\w+)\((\d+)\)")
ALIGNED_ENTRY = ".p2align\t8"
"""Stands before the entry of a kernel whose arguments are preloaded; what comes first loads them."""


@dataclass(frozen=True)
class Instruction:
    """One line of assembly.

    Args:
        mnemonic: with the suffix of its encoding ("_e32", "_dpp").
        operands: as written, in order.
        modifiers: what follows the operands; a bare word has the value "".
        line: its number in the text, from 1.
        text: the line without its comment.
    """

    mnemonic: str
    operands: tuple[str, ...]
    modifiers: Mapping[str, str]
    line: int
    text: str

    @property
    def counters(self) -> dict[str, int]:
        """What an s_waitcnt names, and of each how many memory instructions it leaves outstanding."""
        return {name: int(left) for name, left in COUNTER.findall(self.text)}


@dataclass(frozen=True)
class Program:
    """A kernel as it was assembled.

    Args:
        name: the kernel's name.
        instructions: in order.
        labels: position of the instruction after each label.
        entry: position at which waves start.
        descriptor: the kernel descriptor's directives, without ".amdhsa_".
        remarks: the compiler's numbers in its comments behind the kernel, by name.
        notes: the metadata's numbers, by key.
        arguments: offset and size in bytes of each kernel argument that is not hidden, and its kind.
    """

    name: str
    instructions: tuple[Instruction, ...]
    labels: Mapping[str, int]
    entry: int
    descriptor: Mapping[str, int]
    remarks: Mapping[str, int]
    notes: Mapping[str, int]
    arguments: tuple[tuple[int, int, str], ...]

    @property
    def loops(self) -> list[tuple[Instruction, ...]]:
        """The instructions of each loop, from its label to the last branch back to it."""
        stops: dict[int, int] = {}
        for position, instruction in enumerate(self.instructions):
            if "branch" in instruction.mnemonic:
                start = self.labels.get(instruction.operands[0])
                if start is not None and start <= position:
                    stops[start] = position + 1
        return [self.instructions[start:stop] for start, stop in stops.items()]


def parse(name: str, assembly: str) -> Program:
    """Read one kernel.

    Args:
        name: the kernel's name.
        assembly: what the compiler wrote, with its metadata.
    """
    body, _, rest = assembly.partition(".amdhsa_kernel")
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    entry = 0
    for number, raw in enumerate(body.splitlines(), 1):
        line = raw.partition(";")[0].strip()
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif line == ALIGNED_ENTRY and instructions:
            entry = len(instructions)
        elif match := MNEMONIC.match(line):
            operands, modifiers = _split(match[2] or "")
            instructions.append(Instruction(match[1], operands, modifiers, number, line))
    return Program(
        name=name,
        instructions=tuple(instructions),
        labels=MappingProxyType(labels),
        entry=entry,
        descriptor=_numbers(DIRECTIVE, rest),
        remarks=_numbers(REMARK, rest),
        notes=_numbers(NOTE, rest),
        arguments=tuple(
            (int(offset), int(size), kind)
            for offset, size, kind in ARGUMENT.findall(rest)
            if not kind.startswith("hidden_")
        ),
    )


def _numbers(pattern: re.Pattern[str], text: str) -> Mapping[str, int]:
    """The numbers that a pattern finds, by name."""
    return MappingProxyType({name: int(number) for name, number in pattern.findall(text)})


def _split(text: str) -> tuple[tuple[str, ...], Mapping[str, str]]:
    """Operands, which commas separate, and modifiers, which blanks do; brackets hold either together."""
    parts = re.split(r",\s*(?![^\[(]*[\])])", text)
    last, *modifiers = re.split(r"\s+(?![^\[(]*[\])])", parts[-1].strip())
    operands = (*(part.strip() for part in parts[:-1]), last)
    named = (modifier.partition(":") for modifier in modifiers)
    return tuple(filter(None, operands)), MappingProxyType({key: value for key, _, value in named})
