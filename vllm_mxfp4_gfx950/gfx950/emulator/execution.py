"""Executing a compiled gfx950 kernel without a gfx950: its assembly, its grid and its arguments.

Waves that stand at the same instruction run in lockstep, as one axis of the register arrays; where a
branch divides them they become two groups, and one again where they meet. Workgroups run in batches,
one batch after the other, as hardware would be free to do.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_mxfp4_gfx950.gfx950.driver import WAVE, Launch
from vllm_mxfp4_gfx950.gfx950.emulator.assembly import Instruction, Program, parse
from vllm_mxfp4_gfx950.gfx950.emulator.decode import Step, decode
from vllm_mxfp4_gfx950.gfx950.emulator.memory import Fault, GlobalMemory, Lds, Region
from vllm_mxfp4_gfx950.gfx950.emulator.operands import Machine, Registers, Unknown
from vllm_mxfp4_gfx950.gfx950.emulator.waves import SCALAR_KEY, VCC, Waves

MAX_BLOCKS = 200_000
"""A batch that passes more blocks of instructions than this does not end; these kernels take thousands."""

WAVES_AT_ONCE = 256
"""Waves of a batch: enough to make NumPy's calls cheap, few enough that the arrays stay in the caches."""

MODE = {
    "float_denorm_mode_32": 3,
    "float_denorm_mode_16_64": 3,
    "float_round_mode_32": 0,
    "float_round_mode_16_64": 0,
    "ieee_mode": 1,
}
"""What the descriptor must ask for: `arithmetic` computes that and nothing else."""

USER_SGPRS = ("dispatch_ptr", "queue_ptr", "kernarg_segment_ptr", "dispatch_id")
"""Pairs of scalar registers that a kernel may ask for, in the order in which it gets them."""

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

KINDS = (
    "vector",
    "fp4",
    "matrix",
    "scalar",
    "memory",
    "lds",
    "scratch",
    "wait",
    "branch",
    "barrier",
)
"""What instructions are counted as."""

ENDS = (*CONDITIONS, "s_branch", "s_barrier", "s_endpgm")
"""Instructions behind which waves may part."""


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
    kinds: Counter[str]
    mnemonics: Counter[str]


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
    registers = registers_of(program)
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
        steps = []
        for instruction in part[:-1] if end else part:
            try:
                steps.append(decode(instruction, registers))
            except Fault as fault:
                raise located(fault, name, instruction) from fault
            except (KeyError, IndexError, ValueError) as error:
                unknown = Unknown(f"not something the emulator knows ({error!r})")
                raise located(unknown, name, instruction) from error
        kinds = Counter(step.kind for step in steps)
        if end is not None:
            kinds["barrier" if end.mnemonic == "s_barrier" else "branch"] += 1
        mnemonics = Counter(instruction.mnemonic for instruction in part)
        blocks.append(Block(start, tuple(steps), end, target, kinds, mnemonics))
    return Kernel(program, tuple(blocks), number[program.entry])


def registers_of(program: Program) -> Registers:
    """How many registers a kernel has."""
    accumulation = program.descriptor["accum_offset"]
    vector = max(program.notes["vgpr_count"], accumulation + program.notes["agpr_count"])
    return Registers(vector, accumulation, program.notes["sgpr_count"])


def located(fault: Fault, name: str, instruction: Instruction) -> Fault:
    """The fault with the kernel and the line where it happened."""
    return type(fault)(f"{name}, line {instruction.line}: {instruction.text}: {fault}")


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


def lay_out(program: Program, launch: Launch) -> tuple[NDArray[np.uint8], list[Region]]:
    """The kernel arguments as they lie in memory, and the tensors they point to.

    Source: Triton passes a signature's arguments that are not constants, in order, then pointers to two
    scratch memories, which these kernels do not use.
    """
    size = max((offset + size for offset, size, _ in program.arguments), default=0)
    raw = np.zeros(max(8, size), np.uint8)
    values = launch.values()
    if len(values) + 2 != len(program.arguments):
        raise Fault(
            f"{launch.name} takes {len(program.arguments)} arguments; got {len(values)} and 2 of scratch"
        )
    regions: list[Region] = []
    for (offset, width, kind), (name, value) in zip(program.arguments, values, strict=False):
        tensor = plain_tensor(value)
        if (kind == "global_buffer") != (tensor is not None or value is None):
            raise Fault(f"{launch.name}: argument {name} is {kind}; got {type(value).__name__}")
        if tensor is not None:
            bits = tensor.data_ptr().to_bytes(width, "little")
            if tensor.numel():
                regions.append(tensor_region(name, tensor))
        elif isinstance(value, float):
            bits = np.array(value, f"f{width}").tobytes()
        else:
            bits = (int(value or 0) % 2 ** (8 * width)).to_bytes(width, "little")
        raw[offset : offset + width] = np.frombuffer(bits, np.uint8)
    regions.append(Region("kernel arguments", raw.ctypes.data, raw))
    return raw, without_overlap(regions)


