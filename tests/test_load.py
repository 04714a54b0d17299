"""A server under thousands of requests, some of them cut off: no wrong token, nothing kept, a clean end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import aiohttp
import load_server
import psutil
import pytest
import requests
import tiny_checkpoint
from load_server import KINDS, TWO_RANKS, Load, LoadError, LostError, Quiet, Report, Server

pytestmark = pytest.mark.engine

GOOD = Report(
    kinds=Counter({f"{kind} {how}": 1 for kind in KINDS for how in ("ended", "cut off")}),
    tokens=1,
    wrong=[],
    seconds=1.0,
    grown_bytes=0,
    left={"vllm:num_requests_running": 0.0},
)


@pytest.fixture(name="server")
def fixture_server(tmp_path: Path) -> Iterator[Server]:
    """One that serves the tiny model."""
    checkpoint = tiny_checkpoint.write(load_server.MODEL, tmp_path / "checkpoint")
    with load_server.serving(checkpoint, tmp_path / "log") as server:
        yield server


@pytest.mark.load
def test_load(server: Server) -> None:
    """A hundred requests, of every kind."""
    report = load_server.ask(server, 100)
    # Nothing is said of memory here: a server so young still grows.
    replace(report, grown_bytes=0).check()
    assert report.tokens > 600


@pytest.mark.load
def test_killed_worker(server: Server) -> None:
    """The request under way ends with an error, none after it is answered, and no process is left."""
    url = f"{server.url}/v1/completions"
    (worker,) = (pid for pid in server.processes() if "Worker" in psutil.Process(pid).name())
    # Long enough that it goes on for as long as this process may have to wait for its turn.
    body = load_server.body([3, 4], load_server.CONTEXT - 2, stream=True)
    with requests.post(url, json=body, stream=True) as reply:
        events = (line.removeprefix(b"data: ") for line in reply.iter_lines() if line)
        assert json.loads(next(events))["choices"][0]["token_ids"]
        os.kill(worker, signal.SIGKILL)
        *_, last, done = events
    assert json.loads(last)["error"]["code"] == 500
    assert done == b"[DONE]"
    assert server.main.wait() == 0, "vLLM ends otherwise now: docs/faults.md"
    server.wait_until_gone()
    with pytest.raises(requests.ConnectionError):
        requests.post(url, json=load_server.body([3, 4], 8))


@pytest.mark.load
def test_heavy_load(tmp_path: Path) -> None:
    """Ten thousand."""
    report = load_server.measure(tmp_path, 10_000)
    report.check()
    assert report.tokens > 60_000


class Outage(Load):
    """A load that kills one of the server's processes midway. What that ends is lost, and says so."""

    def __init__(self, server: Server, quiet: list[Quiet], requests: int, process: int) -> None:
        super().__init__(server, quiet, requests)
        self.process, self.begun = process, 0
        self.lost: Counter[str] = Counter()

    async def request(self, session: aiohttp.ClientSession) -> None:
        """One, while there is a server."""
        self.begun += 1
        if self.begun == self.requests // 2:
            os.kill(self.process, signal.SIGKILL)
        try:
            await super().request(session)
        except (aiohttp.ClientError, LostError) as error:
            self.lost[type(error).__name__] += 1


@pytest.mark.load
def test_killed_rank(tmp_path: Path) -> None:
    """Two data-parallel ranks give one rank's answers until one is killed, and when they are started anew."""
    checkpoint = tiny_checkpoint.write(load_server.MODEL, tmp_path / "checkpoint")
    with load_server.serving(checkpoint, tmp_path / "one") as server:
        quiet = load_server.ask_quietly(server)
        long = load_server.ask_quietly(server, prompts=16, answers=(200, 200))
        server.end()
    with load_server.serving(checkpoint, tmp_path / "killed", *TWO_RANKS) as server:
        (rank,) = (pid for pid in server.processes() if "EngineCore_DP1" in psutil.Process(pid).name())
        load = Outage(server, quiet, 1000, rank)
        asyncio.run(load.send())
        code = server.main.wait()
        print(f"{dict(load.kinds)}; lost: {dict(load.lost)}; exit code {code}")
        assert not load.wrong
        assert load.tokens > 1000
        assert code == 1, "vLLM ends otherwise now: docs/faults.md"
        server.wait_until_gone()
    # The several API servers of vLLM 0.32 do not drain.
    drains = ("--api-server-count", "1", "--shutdown-timeout", "60")
    with load_server.serving(checkpoint, tmp_path / "again", *TWO_RANKS, *drains) as server:
        report = load_server.ask(server, 1000, quiet)
        # Nothing is said of memory here: a server so young still grows.
        replace(report, grown_bytes=0).check()
        end_at_work(server, long)


def end_at_work(server: Server, asked: list[Quiet]) -> None:
    """SIGTERM to a server that drains: what it was asked is answered whole, and nothing is left."""
    assert len(asked) > 4
    bodies = [load_server.body(each.prompt, len(each.answer)) for each in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        replies = [pool.submit(requests.post, f"{server.url}/v1/completions", json=body) for body in bodies]
        # The first may be answered before the last is at work.
        while server.metric("vllm:num_requests_running") < sum(not reply.done() for reply in replies):
            time.sleep(0.01)
        assert not all(reply.done() for reply in replies)
        server.end()
    answers = [load_server.read(reply.result().json()) for reply in replies]
    assert answers == [(each.answer, False) for each in asked]


def test_good_report() -> None:
    """The one that the next test spoils."""
    GOOD.check()


@pytest.mark.parametrize(
    ("report", "text"),
    [
        (replace(GOOD, wrong=["[1] instead of [2] to [3]"]), "1 answers differ from the quiet run"),
        (replace(GOOD, left={"vllm:kv_cache_usage_perc": 0.01}), "still holds"),
        (replace(GOOD, grown_bytes=load_server.GROWTH_BYTES + 1), "has grown by 48 MiB"),
        (replace(GOOD, kinds=Counter({"whole ended": 10})), "no request of kind stream"),
    ],
    ids=["token", "block", "memory", "kind"],
)
def test_bad_report(report: Report, text: str) -> None:
    """What must not pass does not."""
    with pytest.raises(LoadError, match=text):
        report.check()


@pytest.mark.parametrize("got", [[5, 6, 8], [5, 6], [5, 6, 7, 7]])
def test_one_wrong_token(got: list[int]) -> None:
    """Another token, one less or one more is noticed."""
    load = Load(None, [], 0)  # type: ignore[arg-type]
    load.compare([5, 6, 7], Quiet([1], [5, 6, 7]), 3)
    load.compare([5, 6], Quiet([1], [5, 6, 7]), 2)
    assert not load.wrong
    load.compare(got, Quiet([1], [5, 6, 7]), 3)
    assert len(load.wrong) == 1
