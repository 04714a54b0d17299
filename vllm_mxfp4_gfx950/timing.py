"""How long a call takes on this device, and how far a long work has come."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

REPLAYS = 6
"""Timed in a row."""


class Calls:
    """Several calls as one piece of work: a CUDA graph, or the calls themselves.

    Args:
        call: takes the call's number and returns its result.
        count: how many.
        device: where they run.
        alike: whether one call compiles what all of them need.
        in_graph: whether a GPU replays them from a graph; else the CPU launches them each time.
    """

    def __init__(
        self,
        call: Callable[[int], Any],
        count: int,
        device: torch.device,
        *,
        alike: bool = False,
        in_graph: bool = True,
    ) -> None:
        self.call, self.count, self.device = call, count, device
        self.graph: torch.cuda.CUDAGraph | None = None
        self.first = call(0) if alike else self.calls()
        if device.type == "cuda" and in_graph:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.first = self.calls()

    def calls(self) -> Any:
        """Make them one by one; the first one's result."""
        first = self.call(0)
        for number in range(1, self.count):
            self.call(number)
        return first

    def replay(self) -> Any:
        """Do the work once; the first call's result."""
        if self.graph is None:
            self.first = self.calls()
        else:
            self.graph.replay()
        return self.first

    def microseconds(self, replays: int = REPLAYS) -> list[float]:
        """Time of a call, once for each replay, after one that is not timed."""
        self.replay()
        return [self.seconds() * 1e6 / self.count for _ in range(replays)]

    def launch_us(self, times: int) -> float:
        """Median time until a call returns, begun when the GPU has nothing to do: what the CPU takes.

        Args:
            times: that it is taken; the calls take turns.
        """
        found = []
        for number in range(times):
            self._wait()
            began = time.perf_counter()
            self.call(number % self.count)
            found.append(time.perf_counter() - began)
        return 1e6 * statistics.median(found)

    def seconds(self) -> float:
        """Time of one replay."""
        if self.graph is None:
            self._wait()
            began = time.perf_counter()
            self.replay()
            self._wait()
            return time.perf_counter() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def _wait(self) -> None:
        """Until the device has nothing to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def progress(done: int, total: int) -> None:
    """A bar on a terminal; nothing elsewhere."""
    if sys.stderr.isatty():
        bar = "#" * (40 * done // total)
        print(f"\r[{bar:40}] {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
