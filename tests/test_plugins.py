"""Another plugin of vLLM that replaces GPT-OSS: found without an import, and refused once it has done so."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine import FLAG
from run_python import run_python

from vllm_mxfp4_gfx950.plugins import ATOM_OFF_VAR, how_to_turn_off, replacing_model

REGISTER = """
import os

def register():
    if os.environ.get("ATOM_DISABLE_VLLM_PLUGIN") != "1":
        from vllm import ModelRegistry
        from vllm.model_executor.models.gpt_oss import GptOssForCausalLM

        class Wrapper(GptOssForCausalLM):
            pass

        ModelRegistry.register_model("GptOssForCausalLM", Wrapper)
"""


def install(folder: Path, package: str, name: str) -> Path:
    """A distribution with a plugin, to be put on sys.path."""
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").touch()
    (folder / package / "register.py").write_text(REGISTER)
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{name} = {package}.register:register\n")
    return folder


@pytest.fixture(name="atom")
def fixture_atom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package called as ROCm's, installed."""
    for name in (ATOM_OFF_VAR, "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    folder = install(tmp_path / "site", "atom", "atom_model_registry")
    monkeypatch.syspath_prepend(folder)
    return folder


def test_no_other_plugin() -> None:
    """Those that vLLM brings replace nothing."""
    assert replacing_model() is None


@pytest.mark.parametrize(
    ("variable", "value", "loaded"),
    [
        (None, "", True),
        (ATOM_OFF_VAR, "1", False),
        (ATOM_OFF_VAR, "0", True),
        ("VLLM_PLUGINS", "mxfp4_triton", False),
        ("VLLM_PLUGINS", "mxfp4_triton,atom_model_registry", True),
        ("VLLM_PLUGINS", "", False),
    ],
)
def test_replacing_model(
    atom: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None, value: str, loaded: bool
) -> None:
    """ATOM's is named where vLLM would load it."""
    if variable:
        monkeypatch.setenv(variable, value)
    named = "atom_model_registry (atom.register:register)"
    assert replacing_model() == (named if loaded else None)


def test_how_to_turn_off(atom: Path) -> None:
    """By its own variable, by vLLM's, or where it is registered otherwise."""
    install(atom / "more", "other", "other_models")
    assert how_to_turn_off("atom.model") == "Set ATOM_DISABLE_VLLM_PLUGIN=1"
    assert how_to_turn_off("other.model") == (
        "Leave out what registers it: a plugin, or --model-class-overrides"
    )
    install(atom, "other", "other_models")
    assert how_to_turn_off("other.model") == (
        "Leave other_models out of VLLM_PLUGINS: set VLLM_PLUGINS=mxfp4_triton"
    )


@pytest.mark.engine
def test_refused_where_it_is_loaded(atom: Path, tmp_path: Path) -> None:
    """The flag would be taken and not used; with the plugin turned off as the error says, it is."""
    import tiny_checkpoint

    checkpoint = tiny_checkpoint.write(tiny_checkpoint.TinyGptOss(), tmp_path / "checkpoint")
    code = "import engine, pathlib, sys; print(engine.create_config(pathlib.Path(sys.argv[1]), sys.argv[2]))"

    def run(**environment: str) -> tuple[str, str]:
        arguments = ["-c", code, str(checkpoint), FLAG]
        result = run_python(arguments, (atom,), VLLM_LOGGING_LEVEL="ERROR", **environment)
        return result.stdout.strip().rpartition("\n")[2], result.stderr

    printed, error = run()
    assert not printed
    assert (
        "GptOssForCausalLM must be vLLM's own for --quantization mxfp4-triton; got atom.register. "
        "Set ATOM_DISABLE_VLLM_PLUGIN=1."
    ) in error
    printed, error = run(ATOM_DISABLE_VLLM_PLUGIN="1")
    assert printed == "vllm_mxfp4_gfx950.vllm_plugin.Mxfp4TritonConfig", error
