"""A hang, told from a slow neighbour: by what processes do and not by how long it takes.

Whoever waits for another process in a test waits without a limit: the one limit is here, and conftest.py
holds each test to it. A process that is starved by others still computes; one that hangs does nothing, or
computes without end.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

import psutil
import pytest

IDLE_SHARE = 0.01
"""Of a core: who gets less done than this does nothing. A process that polls does a tenth of it."""


def cpu_seconds(process: psutil.Process) -> float:
    """CPU time of a process and of all below it, those included that have ended and were waited for."""
    total = 0.0
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            total += sum(each.cpu_times()[:4])
    return total


class Progress:
    """What is known of something that runs.

    Args:
        idle_s: how long it may do nothing.
        cpu_s: how much CPU time it may take.
        now: the time, in seconds.
        cpu: its CPU time until now, in seconds.
    """

    def __init__(self, idle_s: float, cpu_s: float, now: float, cpu: float) -> None:
        self.idle_s, self.cpu_s = idle_s, cpu_s
        self.began = self.cpu = cpu
        self.at = now

    def hang(self, now: float, cpu: float) -> str:
        """Why it hangs; "" where it does not."""
        if cpu - self.began > self.cpu_s:
            return f"computed for {self.cpu_s:g} s of CPU time and came to no end"
        if cpu < self.cpu or cpu - self.cpu > IDLE_SHARE * self.idle_s:  # Less: a process has left the tree.
            self.at, self.cpu = now, cpu
        return f"did nothing for {self.idle_s:g} s" if now - self.at > self.idle_s else ""


class Watch:
    """Ends whatever hangs in this process's main thread, and the processes below.

    Args:
        period_s: between two looks.
    """

    def __init__(self, period_s: float) -> None:
        self.period_s = period_s
        self.limits: tuple[float, float] | None = None
        self.why = ""
        threading.Thread(target=self.look, daemon=True).start()

    @contextlib.contextmanager
    def over(self, idle_s: float, cpu_s: float) -> Iterator[None]:
        """Hold what happens inside to these limits; see `Progress`."""
        before = signal.signal(signal.SIGALRM, self.stop)
        self.limits = (idle_s, cpu_s)
        try:
            yield
        finally:
            self.limits = None
            signal.signal(signal.SIGALRM, before)

    def look(self) -> None:
        """Again and again."""
        process = psutil.Process()
        limits = progress = None
        while True:
            time.sleep(self.period_s)
            asked = self.limits
            if not asked:
                continue
            # Looking takes time of its own, which is no progress.
            now, cpu = time.monotonic(), cpu_seconds(process) - time.thread_time()
            if asked is not limits:  # Another test, or another of its phases.
                limits, progress = asked, Progress(*asked, now, cpu)
            self.why = progress.hang(now, cpu)
            if self.why:
                self.end(process.children(recursive=True))
                time.sleep(self.period_s)
                if self.limits is limits:  # Not even a signal reaches it.
                    os._exit(1)

    def end(self, children: list[psutil.Process]) -> None:
        """Say what runs, and end it."""
        for child in children:
            with contextlib.suppress(psutil.Error):
                text = f"below it: {child.pid} {' '.join(child.cmdline())[:200]}"
                print(text, file=sys.__stderr__, flush=True)
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
        time.sleep(1)  # The test learns why before it sees its processes end.
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()

    def stop(self, _number: int, _frame: FrameType | None) -> None:
        """Fail, in the main thread."""
        if self.limits:
            pytest.fail(f"hangs: it {self.why}. Its stderr has where, and what ran below it")
