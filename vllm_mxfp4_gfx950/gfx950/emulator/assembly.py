"""Reading gfx950 assembly: instructions, labels, and what the kernel's descriptor and metadata say.

Source: LLVM, AMDGPUUsage (code object V5 metadata, kernel descriptor directives, kernarg preload) and
the assembler syntax of AMDGPU operands and modifiers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LABEL = re.compile(r"([.$\w]+):$")
MNEMONIC = re.compile(r"([a-z]\w+)(?:\s+(.*))?$")
DIRECTIVE = re.compile(r"^\s*\.amdhsa_(\w+) (\d+)$", re.MULTILINE)
NOTE = re.compile(r"^[ -]+\.(\w+):\s+(\d+)$", re.MULTILINE)
ARGUMENT = re.compile(r"\.offset:\s+(\d+)\s+\.size:\s+(\d+)\s+\.value_kind:\s+(\w+)")
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
    modifiers: dict[str, str]
    line: int
    text: str


@dataclass(frozen=True)
class Program:
    """A kernel as it was assembled.

    Args:
        name: the kernel's name.
        instructions: in order.
        labels: position of the instruction after each label.
        entry: position at which waves start.
        descriptor: the kernel descriptor's directives, without ".amdhsa_".
        notes: the metadata's numbers, by key.
        arguments: offset and size in bytes of each kernel argument that is not hidden, and its kind.
    """

    name: str
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    entry: int
    descriptor: dict[str, int]
    notes: dict[str, int]
    arguments: tuple[tuple[int, int, str], ...]


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
        labels=labels,
        entry=entry,
        descriptor={key: int(value) for key, value in DIRECTIVE.findall(rest)},
        notes={key: int(value) for key, value in NOTE.findall(rest)},
        arguments=tuple(
            (int(offset), int(size), kind)
            for offset, size, kind in ARGUMENT.findall(rest)
            if not kind.startswith("hidden_")
        ),
    )


def _split(text: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """Operands, which commas separate, and modifiers, which blanks do; brackets hold either together."""
    parts = re.split(r",\s*(?![^\[(]*[\])])", text)
    last, *modifiers = re.split(r"\s+(?![^\[(]*[\])])", parts[-1].strip())
    operands = (*(part.strip() for part in parts[:-1]), last)
    named = (modifier.partition(":") for modifier in modifiers)
    return tuple(filter(None, operands)), {key: value for key, _, value in named}
