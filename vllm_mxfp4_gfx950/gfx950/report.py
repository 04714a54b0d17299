"""What a compiled gfx950 kernel takes and does, read from its assembly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_mxfp4_gfx950.gfx950.driver import LDS_BYTES, WAVE, Launch
from vllm_mxfp4_gfx950.gfx950.emulator.assembly import Instruction, parse
from vllm_mxfp4_gfx950.gfx950.emulator.instructions.small_floats import E2M1, E4M3

SIMDS = 4
"""SIMD units of a compute unit."""

ADDENDS = 2
"""FP8 that a bf16 is the sum of: 8 significant bits, of which each has 4."""


@dataclass(frozen=True)
class KernelReport:
    """Resources and instructions of one kernel.

    Args:
        name: the kernel's name.
        vgprs: vector registers of a lane, accumulation registers included.
        agprs: accumulation registers of a lane.
        sgprs: scalar registers of a wave.
        vgpr_spills, sgpr_spills: registers that did not fit.
        scratch_bytes: private memory of a lane.
        lds_bytes: LDS of a workgroup.
        waves: waves of a workgroup.
        instructions: instructions in the text.
        workgroups: how many of them a compute unit holds at once, by registers and LDS.
        occupancy: waves that a SIMD then holds.
        mfma: the kinds of matrix instruction, by mnemonic, with their number in the text.
        fp4_conversions: instructions that convert FP4, in the text.
        scaled: the formats of the two operands of each kind of scaled matrix instruction, as cbsz and blgp
            number them.
        addends: how many FP8 each activation is the sum of, by the launch's `Codes`; 0 where it has none.
        lds_loads: loads that go from memory straight to LDS, in the text.
        loop_instructions, loop_mfma, loop_scratch: instructions, matrix instructions and scratch
            accesses in the main loop, which is the smallest loop with the most matrix instructions.
    """

    name: str
    vgprs: int
    agprs: int
    sgprs: int
    vgpr_spills: int
    sgpr_spills: int
    scratch_bytes: int
    lds_bytes: int
    waves: int
    instructions: int
    workgroups: int
    occupancy: int
    mfma: dict[str, int]
    fp4_conversions: int
    scaled: tuple[tuple[int, int], ...]
    addends: int
    lds_loads: int
    loop_instructions: int
    loop_mfma: int
    loop_scratch: int

    @property
    def is_w4a16(self) -> bool:
        """Whether it multiplies in bf16 what it converted from FP4, and nothing else."""
        kinds = [name.rpartition("_")[2] for name in self.mfma]
        return bool(kinds) and set(kinds) == {"bf16"} and self.fp4_conversions > 0

    @property
    def is_two_fp8(self) -> bool:
        """Whether it multiplies FP4 as it is by the two e4m3 that a bf16 is the sum of, and nothing else."""
        ours = bool(self.mfma) and all(name.startswith("v_mfma_scale_") for name in self.mfma)
        formats = self.scaled in (((E4M3, E2M1),), ((E2M1, E4M3),))
        return ours and formats and self.addends == ADDENDS and not self.fp4_conversions

    @property
    def is_lossless(self) -> bool:
        """Whether activations keep all the bits of a bf16, and weights those of FP4."""
        return self.is_w4a16 or self.is_two_fp8

    @property
    def per_mfma(self) -> float:
        """Instructions in the main loop for each matrix instruction."""
        return self.loop_instructions / max(1, self.loop_mfma)


def read(launch: Launch) -> KernelReport:
    """Read a kernel's report from its assembly.

    Raises:
        KeyError: the assembly lacks one of the compiler's notes.

    Source: LLVM, AMDGPUUsage (code object V5 metadata, assembler directives).
    """
    program = parse(launch.name, launch.assembly)
    body, notes = program.instructions, program.notes
    by_registers = program.remarks["Occupancy"]
    waves = -(-notes["max_flat_workgroup_size"] // WAVE)
    workgroups = min(by_registers * SIMDS // waves, LDS_BYTES // max(1, launch.lds_bytes))
    text = Counter(instruction.mnemonic for instruction in body)
    codes = [value for name, value in launch.values() if name == "Codes"]
    main = max(program.loops, key=lambda loop: (_count(loop, "v_mfma"), -len(loop)), default=())
    return KernelReport(
        name=launch.name,
        vgprs=notes["vgpr_count"],
        agprs=notes["agpr_count"],
        sgprs=notes["sgpr_count"],
        vgpr_spills=notes["vgpr_spill_count"],
        sgpr_spills=notes["sgpr_spill_count"],
        scratch_bytes=notes["private_segment_fixed_size"],
        lds_bytes=launch.lds_bytes,
        waves=waves,
        instructions=len(body),
        workgroups=workgroups,
        occupancy=-(-workgroups * waves // SIMDS),
        mfma={name: n for name, n in text.items() if name.startswith("v_mfma")},
        fp4_conversions=sum(n for name, n in text.items() if name.startswith("v_cvt") and "fp4" in name),
        scaled=tuple(sorted({_formats(one) for one in body if one.mnemonic.startswith("v_mfma_scale_")})),
        addends=codes[0].shape[1] if codes else 0,
        lds_loads=sum("lds" in one.modifiers or one.mnemonic.startswith("global_load_lds") for one in body),
        loop_instructions=len(main),
        loop_mfma=_count(main, "v_mfma"),
        loop_scratch=_count(main, "scratch_"),
    )


def _formats(instruction: Instruction) -> tuple[int, int]:
    """The formats of a scaled matrix instruction's two operands."""
    return int(instruction.modifiers.get("cbsz", "0")), int(instruction.modifiers.get("blgp", "0"))


def _count(instructions: Sequence[Instruction], prefix: str) -> int:
    return sum(instruction.mnemonic.startswith(prefix) for instruction in instructions)
