"""What the emulated gfx950 refuses: programs that hardware might let pass, and faults in kernels that serve.

The snippets mark the instruction that must be named with `; !`. Each is run once more with its defect mended.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gcn
import numpy as np
import plant_faults
import pytest
from numpy.typing import NDArray
from run_python import run_python
from test_verification import paths_of

from vllm_mxfp4_gfx950.gfx950.emulator.load import load
from vllm_mxfp4_gfx950.gfx950.emulator.memory import Fault
from vllm_mxfp4_gfx950.gfx950.verification import MAX_FROBENIUS

LANE = np.arange(64, dtype=np.uint32)
WAVE = np.arange(2, dtype=np.uint32)[:, None]
OTHER = 1 - WAVE
"""The wave's number in each lane of both waves, and the other's."""

SPACE: NDArray[np.uint8] = np.zeros(1280, np.uint8)
"""Memory of which the launch has two tensors, with room before, between and behind them."""

TENSORS = (SPACE[256:512], SPACE[768:1024])


@pytest.fixture(autouse=True)
def clear_space() -> None:
    """Let no test find what another has stored."""
    SPACE[:] = 0


def at(place: int) -> dict[int, int]:
    """Scalar registers: the address of SPACE[place] in s[2:3], and a buffer from there on in s[4:7]."""
    address = SPACE.ctypes.data + place
    low, high = address % 2**32, address >> 32
    return {2: low, 3: high, 4: low, 5: high & 0xFFFF, 6: 0x7FFFFFFE, 7: 0x27000}


def lines(code: str) -> str:
    """Code without its indentation."""
    return "\n".join(line.strip() for line in code.strip().splitlines())


def refused(code: str, reason: str, **state: Any) -> None:
    """The code faults for that reason, and the fault names the kernel, the line and the instruction."""
    code = lines(code)
    (number,) = (i for i, line in enumerate(code.splitlines(), 1) if line.endswith("; !"))
    instruction = code.splitlines()[number - 1].removesuffix("; !").strip()
    with pytest.raises(Fault) as caught:
        gcn.run(code, **state)
    assert str(caught.value).startswith(f"snippet, line {number}: {instruction}: "), caught.value
    assert reason in str(caught.value)


def check(code: str, reason: str, mended: str | Mapping[str, str], **state: Any) -> None:
    """The code is refused, and passes once mended.

    Args:
        code: with `; !` behind the instruction at fault.
        reason: part of the fault's text.
        mended: the right code, or what to replace in the wrong one.
        state: what `gcn.run` takes.
    """
    refused(code, reason, **state)
    if not isinstance(mended, str):
        right = code
        for old, new in mended.items():
            assert right.count(old) == 1, old
            right = right.replace(old, new)
        mended = right
    gcn.run(lines(mended), **state)


# --- global memory ----------------------------------------------------------------------------------

ACCESSES = {
    "global_load": ("reads", "global_load_dword v1, v0, s[2:3]"),
    "global_store": ("writes", "global_store_dword v0, v0, s[2:3]"),
    "global_atomic_add": ("adds to", "global_atomic_add v0, v0, s[2:3]"),
    "global_load_lds": ("reads", "global_load_lds_dword v0, s[2:3]"),
    "buffer_load": ("reads", "buffer_load_dword v1, v0, s[4:7], 0 offen"),
    "buffer_store": ("writes", "buffer_store_dword v0, v0, s[4:7], 0 offen"),
    "buffer_atomic_add": ("adds to", "buffer_atomic_add v0, v0, s[4:7], 0 offen"),
    "buffer_load_lds": ("reads", "buffer_load_dword v0, s[4:7], 0 offen lds"),
}
PLACES = {
    "before": (252, 256, "before every tensor of the launch"),
    "behind-the-first": (260, 256, "256 bytes into memory0, which has 256"),
    "between": (512, 768, "256 bytes into memory0, which has 256"),
    "before-the-second": (764, 768, "508 bytes into memory0, which has 256"),
    "behind-all": (772, 768, "256 bytes into memory1, which has 256"),
}
"""Where 256 bytes would begin, where they may, and what is said of the first that is outside."""


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("access", ACCESSES)
def test_outside_of_every_tensor(access: str, place: str) -> None:
    """One lane is enough; a buffer's own range check does not help, as it ends far behind the tensor."""
    verb, code = ACCESSES[access]
    wrong, right, where = PLACES[place]
    state: dict[str, Any] = {"v": {0: 4 * LANE}, "m0": 0, "memory": TENSORS}
    refused(f"{code} ; !", where, s=at(wrong), **state)
    with pytest.raises(Fault, match=f": {verb} 4 bytes at 0x"):
        gcn.run(code, s=at(wrong), **state)
    gcn.run(code, s=at(right), **state)


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("global_load_dwordx4 v[4:7], v0, s[2:3]", id="global_load"),
        pytest.param("global_store_dwordx4 v0, v[4:7], s[2:3]", id="global_store"),
        pytest.param("buffer_load_dwordx4 v[4:7], v0, s[4:7], 0 offen", id="buffer_load"),
        pytest.param("buffer_store_dwordx4 v[4:7], v0, s[4:7], 0 offen", id="buffer_store"),
    ],
)
def test_over_the_end(code: str) -> None:
    """The last lane's 16 bytes begin inside."""
    v = {0: 16 * LANE, **dict.fromkeys(range(4, 8), 0)}
    state: dict[str, Any] = {"v": v, "memory": TENSORS, "exec_mask": 0xFFFF}
    refused(f"{code} ; !", "into memory0, which has 256", s=at(260), **state)
    gcn.run(code, s=at(256), **state)


@pytest.mark.parametrize("place", PLACES)
def test_scalar_load_outside(place: str) -> None:
    """Of four loads of 64 bytes, the first or the last is outside."""
    wrong, right, _ = PLACES[place]
    targets = ("s[8:23]", "s[24:39]", "s[40:55]", "s[56:71]")
    code = [f"s_load_dwordx16 {target}, s[2:3], {64 * i:#x}" for i, target in enumerate(targets)]
    outside = code[3 if place.startswith("behind") else 0]
    faulty = "\n".join(f"{line} ; !" if line == outside else line for line in code)
    refused(faulty, "reads 64 bytes at", s=at(wrong), memory=TENSORS)
    gcn.run("\n".join(code), s=at(right), memory=TENSORS)


