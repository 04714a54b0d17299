"""The command line: what it offers, what it costs, and its exit codes."""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest
from run_python import ROOT, run_python

from vllm_mxfp4_gfx950 import cli, commands, models, options
from vllm_mxfp4_gfx950.bench import serve
from vllm_mxfp4_gfx950.commands import doctor
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.models import GPT_OSS

SCRIPTS = [
    file
    for folder in ("accuracy", "demo", "environments")
    for file in sorted((ROOT / folder).glob("*.py"))
    if '__name__ == "__main__"' in file.read_text()
]


WITHOUT_TORCH = """\
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = name.partition(".")[0] in ("torch", "triton", "vllm")
        return None if absent else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""
"""A sitecustomize.py that hides what a client's environment lacks."""

MISSING = "vllm-mxfp4 {}: {} must be installed; got nothing. Run where vLLM's build for this GPU is.\n"


@pytest.fixture(name="client")
def fixture_client(tmp_path: Path) -> Path:
    """A folder for the path's beginning, by which torch, Triton and vLLM are absent."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_TORCH)
    return tmp_path


def test_every_command_is_named() -> None:
    """A file in `commands` is a command, and a command is a file in `commands`."""
    files = {file.stem for place in commands.__path__ for file in Path(place).glob("*.py")}
    assert files - {"__init__"} == set(cli.COMMANDS)


def test_help_lists_the_commands_and_loads_nothing() -> None:
    """Every command is in the help; neither torch nor vLLM is loaded for it."""
    code = (
        "import sys, atexit\n"
        "heavy = ('torch', 'vllm', 'aiter', 'triton')\n"
        "atexit.register(lambda: print('heavy', [name for name in heavy if name in sys.modules]))\n"
        "from vllm_mxfp4_gfx950.cli import main\n"
        "main(['--help'])\n"
    )
    process = run_python(["-c", code], COLUMNS="200")
    assert process.returncode == 0, process.stderr
    assert process.stdout.endswith("heavy []\n")
    for name, (_, summary) in cli.COMMANDS.items():
        assert re.search(rf"^ +{name} +{summary}$", process.stdout, re.MULTILINE)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_command_has_help(name: str, client: Path) -> None:
    """Each command's module has what `main` calls, and says what its options are where it could not run."""
    process = run_python(["-m", "vllm_mxfp4_gfx950.cli", name, "--help"], [client])
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(f"usage: vllm-mxfp4 {name} ")
    process = run_python(["-m", "vllm_mxfp4_gfx950.cli", name, "--no-such-option"], [client])
    assert process.returncode == 2
    assert process.stderr.startswith("usage: ")
    assert callable(import_module(f"vllm_mxfp4_gfx950.commands.{name}").run)


