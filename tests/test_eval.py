"""`vllm-mxfp4 eval`: its statistics against known values, its refusals, and real servers compared."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import engine  # noqa: F401  # It makes demo/ importable.
import numpy as np
import psutil
import pytest
import sglang_server
import tiny_checkpoint
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from run_python import run_python
from safetensors.torch import load_file, save_file
from test_cli import WITHOUT_TORCH
from tiny_checkpoint import TinyGptOss
from tokenizers import Tokenizer

from vllm_mxfp4_gfx950 import cli
from vllm_mxfp4_gfx950.commands.eval import Measured
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.evaluation import measure
from vllm_mxfp4_gfx950.evaluation.compare import LEVEL, MANY, Position, divergence, interval, kl, paired
from vllm_mxfp4_gfx950.evaluation.measure import Question, Tasks, ask, choose_endpoint
from vllm_mxfp4_gfx950.evaluation.report import decision_lines
from vllm_mxfp4_gfx950.evaluation.server import (
    HARMONY_TOKENS,
    Server,
    get,
    moe_path,
)
from vllm_mxfp4_gfx950.evaluation.side import (
    RESULT,
    identity,
    key_of,
    parse,
    serving,
)
from vllm_mxfp4_gfx950.process import TIED, ServerProcess, did_not_start


def outcomes(both: int, lost: int, won: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Whether the tested and the baseline answered right, for so many questions of each kind."""
    tested = [True] * both + [False] * lost + [True] * won + [False] * neither
    baseline = [True] * both + [True] * lost + [False] * won + [False] * neither
    return tested, baseline


def test_paired_equals_published() -> None:
    """Complete response before and after therapy, Cavo et al. 2012: 59, 6, 16 and 80 patients.

    Source: Fagerland, Lydersen, Laake, Statistical Analysis of Contingency Tables (2017), chapter 8; the
    numbers as printed by the authors' R package contingencytables: difference -0.0621, 95% interval by
    Bonett and Price -0.1195 to -0.0032.
    """
    found = paired(*outcomes(both=59, lost=16, won=6, neither=80))
    assert (found.questions, found.tested, found.baseline) == (161, 65, 75)
    assert (found.tested - found.baseline) / found.questions == pytest.approx(-0.0621, abs=5e-5)
    assert (found.low, found.high) == pytest.approx((-0.1195, -0.0032), abs=5e-5)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (0, 5), (16, 6), (6, 16), (30, 30), (80, 40)])
def test_mcnemar_is_the_binomial_test(lost: int, won: int) -> None:
    """The p-value is twice the tail of a fair coin, at most 1."""
    tail = sum(math.comb(lost + won, k) for k in range(min(lost, won) + 1)) / 2 ** (lost + won)
    found = paired(*outcomes(both=50, lost=lost, won=won, neither=20))
    assert (found.lost, found.won) == (lost, won)
    assert found.p == pytest.approx(min(1, 2 * tail))


@pytest.mark.parametrize("lost", [0.0, 0.02, 0.1])
def test_interval_covers(lost: float) -> None:
    """In 1000 samples of 200 questions at least 94% of the intervals hold the true difference."""
    chances = np.array([0.8 - lost, lost, 0.03, 0.17])
    rng = np.random.default_rng(0)
    covered = 0
    for counts in rng.multinomial(200, chances, size=1000).tolist():
        found = paired(*outcomes(*counts))
        covered += found.low <= 0.03 - lost <= found.high
    assert covered >= 940


@pytest.mark.parametrize(
    ("counts", "margin", "verdict"),
    [
        pytest.param((1000, 0, 0, 200), 0.02, "as accurate", id="identical"),
        pytest.param((1000, 30, 28, 200), 0.02, "as accurate", id="as-good"),
        pytest.param((1000, 10, 60, 200), 0.02, "as accurate", id="better"),
        pytest.param((900, 120, 20, 200), 0.02, "regression", id="planted"),
        pytest.param((900, 120, 20, 200), 0.2, "as accurate", id="planted-within-margin"),
        pytest.param((1000, 45, 20, 200), 0.0, "regression", id="slight-and-no-margin"),
        pytest.param((1000, 45, 20, 200), 0.02, "worse, perhaps within the margin", id="slight"),
        pytest.param((1000, 45, 20, 200), 0.04, "as accurate", id="slight-within-margin"),
        pytest.param((1000, 0, 0, 200), 0.0, "undecided", id="identical-and-no-margin"),
        pytest.param((40, 0, 0, 10), 0.02, "undecided", id="identical-but-few"),
        pytest.param((40, 3, 0, 10), 0.02, "undecided", id="chance"),
        pytest.param((20, 15, 0, 10), 0.02, "regression", id="broken-and-few"),
    ],
)
def test_verdict(counts: tuple[int, int, int, int], margin: float, verdict: str) -> None:
    """A regression is beyond the margin with the whole interval."""
    assert paired(*outcomes(*counts)).verdict(margin) == verdict


