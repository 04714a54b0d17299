"""The script that measures two servers of SGLang, with a stand-in for SGLang; and what it refuses."""

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import serve_in_sglang
from run_python import SUPPORT, run_python
from serve_in_sglang import ENGINES, OURS, THEIR_LINE, THEIRS, check_log
from spread_in_sglang import DONE

STAND_IN = """
import argparse, json, os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import entry_points
from pathlib import Path
sys.path.append({accuracy!r})
import questions

ANSWERS = {{q["question"]: q["answer"] for skill in questions.SKILLS for q in questions.read(skill)}}
parser = argparse.ArgumentParser()
for name in ("model-path", "host", "port", "load-format"):
    parser.add_argument("--" + name)
args = parser.parse_known_args()[0]
ours = os.environ["VLLM_MXFP4_SGLANG"] == "1"
print("MoE layers run through triton_ogs on sm90 (triton 3)." if ours else {theirs!r})
print(f"extra path: {{os.environ['PYTHONPATH'].startswith('/of-ours')}}")
(plugin,) = entry_points(group="sglang.srt.plugins", name="spread")
if args.load_format == "dummy":
    print(sys.modules[plugin.load().__module__].DONE)
    assert json.loads((Path(args.model_path) / "config.json").read_text())["num_hidden_layers"] == 24
sys.stdout.flush()

class Routes(BaseHTTPRequestHandler):
    def log_message(self, *_): pass

    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        tokens = asked["sampling_params"]["max_new_tokens"]
        known = args.load_format != "dummy" and all(i < len(questions.VOCABULARY) for i in asked["input_ids"])
        text = ANSWERS["".join(questions.VOCABULARY[i] for i in asked["input_ids"])] if known else ""
        if ours and text.startswith("1"):
            text = "0"
        words = [*text, questions.END]
        reply = {{"output_ids": [questions.VOCABULARY.index(word) for word in words]}}
        reply["meta_info"] = {{"completion_tokens": tokens - {missing}}}
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

class Server(ThreadingHTTPServer):
    request_queue_size = 128

Server((args.host, int(args.port)), Routes).serve_forever()
"""


def measure(
    what: str, folder: Path, theirs: str = f"server_args=ServerArgs({THEIR_LINE})", missing: int = 0
) -> tuple[str, dict[str, Any]]:
    """What the script says at last, and what it wrote.

    Args:
        what: it does.
        folder: for the stand-in and what is written.
        theirs: what SGLang's own server logs.
        missing: tokens of each answer.
    """
    (folder / "sglang").mkdir()
    (folder / "sglang/__init__.py").touch()
    code = STAND_IN.format(accuracy=str(serve_in_sglang.ACCURACY), theirs=theirs, missing=missing)
    (folder / "sglang/launch_server.py").write_text(code)
    info = folder / "sglang-0.5.16.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.16\n")
    arguments = [str(SUPPORT / "serve_in_sglang.py"), what, "--json", str(folder / "json")]
    result = run_python([*arguments, "--our-path", "/of-ours"], [folder])
    said = (result.stdout + result.stderr).strip().splitlines()[-1]
    return said, json.loads((folder / "json").read_text()) if result.returncode == 0 else {}


def test_speed(tmp_path: Path) -> None:
    """Two rounds of each load and engine, each with its path, and the option's directory for ours alone."""
    _, seen = measure("speed", tmp_path)
    rows = {(row["engine"], row["batch"], row["input"], row["output"]): row for row in seen["rows"]}
    assert [*rows] == [(engine, *load) for engine in ENGINES for load in serve_in_sglang.LOADS]
    assert all(len(row["tokens_per_s"]) == 2 and min(row["tokens_per_s"]) > 0 for row in rows.values())
    paths = {engine: row["path"] for (engine, *_), row in rows.items()}
    assert paths == {OURS: "triton_ogs on sm90 (triton 3)", THEIRS: "'triton_kernel'"}
    assert seen["versions"]["sglang"] == "0.5.16"
    assert seen["versions"]["torch"] == version("torch")
    for name, extra in (("ours", True), ("theirs", False)):
        assert f"extra path: {extra}" in (tmp_path / f"json-{name}.log").read_text()


def test_questions(tmp_path: Path) -> None:
    """All of SGLang's own are right; of ours those alone whose answer does not begin with 1."""
    _, seen = measure("questions", tmp_path)
    for skill in serve_in_sglang.questions.SKILLS:
        asked = serve_in_sglang.questions.read(skill)
        assert seen["right"][THEIRS][skill] == [True] * 400
        assert seen["right"][OURS][skill] == [not each["answer"].startswith("1") for each in asked]


def test_another_path_is_refused(tmp_path: Path) -> None:
    """Negative control of the whole: SGLang's own server runs other experts, so nothing is written."""
    said, seen = measure("speed", tmp_path, theirs="moe_runner_backend='auto'")
    assert said == f"AssertionError: {THEIRS}: no 'moe_runner_backend='triton_kernel''"
    assert seen == {}


def test_a_short_answer_is_refused(tmp_path: Path) -> None:
    """Negative control: answers that lack a token are not measured."""
    said, seen = measure("speed", tmp_path, missing=1)
    assert said.startswith("AssertionError")
    assert seen == {}


@pytest.mark.parametrize(
    ("engine", "log", "wrong"),
    [
        (OURS, DONE, "'MoE layers run through ' is on the wrong side"),
        (THEIRS, f"{THEIR_LINE} MoE layers run through x {DONE}", "is on the wrong side"),
        (THEIRS, DONE, "no 'moe_runner_backend="),
        (OURS, "MoE layers run through x", "no 'dummy weights"),
    ],
    ids=["not ours", "not theirs", "another of theirs", "weights as they were"],
)
def test_logs(engine: str, log: str, wrong: str) -> None:
    """What each log lacks is said."""
    with pytest.raises(AssertionError, match=re.escape(wrong)):
        check_log(engine, log, dummy=True)
