"""GPT-OSS in two servers of SGLang at once on one GPU: through this package, and by SGLang's own kernels.

    python tests/support/serve_in_sglang.py speed --json FILE [--our-path DIRECTORIES]
    python tests/support/serve_in_sglang.py questions --json FILE [--our-path DIRECTORIES]

`speed` writes output tokens a second of GPT-OSS-20B with dummy weights, which are the same in both servers,
in alternating turns. `questions` asks both the 1200 questions of accuracy/model, greedily, and writes which
were answered right. SGLang and this package are installed, or on PYTHONPATH with their dist-info; aiohttp is
SGLang's. Each server's log is beside FILE. Source of the routes: SGLang 0.5.16, as of sglang_server.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import spread_in_sglang
import torch
from spread_in_sglang import DONE

from vllm_mxfp4_gfx950.bench.serve import Load, turns, write_dummy
from vllm_mxfp4_gfx950.evaluation.server import moe_path
from vllm_mxfp4_gfx950.process import ServerProcess, ending_on_sigterm
from vllm_mxfp4_gfx950.settings import SGLANG_VAR

ACCURACY = Path(__file__).parents[2] / "accuracy"
sys.path.append(str(ACCURACY))
import questions  # noqa: E402

MODEL = "gpt-oss-20b"
LOADS: dict[Load, int] = {(1, 128, 128): 8, (16, 128, 128): 128, (64, 128, 128): 256}
"""How many requests each has."""

WARM_UP: Load = (64, 128, 16)
ROUNDS = 2
AT_ONCE = 64
ANSWER_TOKENS = 32
REQUEST_SECONDS = 100
"""That a request may take."""

OURS, THEIRS = ENGINES = ("ours", "SGLang's triton_kernel")
OUR_LINE, THEIR_LINE = "MoE layers run through ", "moe_runner_backend='triton_kernel'"
ARGUMENTS = """
--attention-backend triton --sampling-backend pytorch --grammar-backend none --mem-fraction-static 0.8
--max-total-tokens 65536 --cuda-graph-max-bs-decode 64 --disable-prefill-cuda-graph
--disable-hybrid-swa-memory --max-running-requests 64
"""
"""Of both servers: what needs neither flashinfer nor xgrammar, and leaves memory for the other one."""

DUMMY_ARGUMENTS = ["--load-format", "dummy", "--context-length", "1024"]
SMALL_ARGUMENTS = ["--context-length", "512"]


def install_plugin(folder: Path) -> None:
    """Write spread_in_sglang as a distribution that SGLang finds where the folder is on PYTHONPATH."""
    info = folder / "spread_in_sglang-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: spread-in-sglang\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nspread = spread_in_sglang:register\n")
    shutil.copy(spread_in_sglang.__file__, folder)


def check_log(engine: str, log: str, dummy: bool) -> None:
    """Raise AssertionError where a server's log does not say what was to be measured.

    Args:
        engine: of ENGINES.
        log: its text, once the server answers.
        dummy: whether its weights are.
    """
    assert (OUR_LINE in log) == (engine == OURS), f"{engine}: '{OUR_LINE}' is on the wrong side"
    assert engine == OURS or THEIR_LINE in log, f"{engine}: no '{THEIR_LINE}'"
    assert not dummy or DONE in log, f"{engine}: no '{DONE}'"


@contextmanager
def serving(model: Path, arguments: list[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Both servers, and what is known of them.

    Args:
        model: what they serve; its weights are dummies where `arguments` are DUMMY_ARGUMENTS.
        arguments: more of both.
        args: the command line's.

    Returns:
        By engine, its "url" and "path".
    """
    servers, found = {}, {}
    with tempfile.TemporaryDirectory() as plugin, ending_on_sigterm(), ExitStack() as stack:
        install_plugin(Path(plugin))
        for engine in ENGINES:
            path = [args.our_path if engine == OURS else "", plugin, os.environ.get("PYTHONPATH", "")]
            variables = {SGLANG_VAR: str(int(engine == OURS)), "PYTHONPATH": ":".join(filter(None, path))}
            log = args.json.with_name(f"{args.json.stem}-{'ours' if engine == OURS else 'theirs'}.log")
            command = ["--model-path", str(model), *ARGUMENTS.split(), *arguments]
            server = ServerProcess(command, os.environ | variables, log, "sglang.launch_server")
            servers[engine] = stack.enter_context(server)
        for engine, server in servers.items():
            url = server.wait_until_healthy()
            text = server.log.read_text(errors="replace")
            check_log(engine, text, arguments is DUMMY_ARGUMENTS)
            found[engine] = {"url": url, "path": moe_path(text)}
            print(f"{engine}: {found[engine]['path']}", flush=True)
        yield found


