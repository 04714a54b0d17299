"""The command line: what it offers, what it costs, and its exit codes."""

import re
from importlib import import_module
from pathlib import Path

import pytest
from run_python import ROOT, run_python

from vllm_mxfp4_gfx950 import cli, commands
from vllm_mxfp4_gfx950.commands import doctor
from vllm_mxfp4_gfx950.errors import Mxfp4Error


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
    for name, summary in cli.COMMANDS.items():
        assert re.search(rf"^ +{name} +{summary}$", process.stdout, re.MULTILINE)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_command_has_help(name: str) -> None:
    """Each command's module has what `main` calls, and says what its options are."""
    process = run_python(["-m", "vllm_mxfp4_gfx950.cli", name, "--help"])
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(f"usage: vllm-mxfp4 {name} ")
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
    """What the user got wrong is one line and exit code 2; anything else is a bug, and shows where it is."""

    def run(_args: object) -> int:
        raise error

    monkeypatch.setattr(doctor, "run", run)
    if isinstance(error, Mxfp4Error):
        assert cli.main(["doctor"]) == 2
        assert capsys.readouterr().err == "vllm-mxfp4 doctor: --model must be one; got two. Correct it.\n"
    else:
        with pytest.raises(ValueError, match="a bug"):
            cli.main(["doctor"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["compile", "--tokens", "16", "0"], "--tokens must be at least 1; got 0. Correct it."),
        (["compile", "--model", "gpt-oss"], "got gpt-oss (No such file or directory). Correct the name."),
        (["compile", "--model", "o" * 300], "(File name too long). Correct the name."),
        (["compile", "--model", str(ROOT)], f"got {ROOT} (Is a directory). Correct the name."),
    ],
    ids=["tokens", "name", "long-name", "directory"],
)
def test_wrong_value(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Told before anything is compiled."""
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.strip().endswith(text)


def test_installed_script_is_this_one() -> None:
    """What the package's metadata calls `vllm-mxfp4`."""
    lines = (ROOT / "entry_points.cfg").read_text().splitlines()
    assert lines[lines.index("[console_scripts]") + 1] == "vllm-mxfp4 = vllm_mxfp4_gfx950.cli:main"
    assert callable(cli.main)
