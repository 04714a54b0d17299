"""What is measured: a server that runs, one that is started here, or a result that was kept."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from types import FrameType
from typing import Any

from vllm_mxfp4_gfx950 import settings
from vllm_mxfp4_gfx950.errors import Mxfp4Error, first_error

RESULT = "result.json"
"""In the directory of a side that was measured whole."""

ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
HOST_VARIABLES = ("VLLM_", "AITER_")
"""How the variables begin that decide what a server runs."""

PATHS = (
    re.compile(r"MoE layers run through (.+?\))[.;]"),
    re.compile(r"Using ('\w+' Mxfp4 MoE backend)"),
    re.compile(r"Using (\w+ Unquantized MoE backend)"),
)
"""What the log calls the path: ours, vLLM's for MXFP4, vLLM's for other checkpoints of GPT-OSS."""

HARMONY_TOKEN = "<|channel|>"
"""One token in harmony's vocabulary, and in none that is not for it."""

KEY_VARIABLE = "OPENAI_API_KEY"
SECRETS = ("KEY", "TOKEN")
"""How the names of variables end whose values are not to be shown."""

LEVEL_VARIABLE = "VLLM_LOGGING_LEVEL"
LEVELS = ("TRACE", "DEBUG", "INFO")
"""Of a log that names the path."""

UNANSWERED = ("--uds", "--headless")
"""Options with which a server does not listen where it is asked."""

STOP_SECONDS = 30
SECONDS = 600
"""That one request may take."""


@dataclass(frozen=True)
class Access:
    """How a server is asked.

    Args:
        key: that it demands; "" for none.
        verify: whether its certificate has to be good; not of a server that was started here.
    """

    key: str = ""
    verify: bool = True

    def headers(self) -> dict[str, str]:
        """Of a request."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


@dataclass(frozen=True)
class Side:
    """One of the two.

    Args:
        text: as the user wrote it, without keys.
        url: of a server that runs; empty otherwise.
        log: the file that this server writes its log to, if it was named.
        kept: the directory of a result; None otherwise.
        environment: variables for a server that is started here.
        command: its model, and its further arguments of `vllm serve`.
    """

    text: str
    url: str = ""
    log: Path | None = None
    kept: Path | None = None
    environment: tuple[tuple[str, str], ...] = ()
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
    command = tuple(words[assigned:])
    if not command or command[0].startswith(("-", "http:", "https:")):
        rule = "a URL with or without its log file, the directory of a result, or a model with arguments"
        raise Mxfp4Error("a side", rule, repr(text), "Write '[NAME=VALUE ...] MODEL [of vllm serve ...]'")
    secrets = [value for name, value in environment if name.endswith(SECRETS)]
    secrets += option(command, "--api-key")
    if secrets:
        text = shlex.join(
            "***" if w in secrets else re.sub(rf"=({_any(secrets)})$", "=***", w) for w in words
        )
    return Side(text, environment=environment, command=command)


def _any(values: list[str]) -> str:
    return "|".join(map(re.escape, values))


def option(command: Sequence[str], name: str) -> list[str]:
    """The values of an option of `vllm serve`, which takes `_` for `-` and the last of several."""
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
        Mxfp4Error: it is a URL where no server answers or whose log is missing, or a variable of this package
            has a value that it refuses.
    """
    if side.log and not side.log.is_file():
        raise Mxfp4Error(f"the log of {side.url}", "a file that exists", side.log, "Correct it")
    if side.url:
        found = re.search(
            r"^process_start_time_seconds (\S+)$",
            get(f"{side.url}/metrics", Access(key_of(side))),
            re.MULTILINE,
        )
        # A server that does not say since when it runs may be another one at the next look.
        since = found[1] if found else str(time.time())
        return {"url": side.url, "since": since, "log": str(side.log)}
    inherited = {name: value for name, value in os.environ.items() if name.startswith(HOST_VARIABLES)}
    environment = inherited | dict(side.environment)
    tables = settings.from_environment(environment).tables
    model = Path(side.command[0])
    package = sorted(f for f in Path(__file__).parents[1].rglob("*") if f.suffix in (".py", ".json"))
    return {
        "command": side.command,
        "environment": environment,
        "tables": [(f.name, digest(f.read_bytes())) for f in sorted(tables.glob("*.json"))] if tables else [],
        "vllm": metadata.version("vllm") if util.find_spec("vllm") else "",
        "checkpoint": [(f.name, f.stat().st_size, f.stat().st_mtime) for f in sorted(model.glob("*"))],
        "package": digest(*(f.read_bytes() for f in package)),
    }


