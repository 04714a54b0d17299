"""What is measured: a server that runs, one that is started here, or a result that was kept."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

from vllm_mxfp4_gfx950 import settings
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.evaluation.server import KEY_VARIABLE, Access, Server, describe, get
from vllm_mxfp4_gfx950.process import VLLM, ServerProcess, ending_on_sigterm

RESULT = "result.json"
"""In the directory of a side that was measured whole."""

ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
HOST_VARIABLES = ("VLLM_", "SGLANG_", "AITER_")
"""How the variables begin that decide what a server runs."""

SECRETS = ("KEY", "TOKEN")
"""How the names of variables end whose values are not to be shown."""

LEVEL_VARIABLE = "VLLM_LOGGING_LEVEL"
LEVELS = ("TRACE", "DEBUG", "INFO")
"""Of a log that names the path."""

PROGRAMS = {"vllm": (VLLM, "serve"), "sglang": ("sglang.launch_server", "--model-path")}
"""The main program of each framework's server, and what stands before the model."""

UNANSWERED = ("--uds", "--headless")
"""Options with which a server does not listen where it is asked."""


@dataclass(frozen=True)
class Side:
    """One of the two.

    Args:
        text: as the user wrote it, without keys.
        url: of a server that runs; empty otherwise.
        log: the file that this server writes its log to, if it was named.
        kept: the directory of a result; None otherwise.
        environment: variables for a server that is started here.
        framework: of that server, a key of PROGRAMS.
        command: its model, and its further arguments of `vllm serve` or of `sglang.launch_server`.
    """

    text: str
    url: str = ""
    log: Path | None = None
    kept: Path | None = None
    environment: tuple[tuple[str, str], ...] = ()
    framework: str = "vllm"
    command: tuple[str, ...] = ()


def parse(text: str) -> Side:
    """Read a side as it stands on the command line.

    Raises:
        Mxfp4Error: it is none of the three.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise Mxfp4Error("a side", "quoted as for a shell", repr(text), f"{error}: correct it") from error
    if words and re.match(r"https?://", words[0]) and len(words) <= 2:
        return Side(text, url=words[0].rstrip("/"), log=Path(words[1]) if words[1:] else None)
    if len(words) == 1 and Path(words[0], RESULT).is_file():
        return Side(text, kept=Path(words[0]))
    assigned = 0
    while assigned < len(words) and ASSIGNMENT.fullmatch(words[assigned]):
        assigned += 1
    environment = tuple((n, v) for n, _, v in (word.partition("=") for word in words[:assigned]))
    framework, command = "vllm", tuple(words[assigned:])
    if command[:1] == ("sglang",):
        framework, command = "sglang", command[1:]
    if not command or command[0].startswith(("-", "http:", "https:")):
        rule = "a URL with or without its log file, the directory of a result, or a model with arguments"
        raise Mxfp4Error("a side", rule, repr(text), "Write '[NAME=VALUE ...] [sglang] MODEL [...]'")
    secrets = [value for name, value in environment if name.endswith(SECRETS)]
    secrets += option(command, "--api-key")
    if secrets:
        ends = "|".join(map(re.escape, secrets))
        text = shlex.join("***" if w in secrets else re.sub(rf"=({ends})$", "=***", w) for w in words)
    return Side(text, environment=environment, framework=framework, command=command)


def option(command: Sequence[str], name: str) -> list[str]:
    """The values of a server's option; `vllm serve` takes `_` for `-` and the last of several."""
    found: list[str] = []
    for index, word in enumerate(command):
        written, equals, value = word.partition("=")
        if written.replace("_", "-") == name:
            following = itertools.takewhile(lambda word: not word.startswith("-"), command[index + 1 :])
            found = [value] if equals else list(following)
    return found


def key_of(side: Side) -> str:
    """What a side's server demands: as it was told when it is started here, else the user's own."""
    environment: Mapping[str, str] = os.environ | dict(side.environment)
    told = [*option(side.command, "--api-key"), environment.get("VLLM_API_KEY", "")] if side.command else []
    return next(filter(None, told), os.environ.get(KEY_VARIABLE, ""))