@pytest.mark.parametrize(
    ("counts", "margin", "needed"),
    [
        # None changed: 1.96 sqrt(2) / n is below 0.02 from n = 139 on, which is 137 questions and 2.
        pytest.param((40, 0, 0, 10), 0.02, 137, id="identical"),
        # 1.96^2 (0.042 - 0.002^2) / (-0.002 + 0.01)^2
        pytest.param((7000, 220, 200, 2580), 0.002, MANY, id="at-the-margin"),
        pytest.param((700, 22, 20, 258), 0.01, 2521, id="towards-as-accurate"),
        # 1.96^2 (0.06 - 0.02^2) / (-0.02 + 0.01)^2
        pytest.param((700, 40, 20, 240), 0.01, 2290, id="towards-a-regression"),
        pytest.param((1000, 0, 0, 200), 0.02, 1200, id="decided"),
    ],
)
def test_decided_by(counts: tuple[int, int, int, int], margin: float, needed: int) -> None:
    """By hand, without the interval's adjustment; and a line for what is not decided."""
    found = paired(*outcomes(*counts))
    assert found.decided_by(margin) == pytest.approx(needed, rel=0.02)
    lines = decision_lines({"copy": found}, margin)
    assert bool(lines) == (found.verdict(margin) not in ("regression", "as accurate"))
    if lines:
        number = f"more than {MANY}" if needed == MANY else f"about {found.decided_by(margin)}"
        assert lines == [f"- copy: {number} questions would decide, with such shares lost and won"]