def test_outside_of_a_buffer() -> None:
    """What a buffer's range check catches is no fault: a load gives zero, a store is dropped."""
    SPACE[:] = 7
    code = lines(
        """
        buffer_load_dword v1, v0, s[4:7], 0 offen
        buffer_store_dword v0, v0, s[4:7], 0 offen
        s_waitcnt vmcnt(0)
        """
    )
    result = gcn.run(code, v={0: 0x80000000}, s=at(256), memory=TENSORS)
    assert not result.v[1].any()
    assert (SPACE == 7).all()


# --- LDS --------------------------------------------------------------------------------------------

BELOW = np.uint32(-4 % 2**32)
LDS_ACCESSES = {
    "ds_read": "ds_read_b32 v1, v0",
    "ds_read2": "ds_read2_b32 v[2:3], v0 offset0:0 offset1:0",
    "ds_write": "ds_write_b32 v0, v0",
    "ds_write2": "ds_write2_b32 v0, v0, v0 offset0:0 offset1:0",
    "buffer_load_lds": "buffer_load_dword v4, s[4:7], 0 offen lds",
}


@pytest.mark.parametrize("access", LDS_ACCESSES)
def test_outside_of_lds(access: str) -> None:
    """LDS beyond what the workgroup was allotted."""
    code = LDS_ACCESSES[access]
    wrong = code.replace("offset1:0", "offset1:1") if "offset1" in code else f"{code} offset:4"
    wrong = wrong.replace("lds offset:4", "offset:4 lds")
    state: dict[str, Any] = {"v": {0: 4 * LANE, 4: 0}, "s": at(256), "m0": 0, "memory": TENSORS}
    reason = "4 bytes of LDS at 256, and the workgroup has 256"
    check(f"{wrong} ; !", reason, code, lds=np.zeros(256, np.uint8), **state)


def test_below_lds() -> None:
    """A negative address is a very large one."""
    state: dict[str, Any] = {"lds": np.zeros(256, np.uint8)}
    refused("ds_read_b32 v1, v0 ; !", "of LDS at", v={0: np.where(LANE == 5, BELOW, 0)}, **state)
    gcn.run("ds_read_b32 v1, v0", v={0: 0}, **state)


def test_unwritten_lds() -> None:
    """Of what the last lane reads, nothing has written one byte."""
    code = """
        ds_write_b32 v0, v0
        s_waitcnt lgkmcnt(0)
        ds_read_b32 v1, v0 offset:1 ; !
    """
    check(code, "reads LDS that nothing has written", {"offset:1 ": ""}, v={0: 4 * LANE})


# --- registers --------------------------------------------------------------------------------------

SCALAR = "reads scalar register {}, which nothing has written"
VECTOR = "reads vector register {}, which nothing has written"


@pytest.mark.parametrize(
    ("code", "register"),
    [
        pytest.param("v_mov_b32_e32 v1, v0", 0, id="move"),
        pytest.param("v_fma_f32 v1, v2, v3, v0", 0, id="third"),
        pytest.param("v_fmac_f32_e32 v0, v2, v3", 0, id="accumulated"),
        pytest.param("v_lshl_add_u64 v[4:5], v[8:9], 2, v[10:11]", 9, id="upper-half"),
        pytest.param("v_accvgpr_read_b32 v1, a0", 256, id="accumulation"),
        pytest.param("v_mfma_f32_16x16x32_bf16 a[0:3], v[12:15], v[12:15], 0", 15, id="matrix"),
        pytest.param("v_mfma_f32_16x16x32_bf16 a[4:7], v[20:23], v[20:23], a[0:3]", 256, id="matrix-sum"),
        pytest.param("ds_write_b32 v2, v0", 0, id="stored-to-lds"),
        pytest.param("ds_read_b32 v1, v0", 0, id="lds-address"),
        pytest.param("global_store_dword v2, v0, s[2:3]", 0, id="stored"),
        pytest.param("global_load_dword v1, v0, s[2:3]", 0, id="address"),
        pytest.param("buffer_load_dword v1, v0, s[4:7], 0 offen", 0, id="buffer-index"),
        pytest.param("ds_bpermute_b32 v1, v2, v0", 0, id="permuted"),
        pytest.param("v_mov_b32_dpp v1, v0 row_shr:1 row_mask:0xf bank_mask:0xf", 0, id="other-lanes"),
        pytest.param("v_readfirstlane_b32 s8, v0", 0, id="first-lane"),
        pytest.param("v_permlane32_swap_b32 v2, v0", 0, id="swapped"),
    ],
)
def test_unwritten_vector_register(code: str, register: int) -> None:
    """Wherever an instruction reads it."""
    known = dict.fromkeys((2, 3, 8, 10, 11, 12, 13, 14, 20, 21, 22, 23), 0)
    a = dict.fromkeys((1, 2, 3), 0)
    state: dict[str, Any] = {
        "s": at(256),
        "memory": TENSORS,
        "scratch_bytes": 4,
        "lds": np.zeros(64, np.uint8),
    }
    refused(f"{code} ; !", f"vector register {register}", v=known, a=a, **state)
    gcn.run(code, v={0: 0, 9: 0, 15: 0, **known}, a={0: 0, **a}, **state)


def test_unwritten_lane() -> None:
    """A lane is as unknown as the scalar that goes there, and a scalar as the lane that it comes from."""
    write = "v_writelane_b32 v0, s0, 5\n"
    for lane, state in ((5, {"s": {0: 1}}), (6, {"v": {0: 1}})):
        gcn.run(f"{write}v_readlane_b32 s8, v0, {lane}\ns_mov_b32 s9, s8", **state)
    for lane, state in ((6, {"s": {0: 1}}), (5, {"v": {0: 1}})):
        read = f"{write}v_readlane_b32 s8, v0, {lane}\n"
        gcn.run(f"{read}s_mov_b32 s8, 0\ns_mov_b32 s9, s8", **state)
        refused(f"{read}s_mov_b32 s9, s8 ; !", SCALAR.format(8), **state)
        refused(f"s_mov_b32 s8, 0\n{read}s_mov_b32 s9, s8 ; !", SCALAR.format(8), **state)
        refused(f"{write}v_mov_b32_e32 v1, v0 ; !", "vector register 0", **state)
    refused("v_writelane_b32 v0, 1, s0 ; !", SCALAR.format(0))
    refused("v_readlane_b32 s8, v0, s0 ; !", SCALAR.format(0))


