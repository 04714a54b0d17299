"""Requests to a server of vLLM or SGLang: what it is, and what it answers."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_mxfp4_gfx950.errors import Mxfp4Error

PATHS = (
    re.compile(r"MoE layers run through (.+?\))[.;]"),
    re.compile(r"Using ('\w+' Mxfp4 MoE backend)"),
    re.compile(r"Using (\w+ Unquantized MoE backend)"),
    re.compile(r"server_args=.*\bmoe_runner_backend'?[=:] ?('\w+')"),
)
"""What the log calls the path: ours, vLLM's for MXFP4, vLLM's for other checkpoints of GPT-OSS, SGLang's."""

ANSWERED = "answered by vLLM or SGLang"

HARMONY_TOKENS = ("<|channel|>", "<|message|>")
"""A token each in harmony's vocabulary, and in none that is not for it."""

KEY_VARIABLE = "OPENAI_API_KEY"

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
        owner: "vllm" or "sglang", as its list of models says.
    """

    url: str
    model: str
    context: int
    path: str
    harmony: bool
    tokenizer: str = ""
    access: Access = Access()
    owner: str = "vllm"


def describe(url: str, log: Path | None, access: Access) -> Server:
    """Ask a server what it is.

    Raises:
        Mxfp4Error: it does not answer as vLLM and SGLang do.
    """
    try:
        served = decoded(url, get(f"{url}/v1/models", access))["data"][0]
        model, context, owner = served["id"], served["max_model_len"], served["owned_by"]
        requests = [{"model": model, "prompt": text, "add_special_tokens": False} for text in HARMONY_TOKENS]
        tokens = [post(f"{url}/tokenize", request, access)["tokens"] for request in requests]
    except (LookupError, TypeError) as error:
        found = f"an answer that lacks a field ({type(error).__name__}: {error})"
        raise Mxfp4Error(url, ANSWERED, found, "Correct the URL") from error
    path = moe_path(log.read_text(errors="replace")) if log else ""
    tokenizer = served.get("root") or model
    # Elsewhere each is cut into several, or both are what stands for unknown words.
    harmony = tokens[0] != tokens[1] and [len(each) for each in tokens] == [1, 1]
    return Server(url, model, context, path, harmony, tokenizer, access, owner)


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
        raise Mxfp4Error(url, ANSWERED, f"no JSON: {body[:100]!r}", "Correct the URL") from error


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
        raise Mxfp4Error(url, ANSWERED, type(error).__name__, "Start the server") from error
    if not response.ok:
        found = f"status {response.status_code}: {response.text[:300]}"
        fix = "Ask the server itself, and read its log"
        if response.status_code == 401:
            fix = f"Set {KEY_VARIABLE} to {'the' if access.key else 'a'} key that the server takes"
        raise Mxfp4Error(url, ANSWERED, found, fix)
    return str(response.text)
