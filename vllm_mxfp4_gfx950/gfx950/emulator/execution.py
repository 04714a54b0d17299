"""Executing a compiled gfx950 kernel without a gfx950: its assembly, its grid and its arguments.

Waves that stand at the same instruction run in lockstep, as one axis of the register arrays; where a
branch divides them they become two groups, and one again where they meet. Workgroups run in batches,
one batch after the other, as hardware would be free to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_mxfp4_gfx950.gfx950.driver import WAVE, Launch
from vllm_mxfp4_gfx950.gfx950.emulator.launch import lay_out, start
from vllm_mxfp4_gfx950.gfx950.emulator.load import CONDITIONS, Block, Kernel, load, located
from vllm_mxfp4_gfx950.gfx950.emulator.memory import Fault, GlobalMemory, Lds
from vllm_mxfp4_gfx950.gfx950.emulator.operands import Machine
from vllm_mxfp4_gfx950.gfx950.emulator.waves import SCALAR_KEY, VCC, Waves

MAX_BLOCKS = 200_000
"""A batch that passes more blocks of instructions than this does not end; these kernels take thousands."""

WAVES_AT_ONCE = 256
"""Waves of a batch: enough to make NumPy's calls cheap, few enough that the arrays stay in the caches."""

KINDS = ("vector", "fp4", "matrix", "scalar", "memory", "lds", "scratch", "wait", "branch", "barrier")
"""What instructions are counted as."""


@dataclass
class Counts:
    """What a launch did, summed over its waves.

    Args:
        instructions: executed instructions of a wave, by KINDS; fp4 are conversions.
        mnemonics: the same by mnemonic.
        bytes_read, bytes_written: of global memory, by kernel parameter.
        idle_lanes: lanes that were off in vector instructions.
        workgroups: that were executed.
        idle_workgroups: of those, how many executed no matrix instruction.
        lds_passes, lds_conflicts: of the first workgroup executed; see `Lds`.
    """

    instructions: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    mnemonics: dict[str, int] = field(default_factory=dict)
    bytes_read: dict[str, int] = field(default_factory=dict)
    bytes_written: dict[str, int] = field(default_factory=dict)
    idle_lanes: int = 0
    workgroups: int = 0
    idle_workgroups: int = 0
    lds_passes: int = 0
    lds_conflicts: int = 0