@pytest.mark.parametrize("kind", ["v", "s"])
def test_unwritten_half_of_a_pair(kind: str) -> None:
    """It matters only to who chooses it."""
    code = f"v_pk_mul_f32 v[10:11], v[0:1], {kind}[4:5]"
    known = {"v": {0: 0, 1: 0} | ({4: 0} if kind == "v" else {}), "s": {4: 0} if kind == "s" else {}}
    gcn.run(f"{code} op_sel_hi:[1,0]", **known)
    with pytest.raises(Fault, match=(VECTOR if kind == "v" else SCALAR).format(5)):
        gcn.run(code, **known)


PARTLY = """
    s_mov_b64 exec, 0xff
    {write}
    s_mov_b64 exec, {reading}
    {read} ; !
"""


@pytest.mark.parametrize(
    ("write", "read", "reason"),
    [
        pytest.param("v_mov_b32_e32 v0, 1", "v_mov_b32_e32 v1, v0", VECTOR.format(0), id="move"),
        pytest.param("v_accvgpr_write_b32 a0, 1", "v_accvgpr_read_b32 v1, a0", VECTOR.format(256), id="acc"),
        pytest.param(
            "scratch_store_dword off, v2, off offset:4",
            "scratch_load_dword v1, off, off offset:4",
            "reads scratch memory that nothing has written",
            id="scratch",
        ),
        pytest.param(
            "ds_write_b32 v3, v2\ns_waitcnt lgkmcnt(0)",
            "ds_read_b32 v1, v3",
            "reads LDS that nothing has written",
            id="lds",
        ),
        pytest.param(
            "global_load_dword v0, v3, s[2:3]\ns_waitcnt vmcnt(0)",
            "v_mov_b32_e32 v1, v0",
            VECTOR.format(0),
            id="loaded",
        ),
    ],
)
def test_written_in_some_lanes(write: str, read: str, reason: str) -> None:
    """Read by a lane that was off when it was written; those that were on may."""
    state: dict[str, Any] = {"v": {2: 0, 3: 4 * LANE}, "s": at(256), "memory": TENSORS, "scratch_bytes": 8}
    refused(PARTLY.format(write=write, read=read, reading="0x1ff"), reason, **state)
    gcn.run(lines(PARTLY.format(write=write, read=read, reading="0xff")), **state)


def test_matrix_reads_lanes_that_are_off() -> None:
    """A matrix instruction does not ask EXEC."""
    matrix = "v_mfma_f32_16x16x32_bf16 v[8:11], v[0:3], v[0:3], 0"
    code = PARTLY.format(write="v_mov_b32_e32 v0, 1", read=matrix, reading="0xff")
    check(code, VECTOR.format(0), {"exec, 0xff\n    v_mov": "exec, -1\n    v_mov"}, v={1: 0, 2: 0, 3: 0})


@pytest.mark.parametrize(
    ("code", "register"),
    [
        pytest.param("s_mov_b32 s9, s8", 8, id="move"),
        pytest.param("s_cselect_b64 s[10:11], s[12:13], s[14:15]", 13, id="upper-half"),
        pytest.param("v_mov_b32_e32 v1, s8", 8, id="by-vector"),
        pytest.param("v_cndmask_b32_e64 v1, v0, v0, s[16:17]", 16, id="mask"),
        pytest.param("v_cndmask_b32_e32 v1, v0, v0, vcc", 106, id="vcc"),
        pytest.param("s_load_dword s9, s[18:19], 0x0", 19, id="address"),
        pytest.param("buffer_load_dword v1, v0, s[20:23], 0 offen", 23, id="buffer"),
        pytest.param("s_mov_b64 exec, s[16:17]", 16, id="exec"),
        pytest.param("buffer_load_dword v0, s[4:7], 0 offen lds", 124, id="m0"),
    ],
)
def test_unwritten_scalar_register(code: str, register: int) -> None:
    """Wherever an instruction reads it."""
    here = at(256)
    written = {**here, 12: 0, 14: 0, 15: 0, 18: here[2], 20: here[4], 21: here[5], 22: here[6]}
    missing = {8: 0, 13: 0, 16: 0, 17: 0, 19: here[3], 23: here[7]}
    state: dict[str, Any] = {"v": {0: 0}, "memory": TENSORS, "scc": True}
    refused(f"{code} ; !", SCALAR.format(register), s=written, **state)
    gcn.run(code, s={**written, **missing}, vcc=0, m0=0, **state)


@pytest.mark.parametrize(
    ("branch", "compare"),
    [
        pytest.param("s_cbranch_vccz", "v_cmp_eq_u32_e32 vcc, 0, v0", id="vcc"),
        pytest.param("s_cbranch_scc1", "s_cmp_eq_u32 s2, 0", id="scc"),
    ],
)
def test_branch_on_an_unwritten_condition(branch: str, compare: str) -> None:
    """Nothing was compared."""
    code = f"{branch} over ; !\ns_nop 0\nover:\ns_nop 0"
    check(code, "which nothing has written", f"{compare}\n{code}", v={0: 0}, s={2: 0})


def test_unwritten_scratch() -> None:
    """Private memory that no lane has written."""
    code = """
        scratch_store_dword off, v0, off offset:4
        scratch_load_dword v1, off, off ; !
    """
    check(
        code,
        "reads scratch memory that nothing has written",
        {", off ;": ", off offset:4 ;"},
        v={0: 0},
        scratch_bytes=8,
    )


