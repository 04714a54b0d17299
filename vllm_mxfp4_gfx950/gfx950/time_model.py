"""Microseconds that a launch takes on a gfx950, predicted from what its kernel executes on the emulator.

A prediction is two numbers. What AMD or somebody with a card has published is a constant here; what nobody
has published is a range, and the two ends of all ranges are two cards, FAST and SLOW. No constant was fitted
to a case that `trial` judges the model on.

A launch takes what the slowest of these takes, after its start:

    memory    its bytes over the card's bandwidth
    compute   the busiest compute unit's share of the vector units, the matrix units, the LDS and the L1
    waiting   the workgroups of a compute unit one after the other, each as long as a wave takes alone

A wave that is alone is replayed instruction by instruction, in order: a load comes back after a latency, and
`s_waitcnt` waits for it. So the chain of loads, the loads in flight and what a second stage hides are those
of the compiled kernel, and "bytes in flight over latency" is not a formula of its own.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

from vllm_mxfp4_gfx950.gfx950.driver import COMPUTE_UNITS, WAVE, Launch
from vllm_mxfp4_gfx950.gfx950.emulator.assembly import Instruction
from vllm_mxfp4_gfx950.gfx950.emulator.execution import execute
from vllm_mxfp4_gfx950.gfx950.emulator.load import load
from vllm_mxfp4_gfx950.gfx950.report import SIMDS, read

ISSUE_CYCLES = 4
"""A wave's instruction on its SIMD: 64 lanes on 16, and no wave issues sooner again.

Source: AMD, CDNA 3 ISA, "Wave issue"; a vector instruction of 32 bits is at the full rate.
"""

SLOW_VECTOR_CYCLES = 16
SLOW_VECTOR = re.compile(
    r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_f(16|32)|v_mul_(lo|hi)_[ui]32|v_mad_[ui]64_[ui]32|v_div_|v_ldexp_f64"
)
"""Vector instructions at a quarter of the rate.

Source: LLVM, SISchedule.td, SIDPGFX950FullSpeedModel (WriteTrans32, WriteQuarterRate32).
"""

MATRIX_CYCLES = {"16x16x32": 16, "32x32x16": 32, "16x16x128": 32, "32x32x64": 64}
"""Cycles of the matrix unit by shape: bf16, then FP8 by FP4 with scales, at twice the rate.

Source: AMD, CDNA 4 ISA, passes of V_MFMA; 2.5 and 5 PFLOP/s at 2.4 GHz. 16x16x32 measured: 17 independent, 18
dependent (facebookexperimental/triton, AMDLatencyModel.h).
"""

MATRIX_HOLD_CYCLES = 8
"""So long a matrix instruction of 16 cycles holds the vector unit of its SIMD off.

