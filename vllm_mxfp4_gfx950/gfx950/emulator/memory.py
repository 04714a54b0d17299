"""The memories of an emulated launch, which know more than hardware's: what is whose, and what was written.

A fault is an access that hardware might let pass, or answer with whatever lies there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Indices = NDArray[np.int64]
WIDE: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}
"""A NumPy type of each size, to move that many bytes at once; nothing is computed with them."""

BANKS = 64
SETTLED, SEVERAL, IN_FLIGHT = 255, 254, 64
"""States of an LDS byte: written before the last barrier; touched by several waves since then; and, with the
number of a wave added, about to be written by a load. The number of a wave plus 1 is that wave. 0 is none."""


class Fault(RuntimeError):
    """Something that a right program does not do."""


def take(data: Bytes, offsets: Indices, size: int) -> Bytes:
    """Bytes from offsets.

    Returns:
        uint8[..., size]
    """
    if not (offsets % size).any() and not data.size % size:
        wide: Bytes = data.view(WIDE[size])[offsets // size].view(np.uint8)
        return wide.reshape(*offsets.shape, size)
    return data[offsets[..., None] + np.arange(size)]


def put(data: Bytes, offsets: Indices, values: Bytes) -> None:
    """Bytes to offsets; values are uint8[..., size], contiguous."""
    size = values.shape[-1]
    if size in WIDE and not (offsets % size).any() and not data.size % size:
        data.view(WIDE[size])[offsets // size] = values.view(WIDE[size])[..., 0]
    else:
        data[offsets[..., None] + np.arange(size)] = values


@dataclass
class Region:
    """One tensor of a launch, and how many bytes of it were moved.

    Args:
        name: the kernel parameter that brought it, or several of them where they overlap.
        start: its address.
        data: its bytes.
    """

    name: str
    start: int
    data: Bytes
    bytes_read: int = 0
    bytes_written: int = 0


class GlobalMemory:
    """The tensors of a launch. Nothing else can be read or written.

    Args:
        regions: they must not overlap.
    """

    def __init__(self, regions: Sequence[Region]) -> None:
        self.regions = sorted(regions, key=lambda region: region.start)
        self._starts = [region.start for region in self.regions]

    def load(self, addresses: Indices, size: int) -> Bytes:
        """uint8[n, size] from int64[n] addresses."""
        out = np.empty((len(addresses), size), np.uint8)
        for region, where, offsets in self._locate(addresses, size, "reads"):
            out[where] = take(region.data, offsets, size) if size in WIDE else _pieces(region, offsets, size)
            region.bytes_read += offsets.size * size
        return out

    def store(self, addresses: Indices, values: Bytes) -> None:
        """uint8[n, size] to int64[n] addresses."""
        size = values.shape[1]
        for region, where, offsets in self._locate(addresses, size, "writes"):
            put(region.data, offsets, np.ascontiguousarray(values[where]))
            region.bytes_written += offsets.size * size

    def add(self, addresses: Indices, values: NDArray[np.uint32]) -> None:
        """Atomically add uint32[n] to what lies at int64[n] addresses."""
        for region, where, offsets in self._locate(addresses, 4, "adds to"):
            if (offsets % 4).any():
                raise Fault("atomic access that is not aligned")
            np.add.at(region.data.view(np.uint32), offsets // 4, values[where])
            region.bytes_read += offsets.size * 4
            region.bytes_written += offsets.size * 4

    def _locate(self, addresses: Indices, size: int, verb: str) -> list[tuple[Region, Any, Indices]]:
        if not len(addresses):
            return []
        low, high = int(addresses.min()), int(addresses.max())
        found: list[tuple[Region, Any, Indices]] = []
        while True:
            index = bisect_right(self._starts, low) - 1
            region = self.regions[max(index, 0)]
            end = region.start + region.data.size
            if index < 0 or low + size > end:
                raise Fault(f"{verb} {size} bytes at {low:#x}, {self._outside(low)}")
            if high + size <= end:
                where: Any = slice(None) if not found else addresses >= region.start
                found.append((region, where, addresses[where] - region.start))
                return found
            inside = (addresses >= region.start) & (addresses + size <= end)
            found.append((region, inside, addresses[inside] - region.start))
            rest = addresses[(addresses >= region.start) & ~inside]
            low = int(rest.min())
            if low < end:
                raise Fault(f"{verb} {size} bytes at {low:#x}, {self._outside(low)}")

    def _outside(self, address: int) -> str:
        index = bisect_right(self._starts, address) - 1
        if index < 0:
            return "before every tensor of the launch"
        region = self.regions[index]
        return f"{address - region.start} bytes into {region.name}, which has {region.data.size}"


def _pieces(region: Region, offsets: Indices, size: int) -> Bytes:
    return np.concatenate([take(region.data, offsets + i, 4) for i in range(0, size, 4)], axis=-1)


class Lds:
    """The LDS of several workgroups, one after the other.

    Args:
        workgroups: how many.
        size: bytes that each was allotted.

    Attributes:
        passes: what the first workgroup's accesses take at 256 bytes a pass.
        conflicts: passes that they take beside, where lanes of one pass want different dwords of a bank.
    """

    def __init__(self, workgroups: int, size: int) -> None:
        self.size = size
        self.stride = -(-max(size, 1) // 16) * 16
        self.data = np.zeros(workgroups * self.stride, np.uint8)
        self.writer = np.zeros_like(self.data)
        self.reader = np.zeros_like(self.data)
        self.passes = self.conflicts = 0

    def load(self, addresses: Indices, size: int, workgroup: Indices, wave: Bytes) -> Bytes:
        """uint8[n, size] from int64[n] byte addresses.

        Args:
            addresses: within the workgroup.
            size: bytes for each.
            workgroup: int64[n], whose LDS.
            wave: uint8[n], who asks: the wave's number in its workgroup.
        """
        at = self._flat(addresses, size, workgroup, "reads")
        me = (wave + 1)[:, None]
        writer = take(self.writer, at, size)
        if not (writer == SETTLED).all():
            if (writer == 0).any():
                raise Fault("reads LDS that nothing has written")
            if ((writer >= IN_FLIGHT) & (writer < SEVERAL)).any():
                raise Fault("reads LDS that a load is still to write")
            if ((writer != SETTLED) & (writer != me)).any():
                raise Fault("reads LDS that another wave has written since the last barrier")
        before = take(self.reader, at, size)
        mine = np.where((before == 0) | (before == me), me, SEVERAL).astype(np.uint8)
        put(self.reader, at, mine)
        # Lanes of one instruction may read the same byte; the last of them stands there now.
        others = take(self.reader, at, size) != mine
        if others.any():
            lanes = others.any(axis=1)
            put(self.reader, at[lanes], np.where(others[lanes], np.uint8(SEVERAL), mine[lanes]))
        return take(self.data, at, size)

    def store(
        self,
        addresses: Indices,
        values: Bytes,
        workgroup: Indices,
        wave: Bytes,
        *,
        in_flight: bool = False,
        reading: bool = False,
    ) -> Indices:
        """uint8[n, size] to int64[n] byte addresses.

        Args:
            addresses: within the workgroup.
            values: what to write.
            workgroup: int64[n], whose LDS.
            wave: uint8[n], who writes.
            in_flight: whether the bytes arrive only when the wave has waited for its loads.
            reading: whether the wave has reads of LDS outstanding.

        Returns:
            The flat addresses, for `arrive`.
        """
        size = values.shape[1]
        at = self._flat(addresses, size, workgroup, "writes")
        me = np.broadcast_to((wave + (IN_FLIGHT if in_flight else 1))[:, None], values.shape)
        reader = take(self.reader, at, size)
        if ((reader != 0) & (reader != (wave + 1)[:, None])).any():
            raise Fault("writes LDS that another wave has read since the last barrier")
        if in_flight and reader.any() and reading:
            raise Fault("loads into LDS of which a read may not be done: an s_waitcnt is missing")
        writer = take(self.writer, at, size)
        cells = np.ascontiguousarray(me)
        if (writer == (wave + IN_FLIGHT)[:, None]).any():
            raise Fault("writes LDS that a load is still to write")
        shared = (writer != 0) & (writer != SETTLED) & (writer != me)
        if shared.any():
            # Triton lets every wave of a replicated layout write the same values to the same place.
            if (shared & (take(self.data, at, size) != values)).any():
                raise Fault("writes LDS that another wave has written otherwise since the last barrier")
            arriving = shared & (writer != SEVERAL) & (writer >= IN_FLIGHT)
            if arriving.any() and not in_flight:
                raise Fault("writes LDS that a load is still to write")
            cells = np.where(shared, np.where(arriving, writer, np.uint8(SEVERAL)), cells)
        put(self.data, at, values)
        put(self.writer, at, cells)
        if (take(self.data, at, size) != values).any():
            raise Fault("writes two values to the same LDS at once")
        others = take(self.writer, at, size) != cells
        if others.any() and not in_flight:
            lanes = others.any(axis=1)
            put(self.writer, at[lanes], np.where(others[lanes], np.uint8(SEVERAL), cells[lanes]))
        return at

    def count_passes(self, addresses: Indices, size: int, workgroup: Indices, wave: Bytes) -> None:
        """Count the passes of an access, by lanes in order and as if none were off in between.

        A model: 64 banks of 4 bytes, as Triton assumes of gfx950 when it lays out LDS. AMD does not publish
        which lanes share a pass.
        """
        watched = workgroup == 0
        if not watched.any():
            return
        dwords = max(1, size // 4)
        wanted = addresses[watched][:, None] // 4 + np.arange(dwords)
        waves = wave[watched].astype(np.int64)
        # A wave's lanes stand together and in order, the waves in any.
        first, which = np.unique(waves, return_index=True, return_inverse=True)[1:]
        lane = np.arange(len(waves)) - first[which]
        group = (waves * 64 + lane) // (BANKS // dwords if dwords in (1, 2, 4) else 16)
        keys = np.unique((group[:, None] << 32 | wanted).reshape(-1))
        by_bank = np.unique(keys >> 32 << 6 | keys % BANKS, return_counts=True)
        owner = by_bank[0] >> 6
        groups, begin = np.unique(owner, return_index=True)
        self.passes += len(groups)
        self.conflicts += int((np.maximum.reduceat(by_bank[1], begin) - 1).sum())

    def arrive(self, at: Indices, size: int, wave: Bytes) -> None:
        """Note that loads into LDS, issued before by these waves, have been waited for."""
        writer = take(self.writer, at, size)
        me = wave[:, None]
        put(self.writer, at, np.where(writer == me + IN_FLIGHT, me + np.uint8(1), writer))

    def barrier(self, workgroups: Indices) -> None:
        """All waves of these workgroups have met."""
        for workgroup in workgroups:
            span = slice(workgroup * self.stride, (workgroup + 1) * self.stride)
            writer = self.writer[span]
            writer[(writer == SEVERAL) | (writer > 0) & (writer < IN_FLIGHT)] = SETTLED
            self.reader[span] = 0

    def _flat(self, addresses: Indices, size: int, workgroup: Indices, verb: str) -> Indices:
        if len(addresses) and (int(addresses.max()) + size > self.size or int(addresses.min()) < 0):
            worst = int(addresses.max())
            raise Fault(f"{verb} {size} bytes of LDS at {worst}, and the workgroup has {self.size}")
        return addresses + workgroup * self.stride
