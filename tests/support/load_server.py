"""Thousands of requests against `vllm serve` with the flag, some of them cut off, held against a quiet run.

    python tests/support/load_server.py REQUESTS

In float32, so that what a request is batched with changes its logits by rounding only. Prompts whose answer
hangs on so little are left out: those in which, served one after another, a second token comes close.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import engine
import psutil
import requests
import tiny_checkpoint
from tiny_checkpoint import TinyGptOss

from vllm_mxfp4_gfx950.process import ServerProcess

SUPPORT = Path(__file__).parent
MODEL = TinyGptOss()
TWO_RANKS = ("--data-parallel-size", "2", "--worker-extension-cls", "cpu_collectives.Rank")
PROMPTS = 96
LENGTHS = (1, 120)
"""Of the prompts, in tokens: some are shorter than the sliding window of 16, some of several blocks."""

ANSWERS = (1, 24)
"""Tokens that are asked for."""

MARGIN = 1e-3
"""The best token's least lead, in log-probability. Batches change one by about 1e-5."""

AT_ONCE = 64
KINDS = {"whole": 50, "stream": 20, "abort": 10, "timeout": 10, "cancel": 10}
"""How requests go, of a hundred: until their end, streamed until their end, streamed and cut off by closing
the connection, given up by the client after a few milliseconds, and cancelled while they are sent or wait."""

CONTEXT = 4096
"""The longest request, in tokens."""

GROWTH_BYTES = 48 * 2**20
"""Of all of the server's processes, from after a tenth of the requests to their end."""


class LoadError(Exception):
    """Something is not as it must be."""


class LostError(Exception):
    """The server says that it ends an answer early: with an error, or as aborted."""


@dataclass(frozen=True)
class Quiet:
    """A prompt and what a quiet server answers, all in token ids."""

    prompt: list[int]
    answer: list[int]


@dataclass
class Report:
    """What a load did.

    Args:
        kinds: requests, by kind and whether they came to their end.
        tokens: compared with the quiet run.
        wrong: requests with another token.
        seconds: of the load.
        grown_bytes: the server's resident memory after it, less that after a tenth of it.
        left: requests that the server still held, and the share of its KV blocks in use.
    """

    kinds: Counter[str]
    tokens: int
    wrong: list[str]
    seconds: float
    grown_bytes: int
    left: dict[str, float]

    def check(self) -> None:
        """Raise LoadError where something is wrong."""
        if self.wrong:
            raise LoadError(f"{len(self.wrong)} answers differ from the quiet run: {self.wrong[0]}")
        if any(self.left.values()):
            raise LoadError(f"the server still holds {self.left}")
        if self.grown_bytes > GROWTH_BYTES:
            raise LoadError(f"the server has grown by {self.grown_bytes / 2**20:.0f} MiB")
        for kind in KINDS:
            if not self.kinds[f"{kind} ended" if kind in ("whole", "stream") else f"{kind} cut off"]:
                raise LoadError(f"no request of kind {kind}: {dict(self.kinds)}")