Source: LLVM, pull request 233721, from traces of a gfx950.
"""

LDS_LATENCY_CYCLES = 69
"""From an LDS read to its value, measured. Source: facebookexperimental/triton, AMDLatencyModel.h."""

LDS_PASS_CYCLES = 2
"""A pass of 256 bytes. Source: AMD, CDNA 3 white paper, 128 bytes a cycle and compute unit."""

L1_BYTES_PER_CYCLE = 64
"""What a compute unit gets from its L1 and from the L2. Source: AMD, CDNA 3 white paper."""

XCDS, L2_BYTES = 8, 4 << 20
"""Dies of compute units, and the L2 of each. Source: AMD, CDNA 4 white paper."""

LAUNCH_US = 2.2
"""A launch that does nothing. Source: ROCm/aiter e404860, aiter/ops/flydsl/kernels/fused_compress_attn.py."""


@dataclass(frozen=True)
class Card:
    """A gfx950 at one end of what is not known.

    Args:
        ghz: its clock. 2.4 is the peak; a bf16 matmul that fills the card has reached 87% of the peak.
        bytes_per_us: of memory, in the middle of a long launch. 6.0 and 6.6 TB/s are the ends of the fits
            of time to bytes over all published kernels (`trial`), 7.2 is the highest peak anyone measured.
        memory_us: from a load to its value from memory. A chase of pointers took 360 ns on an idle gfx950
            (facebookexperimental/triton, AMDLatencyModel.h); twice that under load is a guess.
        cache_us: the same from the L2, of which nothing is published: a guess, and no more than memory's.
        spill_bytes_per_us: of spilled registers that the L2 cannot hold: between the Infinity Cache's peak,
            17.2 TB/s (AMD, CDNA 3 white paper), and memory.
        fp4_cycles: of v_cvt_scalef32_pk_bf16_fp4, of which nothing is published: full or quarter rate.
        hold: how long a matrix instruction holds the vector unit off, of its own cycles, where it has more
            than 16: published for 16 only.
        overlap: how much of one wave's waiting another's work hides, between all of it and none.
    """

    ghz: float
    bytes_per_us: float
    memory_us: float
    cache_us: float
    spill_bytes_per_us: float
    fp4_cycles: int
    hold: float
    overlap: float

    def cycles(self, us: float) -> float:
        """A time in cycles of this card."""
        return us * 1e3 * self.ghz


FAST = Card(2.4, 6.6e6, 0.36, 0.12, 17.2e6, 4, 0.25, 1.0)
SLOW = Card(2.1, 6.0e6, 0.72, 0.36, 6.0e6, 16, 0.5, 0.5)
CARDS = (FAST, SLOW)


@dataclass(frozen=True)
class Profile:
    """What the first workgroup of a launch executed.

    Args:
        name, assembly: the kernel.
        waves: of a workgroup.
        resident: workgroups that a compute unit holds at once.
        trace: blocks of the kernel that one of its waves went through, in order.
        lds_passes: of the LDS, those of conflicts included.
        bytes_read: from global memory by all its lanes, before any cache.
        scratch_bytes: that all its lanes move to and from scratch memory.
        overflows: whether the scratch memory of all workgroups that run is more than the L2 holds.
    """

    name: str
    assembly: str
    waves: int
    resident: int
    trace: tuple[int, ...]
    lds_passes: int
    bytes_read: int
    scratch_bytes: int
    overflows: bool


def profile(launch: Launch, workgroup: int = 0) -> Profile:
    """Execute one workgroup of a launch, and note what it does."""
    trace: list[int] = []
    counts = execute(launch, [workgroup], trace)
    report = read(launch)
    return Profile(
        launch.name,
        launch.assembly,
        report.waves,
        report.workgroups,
        tuple(trace),
        counts.lds_passes + counts.lds_conflicts,
        sum(counts.bytes_read.values()),
        sum(WAVE * _width(name) * n for name, n in counts.mnemonics.items() if name.startswith("scratch_")),
        report.scratch_bytes * WAVE * report.waves * report.workgroups * COMPUTE_UNITS > XCDS * L2_BYTES,
    )


def _width(mnemonic: str) -> int:
    """Bytes of a lane that a scratch instruction moves."""
    return 4 * int(mnemonic.rpartition("dword")[2].removeprefix("x") or 1)


@dataclass(frozen=True)
class Work:
    """What a workgroup takes of a compute unit, in cycles of a card.

    Args:
        waves: of the workgroup.
        resident: how many a compute unit holds at once.
        alone: from its first instruction to its last, with the compute unit to itself.
        ramp: of that, before the first matrix instruction and after the last one.
        vector, matrix: of one wave, what it occupies of its SIMD's vector and matrix unit.
        lds, l1: of the whole workgroup, what it occupies of the LDS and of the path from the L1.
        spilled: bytes of its spilled registers that pass through more than the L2.
    """

    waves: int
    resident: int
    alone: float
    ramp: float
    vector: float
    matrix: float
    lds: float
    l1: float
    spilled: float

    @property
    def busy(self) -> float:
        """Cycles between two workgroups of a compute unit where nothing ever waits."""
        return max(self.waves / SIMDS * max(self.vector, self.matrix), self.lds, self.l1)

    def share(self, limit: str) -> float:
        """What one resource takes, in cycles of a compute unit: "vector", "matrix", "lds" or "l1"."""
        cycles: float = getattr(self, limit)
        return cycles * (self.waves / SIMDS if limit in ("vector", "matrix") else 1)


@dataclass(frozen=True)
class Op:
    """An instruction as far as time goes.

    Args:
        kind: as the emulator counts it; "smem" for a scalar load.
        cycles: of the vector or matrix unit; of issue for others.
        memory, lds: for a wait, how many may be outstanding; None where it does not say.
    """

    kind: str
    cycles: int
    memory: int | None = None
    lds: int | None = None


@functools.lru_cache(maxsize=64)
def operations(name: str, assembly: str, fp4_cycles: int) -> tuple[tuple[Op, ...], ...]:
    """The instructions of each block of a kernel."""
    kernel = load(name, assembly)

    def op(instruction: Instruction, kind: str) -> Op:
        mnemonic = instruction.mnemonic
        cycles = ISSUE_CYCLES
        if kind == "matrix":
            cycles = MATRIX_CYCLES[re.findall(r"\d+x\d+x\d+", mnemonic)[0]]
        elif kind == "fp4":
            cycles = fp4_cycles
        elif SLOW_VECTOR.match(mnemonic):
            cycles = SLOW_VECTOR_CYCLES
        elif mnemonic == "s_nop":
            cycles *= int(instruction.operands[0], 0) + 1
        elif mnemonic.startswith("s_load"):
            kind = "smem"
        left = instruction.counters if kind == "wait" else {}
        return Op(kind, cycles, left.get("vmcnt"), left.get("lgkmcnt"))

    blocks = []
    for block in kernel.blocks:
        ops = [op(s.instruction, s.kind) for s in block.steps]
        if block.end is not None:
            ops.append(Op("branch", ISSUE_CYCLES))
        blocks.append(tuple(ops))
    return tuple(blocks)


def work(seen: Profile, card: Card) -> Work:
    """Replay a workgroup's wave on a card."""
    blocks = operations(seen.name, seen.assembly, card.fp4_cycles)
    memory_latency, cache_latency = card.cycles(card.memory_us), card.cycles(card.cache_us)
    now = matrix_free = vector_free = 0.0
    vector = matrix = 0.0
    first, last = math.inf, 0.0
    memory: list[float] = []
    lds: list[float] = []
    for index in seen.trace:
        for op in blocks[index]:
            kind = op.kind
            if kind in ("vector", "fp4"):
                now = max(now, vector_free) + op.cycles
                vector += op.cycles
            elif kind == "matrix":
                now = max(now, matrix_free)
                first = min(first, now)
                hold = max(MATRIX_HOLD_CYCLES, card.hold * op.cycles)
                matrix_free, vector_free = now + op.cycles, now + hold
                matrix += op.cycles
                vector += hold
                now += ISSUE_CYCLES
                last = matrix_free
            elif kind == "wait":
                now += op.cycles
                if op.memory is not None:
                    now = _waited(memory, op.memory, now)
                if op.lds is not None:
                    now = _waited(lds, op.lds, now)
            else:
                if kind == "memory":
                    memory.append(now + memory_latency)
                elif kind == "scratch":
                    memory.append(now + (memory_latency if seen.overflows else cache_latency))
                elif kind == "smem":
                    lds.append(now + cache_latency)
                elif kind == "lds":
                    lds.append(now + LDS_LATENCY_CYCLES)
                now += op.cycles
    now = max(now, last)
    return Work(
        waves=seen.waves,
        resident=seen.resident,
        alone=now,
        ramp=min(first, last) + now - last,
        vector=vector,
        matrix=matrix,
        lds=seen.lds_passes * LDS_PASS_CYCLES,
        l1=(seen.bytes_read + seen.scratch_bytes) / L1_BYTES_PER_CYCLE,
        spilled=float(seen.scratch_bytes * seen.overflows),
    )