def execute(
    launch: Launch, workgroups: Sequence[int] | None = None, trace: list[int] | None = None
) -> Counts:
    """Execute a launch: its stores are in the tensors that it was given afterwards.

    Args:
        launch: the compiled kernel, its grid and its arguments; tensors on the CPU.
        workgroups: which ones, numbered with x fastest; all when None.
        trace: gets the blocks of the kernel that the first of them's first wave went through, in order.

    Returns:
        What was executed.

    Raises:
        Fault: the kernel did something that a right one does not, or that the emulator does not know.
    """
    kernel = load(launch.name, launch.assembly)
    x, y, z = launch.grid
    numbers = np.arange(x * y * z) if workgroups is None else np.asarray(workgroups)
    arguments, regions = lay_out(kernel.program, launch)
    memory = GlobalMemory(regions)
    waves = -(-kernel.program.notes["max_flat_workgroup_size"] // WAVE)
    counts = Counts(workgroups=len(numbers))
    at_once = max(1, WAVES_AT_ONCE // waves)
    with np.errstate(all="ignore"):
        for first in range(0, len(numbers), at_once):
            batch = numbers[first : first + at_once]
            ids = np.stack([batch % x, batch // x % y, batch // (x * y)])
            machine = Machine(memory, Lds(len(batch), launch.lds_bytes))
            Run(kernel, machine, counts, None if first else trace).run(
                start(kernel.program, arguments, ids, waves)
            )
            if not first:
                counts.lds_passes, counts.lds_conflicts = machine.lds.passes, machine.lds.conflicts
    for region in memory.regions:
        counts.bytes_read[region.name] = region.bytes_read
        counts.bytes_written[region.name] = region.bytes_written
    return counts


def check_done(waves: Waves) -> None:
    """Raise Fault when waves come to a barrier with LDS instructions that may not be done."""
    for kind, what in (("lds store", "writes to"), ("lds read", "reads of")):
        if any(one.kind == kind for one in waves.lds):
            raise Fault(f"meets the others before its {what} LDS are done: an s_waitcnt is missing")


def check_condition(branch: str, waves: Waves) -> None:
    """Raise Fault when a branch depends on what nothing has written, or what is still to be loaded."""
    if "scc" in branch and not waves.scc_known.all():
        raise Fault("reads SCC, which nothing has written")
    if "vcc" in branch:
        waves.check_known((), (VCC, VCC + 1))
        if not waves.pending.isdisjoint({SCALAR_KEY + VCC, SCALAR_KEY + VCC + 1}):
            raise Fault("touches a register that a load is still to write: an s_waitcnt is missing")


class Run:
    """One batch of workgroups on its way through a kernel."""

    def __init__(
        self, kernel: Kernel, machine: Machine, counts: Counts, trace: list[int] | None = None
    ) -> None:
        self.kernel, self.machine, self.counts, self.trace = kernel, machine, counts, trace
        self.ready: list[Waves] = []
        self.waiting: list[Waves] = []
        self.executed = Counter[int]()

    def run(self, waves: Waves) -> None:
        """Run until every wave has ended."""
        waves.block = self.kernel.entry
        workgroups = set(waves.workgroup.tolist())
        idle = waves.idle_issued
        live = np.bincount(waves.workgroup)
        busy: set[int] = set()
        passed = 0
        self.ready = [waves]
        while self.ready or self.waiting:
            if not self.ready:
                self._release(live)
            group = self._next()
            block = self.kernel.blocks[group.block]
            try:
                for step in block.steps:
                    step.run(group, self.machine)
            except Fault as fault:
                raise located(fault, self.kernel.program.name, step.instruction) from fault
            passed += 1
            if passed > MAX_BLOCKS:
                endless = Fault(f"has not ended after {MAX_BLOCKS} blocks of instructions")
                last = block.end or block.steps[-1].instruction
                raise located(endless, self.kernel.program.name, last)
            self.executed[group.block] += len(group)
            if self.trace is not None and ((group.workgroup == 0) & (group.wave == 0)).any():
                self.trace.append(group.block)
            if "matrix" in block.kinds:
                busy |= set(group.workgroup.tolist())
            self._leave(group, block, live)
        for index, times in self.executed.items():
            for name, each in self.kernel.blocks[index].kinds.items():
                self.counts.instructions[name] += times * each
            for name, each in self.kernel.blocks[index].mnemonics.items():
                self.counts.mnemonics[name] = self.counts.mnemonics.get(name, 0) + times * each
        self.counts.idle_lanes += int(idle[0])
        self.counts.idle_workgroups += len(workgroups - busy)

    def _next(self) -> Waves:
        """The group that is furthest behind, joined with those that stand at the same place."""
        if len(self.ready) == 1:
            return self.ready.pop()
        group = min(self.ready, key=lambda each: each.block)
        self.ready.remove(group)
        for other in [each for each in self.ready if each.can_join(group)]:
            self.ready.remove(other)
            group = group.joined(other)
        return group

    def _leave(self, group: Waves, block: Block, live: NDArray[Any]) -> None:
        """Send a group on from the end of a block."""
        here = group.block
        group.block = here + 1
        if block.end is None:
            self.ready.append(group)
            return
        name = block.end.mnemonic
        try:
            if name == "s_barrier":
                check_done(group)
            elif name in CONDITIONS:
                check_condition(name, group)
        except Fault as fault:
            raise located(fault, self.kernel.program.name, block.end) from fault
        if name == "s_branch":
            group.block = block.target
            self.ready.append(group)
        elif name == "s_barrier":
            self.waiting.append(group)
        elif name == "s_endpgm":
            live -= np.bincount(group.workgroup, minlength=len(live))
        else:
            taken = CONDITIONS[name](group)
            if taken.all():
                group.block = block.target
                self.ready.append(group)
            elif not taken.any():
                self.ready.append(group)
            else:
                jumped, fell = group.split(taken)
                jumped.block = block.target
                self.ready += [jumped, fell]

    def _release(self, live: NDArray[Any]) -> None:
        """Let the workgroups go on of which every wave has come to a barrier."""
        came = np.bincount(np.concatenate([each.workgroup for each in self.waiting]), minlength=len(live))
        complete = (came == live) & (came > 0)
        self.machine.lds.barrier(np.flatnonzero(complete))
        still = []
        for group in self.waiting:
            free = complete[group.workgroup]
            if free.all():
                self.ready.append(group)
            elif not free.any():
                still.append(group)
            else:
                gone, stay = group.split(free)
                self.ready.append(gone)
                still.append(stay)
        self.waiting = still
