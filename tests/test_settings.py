"""The environment variables: what they may say, and what they say when they do not."""

import re
from pathlib import Path

import pytest

from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.settings import Settings, for_sglang, from_environment, misspelt


@pytest.mark.parametrize("backend", ["auto", "triton", "ck", "aiter_triton", "reference"])
@pytest.mark.parametrize("strict", ["0", "1"])
@pytest.mark.parametrize("check", ["first", "all", "off"])
@pytest.mark.parametrize("timed", ["0", "1"])
def test_from_environment(backend: str, strict: str, check: str, timed: str) -> None:
    """Every value that is allowed."""
    environment = {
        "VLLM_MXFP4_BACKEND": backend, "VLLM_MXFP4_STRICT": strict, "VLLM_MXFP4_SELF_CHECK": check,
        "VLLM_MXFP4_TIME_AT_LOAD": timed,
    }  # fmt: skip
    asked = Settings(backend, strict == "1", check, time_at_load=timed == "1")
    assert from_environment(environment) == asked


def test_from_environment_reads_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mapping it is os.environ that counts, at the time of the call; unset is the default."""
    monkeypatch.delenv("VLLM_MXFP4_BACKEND", raising=False)
    monkeypatch.delenv("VLLM_MXFP4_STRICT", raising=False)
    monkeypatch.delenv("VLLM_MXFP4_SELF_CHECK", raising=False)
    monkeypatch.delenv("VLLM_MXFP4_TABLES", raising=False)
    monkeypatch.delenv("VLLM_MXFP4_TIME_AT_LOAD", raising=False)
    assert from_environment() == Settings("auto", False, "first")
    monkeypatch.setenv("VLLM_MXFP4_BACKEND", "ck")
    assert from_environment() == Settings("ck", False)


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        (
            {"VLLM_MXFP4_BACKEND": "Triton"},
            "VLLM_MXFP4_BACKEND must be one of auto, fastest, triton, two_fp8, ck, aiter_triton, reference; "
            "got 'Triton'. Set VLLM_MXFP4_BACKEND to one of these or unset it.",
        ),
        (
            {"VLLM_MXFP4_BACKEND": ""},
            "VLLM_MXFP4_BACKEND must be one of auto, fastest, triton, two_fp8, ck, aiter_triton, reference; "
            "got ''. Set VLLM_MXFP4_BACKEND to one of these or unset it.",
        ),
        (
            {"VLLM_MXFP4_STRICT": "true"},
            "VLLM_MXFP4_STRICT must be one of 0, 1; got 'true'. "
            "Set VLLM_MXFP4_STRICT to one of these or unset it.",
        ),
        (
            {"VLLM_MXFP4_SELF_CHECK": "1"},
            "VLLM_MXFP4_SELF_CHECK must be one of first, all, off; got '1'. "
            "Set VLLM_MXFP4_SELF_CHECK to one of these or unset it.",
        ),
    ],
)
def test_from_environment_refuses(environment: dict[str, str], text: str) -> None:
    """A misspelt value is an error, never a silent default."""
    with pytest.raises(Mxfp4Error, match=f"^{re.escape(text)}$"):
        from_environment(environment)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("VLLM_MXFP4_BACKENDS", "VLLM_MXFP4_BACKEND"),
        ("VLLM_MXPF4_BACKEND", "VLLM_MXFP4_BACKEND"),
        ("MXFP4_BACKEND", "VLLM_MXFP4_BACKEND"),
        ("vllm_mxfp4_strict", "VLLM_MXFP4_STRICT"),
        ("VLLM_MXFP4_SELFCHECK", "VLLM_MXFP4_SELF_CHECK"),
        ("VLLM_MXFP4_TILES", "VLLM_MXFP4_TABLES"),
    ],
)
def test_misspelt_name(name: str, meant: str) -> None:
    """It would steer nothing, and nobody would know."""
    with pytest.raises(Mxfp4Error, match=f"^{name} must be one of .* Rename it to {meant}, or unset it"):
        from_environment({name: "1"})


def test_for_sglang() -> None:
    """Off where it is not set; a misspelt name or value is an error, and others' are not looked at."""
    assert not for_sglang({"VLLM_MXFP4_BACKENDS": "1", "VLLM_MXFP4_STRICT": "yes"})
    assert not for_sglang({"VLLM_MXFP4_SGLANG": "0"})
    assert for_sglang({"VLLM_MXFP4_SGLANG": "1"})
    with pytest.raises(Mxfp4Error, match=r"^VLLM_MXFP4_SGLANG must be one of 0, 1; got 'true'"):
        for_sglang({"VLLM_MXFP4_SGLANG": "true"})
    with pytest.raises(Mxfp4Error, match=r"^VLLM_MXFP4_SGLAN must .* Rename it to VLLM_MXFP4_SGLANG"):
        for_sglang({"VLLM_MXFP4_SGLAN": "1"})


def test_names_of_others(packages: Path) -> None:
    """None that vLLM or SGLang has is taken for a misspelling of ours."""
    for release in ("vllm-0.26.0", "vllm-0.33.0"):
        names = set(re.findall(r"\bVLLM_\w+", (packages / release / "vllm/envs.py").read_text()))
        assert len(names) > 100
        assert {name: misspelt(name) for name in names if misspelt(name)} == {}
    names = set(re.findall(r"\bSGLANG_\w+", (packages / "sglang-0.5.23/sglang/srt/environ.py").read_text()))
    assert len(names) > 100
    assert {name: misspelt(name) for name in names if misspelt(name)} == {}
    assert misspelt("VLLM_MXFP4_USE_MARLIN") == misspelt("VLLM_NVFP4_BACKEND") == ""


def test_tables(tmp_path: Path) -> None:
    """A directory that exists; nothing else, and no blank that would mean the one where the server runs."""
    assert from_environment({"VLLM_MXFP4_TABLES": str(tmp_path)}).tables == tmp_path
    (tmp_path / "sm90.json").touch()
    for value in ("", str(tmp_path / "none"), str(tmp_path / "sm90.json")):
        text = (
            f"VLLM_MXFP4_TABLES must be a directory that exists; got {value!r}. "
            "Set VLLM_MXFP4_TABLES to what `vllm-mxfp4 tune --out` was given, or unset it."
        )
        with pytest.raises(Mxfp4Error, match=f"^{re.escape(text)}$"):
            from_environment({"VLLM_MXFP4_TABLES": value})