@pytest.mark.parametrize("arguments", [[], ["docter"], ["doctor", "--jsn"]], ids=" ".join)
def test_wrong_command_line(arguments: list[str]) -> None:
    """Exit code 2 and the usage, as of every command line made with argparse."""
    process = run_python(["-m", "vllm_mxfp4_gfx950.cli", *arguments])
    assert process.returncode == 2
    assert process.stderr.startswith("usage: ")
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("error", [Mxfp4Error("--model", "one", "two", "Correct it"), ValueError("a bug")])
def test_error_of_a_command(
    error: ValueError, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither is a verdict, which is 1: what the user got wrong is a line; a bug shows where it is."""

    def run(_args: object) -> int:
        raise error

    monkeypatch.setattr(doctor, "run", run)
    assert cli.main(["doctor"]) == 2
    printed = capsys.readouterr().err
    if isinstance(error, Mxfp4Error):
        assert printed == "vllm-mxfp4 doctor: --model must be one; got two. Correct it.\n"
    else:
        assert printed.startswith("Traceback ")
        assert printed.endswith("ValueError: a bug\n")


def test_plot_needs_no_torch(client: Path) -> None:
    """`bench plot` draws what was measured elsewhere; what would measure says that torch is absent."""
    row = {"layer": "E=4", "tokens": 1, "floor_us": 1.0, "us": {"ours": [2.0, 3.0]}}
    report = {"bench": "layer", "device": "CPU", "versions": {}, "rows": [row]}
    (client / "layer.json").write_text(json.dumps(report))
    command = ["-m", "vllm_mxfp4_gfx950.cli", "bench"]
    drawn = ["plot", str(client / "layer.json"), "--plot", str(client / "layer.svg")]
    process = run_python([*command, *drawn], [client])
    assert process.returncode == 0, process.stderr
    assert (client / "layer.svg").read_text().startswith("<?xml")
    process = run_python([*command, "layer"], [client])
    assert process.returncode == 2
    assert process.stderr.endswith(MISSING.format("bench", "torch"))


def test_help_of_bench_names_what_there_is() -> None:
    """Written out in `options`, which imports nothing that needs torch."""
    assert tuple(GPT_OSS) == options.MODELS == tuple(serve.LAYERS)
    assert models.TOKENS == options.TOKENS
    for kind, names in (("layer", GPT_OSS), ("serve", [*serve.LAYERS, *serve.LENGTHS, *serve.ROUTINGS])):
        process = run_python(["-m", "vllm_mxfp4_gfx950.cli", "bench", kind, "--help"])
        assert set(names) <= set(re.findall(r"[\w-]+", process.stdout))


def test_help_of_scripts(tmp_path: Path) -> None:
    """--help is a question, in whatever script: nothing runs, and nothing is written."""
    process = run_python([str(ROOT / "demo/tiny_checkpoint.py"), "--help"], cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("usage: ")
    assert not list(tmp_path.iterdir())
    assert [file.name for file in SCRIPTS if "parse_args()" not in file.read_text()] == []
    assert [file.name for file in SCRIPTS if "sys.argv" in file.read_text()] == []


def test_docker_leaves_out_what_git_does() -> None:
    """`COPY .` takes 4 GB of .venv otherwise. Docker's patterns begin at the root, git's anywhere."""
    ignored = (ROOT / ".gitignore").read_text().split()
    left_out = (ROOT / ".dockerignore").read_text().split()
    assert {f"**/{pattern.strip('/')}" for pattern in ignored} | {".git"} == set(left_out)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["compile", "--tokens", "16", "0"], "--tokens must be at least 1; got 0. Correct it."),
        (["compile", "--model", "gpt-oss"], "got gpt-oss (No such file or directory). Correct the name."),
        (["compile", "--model", "o" * 300], "(File name too long). Correct the name."),
        (
            ["compile", "--model", str(ROOT)],
            "/config.json (No such file or directory). Correct the name.",
        ),
    ],
    ids=["tokens", "name", "long-name", "directory"],
)
def test_wrong_value(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Told before anything is compiled."""
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.strip().endswith(text)


@pytest.mark.parametrize("name", ["compile", "verify", "predict", "tune"])
def test_a_package_is_missing(name: str, client: Path) -> None:
    """Told in a line, by what needs it."""
    process = run_python(["-m", "vllm_mxfp4_gfx950.cli", name], [client])
    assert process.returncode == 2
    assert process.stderr in [MISSING.format(name, package) for package in ("torch", "triton")]


def test_doctor_needs_no_torch(client: Path) -> None:
    """It says so, and all else that it can."""
    process = run_python(["-m", "vllm_mxfp4_gfx950.cli", "doctor", "--json"], [client])
    assert process.returncode == 1, process.stderr
    checks = {check["what"]: check for check in json.loads(process.stdout)}
    assert checks["torch"]["found"] == "ModuleNotFoundError: No module named 'torch'"
    assert checks["plugin"]["ok"]


def test_installed_script_is_this_one() -> None:
    """What the package's metadata calls `vllm-mxfp4`."""
    lines = (ROOT / "entry_points.cfg").read_text().splitlines()
    assert lines[lines.index("[console_scripts]") + 1] == "vllm-mxfp4 = vllm_mxfp4_gfx950.cli:main"
    assert callable(cli.main)