def digest(*contents: bytes) -> str:
    """One hash of several contents."""
    return hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Args:
        url: without "/v1".
        model: its name there.
        context: tokens that a request may have.
        path: what its log says computes the experts; empty where there is no log, or no such line.
        harmony: whether its tokenizer has harmony's special tokens.
        tokenizer: the checkpoint that it loaded, which has one.
        access: how it is asked.
    """

    url: str
    model: str
    context: int
    path: str
    harmony: bool
    tokenizer: str = ""
    access: Access = Access()


@contextmanager
def serving(side: Side, directory: Path, more: list[str]) -> Iterator[Server]:
    """The side's server, which is started and stopped here if it is not a URL.

    Args:
        side: not a kept one.
        directory: gets the log of a server that is started.
        more: arguments of `vllm serve` for one that is started.

    Raises:
        Mxfp4Error: the server did not start or does not answer as vLLM does, or a proxy stands before it.
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
    from requests.utils import get_environ_proxies, select_proxy

    port, log = free_port(), directory / "server.log"
    place = f"127.0.0.1:{port}"
    url = f"http://{place}"
    if select_proxy(url, get_environ_proxies(url)):
        listed = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "nothing"
        raise Mxfp4Error("no_proxy", "a list with 127.0.0.1, where there is a proxy", listed, "Add it")
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *side.command, *more]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | dict(side.environment)
    if environment.get(LEVEL_VARIABLE, "INFO").upper() not in LEVELS:
        print(f"{LEVEL_VARIABLE}=INFO for this server: a quieter log does not name the path", flush=True)
        environment[LEVEL_VARIABLE] = "INFO"
    print(f"starting {side.text}: {log}", flush=True)
    began = time.monotonic()
    # By default this would end this process alone.
    before = signal.signal(signal.SIGTERM, leave)
    with log.open("w") as output:
        # A session of its own, so that all of its processes can be ended.
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        roots = dict.fromkeys(("", *option(side.command, "--root-path")))
        urls = [f"{scheme}://{place}{root.rstrip('/')}" for root in roots for scheme in ("http", "https")]
        url = wait_until_healthy(process, urls, log)
        server = describe(url, log, Access(key_of(side), verify=False))
        seconds = time.monotonic() - began
        print(f"serving after {seconds:.0f} s; MoE path: {server.path or 'not in the log'}", flush=True)
        yield server
    finally:
        stop(process)
        signal.signal(signal.SIGTERM, before)


def leave(number: int, _: FrameType | None) -> None:
    """Handle a signal as the request to end, with the exit code that a shell gives it."""
    raise SystemExit(128 + number)


def wait_until_healthy(process: subprocess.Popen[bytes], urls: list[str], log: Path) -> str:
    """Wait for as long as the server is starting; vLLM itself limits that.

    Args:
        process: the server.
        urls: where it may answer; the one that does is returned.
        log: that it writes.

    Raises:
        Mxfp4Error: it ended. The reason is the first error of its log, as its last words are of another one
            of its processes, which only met the end of the first.
    """
    import requests

    while process.poll() is None:
        for url in urls:
            with suppress(requests.RequestException), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Of a certificate that is not looked at.
                if requests.get(f"{url}/health", timeout=5, verify=False).ok:
                    return url
        time.sleep(0.5)
    text = log.read_text(errors="replace")
    found, fix = f"exit code {process.returncode}", f"Read {log}"
    first = first_error(text)
    if first:
        found += f" after: {first.rstrip('.')}"
    else:
        print("\n".join(text.splitlines()[-25:]), file=sys.stderr)
        fix += ", which ends as above"
    raise Mxfp4Error("the server", "able to start", found, fix)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Let a server shut down, and end what is left of it."""
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
    finally:  # A second signal to this process must not spare it, either.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def describe(url: str, log: Path | None, access: Access) -> Server:
    """Ask a server what it is.

    Raises:
        Mxfp4Error: it does not answer as vLLM does.
    """
    try:
        served = decoded(url, get(f"{url}/v1/models", access))["data"][0]
        model, context = served["id"], served["max_model_len"]
        request = {"model": model, "prompt": HARMONY_TOKEN}
        request |= {"add_special_tokens": False, "return_token_strs": True}
        strings = post(f"{url}/tokenize", request, access)["token_strs"]
    except (LookupError, TypeError) as error:
        found = f"an answer that lacks a field ({type(error).__name__}: {error})"
        raise Mxfp4Error(url, "answered by vLLM", found, "Correct the URL") from error
    path = moe_path(log.read_text(errors="replace")) if log else ""
    tokenizer = served.get("root") or model
    return Server(url, model, context, path, strings == [HARMONY_TOKEN], tokenizer, access)


def moe_path(log: str) -> str:
    """What computes the experts, by the last line of a log that says so; a fallback logs a second one."""
    found = [(match.start(), match[1]) for path in PATHS for match in path.finditer(log)]
    return max(found)[1] if found else ""


def get(url: str, access: Access = Access()) -> str:
    """The body of an answer.

    Raises:
        Mxfp4Error: there was none, or it was an error.
    """
    return answer("GET", url, None, access)


def post(url: str, request: dict[str, Any], access: Access) -> Any:
    """The parsed answer to a request in JSON.

    Raises:
        Mxfp4Error: there was none, or it was an error, or no JSON.
    """
    return decoded(url, answer("POST", url, request, access))


def decoded(url: str, body: str) -> Any:
    """The JSON that a server answered."""
    try:
        return json.loads(body)
    except ValueError as error:
        raise Mxfp4Error(url, "answered by vLLM", f"no JSON: {body[:100]!r}", "Correct the URL") from error


def answer(method: str, url: str, request: dict[str, Any] | None, access: Access) -> str:
    """What a server answers to one request."""
    import requests

    try:
        with warnings.catch_warnings():
            if not access.verify:
                warnings.simplefilter("ignore")
            response = requests.request(
                method, url, json=request, timeout=SECONDS, headers=access.headers(), verify=access.verify
            )
    except requests.RequestException as error:
        raise Mxfp4Error(url, "answered by vLLM", type(error).__name__, "Start the server") from error
    if not response.ok:
        found = f"status {response.status_code}: {response.text[:300]}"
        fix = "Ask vLLM itself, and read its log"
        if response.status_code == 401:
            fix = f"Set {KEY_VARIABLE} to {'the' if access.key else 'a'} key that the server takes"
        raise Mxfp4Error(url, "answered by vLLM", found, fix)
    return str(response.text)