def identity(side: Side) -> dict[str, Any]:
    """All that decides what a side answers, as far as it can be seen: equal means that a result still holds.

    Raises:
        Mxfp4Error: it is a URL whose log is missing, or a variable of this package has a value that it
            refuses.
    """
    if side.log and not side.log.is_file():
        raise Mxfp4Error(f"the log of {side.url}", "a file that exists", side.log, "Correct it")
    if side.url:
        since = str(time.time())
        # A server that does not say since when it runs, as SGLang does by itself, may be another one at the
        # next look; one that does not answer at all is refused when it is asked what it is.
        with suppress(Mxfp4Error):
            metrics = get(f"{side.url}/metrics", Access(key_of(side)))
            found = re.search(r"^process_start_time_seconds (\S+)$", metrics, re.MULTILINE)
            since = found[1] if found else since
        return {"url": side.url, "since": since, "log": str(side.log)}
    inherited = {name: value for name, value in os.environ.items() if name.startswith(HOST_VARIABLES)}
    environment = inherited | dict(side.environment)
    tables = settings.from_environment(environment).tables
    model = Path(side.command[0])
    package = sorted(f for f in Path(__file__).parents[1].rglob("*") if f.suffix in (".py", ".json"))
    return {
        "command": [side.framework, *side.command],
        "environment": environment,
        "tables": [(f.name, digest(f.read_bytes())) for f in sorted(tables.glob("*.json"))] if tables else [],
        "version": metadata.version(side.framework) if util.find_spec(side.framework) else "",
        "checkpoint": [(f.name, f.stat().st_size, f.stat().st_mtime) for f in sorted(model.glob("*"))],
        "package": digest(*(f.read_bytes() for f in package)),
    }


def digest(*contents: bytes) -> str:
    """One hash of several contents."""
    return hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()


@contextmanager
def serving(side: Side, directory: Path, more: list[str]) -> Iterator[Server]:
    """The side's server, which is started and stopped here if it is not a URL.

    Args:
        side: not a kept one.
        directory: gets the log of a server that is started.
        more: arguments of `vllm serve` for one that is started.

    Raises:
        Mxfp4Error: the server did not start or does not answer as its framework does, or a proxy stands
            before it.
    """
    if side.url:
        yield describe(side.url, side.log, Access(key_of(side)))
        return
    for name in UNANSWERED:
        if any(word.partition("=")[0] == name for word in side.command):
            raise Mxfp4Error(
                f"{name} of a side", "left out", side.text, "Start that server, and name its URL"
            )
    if option(side.command, "--ssl-cert-reqs") == ["2"]:
        fix = "Leave it out: no certificate of a client is sent"
        raise Mxfp4Error("--ssl-cert-reqs of a side", "0 or 1", 2, fix)
    log = directory / "server.log"
    environment = os.environ | dict(side.environment)
    if environment.get(LEVEL_VARIABLE, "INFO").upper() not in LEVELS:
        print(f"{LEVEL_VARIABLE}=INFO for this server: a quieter log does not name the path", flush=True)
        environment[LEVEL_VARIABLE] = "INFO"
    print(f"starting {side.text}: {log}", flush=True)
    program, before_model = PROGRAMS[side.framework]
    arguments = [before_model, *side.command, *(more if side.framework == "vllm" else ())]
    began = time.monotonic()
    with ending_on_sigterm(), ServerProcess(arguments, environment, log, program) as process:
        roots = [root.rstrip("/") for root in dict.fromkeys(("", *option(side.command, "--root-path")))]
        urls = [f"{scheme}://{process.place}{root}" for root in roots for scheme in ("http", "https")]
        url = process.wait_until_healthy(urls)
        server = describe(url, log, Access(key_of(side), verify=False))
        seconds = time.monotonic() - began
        print(f"serving after {seconds:.0f} s; MoE path: {server.path or 'not in the log'}", flush=True)
        yield server