def test_unwritten_register_through_scratch() -> None:
    """A pair is spilled of which one half, or some lanes, were written: its use is refused, not its way."""
    code = """
        scratch_store_dwordx2 off, v[0:1], off
        scratch_load_dwordx2 v[2:3], off, off
        s_waitcnt vmcnt(0)
        v_mov_b32_e32 v4, v3 ; !
    """
    check(code, VECTOR.format(3), {"v4, v3": "v4, v2"}, v={0: 0, 3: 0}, scratch_bytes=8)
    through = "scratch_store_dword off, v0, off\nscratch_load_dword v1, off, off\ns_waitcnt vmcnt(0)"
    code = PARTLY.format(
        write=f"v_mov_b32_e32 v0, 1\ns_mov_b64 exec, -1\n{through}",
        read="v_mov_b32_e32 v4, v1",
        reading="0x1ff",
    )
    check(code, VECTOR.format(1), {"0x1ff": "0xff"}, v={1: 0}, scratch_bytes=8)


def test_outside_of_scratch() -> None:
    """Beyond a lane's private memory."""
    code = "scratch_store_dwordx2 off, v[0:1], off offset:4 ; !"
    check(code, "and a lane has 8 bytes", {" offset:4": ""}, v={0: 0, 1: 0}, scratch_bytes=8)


# --- waves that share LDS ---------------------------------------------------------------------------

MINE, THEIRS = 256 * WAVE + 4 * LANE, 256 * OTHER + 4 * LANE
BY_WAVE: dict[str, Any] = {
    "waves": 2,
    "v": {0: MINE, 1: THEIRS, 2: WAVE + LANE, 3: LANE, 4: 4 * LANE, 5: np.broadcast_to(WAVE, (2, 64))},
}
"""v0 is where a wave writes, v1 where the other does, v2 is the wave's value and v3 everyone's, v4 is where
both write, and v5 the wave's number."""

BARRIER = "s_waitcnt lgkmcnt(0)\ns_barrier"
FIRST_WAVE = """
    v_readfirstlane_b32 s8, v5
    s_cmp_lg_u32 s8, 0
"""


def test_read_after_another_wave_s_write() -> None:
    """Without a barrier the value may not be there."""
    code = """
        ds_write_b32 v0, v2
        s_waitcnt lgkmcnt(0)
        ds_read_b32 v6, v1 ; !
        s_waitcnt lgkmcnt(0)
    """
    reason = "reads LDS that another wave has written since the last barrier"
    check(code, reason, {"ds_read": "s_barrier\nds_read"}, **BY_WAVE)


def test_write_after_another_wave_s_read() -> None:
    """Without a barrier the other wave may get the new value."""
    code = f"""
        ds_write_b32 v0, v2
        {BARRIER}
        ds_read_b32 v6, v1
        s_waitcnt lgkmcnt(0)
        ds_write_b32 v0, v3 ; !
    """
    reason = "writes LDS that another wave has read since the last barrier"
    check(code, reason, {"ds_write_b32 v0, v3": "s_barrier\nds_write_b32 v0, v3"}, **BY_WAVE)


def test_load_to_lds_after_another_wave_s_read() -> None:
    """The same, and a load is what writes."""
    code = f"""
        ds_write_b32 v0, v2
        {BARRIER}
        ds_read_b32 v6, v1
        s_waitcnt lgkmcnt(0)
        v_readfirstlane_b32 s8, v0
        s_mov_b32 m0, s8
        global_load_lds_dword v4, s[2:3] ; !
    """
    reason = "writes LDS that another wave has read since the last barrier"
    check(code, reason, {"global_load": "s_barrier\nglobal_load"}, s=at(256), memory=TENSORS, **BY_WAVE)


def test_two_values_at_once() -> None:
    """Two waves in lockstep; what the same values may do is that every wave of a replicated layout writes."""
    reason = "writes two values to the same LDS at once"
    check("ds_write_b32 v4, v2 ; !", reason, {"v2": "v3"}, **BY_WAVE)


def test_write_after_another_wave_s_write() -> None:
    """The second wave's value differs, and comes later here only by chance."""
    code = f"""
        {FIRST_WAVE}
        s_cbranch_scc1 second
        ds_write_b32 v4, v2
        s_waitcnt lgkmcnt(0)
        s_branch done
        second:
        ds_write_b32 v4, v2 ; !
        s_waitcnt lgkmcnt(0)
        done:
        s_nop 0
    """
    reason = "writes LDS that another wave has written otherwise since the last barrier"
    check(code, reason, code.replace("v4, v2", "v4, v3"), **BY_WAVE)
    barriers = code.replace("s_branch done", "s_barrier\ns_branch done")
    gcn.run(lines(barriers.replace("second:", "second:\ns_barrier")), **BY_WAVE)


@pytest.mark.parametrize("reader", ["first", "second"])
def test_order_does_not_hide_a_race(reader: str) -> None:
    """Whichever wave happens to come first here."""
    read, write = "ds_read_b32 v6, v4", "ds_write_b32 v4, v2"
    first, second = (read, write) if reader == "first" else (write, read)
    code = f"""
        {FIRST_WAVE}
        s_cbranch_scc1 second
        {first}
        s_waitcnt lgkmcnt(0)
        s_branch done
        second:
        {second} ; !
        s_waitcnt lgkmcnt(0)
        done:
        s_nop 0
    """
    reason = "LDS that another wave has"
    mended = code.replace("s_branch done", "s_barrier\ns_branch done").replace(
        "second:", "second:\ns_barrier"
    )
    check(code, reason, mended, lds=np.zeros(256, np.uint8), **BY_WAVE)


def test_one_byte_of_another_wave() -> None:
    """All lanes read what their own wave wrote, but for one lane of the first wave."""
    code = """
        ds_write_b8 v0, v2
        s_waitcnt lgkmcnt(0)
        ds_read_u8 v6, v1 ; !
    """
    mine = 64 * WAVE + LANE
    v = {0: mine, 1: np.where((WAVE == 0) & (LANE == 9), 64, mine), 2: LANE}
    reason = "reads LDS that another wave has written since the last barrier"
    check(code, reason, {"ds_read": "s_barrier\nds_read"}, waves=2, v=v)


# --- loads to LDS -----------------------------------------------------------------------------------

TO_LDS = {
    "buffer": "buffer_load_dword v4, s[4:7], 0 offen lds",
    "global": "global_load_lds_dword v4, s[2:3]",
    "global-wide": "global_load_lds_dwordx4 v4, s[2:3]",
}
IN_FLIGHT = "reads LDS that a load is still to write"


