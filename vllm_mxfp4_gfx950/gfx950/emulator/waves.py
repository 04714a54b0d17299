"""The registers of many waves that are at the same instruction, as arrays with one axis for the waves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_mxfp4_gfx950.gfx950.driver import WAVE
from vllm_mxfp4_gfx950.gfx950.emulator.instructions.op import Array
from vllm_mxfp4_gfx950.gfx950.emulator.memory import Fault, Indices

SGPRS = 128
VCC, M0, EXEC = 106, 124, 126
"""Numbers of the special registers among the scalar ones; VCC and EXEC are pairs."""

ALL = np.uint64(2**64 - 1)
SCALAR_KEY = 1000
"""Added to a scalar register's number where vector and scalar registers stand in one set."""


def expand(masks: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """uint64[waves], a bit per lane, to bool[waves, 64]."""
    raw = np.ascontiguousarray(masks).view(np.uint8).reshape(-1, 8)
    return np.unpackbits(raw, axis=1, bitorder="little").view(np.bool_)


def pack(lanes: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """bool[waves, 64] to uint64[waves], a bit per lane."""
    return np.packbits(lanes, axis=1, bitorder="little").view(np.uint64)[:, 0]


@dataclass(frozen=True)
class Outstanding:
    """A memory instruction that has been issued and not been waited for.

    Args:
        kind: "load", "store", "lds read", "lds store", "lds" (between lanes) or "smem".
        registers: what it will have written; see SCALAR_KEY.
        lds: int64[waves, 64], flat LDS addresses that it will have written; -1 is none.
        size: bytes at each of them.
    """

    kind: str
    registers: frozenset[int] = frozenset()
    lds: Indices | None = None
    size: int = 0

    def of(self, waves: Any) -> Outstanding:
        """The same for some of the waves."""
        lds = None if self.lds is None else self.lds[waves]
        return Outstanding(self.kind, self.registers, lds, self.size)

    def joined(self, other: Outstanding) -> Outstanding:
        """The same for these waves and the other's."""
        lds = None if self.lds is None or other.lds is None else np.concatenate([self.lds, other.lds])
        return Outstanding(self.kind, self.registers, lds, self.size)

    def like(self, other: Outstanding) -> bool:
        """Whether both came from the same kind of instruction."""
        return (self.kind, self.registers, self.size) == (other.kind, other.registers, other.size)


AXES = {"v": 1, "s": 1, "scratch": 1, "v_known": 1, "s_known": 1, "scratch_known": 1, "scratch_sound": 1}
FIRST_AXES = ("scc", "scc_known", "workgroup", "wave")
"""The arrays of Waves with their wave axis, and those that have no other."""


class Waves:
    """Waves in lockstep, W of them.

    Args:
        vector: registers of a lane, accumulation registers last.
        scratch: dwords of private memory of a lane.
        workgroup: int64[W], which of the workgroups at hand each wave belongs to.
        wave: uint8[W], each wave's number in its workgroup.

    Attributes:
        v: uint32[vector, W, 64]. v_known: uint64[vector, W], the lanes that were written.
        s: uint32[128, W]. s_known: bool[128, W].
        scratch: uint32[scratch, W, 64]. scratch_known: uint64[scratch, W]. scratch_sound: likewise, the lanes
            that were written from a register that was.
        scc: bool[W]. scc_known: bool[W].
        exec: uint64[W]. lanes: bool[W, 64], the same. whole: whether all lanes are on.
        block: index of the block that they are about to execute.
        memory, lds: what is outstanding, by the counter (vmcnt, lgkmcnt) that tells of it, oldest first.
        pending: the registers that those will write.
        idle_issued: int64[1], shared by all waves of a run: lanes that were off in vector instructions.
    """

    def __init__(self, vector: int, scratch: int, workgroup: Indices, wave: NDArray[np.uint8]) -> None:
        count = len(workgroup)
        self.v = np.zeros((vector, count, WAVE), np.uint32)
        self.v_known = np.zeros((vector, count), np.uint64)
        self.s = np.zeros((SGPRS, count), np.uint32)
        self.s_known = np.zeros((SGPRS, count), np.bool_)
        self.scratch = np.zeros((scratch, count, WAVE), np.uint32)
        self.scratch_known = np.zeros((scratch, count), np.uint64)
        self.scratch_sound = np.zeros((scratch, count), np.uint64)
        self.scc = np.zeros(count, np.bool_)
        self.scc_known = np.zeros(count, np.bool_)
        self.workgroup = workgroup
        self.wave = wave
        self.block = 0
        self.memory: list[Outstanding] = []
        self.lds: list[Outstanding] = []
        self.pending: set[int] = set()
        self.idle_issued = np.zeros(1, np.int64)
        self.set_exec(np.full(count, ALL))
        self._note_known()

    def __len__(self) -> int:
        return len(self.wave)

    def _note_known(self) -> None:
        # Whether a register is known in every lane of every wave: the quick answer to most questions.
        self.v_all: list[bool] = np.all(self.v_known == ALL, axis=1).tolist()
        self.s_all: list[bool] = np.all(self.s_known, axis=1).tolist()
        self.lane_workgroup = np.broadcast_to(self.workgroup[:, None], (len(self), WAVE))
        self.lane_wave = np.broadcast_to(self.wave[:, None], (len(self), WAVE))

    def set_exec(self, masks: NDArray[np.uint64]) -> None:
        """Turn lanes on and off."""
        self.exec = masks
        self.whole = bool((masks == ALL).all())
        self.lanes = expand(masks)
        self.idle = 0 if self.whole else int(self.lanes.size - np.count_nonzero(self.lanes))

    def write_v(self, register: int, value: Array) -> None:
        """Write a vector register where lanes are on."""
        if self.whole:
            self.v[register] = value
            if not self.v_all[register]:
                self.v_known[register] = ALL
                self.v_all[register] = True
        else:
            np.copyto(self.v[register], value, where=self.lanes)
            if not self.v_all[register]:
                self.v_known[register] |= self.exec
                self.v_all[register] = bool((self.v_known[register] == ALL).all())

    def forget_v(self, register: int, lanes: NDArray[np.uint64]) -> None:
        """Take a vector register for one that nothing has written in some lanes."""
        if lanes.any():
            self.v_known[register] &= ~lanes
            self.v_all[register] = False

    def write_lanes(self, register: int, value: Array, lanes: NDArray[np.bool_]) -> None:
        """Write a vector register where `lanes` says."""
        np.copyto(self.v[register], value, where=lanes)
        if not self.v_all[register]:
            self.v_known[register] |= pack(np.ascontiguousarray(np.broadcast_to(lanes, (len(self), WAVE))))
            self.v_all[register] = bool((self.v_known[register] == ALL).all())

    def write_s(self, register: int, value: Array, known: NDArray[np.bool_] | None = None) -> None:
        """Write a scalar register, with what may be unknown; None for nothing."""
        self.s[register] = value
        if not self.s_all[register] or known is not None:
            self.s_known[register] = True if known is None else known
            self.s_all[register] = bool(self.s_known[register].all())

    def write_scc(self, value: Array) -> None:
        """Write the scalar condition."""
        self.scc = np.array(np.broadcast_to(value, self.scc.shape))
        self.scc_known = np.ones_like(self.scc)

    def read_pair(self, register: int) -> NDArray[np.uint64]:
        """A pair of scalar registers."""
        if register == EXEC:
            return self.exec
        low, high = self.s[register].astype(np.uint64), self.s[register + 1].astype(np.uint64)
        pair: NDArray[np.uint64] = low | high << np.uint64(32)
        return pair

    def write_pair(self, register: int, value: Array) -> None:
        """Write a pair of scalar registers."""
        value = np.asarray(value, np.uint64)
        if register == EXEC:
            self.set_exec(np.broadcast_to(value, self.exec.shape).copy())
        else:
            self.write_s(register, value.astype(np.uint32))
            self.write_s(register + 1, (value >> np.uint64(32)).astype(np.uint32))

    def check_known(self, vector: Sequence[int], scalar: Sequence[int], *, all_lanes: bool = False) -> None:
        """Raise Fault when an active lane is about to read a register that nothing has written."""
        for register in vector:
            if not self.v_all[register]:
                unknown = ~self.v_known[register] & (ALL if all_lanes else self.exec)
                if unknown.any():
                    raise Fault(f"reads vector register {register}, which nothing has written in some lanes")
        for register in scalar:
            if not self.s_all[register] and not self.s_known[register].all():
                raise Fault(f"reads scalar register {register}, which nothing has written")

    def wait(self, queue: list[Outstanding], left: int) -> list[Outstanding]:
        """Let all but the newest `left` of a queue finish, and return those that did.

        Scalar loads finish in any order, so among them only an empty queue is certain.
        """
        if left and any(one.kind == "smem" for one in queue):
            return []
        done = queue[: max(0, len(queue) - left)]
        del queue[: len(done)]
        if done:
            self.pending = set().union(*(one.registers for one in (*self.memory, *self.lds)))
        return done

    def split(self, waves: NDArray[np.bool_]) -> tuple[Waves, Waves]:
        """Those waves, and the others."""
        return self._of(waves), self._of(~waves)

    def _of(self, waves: NDArray[np.bool_]) -> Waves:
        some = Waves.__new__(Waves)
        for name in AXES:
            setattr(some, name, getattr(self, name)[:, waves])
        for name in FIRST_AXES:
            setattr(some, name, getattr(self, name)[waves])
        some.block, some.idle_issued = self.block, self.idle_issued
        some.memory = [one.of(waves) for one in self.memory]
        some.lds = [one.of(waves) for one in self.lds]
        some.pending = set(self.pending)
        some.set_exec(self.exec[waves])
        some._note_known()
        return some

    def can_join(self, other: Waves) -> bool:
        """Whether both are at the same place and wait for the same."""
        return self.block == other.block and all(
            len(mine) == len(theirs) and all(map(Outstanding.like, mine, theirs))
            for mine, theirs in ((self.memory, other.memory), (self.lds, other.lds))
        )

    def joined(self, other: Waves) -> Waves:
        """These waves and the others, which `can_join`."""
        both = Waves.__new__(Waves)
        for name, axis in AXES.items():
            setattr(both, name, np.concatenate([getattr(self, name), getattr(other, name)], axis=axis))
        for name in FIRST_AXES:
            setattr(both, name, np.concatenate([getattr(self, name), getattr(other, name)]))
        both.block, both.idle_issued = self.block, self.idle_issued
        both.memory = list(map(Outstanding.joined, self.memory, other.memory))
        both.lds = list(map(Outstanding.joined, self.lds, other.lds))
        both.pending = set(self.pending)
        both.set_exec(np.concatenate([self.exec, other.exec]))
        both._note_known()
        return both