def plain_tensor(value: Any) -> torch.Tensor | None:
    """The tensor of an argument: triton_kernels passes its own, and Triton wraps those of another type."""
    while hasattr(value, "data_ptr") and not isinstance(value, torch.Tensor):
        value = value.storage.data if hasattr(value, "storage") else value.base
    return value if isinstance(value, torch.Tensor) else None


def tensor_region(name: str, tensor: torch.Tensor) -> Region:
    """A tensor's whole storage: triton_kernels clears more of an allocation than the view that it passes."""
    storage = tensor.untyped_storage()
    flat = torch.empty(0, dtype=torch.uint8).set_(storage)
    return Region(name, storage.data_ptr(), flat.numpy())


def without_overlap(regions: list[Region]) -> list[Region]:
    """Regions that share bytes, as one."""
    merged: list[Region] = []
    for region in sorted(regions, key=lambda each: (each.start, -each.data.size)):
        last = merged[-1] if merged else None
        if last is None or region.start >= last.start + last.data.size:
            merged.append(region)
            continue
        size = max(last.data.size, region.start + region.data.size - last.start)
        data = np.lib.stride_tricks.as_strided(last.data, (size,), (1,))
        name = last.name if region.name in last.name.split("+") else f"{last.name}+{region.name}"
        merged[-1] = Region(name, last.start, data)
    return merged


def start(program: Program, arguments: NDArray[np.uint8], ids: NDArray[Any], waves: int) -> Waves:
    """Waves at the kernel's entry, with the registers that hardware sets.

    Args:
        program: the kernel.
        arguments: uint8[n], the kernel arguments.
        ids: int64[3, workgroups], their coordinates.
        waves: of a workgroup.

    Source: LLVM, AMDGPUUsage, "Initial Kernel Execution State" and "Preloaded Kernel Arguments".
    """
    descriptor, notes = program.descriptor, program.notes
    count = ids.shape[1]
    vector = registers_of(program).vector
    workgroup = np.repeat(np.arange(count), waves)
    wave = np.tile(np.arange(waves, dtype=np.uint8), count)
    group = Waves(vector, -(-notes["private_segment_fixed_size"] // 4), workgroup, wave)
    group.write_v(0, (wave[:, None].astype(np.uint32) * WAVE + np.arange(WAVE, dtype=np.uint32)))
    at = 0
    for name in USER_SGPRS:
        if descriptor.get(f"user_sgpr_{name}"):
            if name == "kernarg_segment_ptr":
                group.write_pair(at, np.asarray(arguments.ctypes.data, np.uint64))
            at += 2
    words = arguments[: len(arguments) // 4 * 4].view(np.uint32)
    offset = descriptor["user_sgpr_kernarg_preload_offset"]
    for word in words[offset : offset + descriptor["user_sgpr_kernarg_preload_length"]]:
        group.write_s(at, word)
        at += 1
    at = descriptor["user_sgpr_count"]
    for axis, name in enumerate("xyz"):
        if descriptor[f"system_sgpr_workgroup_id_{name}"]:
            group.write_s(at, ids[axis][workgroup].astype(np.uint32))
            at += 1
    return group


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
            if block.kinds["matrix"]:
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
        if name == "s_branch":
            group.block = block.target
            self.ready.append(group)
        elif name == "s_barrier":
            try:
                check_done(group)
            except Fault as fault:
                raise located(fault, self.kernel.program.name, block.end) from fault
            self.waiting.append(group)
        elif name == "s_endpgm":
            live -= np.bincount(group.workgroup, minlength=len(live))
        else:
            try:
                check_condition(name, group)
            except Fault as fault:
                raise located(fault, self.kernel.program.name, block.end) from fault
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
