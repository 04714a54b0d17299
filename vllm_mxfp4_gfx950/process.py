"""A server of vLLM or SGLang as processes: started, awaited, and stopped with all that it started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from vllm_mxfp4_gfx950.errors import Mxfp4Error, first_error

if TYPE_CHECKING:
    from typing_extensions import Self

STOP_SECONDS = 30
VLLM = "vllm.entrypoints.cli.main"

TIED = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit("what started this server was killed meanwhile")
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
"""Runs Python with its own arguments but the first, the id of the process that started it: where that one is
killed, it gets SIGTERM.

Source: prctl(2).
"""


class ServerProcess:
    """A server on a free port of this machine, in a session of its own, by which its processes are found.

    It has begun to start, and is stopped where a `with` of it ends, or this process is killed.

    Args:
        arguments: of its command line, without host and port.
        environment: for it, all of it.
        log: the file that it writes.
        module: its main program; vLLM's command line.

    Raises:
        Mxfp4Error: a proxy stands before it.
    """

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str], log: Path, module: str = VLLM
    ) -> None:
        self.log, self.place = log, f"127.0.0.1:{free_port()}"
        self.url = f"http://{self.place}"
        check_proxy(self.url)
        host, port = self.place.split(":")
        command = [sys.executable, "-c", TIED, str(os.getpid()), "-m", module, *arguments]
        with log.open("w") as output:
            self.main = subprocess.Popen(
                [*command, "--host", host, "--port", port],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_until_healthy(self, urls: Sequence[str] = (), look: Callable[[], object] = bool) -> str:
        """Wait for as long as it is starting; the framework itself limits that.

        Args:
            urls: where it may answer; the one that does is returned; by default its own.
            look: called each time that it does not answer yet.

        Raises:
            Mxfp4Error: it ended. The reason is the first error of its log, as its last words are of another
                one of its processes, which only met the end of the first.
        """
        import requests

        while self.main.poll() is None:
            for url in urls or [self.url]:
                with suppress(requests.RequestException), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # Of a certificate that is not looked at.
                    if requests.get(f"{url}/health", timeout=5, verify=False).ok:
                        return url
            look()
            time.sleep(0.5)
        raise did_not_start(self.main.returncode, self.log)

    def processes(self) -> list[int]:
        """Those of its session that have not ended, by their ids."""
        found = []
        for file in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                state, _, _, session, *_ = file.read_text().rpartition(")")[2].split()
                if int(session) == self.main.pid and state != "Z":
                    found.append(int(file.parent.name))
        return found

    def stop(self, number: int = signal.SIGINT, seconds: float = STOP_SECONDS) -> list[int]:
        """Let it shut down, and end what is left of it.

        Args:
            number: the signal that asks it to.
            seconds: that this may take.

        Returns:
            The processes that were left, by their ids.
        """
        left = []
        try:
            if self.main.poll() is None:
                began = time.monotonic()
                self.main.send_signal(number)
                with suppress(subprocess.TimeoutExpired):
                    self.main.wait(seconds)
                while (left := self.processes()) and time.monotonic() - began < seconds:
                    time.sleep(0.1)
        finally:  # A second signal to this process must not spare them, either.
            for process in self.processes():
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            self.main.wait()
            # What was killed ends when it is its turn to run.
            ended = time.monotonic() + STOP_SECONDS
            while self.processes() and time.monotonic() < ended:
                time.sleep(0.01)
        return left


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Within this, SIGTERM ends a `with` of a server as well; by default it would end this process alone."""
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def leave(number: int, _: FrameType | None) -> None:
    """Handle a signal as the request to end, with the exit code that a shell gives it."""
    raise SystemExit(128 + number)


def check_proxy(url: str) -> None:
    """Raise Mxfp4Error where requests to this machine would go through a proxy."""
    from requests.utils import get_environ_proxies, select_proxy

    if select_proxy(url, get_environ_proxies(url)):
        listed = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "nothing"
        raise Mxfp4Error("no_proxy", "a list with 127.0.0.1, where there is a proxy", listed, "Add it")


def did_not_start(code: int, log: Path, rule: str = "able to start") -> Mxfp4Error:
    """Why a server ended before it answered, or before it kept another rule, by its exit code and its log."""
    text = log.read_text(errors="replace")
    found, fix = f"exit code {code}", f"Read {log}"
    first = first_error(text)
    if first:
        found += f" after: {first.rstrip('.')}"
    else:
        print("\n".join(text.splitlines()[-25:]), file=sys.stderr)
        fix += ", which ends as above"
    return Mxfp4Error("the server", rule, found, fix)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