@pytest.mark.parametrize("margin", [0.01, 0.04])
def test_so_many_decide(margin: float) -> None:
    """Of 1000 comparisons about half; with a quarter of the questions few, with four times as many all."""
    needed = paired(*outcomes(both=350, lost=20, won=10, neither=120)).decided_by(margin)
    rng = np.random.default_rng(0)
    decided = []
    for questions in (needed // 4, needed, 4 * needed):
        samples = rng.multinomial(questions, [0.7, 0.04, 0.02, 0.24], size=1000)[:, 1:3].tolist()
        intervals = [interval(questions, lost, won, LEVEL) for lost, won in samples]
        decided.append(sum(high < -margin or low >= -margin for low, high in intervals))
    assert decided[0] < 250
    assert 400 < decided[1] < 600
    assert decided[2] > 950


def top(logprobs: np.ndarray, count: int) -> dict[int, float]:
    """What a server reports of a distribution: its likeliest tokens, the likeliest first."""
    return {int(token): float(logprobs[token]) for token in np.argsort(-logprobs, kind="stable")[:count]}


def random_logprobs(seed: int, vocab: int = 500) -> np.ndarray:
    """A distribution over a vocabulary."""
    logits = 3 * np.random.default_rng(seed).standard_normal(vocab)
    return logits - np.log(np.exp(logits).sum())


def test_kl_of_whole_distributions() -> None:
    """It is the sum that defines it, and zero between equals."""
    p, q = random_logprobs(0), random_logprobs(1)
    assert kl(top(p, 500), top(q, 500)) == pytest.approx(float((np.exp(p) * (p - q)).sum()), rel=1e-4)
    assert kl(top(p, 500), top(p, 500)) == 0


@pytest.mark.parametrize("count", [1, 5, 20, 100, 400])
def test_kl_of_truncated_distributions(count: int) -> None:
    """Never more than over the whole vocabulary, however little both report."""
    for seed in range(50):
        p = random_logprobs(seed)
        q = random_logprobs(seed + 1000) if seed % 2 else p + 0.1 * random_logprobs(seed + 1000)
        q -= np.log(np.exp(q).sum())
        whole = float((np.exp(p) * (p - q)).sum())
        assert 0 <= kl(top(p, count), top(q, count)) <= whole + 1e-9


def test_kl_of_distributions_with_nothing_in_common() -> None:
    """Two sides that report no token in common are far apart, not equal."""
    tokens = np.arange(500)
    p, q = -0.5 * tokens, -0.5 * tokens[::-1]
    p, q = p - np.log(np.exp(p).sum()), q - np.log(np.exp(q).sum())
    assert set(top(p, 20)).isdisjoint(top(q, 20))
    assert kl(top(p, 20), top(q, 20)) > 5


def test_nan_is_not_near() -> None:
    """A side that computes NaN has no small divergence."""
    sound = Position(3, "c", -0.1, {3: -0.1, 4: -3.0}, "c")
    broken = Position(3, "", math.nan, {3: math.nan}, "")
    found, kls = divergence([sound, broken], [sound, sound])
    assert kls[0] == 0
    assert math.isnan(found.mean_kl)
    assert found.worst == 1


OURS = "INFO [vllm_plugin.py:154] MoE layers run through "
LOGS = {
    "ours": (
        f"{OURS}triton_ogs on gfx950 (triton_kernels in /x/y (a), triton 3.6.0). Each is E=128 topk=4.",
        "triton_ogs on gfx950 (triton_kernels in /x/y (a), triton 3.6.0)",
    ),
    "fallback": (
        f"{OURS}triton_ogs on sm90 (triton 3.6.0). Each is E=8.\n"
        f"{OURS}ck on gfx950 (aiter 0.1); not triton_ogs: 3 rows (of 64) are off.",
        "ck on gfx950 (aiter 0.1)",
    ),
    "built-in": ("INFO [mxfp4.py:5] Using 'TRITON' Mxfp4 MoE backend.", "'TRITON' Mxfp4 MoE backend"),
    "unquantized": (
        "INFO Using TRITON Unquantized MoE backend out of potential backends: ['TRITON'].",
        "TRITON Unquantized MoE backend",
    ),
    "SGLang 0.5.16": ("server_args=ServerArgs(a='b', moe_runner_backend='auto', c=1)", "'auto'"),
    "SGLang 0.5.23": (
        "server_args={'a': 'b', 'moe_runner_backend': 'triton_kernel', 'c': 1}",
        "'triton_kernel'",
    ),
    "dense": ("INFO Resolved architecture: LlamaForCausalLM", ""),
}


@pytest.mark.parametrize("name", LOGS)
def test_moe_path(name: str) -> None:
    """Read from lines as vLLM and this package print them."""
    log, path = LOGS[name]
    assert moe_path(f"INFO starting\n{log}\nINFO ready\n") == path


@pytest.mark.parametrize("release", ["vllm-0.26.0", "vllm-0.33.0"])
def test_vllm_prints_these_lines(release: str, packages: Path) -> None:
    """What LOGS has of vLLM's own paths is what its releases print."""
    oracle = packages / release / "vllm/model_executor/layers/fused_moe/oracle"
    assert "f\"Using '{backend.value}' Mxfp4 MoE backend.\"" in (oracle / "mxfp4.py").read_text()
    assert 'f"Using {backend.value} Unquantized MoE backend out "' in (oracle / "unquantized.py").read_text()


def test_parse() -> None:
    """The three kinds of sides."""
    started = parse("VLLM_MXFP4_BACKEND=reference A='b c' openai/x --quantization mxfp4-triton")
    assert started.environment == (("VLLM_MXFP4_BACKEND", "reference"), ("A", "b c"))
    assert started.command == ("openai/x", "--quantization", "mxfp4-triton")
    other = parse("A=b sglang openai/x --tp 2")
    assert (other.framework, other.environment, other.command) == (
        "sglang",
        (("A", "b"),),
        ("openai/x", "--tp", "2"),
    )
    assert started.framework == "vllm"
    running = parse("http://localhost:8000/ server.log")
    assert (running.url, running.log) == ("http://localhost:8000", Path("server.log"))


def test_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result is kept for the same side only: checkpoint, arguments and settings as they were."""
    (tmp_path / "model.safetensors").write_text("weights")
    side = parse(f"{tmp_path} --quantization mxfp4-triton")
    before = identity(side)
    assert identity(side) == before
    assert identity(parse(f"{tmp_path}")) != before
    assert identity(parse(f"VLLM_MXFP4_BACKEND=ck {side.text}")) != before
    monkeypatch.setenv("VLLM_MXFP4_BACKEND", "ck")
    assert identity(side) != before
    monkeypatch.delenv("VLLM_MXFP4_BACKEND")
    (tmp_path / "model.safetensors").write_text("other weights")
    assert identity(side) != before


def test_identity_of_tables(tmp_path: Path) -> None:
    """A result is kept for the tables that it was measured with."""
    side = parse(f"VLLM_MXFP4_TABLES={tmp_path} model")
    table = tmp_path / "gfx950.json"
    found = []
    for content in ("one", "two"):
        table.write_text(content)
        found.append(identity(side))
    assert found[0] != found[1]


@pytest.fixture(name="web")
def fixture_web(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The URL of a server that is not vLLM, and the directory whose files it answers with."""
    root = tmp_path / "web"
    (root / "v1").mkdir(parents=True)
    (root / "metrics").write_text("process_start_time_seconds 1.0\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(root)))
    threading.Thread(target=server.serve_forever).start()
    yield f"http://127.0.0.1:{server.server_port}", root
    server.shutdown()
    server.server_close()


def test_identity_of_url(web: tuple[str, Path], tmp_path: Path) -> None:
    """What was measured without a log, and so of no known path, is not kept for the same with one."""
    (tmp_path / "log").write_text("")
    assert identity(parse(web[0])) == identity(parse(web[0]))
    assert identity(parse(web[0])) != identity(parse(f"{web[0]} {tmp_path / 'log'}"))


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("<html>", "must be answered by vLLM or SGLang; got no JSON: '<html>'"),
        ("{}", "got an answer that lacks a field (KeyError: 'data')"),
        ('{"data": []}', "got an answer that lacks a field (IndexError"),
        ("[]", "got an answer that lacks a field (TypeError"),
        (
            '{"data": [{"id": "m", "max_model_len": 256, "owned_by": "vllm"}]}',
            "/tokenize must be answered by vLLM or SGLang; got status 501",
        ),
    ],
    ids=["html", "object", "empty", "list", "no-tokenizer"],
)
def test_not_vllm(
    body: str, complaint: str, web: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that answers otherwise is named as such."""
    url, root = web
    (root / "v1/models").write_text(body)
    assert cli.main(["eval", url, "--logprobs", __file__, "--out", str(tmp_path / "out")]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class Guarded(BaseHTTPRequestHandler):
    """What `eval` asks of vLLM, answered by a few lines, and only to who has the key."""

    def do_GET(self) -> None:
        """The model and its metrics."""
        self.reply({"data": [{"id": "m", "root": "m", "max_model_len": 256, "owned_by": "vllm"}]})

    def do_POST(self) -> None:
        """Tokens, and one token's answer with its distributions."""
        self.rfile.read(int(self.headers["Content-Length"]))
        entry = {"1": {"logprob": -0.5, "rank": 1, "decoded_token": "a"}}
        choice = {"text": "a", "index": 0, "prompt_logprobs": [None, *[entry] * 2]}
        tokens = {"tokens": [1, 1, 1]}
        self.reply(tokens if self.path == "/tokenize" else {"choices": [choice]})

    def reply(self, content: dict) -> None:
        """With 401 for who has no key."""
        allowed = self.headers["Authorization"] == f"Bearer {KEY}"
        text = json.dumps(content if allowed else {"error": "Unauthorized"}).encode()
        self.send_response(200 if allowed else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_key_and_no_torch(tmp_path: Path) -> None:
    """A client without torch measures a server that demands a key; without the key it is told so."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_TORCH)
    tasks = write_tasks(tmp_path / "tasks", [{"question": "a", "answer": "a"}])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Guarded)
    threading.Thread(target=server.serve_forever).start()
    url = f"http://127.0.0.1:{server.server_port}"
    command = ["-m", "vllm_mxfp4_gfx950.cli", "eval", url, "--include-path", str(tasks), "--logprobs"]
    command += [str(tasks / "next_word.yaml"), "--top", "1", "--out", str(tmp_path / "out")]
    try:
        refused = run_python(command, [tmp_path], OPENAI_API_KEY="")
        answered = run_python(command, [tmp_path], OPENAI_API_KEY=KEY)
    finally:
        server.shutdown()
        server.server_close()
    assert refused.returncode == 2
    assert "got status 401" in refused.stderr
    assert refused.stderr.endswith("Set OPENAI_API_KEY to a key that the server takes.\n")
    assert answered.returncode == 0, answered.stderr
    facts = json.loads((tmp_path / "out/report.json").read_text())
    assert facts["tasks"]["next_word"]["tested"] == 1
    assert facts["logprobs"]["positions"] == 2
    assert KEY not in answered.stdout + answered.stderr


def test_data_out_of_reach(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A task whose data cannot be had is no regression."""
    tasks = write_tasks(tmp_path / "tasks", [])
    (tasks / "load.py").write_text("def questions(**_):\n    raise ConnectionError('no hub')\n")
    assert cli.main(["eval", "m", "--include-path", str(tasks), "--out", str(tmp_path / "out")]) == 2
    complaint = "--tasks next_word must be loadable here; got ConnectionError: no hub. Correct it, or where"
    assert complaint in capsys.readouterr().err


def test_keys_of_a_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key that its server was started with, else the user's; and no text shows it."""
    monkeypatch.setenv("OPENAI_API_KEY", "mine")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    for text, key, shown in (
        ("http://localhost:8000", "mine", "http://localhost:8000"),
        ("m --tp 2", "mine", "m --tp 2"),
        ("m --api-key k l --tp 2", "k", "m --api-key '***' '***' --tp 2"),
        ("m --api_key=k --tp 2", "k", "m '--api_key=***' --tp 2"),
        ("VLLM_API_KEY=v m", "v", "'VLLM_API_KEY=***' m"),
        ("VLLM_API_KEY=v m --api-key k", "k", "'VLLM_API_KEY=***' m --api-key '***'"),
    ):
        side = parse(text)
        assert (key_of(side), side.text) == (key, shown)


@pytest.mark.parametrize("more", ["--uds /tmp/socket", "--headless", "--ssl-cert-reqs 2"])
def test_server_that_could_not_be_asked(more: str, tmp_path: Path) -> None:
    """It is not started, and not waited for for ever."""
    with pytest.raises(Mxfp4Error, match=f"^{more.split(maxsplit=1)[0]} of a side must be "):
        serving(parse(f"model {more}"), tmp_path, []).__enter__()
    assert not list(tmp_path.iterdir())


def test_first_error_of_a_server(tmp_path: Path) -> None:
    """Not the last, of the process that only waited for the one that failed."""
    log = tmp_path / "server.log"
    log.write_text(
        "(APIServer pid=1) WARNING 11-29 19:12:36 [utils.py:255] error Found ulimit of 20000\n"
        "(VllmWorker-0 pid=3) ERROR 11-29 19:13:47 [executor.py:953] Traceback (most recent call last):\n"
        '(VllmWorker-0 pid=3) ERROR 11-29 19:13:47 [executor.py:953]   File "x.py", line 1, in f\n'
        "(VllmWorker-0 pid=3) ERROR 11-29 19:13:47 [executor.py:953]     raise ValueError(\n"
        "(VllmWorker-0 pid=3) ERROR 11-29 19:13:47 [executor.py:953] ValueError: Available memory is less.\n"
        "(EngineCore pid=2) ERROR 11-29 19:13:48 [core.py:1] Exception: WorkerProc initialization failed\n"
        "Traceback (most recent call last):\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    text = f"must be able to start; got exit code 3 after: ValueError: Available memory is less. Read {log}"
    assert text in str(did_not_start(3, log))


LIKE_VLLM = """\
import http.server, signal, subprocess, sys

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

# As vLLM does: a shell's background jobs, and what they start, ignore it otherwise.
signal.signal(signal.SIGINT, signal.default_int_handler)
child, host, port = sys.argv[1], sys.argv[3], int(sys.argv[5])
if child == "child":
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
    subprocess.Popen([sys.executable, "-S", "-c", code])
try:
    http.server.HTTPServer((host, port), Answer).serve_forever()
except KeyboardInterrupt:
    sys.exit(7)
"""
"""A server and, if it is asked for, a process of it that does not end by itself."""


@pytest.mark.parametrize("child", ["child", "none"])
def test_processes_of_a_server(child: str, tmp_path: Path) -> None:
    """One that is stopped gives its exit code, and leaves none of its processes, which are counted."""
    main = tmp_path / "vllm/entrypoints/cli/main.py"
    main.parent.mkdir(parents=True)
    main.write_text(LIKE_VLLM)
    for package in ("vllm", "vllm/entrypoints", "vllm/entrypoints/cli"):
        (tmp_path / package / "__init__.py").touch()
    environment = {"PYTHONPATH": str(tmp_path), "PYTHONNOUSERSITE": "1"}
    with ServerProcess([child], environment, tmp_path / "log") as server:
        looked: list[None] = []
        url = server.wait_until_healthy([f"{server.url}/none", server.url], lambda: looked.append(None))
        assert url == server.url
        found = {*server.processes()} - {server.main.pid}
        assert len(found) == (child == "child")
        assert {*server.stop(seconds=3)} == found
        assert server.main.returncode == 7
        assert server.processes() == []
    assert server.stop() == []


def keep(directory: Path, path: str, right: dict[str, int], **changes: object) -> Path:
    """A result as a run keeps it: of each task ten questions, of which so many were answered right."""
    questions = [
        Question(task, number, f"{task}{number}", number < count, str(number), False)
        for task, count in right.items()
        for number in range(10)
    ]
    positions = [Position(3, "c", -0.5, {3: -0.5}, "c")]
    result = Measured(directory.name, path, "chat", "now", questions, 1, positions)
    directory.mkdir()
    (directory / RESULT).write_text(json.dumps(dataclasses.asdict(result) | changes))
    return directory


def test_one_side(tmp_path: Path) -> None:
    """Its scores, with intervals that hold together, replace what an earlier run wrote."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text("of an earlier run")
    side = keep(tmp_path / "side", "a", {"copy": 7, "add": 10})
    assert cli.main(["eval", str(side), "--out", str(out)]) == 0
    facts = json.loads((out / "report.json").read_text())
    found = facts["tasks"]["copy"]
    assert (found["questions"], found["tested"]) == (10, 7)
    z = 2.2414027  # The normal distribution's 1 - 0.05 / 2 / 2: two ends of two tasks.
    middle, half = 0.7 + z**2 / 20, z * math.sqrt(0.021 + z**2 / 400)
    ends = [(middle - half) / (1 + z**2 / 10), (middle + half) / (1 + z**2 / 10)]
    assert [found["low"], found["high"]] == pytest.approx(ends)
    assert facts["logprobs"] == {"positions": 1, "tested_nll": 0.5}
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "| copy | 10 | 0.7000 |" in (out / "report.md").read_text()


def test_changed_questions_can_be_found(tmp_path: Path) -> None:
    """By lm-eval's number of the question."""
    sides = [keep(tmp_path / name, name, {"copy": count}) for name, count in (("a", 7), ("b", 9))]
    cli.main(["eval", *map(str, sides), "--out", str(tmp_path / "out")])
    changed = json.loads((tmp_path / "out/report.json").read_text())["changed"]
    assert [(question["task"], question["doc_id"]) for question in changed] == [("copy", 7), ("copy", 8)]


def test_unlike_tops_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A divergence of twenty tokens is not one of all."""
    sides = [keep(tmp_path / "a", "a", {}), keep(tmp_path / "b", "b", {}, top=20)]
    assert cli.main(["eval", *map(str, sides), "--out", str(tmp_path / "out")]) == 2
    assert "--top of the two sides must be the same; got 1 and 20" in capsys.readouterr().err


def test_side_against_itself_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One directory is not two measurements, however it is written and whatever was asked for."""
    side = keep(tmp_path / "side", "a", {"copy": 7})
    other = tmp_path / "side/../side"
    assert cli.main(["eval", str(side), str(other), "--same-path", "--out", str(tmp_path / "out")]) == 2
    assert "the two sides must be different; got" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "cut"),
    [({}, 100), ({"top": 1, "more": 1}, None), ({"positions": [{}]}, None), ({"questions": [1]}, None)],
    ids=["cut-off", "another-version", "position", "question"],
)
def test_malformed_result(
    changes: dict[str, object], cut: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is refused by name."""
    file = keep(tmp_path / "side", "a", {"copy": 7}, **changes) / RESULT
    file.write_text(file.read_text()[:cut])
    assert cli.main(["eval", str(file.parent), "--out", str(tmp_path / "out")]) == 2
    assert f"{file} must be a result that this version of" in capsys.readouterr().err


def test_unknown_path_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is started for the other side."""
    sides = [str(keep(tmp_path / "side", "", {"copy": 7})), str(tmp_path)]
    arguments = ["--logprobs", __file__, "--out", str(tmp_path / "out")]
    assert cli.main(["eval", *sides, *arguments]) == 2
    assert "must be known and different; got 'not known'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.engine
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)],
    ids=["SIGTERM", "SIGKILL"],
)
def test_signal_ends_the_server(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """What `eval` started does not outlive it. The server has begun to start, and never gets further."""
    command = [sys.executable, "-m", "vllm_mxfp4_gfx950.cli", "eval", str(tmp_path), "--logprobs", __file__]
    process = psutil.Popen([*command, "--out", str(tmp_path / "out")], cwd=Path(cli.__file__).parents[1])
    servers: list[psutil.Process] = []
    try:
        while not servers:
            assert process.poll() is None
            time.sleep(0.1)
            servers = [child for child in process.children() if child.cpu_times().user > 0.5]
        process.send_signal(number)
        assert process.wait() == code
        servers[0].wait(10)
    finally:
        for running in (process, *servers):
            if running.is_running():
                running.kill()


@pytest.mark.parametrize(("lives", "code", "said"), [(True, 0, "started\n"), (False, 1, "")])
def test_server_of_a_process_that_was_killed(lives: bool, code: int, said: str) -> None:
    """One that ended before its server was tied to it: the server does not start."""
    starter = os.getpid() if lives else 1
    command = [sys.executable, "-c", TIED, str(starter), "-c", "print('started')"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (code, said)


FOLDER = {
    "load.py": """\
import json
from pathlib import Path
from datasets import Dataset, DatasetDict

def questions(**_):
    lines = Path(__file__).with_name("questions.jsonl").read_text().splitlines()
    return DatasetDict(test=Dataset.from_list([json.loads(line) for line in lines]))
""",
    "next_word.yaml": """\
task: next_word
custom_dataset: !function load.questions
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {max_gen_toks: 1, until: []}
filter_list:
  - name: word
    filter:
      - function: remove_whitespace
      - function: take_first
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}
CHOICE = {
    "next_word.yaml": FOLDER["next_word.yaml"]
    .replace("generate_until", "multiple_choice")
    .replace("exact_match", "acc")
    .replace("doc_to_target", "doc_to_choice: [bada, baki]\ndoc_to_target")
}


def write_tasks(folder: Path, lines: list[dict[str, str]], **changes: str) -> Path:
    """A folder for --include-path."""
    folder.mkdir()
    for name, text in (FOLDER | changes).items():
        (folder / name).write_text(text)
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


HARMONY = Server("http://x", "openai/gpt-oss-20b", 4096, "", harmony=True)
PLAIN = Server("http://x", "small", 256, "", harmony=False)


def test_endpoint(tmp_path: Path) -> None:
    """Chat for what speaks harmony and nothing else; log-likelihoods only by completions."""
    lines = [{"question": "a", "answer": "baki"}]
    text = Tasks([], write_tasks(tmp_path / "text", lines))
    choice = Tasks([], write_tasks(tmp_path / "choice", lines, **CHOICE))
    assert choose_endpoint(None, HARMONY, text) == "chat"
    assert choose_endpoint(None, PLAIN, text) == "completions"
    assert choose_endpoint("completions", PLAIN, text) == "completions"
    assert choose_endpoint("chat", PLAIN, text) == "chat"
    assert choose_endpoint(None, PLAIN, choice) == "completions"
    with pytest.raises(Mxfp4Error, match=r"--endpoint must be chat; .* 0\.30 by completions"):
        choose_endpoint("completions", HARMONY, text)
    for server, wanted in ((HARMONY, None), (HARMONY, "chat"), (PLAIN, "chat")):
        with pytest.raises(Mxfp4Error, match="the tasks must be answered in text over chat"):
            choose_endpoint(wanted, server, choice)


def test_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that could be asked through a proxy only is not started."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "example.org")
    error = r"^no_proxy must be a list with 127\.0\.0\.1, where there is a proxy; got example\.org\. "
    with pytest.raises(Mxfp4Error, match=error), serving(parse("model"), tmp_path, []):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["a", "b", "c"], "the sides must be one or two; got 3"),
        (["--quantization mxfp4-triton"], "a side must be a URL"),
        ([""], "a side must be a URL"),
        (["m", "--limit", "0"], "--limit must be at least 1; got 0"),
        (["m", "--margin", "nan"], "--margin must be at least 0; got nan"),
        (["m", "--top", "0"], "--top must be at least 1"),
        (["m 'a"], 'a side must be quoted as for a shell; got "m \'a". No closing quotation'),
        (["m", "--logprobs", "/nowhere"], "--logprobs must be a text file in UTF-8"),
        (["m", "--logprobs", "{tasks}"], "--logprobs must be a text file in UTF-8"),
        (["m", "--logprobs", sys.executable], "--logprobs must be a text file in UTF-8"),
        (["m", "--include-path", __file__], "--include-path must be a directory that exists"),
        (["http://127.0.0.1:9 /nowhere", "--logprobs", __file__], "must be a file that exists; got /nowhere"),
        (["m", "m", "--logprobs", __file__, "--same-path"], "the two sides must be different"),
        (["m", "--include-path", "{tasks}", "--tasks", "gsm9k"], "--tasks must be a task in"),
        (
            ["http://127.0.0.1:9", "--include-path", "{tasks}"],
            "must be answered by vLLM or SGLang; got ConnectionError",
        ),
    ],
)
def test_misuse(
    arguments: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line and exit code 2, before anything is started."""
    tasks = write_tasks(tmp_path / "tasks", [{"question": "a", "answer": "b"}])
    arguments = [argument.format(tasks=tasks) for argument in arguments]
    assert cli.main(["eval", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Every expert is always chosen, so that rounding sends no token elsewhere.
MODEL = TinyGptOss(experts=8, topk=8, seed=2)
SERVE = "OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind {} --dtype float32 --enforce-eager"
SERVE += " --max-model-len 256 --kv-cache-memory-bytes 67108864"
FLAG = " --quantization mxfp4-triton"
QUESTIONS = 60
KEY = "s3cret"


def write_broken(checkpoint: Path, directory: Path) -> Path:
    """The same with each layer's ordinary scales shuffled."""
    shutil.copytree(checkpoint, directory)
    tensors = load_file(checkpoint / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, scales in tensors.items():
        if name.endswith("_scales"):
            scales[:, :2] = scales[:, 2:4]  # Without 2^127, which makes NaN in another's place.
            order = torch.randperm(scales.numel(), generator=generator)
            tensors[name] = scales.flatten()[order].view_as(scales)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module", name="place")
def fixture_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints, a text, and questions whose answers are transformers' on the sound one."""
    root = tmp_path_factory.mktemp("eval")
    sound = tiny_checkpoint.write(MODEL, root / "sound")
    tiny_checkpoint.write_dequantized(sound, root / "dequantized")
    write_broken(sound, root / "broken")
    words = list(json.loads((sound / "tokenizer.json").read_text())["model"]["vocab"])
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(2, MODEL.vocab, (QUESTIONS, 12), generator=generator).tolist()
    answers = [rows[-1].argmax() for rows in tiny_checkpoint.transformers_logprobs(sound, prompts)]
    lines = [
        {"question": " ".join(words[token] for token in prompt), "answer": words[answer]}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    write_tasks(root / "tasks", lines)
    text = torch.randint(2, MODEL.vocab, (400,), generator=generator).tolist()
    (root / "text").write_text(" ".join(words[token] for token in text))
    return root


def options(place: Path) -> list[str]:
    """Of every comparison here."""
    asked = ["--include-path", str(place / "tasks"), "--logprobs", str(place / "text"), "--top", "-1"]
    return [*asked, "--out", str(place / "out")]


def guarded(place: Path) -> str:
    """Options of a server behind a proxy, with a key, a certificate of its own, and names."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "example.org")])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(datetime(2020, 1, 1)).not_valid_after(datetime(2099, 1, 1))
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    (place / "key.pem").write_bytes(private)
    (place / "cert.pem").write_bytes(made.sign(key, hashes.SHA256()).public_bytes(pem))
    more = f" --api-key {KEY} other --root-path /behind/a/proxy --served-model-name one two"
    return f"{more} --ssl-keyfile {place / 'key.pem'} --ssl-certfile={place / 'cert.pem'}"


@pytest.fixture(scope="module", name="equal")
def fixture_equal(place: Path) -> tuple[list[str], int, dict, str]:
    """Ours against the same weights without quantization: command line, exit code, report."""
    sides = [SERVE.format(place / "sound") + FLAG, "VLLM_LOGGING_LEVEL=WARNING "]
    sides[1] += SERVE.format(place / "dequantized") + guarded(place)
    code = cli.main(["eval", *sides, *options(place)])
    report = (place / "out/report.md").read_text()
    return sides, code, json.loads((place / "out/report.json").read_text()), report


@pytest.mark.engine
def test_equal_paths(equal: tuple[list[str], int, dict, str], place: Path) -> None:
    """Two ways to compute the same: equal answers, distributions equal but for rounding, exit code 0."""
    _, code, facts, report = equal
    assert code == 0
    assert facts["paths"][0].startswith("reference on cpu (torch ")
    assert facts["paths"][1] == "CPU Unquantized MoE backend"
    task = facts["tasks"]["next_word"]
    assert (task["tested"], task["baseline"]) == (QUESTIONS, QUESTIONS)
    assert facts["logprobs"]["mean_kl"] < 1e-6
    assert facts["logprobs"]["same_best"] == facts["logprobs"]["positions"] == 398  # Two windows.
    assert "over completions" in report
    assert KEY not in report
    assert "--api-key '***'" in report
    assert (place / "out/report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.engine
def test_second_run_reuses(
    equal: tuple[list[str], int, dict, str], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is served again, and the report is the same; so it is of the two results by themselves."""
    sides, _, facts, report = equal
    assert cli.main(["eval", *sides, *options(place)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("kept from") == 2
    assert "starting" not in printed
    assert json.loads((place / "out/report.json").read_text()) == facts
    assert (place / "out/report.md").read_text() == report
    results = [str(*(place / "out").glob(f"{name}-*")) for name in ("sound", "dequantized")]
    assert cli.main(["eval", *results, "--out", str(tmp_path / "elsewhere")]) == 0
    assert (tmp_path / "elsewhere/report.md").read_text() == report


@pytest.mark.engine
def test_sglang(
    equal: tuple[list[str], int, dict, str],
    place: Path,
    packages: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A stand-in for SGLang's server says of each token what vLLM's says, and its answers count.

    By its URL it is asked without a log, and without metrics, which SGLang has only where it is told so.
    """
    source = packages / "sglang-0.5.23/sglang/srt"
    package = tmp_path / "sglang"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "launch_server.py").symlink_to(sglang_server.__file__)
    path = os.pathsep.join(
        map(str, (tmp_path, Path(sglang_server.__file__).parent, Path(tiny_checkpoint.__file__).parent))
    )
    side = f"PYTHONPATH={path} SGLANG_SOURCE={source} sglang {place / 'sound'} --api-key {KEY}"
    out = tmp_path / "out"
    arguments = ["--include-path", str(place / "tasks"), "--limit", "10", "--logprobs", str(place / "text")]
    assert cli.main(["eval", side, *arguments, "--top", "5", "--out", str(out)]) == 0
    facts = json.loads((out / "report.json").read_text())
    assert facts["paths"] == ["'triton_kernel'"]
    assert facts["tasks"]["next_word"]["tested"] == 10
    (kept,) = (place / "out").glob("sound-*")
    (found,) = out.glob("sound-*")
    of_vllm, of_sglang = (json.loads((each / RESULT).read_text())["positions"] for each in (kept, found))
    for one, other in zip(of_vllm, of_sglang, strict=True):
        assert (one["token"], one["text"], one["top_text"]) == (
            other["token"],
            other["text"],
            other["top_text"],
        )
        assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-4)
        assert len(other["top"]) == 5
        assert {n: one["top"][n] for n in other["top"]} == pytest.approx(other["top"], abs=1e-4)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(parse(side), tmp_path, []) as server:
        assert cli.main(["eval", server.url, *arguments, "--top", "-1", "--out", str(out)]) == 2
    assert "--top must be at least 1 for a server of SGLang; got -1" in capsys.readouterr().err


def test_nan_of_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its JSON has null for NaN, which is NaN here, and no number beside it is."""
    triples = [[None, 3, "a"], [None, 4, "b"], [-0.5, 5, "c"]]
    best = [None, [[None, 7, "e"], [-1.0, 4, "b"]], [[-0.5, 5, "c"], [None, 7, "e"]]]
    answers = {
        "/tokenize": {"tokens": [3, 4, 5]},
        "/generate": {"meta_info": {"input_token_logprobs": triples, "input_top_logprobs": best}},
    }
    server = dataclasses.replace(PLAIN, owner="sglang")
    monkeypatch.setattr(measure, "post", lambda url, *_: answers[url.removeprefix(server.url)])
    broken, sound = measure.read(server, "a b c", 2, 256)
    assert (broken.token, broken.text, broken.top_text) == (4, "b", "e")
    assert math.isnan(broken.logprob)
    assert math.isnan(broken.top[7])
    assert (broken.top[4], sound.logprob, sound.top[5]) == (-1.0, -0.5, -0.5)
    assert math.isnan(sound.top[7])
    assert math.isnan(divergence([broken], [broken])[0].mean_kl)


@pytest.mark.parametrize("release", ["sglang-0.5.16", "sglang-0.5.23"])
def test_sglang_prints_and_answers_so(release: str, packages: Path) -> None:
    """What LOGS and the stand-in have of SGLang is what its releases have."""
    source = packages / release / "sglang/srt"
    assert re.search(r'logger.info\(f"\{?server_args=', (source / "entrypoints/engine.py").read_text())
    assert 'owned_by: str = "sglang"' in (source / "entrypoints/openai/protocol.py").read_text()
    manager = (source / "managers/tokenizer_manager.py").read_text()
    assert 'meta_info["input_token_logprobs"] = ' in manager
    assert 'meta_info["input_top_logprobs"] = ' in manager
    wanted = {
        "/generate": {"input_ids", "sampling_params", "return_logprob", "logprob_start_len"},
        "/tokenize": {"model", "prompt", "add_special_tokens"},
        "/v1/completions": {"model", "prompt", "max_tokens", "temperature", "seed", "stop"},
    }
    for route, names in wanted.items():
        assert names <= sglang_server.fields(source, *sglang_server.CLASSES[route])


@pytest.fixture(scope="module", name="broken")
def fixture_broken(place: Path) -> Iterator[tuple[Server, Path]]:
    """A server of the broken checkpoint, and its log."""
    with serving(parse(SERVE.format(place / "broken") + FLAG), place, ["--max-logprobs", "-1"]) as server:
        yield server, place / "server.log"


@pytest.mark.engine
def test_broken_path_is_a_regression(
    equal: tuple[list[str], int, dict, str], broken: tuple[Server, Path], place: Path
) -> None:
    """Negative control: shuffled scales, by URL against a kept result, and exit code 1 for either measure."""
    server, log = broken
    (kept,) = (place / "out").glob("dequantized-*")
    sides = [f"{server.url} {log}", str(kept)]
    assert cli.main(["eval", *sides, *options(place)]) == 1
    facts = json.loads((place / "out/report.json").read_text())
    task = facts["tasks"]["next_word"]
    assert task["verdict"] == "regression"
    assert len(facts["changed"]) == task["lost"] + task["won"] > QUESTIONS // 2
    assert facts["logprobs"]["mean_kl"] > 1
    assert "BEYOND 0.01" in (place / "out/report.md").read_text()
    # Each measure alone: allowed any divergence, it is the answers; and the other way round.
    assert cli.main(["eval", *sides, *options(place), "--max-kl", "100"]) == 1
    assert cli.main(["eval", *sides, *options(place), "--margin", "1"]) == 1
    assert cli.main(["eval", *sides, *options(place), "--margin", "1", "--max-kl", "100"]) == 0


@pytest.mark.engine
def test_one_path_is_refused(
    equal: tuple[list[str], int, dict, str],
    broken: tuple[Server, Path],
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two sides on one path are compared only where that is asked for; so are sides of unknown paths."""
    (kept,) = (place / "out").glob("sound-*")
    server, log = broken
    for running in (f"{server.url} {log}", server.url):
        assert cli.main(["eval", running, str(kept), *options(place)]) == 2
        complaint = "the MoE paths of the two sides must be known and different; got "
        assert complaint in capsys.readouterr().err
    # A path that is not known is refused at once, whatever the other side would have been.
    before = requests_answered(server)
    for sides in ([server.url, "no-model"], ["no-model", server.url]):
        assert cli.main(["eval", *sides, *options(place)]) == 2
        assert f"{complaint}'not known'" in capsys.readouterr().err
    assert requests_answered(server) == before
    assert cli.main(["eval", f"{server.url} {log}", str(kept), *options(place), "--same-path"]) == 1


@pytest.mark.engine
def test_unlike_questions_are_refused(
    equal: tuple[list[str], int, dict, str],
    broken: tuple[Server, Path],
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ten questions cannot be paired with sixty."""
    (kept,) = (place / "out").glob("dequantized-*")
    server, log = broken
    arguments = [*options(place)[:2], "--limit", "10", "--out", str(place / "out")]
    assert cli.main(["eval", f"{server.url} {log}", str(kept), *arguments]) == 2
    assert "the questions of the two sides must be the same; got 10 and 60" in capsys.readouterr().err


def requests_answered(server: Server) -> float:
    """How many requests a server has answered since its start."""
    lines = get(f"{server.url}/metrics").splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:request_success_total"))


@pytest.mark.engine
def test_interrupted_side_resumes(broken: tuple[Server, Path], place: Path, tmp_path: Path) -> None:
    """Answers that came before an interruption are not asked for again."""
    server, _ = broken
    tasks = Tasks([], place / "tasks")
    asked = []
    for limit in (20, None, None):
        before = requests_answered(server)
        ask(server, "completions", tasks, limit, 8, tmp_path / "answers")
        asked.append(requests_answered(server) - before)
    assert asked == [21, QUESTIONS - 20 + 1, 1]  # One of each is the request that tries the endpoint.


@pytest.mark.engine
@pytest.mark.load
def test_harmony_is_refused_over_completions(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint whose tokenizer speaks harmony, asked of vLLM's server without an engine."""
    shutil.copytree(place / "sound", tmp_path / "harmony")
    file = str(tmp_path / "harmony/tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    tokenizer.add_special_tokens([*HARMONY_TOKENS])
    tokenizer.save(file)
    arguments = [*options(place)[:2], "--endpoint", "completions", "--out", str(tmp_path / "out")]
    launch = ["launch", "render", str(tmp_path / "harmony")]
    with ServerProcess(launch, os.environ, tmp_path / "render.log") as process:
        url = process.wait_until_healthy()
        assert cli.main(["eval", url, *arguments]) == 2
    assert (
        "--endpoint must be chat; got completions for a model that speaks harmony" in capsys.readouterr().err
    )