@pytest.mark.parametrize("load", TO_LDS)
def test_loaded_lds_before_its_wait(load: str) -> None:
    """Nor does a wait for LDS's own counter help."""
    code = f"""
        {TO_LDS[load]}
        s_waitcnt lgkmcnt(0)
        ds_read_b32 v1, v4 ; !
    """
    state: dict[str, Any] = {"v": {4: 4 * (LANE % 32)}, "s": at(256), "m0": 0, "memory": TENSORS}
    check(code, IN_FLIGHT, {"lgkmcnt(0)": "vmcnt(0)"}, **state)


def test_loaded_lds_with_too_weak_a_wait() -> None:
    """The older load has come back, the newer has not."""
    code = """
        buffer_load_dword v4, s[4:7], 0 offen lds
        buffer_load_dword v4, s[4:7], 0 offen offset:256 lds
        s_waitcnt vmcnt(1)
        ds_read_b32 v1, v4
        ds_read_b32 v2, v4 offset:256 ; !
    """
    state: dict[str, Any] = {"v": {4: 4 * LANE}, "s": at(256) | {6: 256}, "m0": 0, "memory": TENSORS}
    check(code, IN_FLIGHT, {"vmcnt(1)": "vmcnt(0)"}, **state)


LOADED_BY_WAVE = """
    v_readfirstlane_b32 s8, v0
    s_mov_b32 m0, s8
    global_load_lds_dword v4, s[2:3]
    {between}
    ds_read_b32 v6, v1 ; !
    s_waitcnt lgkmcnt(0)
"""


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        pytest.param(
            "s_waitcnt vmcnt(0)", "another wave has written since the last barrier", id="no-barrier"
        ),
        pytest.param("s_barrier", IN_FLIGHT, id="no-wait"),
        pytest.param(
            "s_barrier\ns_waitcnt vmcnt(0)",
            "another wave has written since the last barrier",
            id="wait-too-late",
        ),
        pytest.param("s_waitcnt lgkmcnt(0)\ns_barrier", IN_FLIGHT, id="other-counter"),
    ],
)
def test_loaded_lds_of_another_wave(between: str, reason: str) -> None:
    """Its wave has to wait for it, and then all have to meet."""
    state: dict[str, Any] = {"s": at(256), "memory": TENSORS, **BY_WAVE}
    right = LOADED_BY_WAVE.format(between="s_waitcnt vmcnt(0)\ns_barrier")
    check(LOADED_BY_WAVE.format(between=between), reason, right, **state)


def test_loaded_by_both_waves() -> None:
    """The same to the same place, as a replicated layout has it; until the next barrier it is one wave's."""
    code = f"""
        {TO_LDS["global"]}
        s_waitcnt vmcnt(0)
        ds_read_b32 v6, v4 ; !
    """
    state: dict[str, Any] = {"s": at(256), "memory": TENSORS, "m0": 0, **BY_WAVE}
    reason = "another wave has written since the last barrier"
    check(code, reason, {"ds_read": "s_barrier\nds_read"}, **state)


def test_write_where_a_load_is_still_to_write() -> None:
    """Even if it is what the load brings."""
    code = f"""
        {TO_LDS["buffer"]}
        ds_write_b32 v4, v5 ; !
    """
    state: dict[str, Any] = {"v": {4: 4 * LANE, 5: 0}, "s": at(256), "m0": 0, "memory": TENSORS}
    reason = "writes LDS that a load is still to write"
    check(code, reason, {"ds_write": "s_waitcnt vmcnt(0)\nds_write"}, **state)


# --- waiting ----------------------------------------------------------------------------------------

PENDING = "touches a register that a load is still to write: an s_waitcnt is missing"
LOADS = {
    "global_load": ("global_load_dword v1, v0, s[2:3]", "v_mov_b32_e32 v2, v1", "vmcnt"),
    "buffer_load": ("buffer_load_dwordx2 v[8:9], v3, s[4:7], 0 offen", "v_mov_b32_e32 v2, v9", "vmcnt"),
    "to-accumulation": ("global_load_dword a1, v0, s[2:3]", "v_accvgpr_read_b32 v2, a1", "vmcnt"),
    "scratch_load": ("scratch_load_dword v1, off, off", "v_mov_b32_e32 v2, v1", "vmcnt"),
    "ds_read": ("ds_read_b32 v1, v0", "v_mov_b32_e32 v2, v1", "lgkmcnt"),
    "ds_bpermute": ("ds_bpermute_b32 v1, v0, v0", "v_mov_b32_e32 v2, v1", "lgkmcnt"),
    "ds_swizzle": ("ds_swizzle_b32 v1, v0 offset:swizzle(SWAP,16)", "v_mov_b32_e32 v2, v1", "lgkmcnt"),
    "s_load": ("s_load_dwordx2 s[8:9], s[2:3], 0x0", "s_mov_b32 s10, s9", "lgkmcnt"),
    "s_load-by-vector": ("s_load_dword s8, s[2:3], 0x0", "v_mov_b32_e32 v2, s8", "lgkmcnt"),
    "s_load-of-vcc": ("s_load_dwordx2 vcc, s[2:3], 0x0", "s_cbranch_vccz over\nover:\ns_nop 0", "lgkmcnt"),
}


def loading() -> dict[str, Any]:
    """State for LOADS."""
    return {
        "v": {0: 4 * LANE, 3: 0},
        "s": at(256),
        "memory": TENSORS,
        "lds": np.zeros(256, np.uint8),
        "scratch_bytes": 4,
    }


def marked(code: str) -> str:
    """The first line is the one to be refused."""
    first, newline, rest = code.partition("\n")
    return f"{first} ; !{newline}{rest}"


@pytest.mark.parametrize("load", LOADS)
def test_use_before_the_wait(load: str) -> None:
    """A wait for the other counter does not help."""
    issue, use, counter = LOADS[load]
    other = {"vmcnt": "lgkmcnt", "lgkmcnt": "vmcnt"}[counter]
    prepare = "scratch_store_dword off, v0, off\n" if load == "scratch_load" else ""
    code = f"{prepare}{issue}\ns_waitcnt {other}(0)\n{marked(use)}"
    check(code, PENDING, {f"{other}(0)": f"{counter}(0)"}, **loading())


