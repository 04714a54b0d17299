"""From an instruction to the function that executes it on Waves.

Everything that the text says is settled here, once: which registers, which halves, which lanes. What
the tables of `instructions` do not know is refused by name.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from vllm_mxfp4_gfx950.gfx950.emulator.assembly import Instruction
from vllm_mxfp4_gfx950.gfx950.emulator.instructions import access, lanes, matrix, scalar, vector
from vllm_mxfp4_gfx950.gfx950.emulator.memory import Fault
from vllm_mxfp4_gfx950.gfx950.emulator.operands import Effect, Entry, Form, Machine, Registers, Unknown
from vllm_mxfp4_gfx950.gfx950.emulator.waves import SCALAR_KEY, Waves

ENCODINGS = ("_e32", "_e64", "_dpp", "_sdwa")

TABLE: dict[str, Entry] = scalar.TABLE | vector.TABLE | lanes.TABLE | matrix.TABLE | access.TABLE
"""The instructions by mnemonic without the suffix of the encoding, but for those of `access.PATTERNS`."""


@dataclass(frozen=True)
class Step:
    """One instruction, ready to run.

    Args:
        instruction: where it came from.
        effect: what it does.
        vector, scalar: registers that it reads.
        checked: those of `vector` that must have been written.
        touched: registers that it reads or writes; see SCALAR_KEY.
        all_lanes: whether it reads lanes that are off, too.
        kind: its class, for counting.
    """

    instruction: Instruction
    effect: Effect
    vector: tuple[int, ...]
    scalar: tuple[int, ...]
    checked: tuple[int, ...]
    touched: frozenset[int]
    all_lanes: bool
    kind: str

    def run(self, waves: Waves, machine: Machine) -> None:
        """Check what it reads, and execute it."""
        if waves.pending and not waves.pending.isdisjoint(self.touched) and self._too_early(waves):
            raise Fault("touches a register that a load is still to write: an s_waitcnt is missing")
        for register in self.checked:
            if not waves.v_all[register]:
                waves.check_known(self.checked, (), all_lanes=self.all_lanes)
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
    found = entry(base)
    if found is None:
        raise Unknown(f"{mnemonic} is not an instruction that the emulator knows")
    kind, build = found
    effect = build(form)
    left = [*form.texts, *form.modifiers]
    if left:
        raise Unknown(f"{mnemonic} with {', '.join(left)} is not something the emulator knows")
    touched = {*form.reads["v"], *form.writes, *(SCALAR_KEY + register for register in form.reads["s"])}
    vector = tuple(dict.fromkeys(form.reads["v"]))
    return Step(
        form.instruction,
        effect,
        vector,
        tuple(dict.fromkeys(form.reads["s"])),
        () if form.carries_unknown else vector,
        frozenset(touched),
        form.all_lanes,
        kind,
    )


def entry(mnemonic: str) -> Entry | None:
    """The instruction's entry in the tables, if it has one."""
    for pattern, kind, build in access.PATTERNS:
        if match := pattern.fullmatch(mnemonic):
            return kind, functools.partial(build, **match.groupdict())
    return TABLE.get(mnemonic)