async def generate(url: str, prompts: list[list[int]], at_once: int, **params: Any) -> list[Any]:
    """What a server answers to each of these token ids, greedily."""
    slots = asyncio.Semaphore(at_once)
    timeout, connector = aiohttp.ClientTimeout(REQUEST_SECONDS), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:

        async def ask(prompt: list[int]) -> Any:
            request = {"input_ids": prompt, "sampling_params": {"temperature": 0, **params}}
            async with slots, session.post("/generate", json=request) as response:
                response.raise_for_status()
                return await response.json()

        return await asyncio.gather(*map(ask, prompts))


def tokens_per_s(url: str, load: Load, requests: int, seed: str) -> float:
    """Output tokens a second of a load, with prompts of random tokens."""
    batch, inputs, outputs = load
    chance = random.Random(seed)
    prompts = [[chance.randrange(1000, 190000) for _ in range(inputs)] for _ in range(requests)]
    began = time.perf_counter()
    answers = asyncio.run(generate(url, prompts, batch, max_new_tokens=outputs, ignore_eos=True))
    seconds = time.perf_counter() - began
    assert all(answer["meta_info"]["completion_tokens"] == outputs for answer in answers)
    return requests * outputs / seconds


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Rows in the form of `vllm-mxfp4 bench serve`."""
    rows: dict[tuple[str, Load], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as model:
        write_dummy(MODEL, Path(model))
        with serving(Path(model), DUMMY_ARGUMENTS, args) as found:
            for known in found.values():
                tokens_per_s(known["url"], WARM_UP, 2 * AT_ONCE, "warm-up")
            for engine, routing, load, number in turns([*ENGINES], ["spread"], [*LOADS], ROUNDS, False):
                rate = tokens_per_s(found[engine]["url"], load, LOADS[load], f"{number} {load}")
                print(f"round {number}, {engine}, {load}: {rate:.0f} output tokens/s", flush=True)
                row = {"model": MODEL, "engine": engine, "routing": routing, "path": found[engine]["path"]}
                row |= dict(zip(("batch", "input", "output"), load, strict=True)) | {"tokens_per_s": []}
                rows.setdefault((engine, load), row)["tokens_per_s"].append(rate)
    return {"rows": [*rows.values()]}


def ask(args: argparse.Namespace) -> dict[str, Any]:
    """Whether each engine answered each question of each skill right, in the questions' order."""
    token = {word: i for i, word in enumerate(questions.VOCABULARY)}
    word = dict(enumerate(questions.VOCABULARY))
    params = {"max_new_tokens": ANSWER_TOKENS, "stop_token_ids": [token[questions.END]]}
    right: dict[str, dict[str, list[bool]]] = {engine: {} for engine in ENGINES}
    with serving(ACCURACY / "model", SMALL_ARGUMENTS, args) as found:
        for engine in ENGINES:
            for skill in questions.SKILLS:
                asked = questions.read(skill)
                prompts = [[token[character] for character in each["question"]] for each in asked]
                answers = asyncio.run(generate(found[engine]["url"], prompts, AT_ONCE, **params))
                texts = ["".join(word.get(i, "#") for i in answer["output_ids"]) for answer in answers]
                pairs = zip(texts, asked, strict=True)
                right[engine][skill] = [a.removesuffix(questions.END) == q["answer"] for a, q in pairs]
                print(f"{engine}, {skill}: {sum(right[engine][skill])} of {len(asked)} right", flush=True)
    return {"paths": {engine: known["path"] for engine, known in found.items()}, "right": right}


def main() -> None:
    """Measure, and write it with device and versions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["speed", "questions"])
    parser.add_argument("--json", type=Path, required=True, help="for what was measured")
    help_path = "directories before PYTHONPATH for this package's server, as with another triton_kernels"
    parser.add_argument("--our-path", default="", metavar="DIRECTORIES", help=help_path)
    args = parser.parse_args()
    seen = speed(args) if args.what == "speed" else ask(args)
    versions = {name: version(name) for name in ("sglang", "torch", "triton", "transformers")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    args.json.write_text(json.dumps({"device": device, "versions": versions, **seen}, indent=1) + "\n")


if __name__ == "__main__":
    main()