USES = {
    "added": "v_add_u32_e32 v2, v1, v0",
    "as-address": "ds_read_b32 v2, v1",
    "stored": "global_store_dword v0, v1, s[2:3]",
    "stored-to-lds": "ds_write_b32 v0, v1",
    "stored-to-scratch": "scratch_store_dword off, v1, off",
    "matrix": "v_mfma_f32_16x16x32_bf16 v[12:15], v[0:3], v[0:3], 0",
    "matrix-sum": "v_mfma_f32_16x16x32_bf16 v[12:15], v[4:7], v[4:7], v[0:3]",
    "other-lane": "v_mov_b32_dpp v2, v1 row_shr:1 row_mask:0xf bank_mask:0xf",
    "one-lane": "v_readlane_b32 s8, v1, 3",
    "one-lane-written": "v_writelane_b32 v1, 1, 3",
    "swapped": "v_permlane32_swap_b32 v0, v1",
    "accumulated": "v_fmac_f32_e32 v1, v0, v0",
    "written-over": "v_mov_b32_e32 v1, 0",
    "loaded-over": "ds_read_b32 v1, v0",
    "half-written-over": "v_lshl_add_u64 v[0:1], v[4:5], 0, v[6:7]",
}


@pytest.mark.parametrize("use", USES)
def test_every_use_waits(use: str) -> None:
    """Reading or writing a register that a load is still to write, in any operand."""
    state = loading()
    state["v"] |= dict.fromkeys(range(2, 8), 0)
    code = f"global_load_dword v1, v0, s[2:3]\n{USES[use]} ; !"
    check(code, PENDING, code.replace("\n", "\ns_waitcnt vmcnt(0)\n"), **state)


def test_a_load_may_follow_a_load() -> None:
    """Loads from memory come back in order, so the second one's value stays; its address must be there."""
    code = "global_load_dword v1, v0, s[2:3]\n{}\ns_waitcnt vmcnt(0)\nv_mov_b32_e32 v2, v1"
    gcn.run(lines(code.format("global_load_dword v1, v3, s[2:3]")), **loading())
    refused(code.format("global_load_dword v1, v1, s[2:3] ; !"), PENDING, **loading())
    refused(code.format("global_load_dword v1, v3, s[2:3]\nv_mov_b32_e32 v2, v1 ; !"), PENDING, **loading())


def test_operands_of_a_load_are_free() -> None:
    """An instruction has read its address and its data when it has been issued."""
    code = """
        global_store_dword v0, v0, s[2:3]
        ds_write_b32 v0, v0
        s_load_dword s8, s[2:3], 0x0
        v_mov_b32_e32 v0, 0
        s_mov_b64 s[2:3], 0
    """
    gcn.run(lines(code), **loading())


@pytest.mark.parametrize(
    ("issue", "counter", "fill"),
    [
        pytest.param("global_load_dword v{}, v0, s[2:3]", "vmcnt", "", id="loads"),
        pytest.param("ds_read_b32 v{}, v0", "lgkmcnt", "", id="ds_reads"),
        pytest.param(
            "global_load_dword v{}, v0, s[2:3]",
            "vmcnt",
            "global_store_dword v0, v0, s[2:3]",
            id="store-between",
        ),
    ],
)
def test_too_weak_a_wait(issue: str, counter: str, fill: str) -> None:
    """One may be outstanding: not the older one, but the newer."""
    code = lines(
        f"{issue.format(1)}\n{fill}\n{issue.format(2)}\ns_waitcnt {counter}(1)\nv_mov_b32_e32 v3, v1"
    )
    gcn.run(code, **loading())
    code += "\nv_mov_b32_e32 v4, v2 ; !"
    check(code, PENDING, {f"{counter}(1)": f"{counter}(0)"}, **loading())


@pytest.mark.parametrize("use", ["v_mov_b32_e32 v2, v1", "s_mov_b32 s9, s8"], ids=["ds_read", "s_load"])
def test_scalar_loads_come_back_in_any_order(use: str) -> None:
    """With one of them outstanding, a count above zero is certain of nothing."""
    code = f"""
        ds_read_b32 v1, v0
        s_load_dword s8, s[2:3], 0x0
        s_waitcnt lgkmcnt(1)
        {use} ; !
    """
    check(code, PENDING, {"lgkmcnt(1)": "lgkmcnt(0)"}, **loading())


# --- barriers ---------------------------------------------------------------------------------------


def test_write_to_lds_not_done_at_the_barrier() -> None:
    """The other wave may read what was there before."""
    code = """
        ds_write_b32 v0, v2
        s_barrier ; !
        ds_read_b32 v6, v1
    """
    reason = "meets the others before its writes to LDS are done: an s_waitcnt is missing"
    check(code, reason, {"s_barrier": BARRIER}, **BY_WAVE)


def test_read_of_lds_not_done_at_the_barrier() -> None:
    """The other wave may write over it first."""
    code = f"""
        ds_write_b32 v0, v2
        {BARRIER}
        ds_read_b32 v6, v1
        s_barrier ; !
        ds_write_b32 v0, v3
        s_waitcnt lgkmcnt(0)
    """
    mended = code.replace("s_barrier ; !", BARRIER)
    check(code, "meets the others before its reads of LDS are done", mended, **BY_WAVE)


def test_ended_waves_are_not_waited_for() -> None:
    """A barrier counts those that are still there."""
    code = f"""
        {FIRST_WAVE}
        s_cbranch_scc0 more
        s_endpgm
        more:
        s_barrier
        s_nop 0
    """
    assert gcn.run(lines(code), **BY_WAVE).counts.instructions["barrier"] == 1


def test_deadlock() -> None:
    """One wave waits at a barrier for another that never gets there."""
    code = f"""
        {FIRST_WAVE}
        s_cbranch_scc0 over
        again:
        s_cmp_lg_u32 s8, {{}}
        s_cbranch_scc1 again
        over:
        s_barrier
        s_nop 0
    """
    with pytest.raises(Fault, match=r"^snippet, line \d+: s_(barrier|cbranch_scc1 again): "):
        gcn.run(lines(code.format(0)), **BY_WAVE)
    gcn.run(lines(code.format(1)), **BY_WAVE)