class Server(ServerProcess):
    """One of the tiny model through the plugin, with what it holds."""

    def __init__(self, checkpoint: Path, log: Path, *options: str) -> None:
        arguments = ["serve", str(checkpoint), "--quantization", engine.FLAG, "--dtype", "float32"]
        arguments += ["--enforce-eager", "--max-model-len", str(CONTEXT)]
        arguments += ["--kv-cache-memory-bytes", str(2**26)]
        environment = {
            **os.environ,
            **engine.ENVIRONMENT,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            # oneDNN keeps code for the last 1024 sizes of batches, hundreds of megabytes, which hides a leak.
            "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8",
            # For cpu_collectives.
            "PYTHONPATH": os.pathsep.join(filter(None, (str(SUPPORT), os.environ.get("PYTHONPATH")))),
        }
        super().__init__([*arguments, *options], environment, log)

    def resident_bytes(self) -> int:
        """Memory of all of its processes."""
        return sum(psutil.Process(process).memory_info().rss for process in self.processes())

    def metric(self, name: str) -> float:
        """A gauge of /metrics, of all ranks together."""
        lines = requests.get(f"{self.url}/metrics").text.splitlines()
        ranks = [float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{")]
        assert ranks
        return sum(ranks)

    def held(self) -> dict[str, float]:
        """Requests that it has and the share of its KV blocks in use, when all is free or nothing changes."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        found, unchanged = {}, 0
        while True:
            before, found = found, {name: self.metric(name) for name in names}
            unchanged = unchanged + 1 if found == before else 0
            if not any(found.values()) or unchanged == 60:
                return found
            time.sleep(0.5)

    def wait_until_gone(self) -> None:
        """Wait for all of its processes to end."""
        while self.processes():
            time.sleep(0.1)

    def end(self) -> None:
        """SIGTERM: it ends with 0 and leaves nothing.

        Raises:
            LoadError: it does not.
        """
        left = self.stop(signal.SIGTERM, math.inf)
        if left or self.main.returncode:
            tail = "\n".join(self.log.read_text().splitlines()[-25:])
            raise LoadError(f"the server ended with {self.main.returncode} and left {left}: {tail}")


@contextmanager
def serving(checkpoint: Path, log: Path, *options: str) -> Iterator[Server]:
    """A server that is ready; whatever of it is left at the end is killed."""
    with Server(checkpoint, log, *options) as server:
        server.wait_until_healthy()
        yield server
        server.stop(seconds=0)


def body(prompt: list[int], tokens: int, **more: Any) -> dict[str, Any]:
    """A greedy completion of /v1/completions, in token ids."""
    greedy = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {"prompt": prompt, "max_tokens": tokens, **greedy, **more}


def read(reply: dict[str, Any]) -> tuple[list[int], bool]:
    """The tokens of an answer or of a part of one, and whether the server aborts it.

    Raises:
        LostError: it is an error.
    """
    if "error" in reply:
        raise LostError(reply["error"]["message"])
    (choice,) = reply["choices"]
    return choice["token_ids"] or [], choice["finish_reason"] == "abort"


def ask_quietly(server: Server, prompts: int = PROMPTS, answers: tuple[int, int] = ANSWERS) -> list[Quiet]:
    """One prompt after another; those whose answer hangs on rounding are left out."""
    generator = random.Random(0)
    found = []
    for _ in range(prompts):
        prompt = [generator.randrange(2, MODEL.vocab) for _ in range(generator.randint(*LENGTHS))]
        tokens = generator.randint(*answers)
        reply = requests.post(f"{server.url}/v1/completions", json=body(prompt, tokens, logprobs=2))
        reply.raise_for_status()
        (choice,) = reply.json()["choices"]
        leads = [max(step.values()) - min(step.values()) for step in choice["logprobs"]["top_logprobs"]]
        if min(leads) > MARGIN:
            found.append(Quiet(prompt, choice["token_ids"]))
    return found


class Load:
    """Requests at once, and what came of them."""

    def __init__(self, server: Server, quiet: list[Quiet], requests: int) -> None:
        self.server, self.quiet, self.requests = server, quiet, requests
        self.generator = random.Random(1)
        self.kinds: Counter[str] = Counter()
        self.tokens, self.resident_bytes = 0, 0
        self.wrong: list[str] = []

    async def run(self) -> Report:
        """All of them, and what the server holds after them."""
        began = time.monotonic()
        await self.send()
        seconds = time.monotonic() - began
        left = self.server.held()
        grown = self.server.resident_bytes() - self.resident_bytes
        return Report(self.kinds, self.tokens, self.wrong, seconds, grown, left)

    async def send(self) -> None:
        """AT_ONCE at a time."""
        todo = iter(range(self.requests))
        timeout = aiohttp.ClientTimeout(total=120)
        # A connection that is kept may be closed by the server just as the next request is sent on it.
        connector = aiohttp.TCPConnector(limit=2 * AT_ONCE, force_close=True)
        async with aiohttp.ClientSession(self.server.url, timeout=timeout, connector=connector) as session:

            async def work() -> None:
                for number in todo:
                    if number == self.requests // 10:
                        self.resident_bytes = self.server.resident_bytes()
                    await self.request(session)

            await asyncio.gather(*(work() for _ in range(AT_ONCE)))

    async def request(self, session: aiohttp.ClientSession) -> None:
        """One of some kind."""
        (kind,) = self.generator.choices(list(KINDS), KINDS.values())
        expected = self.generator.choice(self.quiet)
        patience = self.generator.uniform(0, 0.3)
        if kind == "cancel":
            task = asyncio.create_task(self.whole(session, expected))
            await asyncio.sleep(patience)
            task.cancel()
            ended = (await asyncio.gather(task, return_exceptions=True))[0] is True
        elif kind == "timeout":
            try:
                ended = await self.whole(
                    session, expected, timeout=aiohttp.ClientTimeout(total=patience + 1e-3)
                )
            except TimeoutError:
                ended = False
        elif kind == "whole":
            ended = await self.whole(session, expected)
        else:
            most = self.generator.randrange(len(expected.answer)) if kind == "abort" else len(expected.answer)
            ended = await self.stream(session, expected, most)
        self.kinds[f"{kind} {'ended' if ended else 'cut off'}"] += 1

    async def whole(self, session: aiohttp.ClientSession, expected: Quiet, **options: Any) -> bool:
        """Wait for an answer."""
        json_body = body(expected.prompt, len(expected.answer))
        async with session.post("/v1/completions", json=json_body, **options) as reply:
            reply.raise_for_status()
            got, aborted = read(await reply.json())
        self.compare(got, expected, len(got) if aborted else len(expected.answer))
        if aborted:
            raise LostError
        return True

    async def stream(self, session: aiohttp.ClientSession, expected: Quiet, most: int) -> bool:
        """Read an answer token by token, and close the connection when there are so many."""
        json_body = body(expected.prompt, len(expected.answer), stream=True)
        got: list[int] = []
        aborted = False
        async with session.post("/v1/completions", json=json_body) as reply:
            reply.raise_for_status()
            async for line in reply.content:
                event = line.decode().strip().removeprefix("data: ")
                if event == "[DONE]" or len(got) > most:
                    break
                if event:
                    tokens, aborted = read(json.loads(event))
                    got += tokens
            ended = event == "[DONE]"
            if not ended:
                reply.close()
        self.compare(got, expected, len(expected.answer) if ended and not aborted else len(got))
        if aborted:
            raise LostError
        return ended

    def compare(self, got: list[int], expected: Quiet, tokens: int) -> None:
        """Token by token with the quiet run."""
        self.tokens += len(got)
        if got != expected.answer[:tokens]:
            self.wrong.append(f"{got} instead of {expected.answer[:tokens]} to {expected.prompt}")


def ask(server: Server, requests: int, quiet: list[Quiet] | None = None) -> Report:
    """Ask a server of MODEL all at once, what it or another one was asked quietly before."""
    quiet = quiet or ask_quietly(server)
    report = asyncio.run(Load(server, quiet, requests).run())
    print(
        f"{requests} requests in {report.seconds:.0f} s over {len(quiet)} of {PROMPTS} prompts: "
        f"{', '.join(f'{count} {kind}' for kind, count in sorted(report.kinds.items()))}; "
        f"{report.tokens} tokens compared, {len(report.wrong)} answers wrong; "
        f"the server grew by {report.grown_bytes / 2**20:.1f} MiB and holds {report.left}"
    )
    return report


def measure(directory: Path, requests: int) -> Report:
    """Write the tiny model, serve it, ask it, and stop it."""
    checkpoint = tiny_checkpoint.write(MODEL, directory / "checkpoint")
    with serving(checkpoint, directory / "log") as server:
        report = ask(server, requests)
        server.end()
    return report


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        measure(Path(directory), int(sys.argv[1])).check()