def _waited(outstanding: list[float], left: int, now: float) -> float:
    """When all but the newest `left` have come back."""
    done = outstanding[: max(0, len(outstanding) - left)]
    del outstanding[: len(done)]
    return max(now, *done) if done else now


def along(few: Work, many: Work, steps: tuple[float, float], wanted: float) -> Work:
    """Work at another depth, on the line through two of them.

    Args:
        few, many: work of one kernel at two depths.
        steps: how many blocks of the depth those had.
        wanted: how many it is to have.
    """
    part = (wanted - steps[0]) / (steps[1] - steps[0])
    names = ("alone", "ramp", "vector", "matrix", "lds", "l1", "spilled")
    ends = ((getattr(few, name), getattr(many, name)) for name in names)
    values = (max(0.0, start + part * (end - start)) for start, end in ends)
    return Work(many.waves, many.resident, *values)


@dataclass(frozen=True)
class Prediction:
    """What a launch takes on one card, in microseconds.

    Args:
        us: all of it.
        limits: what each of its resources would take alone: "memory", "vector", "matrix", "lds", "l1", and
            "waiting", the workgroups of a compute unit one after the other.
    """

    us: float
    limits: dict[str, float]

    @property
    def limit(self) -> str:
        """The resource that takes longest."""
        return max(self.limits, key=self.limits.__getitem__)


def launch(done: Work, card: Card, workgroups: float, memory_bytes: float) -> Prediction:
    """How long a launch takes.

    Args:
        done: by each workgroup.
        card: where.
        workgroups: that have work to do.
        memory_bytes: that have to come from memory or go there, each once.
    """
    queue = math.ceil(workgroups / COMPUTE_UNITS)
    side_by_side = max(1, min(done.resident, queue))
    hidden = max(side_by_side * done.busy, done.alone)
    in_turn = done.alone + (side_by_side - 1) * done.busy
    unit = (card.overlap * hidden + (1 - card.overlap) * in_turn) * max(1.0, queue / side_by_side)
    us = 1e-3 / card.ghz
    memory = memory_bytes / card.bytes_per_us + workgroups * done.spilled / card.spill_bytes_per_us
    limits = {name: queue * done.share(name) * us for name in ("vector", "matrix", "lds", "l1")}
    limits |= {"memory": memory, "waiting": done.alone * max(1.0, queue / side_by_side) * us}
    return Prediction(LAUNCH_US + max(memory + done.ramp * us, unit * us), limits)