# --- what the emulator does not know ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "reason", "known"),
    [
        pytest.param(
            "v_sad_u8 v1, v0, v0, v0",
            "v_sad_u8 is not an instruction that the emulator knows",
            "v_add3_u32 v1, v0, v0, v0",
            id="mnemonic",
        ),
        pytest.param(
            "s_sleep 1",
            "s_sleep is not an instruction that the emulator knows",
            "s_nop 1",
            id="scalar-mnemonic",
        ),
        pytest.param(
            "v_add_f32_e64 v1, v0, v0 clamp",
            "v_add_f32_e64 with clamp is not something the emulator knows",
            "v_add_f32_e64 v1, v0, v0",
            id="clamp",
        ),
        pytest.param(
            "v_add_f32_e64 v1, v0, v0 mul:2",
            "v_add_f32_e64 with mul is not something the emulator knows",
            "v_add_f32_e64 v1, v0, v0",
            id="multiplied",
        ),
        pytest.param(
            "s_waitcnt expcnt(0)",
            "s_waitcnt expcnt(0) is not something the emulator knows",
            "s_waitcnt vmcnt(0)",
            id="counter",
        ),
        pytest.param(
            "buffer_load_dword v1, v0, s[4:7], s2 offen",
            "the emulator knows offen and no scalar offset",
            "buffer_load_dword v1, v0, s[4:7], 0 offen",
            id="scalar-offset",
        ),
        pytest.param(
            "global_load_short_d16_hi v1, v0, s[2:3]",
            "the emulator knows _d16_hi of stores only",
            "global_load_ushort v1, v0, s[2:3]",
            id="upper-half-loaded",
        ),
    ],
)
def test_unknown_instruction(code: str, reason: str, known: str) -> None:
    """Is refused by name, rather than taken for something similar."""
    state: dict[str, Any] = {
        "v": {0: 4 * LANE},
        "s": at(256),
        "memory": TENSORS,
        "lds": np.zeros(256, np.uint8),
    }
    check(f"{code} ; !", reason, known, **state)


@pytest.mark.parametrize("wrong", ["other", "unsaid"])
@pytest.mark.parametrize("key", gcn.MODE)
def test_unknown_mode(monkeypatch: pytest.MonkeyPatch, key: str, wrong: str) -> None:
    """A kernel that asks for other rounding, denormals or NaNs than the emulator's, or does not say."""
    gcn.run("s_nop 0")
    line, value = f"\t.amdhsa_{key} {gcn.MODE[key]}\n", int(not gcn.MODE[key])
    assert line in gcn.METADATA
    changed = f"\t.amdhsa_{key} {value}\n" if wrong == "other" else ""
    monkeypatch.setattr(gcn, "METADATA", gcn.METADATA.replace(line, changed))
    with pytest.raises(
        Fault, match=f"^snippet: {key} is {value if changed else None}; the emulator computes"
    ):
        gcn.run("s_nop 0")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        pytest.param("v_mov_b32_e32 v8, 0", "v_mov_b32_e32 v7, 0", id="vector"),
        pytest.param("v_mov_b32_e32 v20, 0", "v_mov_b32_e32 v7, 0", id="vector-behind-accumulation"),
        pytest.param("ds_read_b96 v[6:8], v0", "ds_read_b96 v[4:6], v0", id="last-of-three"),
        pytest.param("v_accvgpr_write_b32 a8, 0", "v_accvgpr_write_b32 a7, 0", id="accumulation"),
        pytest.param("s_mov_b32 s16, 0", "s_mov_b32 s9, 0", id="scalar"),
    ],
)
def test_register_that_the_kernel_does_not_have(
    monkeypatch: pytest.MonkeyPatch, wrong: str, right: str
) -> None:
    """On hardware it would be another wave's, or an accumulation register."""
    monkeypatch.setattr(gcn, "METADATA", gcn.METADATA.replace(f"accum_offset {gcn.VECTOR}", "accum_offset 8"))
    monkeypatch.setattr(gcn, "NOTES", "    .vgpr_count: 16\n    .agpr_count: 8\n    .sgpr_count: 16\n")
    state: dict[str, Any] = {"v": {0: 0}, "lds": np.zeros(64, np.uint8)}
    check(f"{wrong} ; !", "is beyond the", right, **state)


@pytest.mark.parametrize("branch", ["s_branch", "s_cbranch_scc1"])
@pytest.mark.parametrize("behind", ["s_endpgm", "s_endpgm\nnowhere:"], ids=["undefined", "behind-the-end"])
def test_branch_to_nowhere(branch: str, behind: str) -> None:
    """To a label that the kernel does not have, or behind which it has nothing."""
    code = f"{branch} nowhere\ns_nop 0\n{behind}\n"
    with pytest.raises(Fault, match=f"^snippet, line 1: {branch} nowhere: .*nowhere"):
        load("snippet", code + gcn.METADATA + gcn.NOTES)
    right = f"{branch} nowhere\nnowhere:\ns_nop 0\ns_endpgm\n"
    load("snippet", right + gcn.METADATA + gcn.NOTES)


def test_no_end() -> None:
    """The last instruction does not end the wave."""
    code = "s_cbranch_scc1 over\ns_endpgm\nover:\ns_nop 0\n"
    with pytest.raises(Fault, match=r"^snippet, line 4: s_nop 0: "):
        load("snippet", code + gcn.METADATA + gcn.NOTES)
    load("snippet", f"{code}s_endpgm\n" + gcn.METADATA + gcn.NOTES)


# --- the kernels that serve -------------------------------------------------------------------------

ROUTING = dict.fromkeys(
    (
        "few, few tokens",
        "place, one launch",
        "count, two launches",
        "place, two launches",
        "count, three launches",
        "add_up, three launches",
        "place, three launches",
    ),
    "barrier vmcnt lgkmcnt store",
)
KERNELS = {
    "matmul_ogs-3.6.0": ROUTING
    | {
        "w13": "barrier vmcnt lgkmcnt store",
        "w2": "barrier vmcnt lgkmcnt store",
        "_reduce_grouped": "vmcnt lgkmcnt store",
    },
    "matmul-3.8.0": ROUTING
    | {
        "w13": "barrier vmcnt lgkmcnt store",
        "w2": "barrier vmcnt lgkmcnt store",
        "_reduce_forward": "vmcnt lgkmcnt store",
    },
}
"""What each kernel of a layer has to plant faults in, by Triton and its kernels."""

