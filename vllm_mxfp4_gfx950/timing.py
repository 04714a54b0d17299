"""How long a call takes on this GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

REPLAYS = 10
MIN_REPLAYS = 4
ENOUGH_MS = 100.0
"""REPLAYS are timed, or as many as take this long, but at least MIN_REPLAYS."""


def graph_time_us(calls: Sequence[Callable[[], object]]) -> float:
    """The median over replays of a CUDA graph of all calls, in microseconds a call.

    What a call reads should not be in the cache of the call before it: give it calls on other data, so many
    that together they read more than the largest cache holds.

    Args:
        calls: what to time; each is also run once before.
    """
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times_ms: list[float] = []
    # The first two replays find the clocks of whatever ran before.
    while len(times_ms) < 2 + MIN_REPLAYS or (len(times_ms) < 2 + REPLAYS and sum(times_ms) < ENOUGH_MS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times_ms.append(start.elapsed_time(end))
    return 1000 * statistics.median(times_ms[2:]) / len(calls)
