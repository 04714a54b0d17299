"""Runs a few lines of gfx950 assembly in the emulator, from given registers to the registers they leave."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from triton._C.libtriton import amd, llvm

from vllm_mxfp4_gfx950.gfx950.driver import ARCH
from vllm_mxfp4_gfx950.gfx950.emulator.execution import Counts, Run
from vllm_mxfp4_gfx950.gfx950.emulator.load import MODE, Block, load
from vllm_mxfp4_gfx950.gfx950.emulator.memory import SETTLED, GlobalMemory, Lds, Region
from vllm_mxfp4_gfx950.gfx950.emulator.operands import Machine
from vllm_mxfp4_gfx950.gfx950.emulator.waves import ALL, M0, VCC, Waves

Value = int | NDArray[Any]
LDS_BYTES = 4096
VECTOR = 256
"""Vector registers of a snippet, and as many accumulation registers."""

DESCRIPTOR = "".join(f"\t.amdhsa_{key} {value}\n" for key, value in MODE.items())
METADATA = f".amdhsa_kernel snippet\n\t.amdhsa_accum_offset {VECTOR}\n{DESCRIPTOR}"
NOTES = f"    .vgpr_count: {2 * VECTOR}\n    .agpr_count: {VECTOR}\n    .sgpr_count: 106\n"


@dataclass(frozen=True)
class Result:
    """What a snippet leaves: registers by number (of wave 0 where there is one value), LDS, and counts."""

    v: NDArray[np.uint32]
    a: NDArray[np.uint32]
    s: list[int]
    vcc: int
    exec: int
    scc: bool
    lds: NDArray[np.uint8]
    counts: Counts


class Kept(Run):
    """A run that keeps the waves which have ended."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.ended: list[Waves] = []

    def _leave(self, group: Waves, block: Block, live: NDArray[Any]) -> None:
        if block.end is not None and block.end.mnemonic == "s_endpgm":
            self.ended.append(group)
        super()._leave(group, block, live)


def assemble(code: str) -> None:
    """Raise unless LLVM takes the text for gfx950 assembly."""
    llvm.init_targets()
    if not amd.assemble_amdgcn(code, ARCH, ""):
        raise ValueError(f"not gfx950 assembly: {code}")


def run(
    code: str,
    *,
    v: Mapping[int, Value] | None = None,
    a: Mapping[int, Value] | None = None,
    s: Mapping[int, int] | None = None,
    vcc: int | None = None,
    exec_mask: int = int(ALL),
    scc: bool | None = None,
    m0: int | None = None,
    lds: NDArray[np.uint8] | None = None,
    memory: Sequence[NDArray[Any]] = (),
    waves: int = 1,
    scratch_bytes: int = 0,
) -> Result:
    """Execute a snippet.

    Args:
        code: lines of assembly; s_endpgm is added.
        v, a: vector and accumulation registers: one value, uint32[64] or uint32[waves, 64].
        s: scalar registers.
        vcc, exec_mask, scc, m0: special registers.
        lds: what LDS holds; None for bytes that nothing has written.
        memory: tensors of the launch.
        waves: of the one workgroup.
        scratch_bytes: private memory of a lane.
    """
    code = f"{code}\ns_endpgm\n"
    assemble(code)
    regions = [Region(f"memory{i}", each.ctypes.data, each.view(np.uint8)) for i, each in enumerate(memory)]
    shared = Lds(1, LDS_BYTES if lds is None else lds.size)
    if lds is not None:
        shared.data[: lds.size] = lds
        shared.writer[: lds.size] = SETTLED
    start = Waves(2 * VECTOR, scratch_bytes // 4, np.zeros(waves, np.int64), np.arange(waves, dtype=np.uint8))
    for first, values in ((0, v), (VECTOR, a)):
        for register, value in (values or {}).items():
            start.write_v(first + register, np.asarray(value).astype(np.uint32))
    for register, number in (s or {}).items():
        start.write_s(register, np.uint32(number))
    if vcc is not None:
        start.write_pair(VCC, np.uint64(vcc))
    if m0 is not None:
        start.write_s(M0, np.uint32(m0))
    if scc is not None:
        start.write_scc(np.bool_(scc))
    start.set_exec(np.full(waves, exec_mask, np.uint64))
    counts = Counts()
    kept = Kept(load("snippet", code + METADATA + NOTES), Machine(GlobalMemory(regions), shared), counts)
    with np.errstate(all="ignore"):
        kept.run(start)
    end = kept.ended[0]
    for other in kept.ended[1:]:
        other.block, other.memory, other.lds = end.block, end.memory, end.lds
        end = end.joined(other)
    order = np.argsort(end.wave)
    vector = end.v[:, order] if waves > 1 else end.v[:, 0]
    return Result(
        v=vector[:VECTOR],
        a=vector[VECTOR:],
        s=[int(value) for value in end.s[:, order[0]]],
        vcc=int(end.read_pair(VCC)[order[0]]),
        exec=int(end.exec[order[0]]),
        scc=bool(end.scc[order[0]]),
        lds=shared.data[: shared.size],
        counts=counts,
    )