HARMLESS = {
    # Outstanding are scalar loads, or a permutation of lanes, which are not used before another wait, and
    # touch no LDS.
    ("matmul_ogs-3.6.0", "place, one launch", "lgkmcnt"): ["s_waitcnt lgkmcnt(0)"] * 2,
    ("matmul-3.8.0", "place, one launch", "lgkmcnt"): ["s_waitcnt lgkmcnt(0)"] * 2,
    # The scales have two places in LDS. Behind this barrier the next tile's are written to one of them,
    # which was last read before the barrier at the head of the loop; since then only the other was.
    ("matmul-3.8.0", "w13", "barrier"): ["s_barrier"],
    ("matmul-3.8.0", "w2", "barrier"): ["s_barrier"],
    # LLVM waits for the sake of a path that no layer takes, K < 1. The first block's scales are not loaded
    # there, so that one load less is outstanding; and scalar loads have not been waited for.
    ("matmul_ogs-3.6.0", "w13", "vmcnt"): ["s_waitcnt vmcnt(9)", "s_waitcnt vmcnt(8)"],
    ("matmul_ogs-3.6.0", "w2", "vmcnt"): [f"s_waitcnt vmcnt({count})" for count in (11, 10, 9, 8)],
    ("matmul_ogs-3.6.0", "w2", "lgkmcnt"): ["s_waitcnt lgkmcnt(0)"],
}
"""What these layers can do without, by Triton and its kernels, kernel and kind: instructions in order."""

Findings = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    """What became of every planted fault, by Triton and its kernels."""
    directory = tmp_path_factory.mktemp("findings")

    def plant(name: str) -> dict[str, Any]:
        out = directory / f"{name}.json"
        kernels, _, triton = name.rpartition("-")
        result = run_python([plant_faults.__file__, str(out)], path=paths_of(triton, kernels))
        assert result.returncode == 0, result.stderr
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    with ThreadPoolExecutor() as pool:
        return dict(zip(KERNELS, pool.map(plant, KERNELS), strict=True))


@pytest.mark.emulate
@pytest.mark.parametrize("kernels", KERNELS)
def test_sound_kernels(findings: Findings, kernels: str) -> None:
    """With nothing planted a layer is right, also where everything has been planted before."""
    sound = findings[kernels]["sound"]
    layers = len(plant_faults.WAIT_LAYERS) + len(plant_faults.STORE_LAYERS)
    assert len(sound) == 1 + layers + 2 * len(plant_faults.ROUTINGS)
    for layer, outcome in sound.items():
        assert not outcome["fault"], layer
        assert not outcome["miss"], layer
        assert outcome["frobenius"] < MAX_FROBENIUS, layer


@pytest.mark.emulate
@pytest.mark.parametrize("fault", plant_faults.INPUTS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_wrong_input(findings: Findings, kernels: str, fault: str) -> None:
    """Weights in the wrong order, or a K that is not theirs."""
    outcome = findings[kernels]["inputs"][fault]
    if fault.endswith("too-many"):
        # The last row's last load ends behind the activations.
        assert re.search(r"_matmul\S+, line \d+: buffer_load_dwordx4 .*: reads 16 bytes at", outcome["fault"])
    else:
        assert not outcome["fault"]
        assert "errs by" in outcome["miss"]
        assert outcome["frobenius"] > 5 * MAX_FROBENIUS


@pytest.mark.emulate
@pytest.mark.parametrize(
    ("kernels", "kernel", "what"),
    [
        pytest.param(kernels, kernel, what, id=f"{kernels}-{kernel}-{what}")
        for kernels, named in KERNELS.items()
        for kernel, whats in named.items()
        for what in whats.split()
    ],
)
def test_wrong_code(findings: Findings, kernels: str, kernel: str, what: str) -> None:
    """Each barrier dropped, each wait dropped or too weak by one, each store four bytes off."""
    planted = [
        each for each in findings[kernels]["planted"] if (each["kernel"], each["what"]) == (kernel, what)
    ]
    assert planted
    missed = [each for each in planted if not each["found"]]
    needed = [each for each in missed if not each["idle"]]
    assert [each["text"] for each in needed] == HARMLESS.get((kernels, kernel, what), []), needed
    if what != "store":
        for each in planted:
            assert each["reached"], each
            # Only a Fault will do, and it names a place in the kernel.
            assert each in missed or re.match(r"\S+, line \d+: \w+.*: \w+", each["found"]), each


@pytest.mark.emulate
@pytest.mark.parametrize("kernels", KERNELS)
def test_sample_without_a_store(findings: Findings, kernels: str) -> None:
    """What a workgroup should have written and did not is missed, also where others are not executed."""
    sound, *without = findings[kernels]["sampled"]
    assert sound["found"] == ""
    assert len(without) >= 2
    for each in without:
        assert re.search("not finite|workgroups wrote [0-9]+ tiles", each["found"]), each


@pytest.mark.emulate
@pytest.mark.parametrize("kernels", KERNELS)
def test_nothing_else_to_plant(findings: Findings, kernels: str) -> None:
    """The table has every kernel, and everything in it."""
    planted = {(each["kernel"], each["what"]) for each in findings[kernels]["planted"]}
    assert planted == {(kernel, what) for kernel, whats in KERNELS[kernels].items() for what in whats.split()}


@pytest.mark.emulate
@pytest.mark.parametrize(
    "reason",
    [
        pytest.param(PENDING, id="register"),
        pytest.param(IN_FLIGHT, id="loaded-lds"),
        pytest.param("reads LDS that another wave has written since the last barrier", id="read-after-write"),
        pytest.param("writes LDS that another wave has read since the last barrier", id="write-after-read"),
        pytest.param("meets the others before its writes to LDS are done", id="write-at-barrier"),
        pytest.param("meets the others before its reads of LDS are done", id="read-at-barrier"),
    ],
)
def test_kinds_of_faults(findings: Findings, reason: str) -> None:
    """Some of what was planted was found for each of these reasons."""
    found = [each["found"] for of in findings.values() for each in of["planted"]]
    assert any(reason in text for text in found)
