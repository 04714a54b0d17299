"""`vllm-mxfp4 doctor`, run as a user runs it, in environments made of real directories."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from run_python import ROOT, run_python

from vllm_mxfp4_gfx950.commands.doctor import check_backends, check_dependencies, check_plugin

VLLM = ROOT / ".venv/packages/vllm-0.33.0"
IMPOSTOR = "so it is not OpenAI's (the triton-kernels on PyPI is an unrelated package"
EVERYTHING = [
    "torch",
    "dependencies",
    "vllm",
    "plugin",
    "GPU",
    "settings",
    "triton",
    "triton_ogs",
    "triton_matmul",
    "ck",
    "reference",
    "gpt-oss-20b",
    "gpt-oss-120b",
]


def write(root: Path, files: dict[str, str]) -> Path:
    """A directory of files."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def distribution(
    name: str, version: str, top_level: str = "", requires: str = "", points: str = ""
) -> dict[str, str]:
    """The files by which an installed package is known."""
    directory = f"{name.replace('-', '_')}-{version}.dist-info"
    return {
        f"{directory}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}",
        f"{directory}/top_level.txt": top_level,
        f"{directory}/entry_points.txt": points,
    }


def ours(**metadata: str) -> dict[str, str]:
    """This package as it is installed, before any copy in the test's own environment."""
    points = (ROOT / "entry_points.cfg").read_text()
    return distribution("vllm-mxfp4-gfx950", "0.1.0", "vllm_mxfp4_gfx950", **{"points": points} | metadata)


HOST = {
    "vllm/__init__.py": "raise RuntimeError('doctor must not import vllm')",
    "vllm/model_executor/layers/fused_moe/routed_experts.py": "",
    **distribution("vllm", "0.33.0", "vllm"),
    "aiter.py": "raise ModuleNotFoundError(\"No module named 'aiter'\", name='aiter')",
}
"""A vLLM without a copy of triton_kernels, and no aiter."""


def doctor(*path: Path, arch: str = "cpu", **environment: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit code, and each check by what it is about."""
    process = run_python(
        ["-m", "vllm_mxfp4_gfx950.cli", "doctor", "--json", "--arch", arch], path, **environment
    )
    assert "Traceback" not in process.stderr, process.stderr
    answer = json.loads(process.stdout)
    assert answer["served"] == all(check["ok"] for check in answer["checks"]) == (process.returncode == 0)
    for check in answer["checks"]:
        assert check["ok"] or check["fix"]
    return process.returncode, {check["what"]: check for check in answer["checks"]}


def failed(checks: dict[str, dict[str, Any]]) -> list[str]:
    """What is not ok."""
    return [what for what, check in checks.items() if not check["ok"]]


def test_cpu_is_served_by_the_reference(tmp_path: Path) -> None:
    """Nothing but torch and vLLM: enough on a CPU, and what is missing is not needed."""
    exit_code, checks = doctor(write(tmp_path, HOST | ours()))
    assert exit_code == 0
    assert list(checks) == EVERYTHING
    assert checks["dependencies"]["found"] == "none"
    assert checks["vllm"]["found"] == f"vllm 0.33.0 in {tmp_path / 'vllm'}"
    assert checks["plugin"]["found"] == "vllm_mxfp4_gfx950.vllm_plugin:register"
    assert checks["GPU"]["found"] == "cpu"
    assert checks["settings"]["found"] == (
        "VLLM_MXFP4_BACKEND=auto, VLLM_MXFP4_STRICT=0, VLLM_MXFP4_SELF_CHECK=first, VLLM_MXFP4_TABLES=unset"
    )
    for what in ("triton_ogs", "triton_matmul"):
        assert checks[what]["found"] == (
            "it runs on gfx950, gfx942, sm90, not on cpu; "
            "triton_kernels is not installed, and there is no vLLM that vendors it"
        )
        assert checks[what]["needed"] == "not needed here"
    assert checks["ck"]["found"] == (
        "it runs on gfx950, not on cpu; aiter does not import here: No module named 'aiter'"
    )
    assert checks["reference"]["needed"] == "chosen"
    assert checks["gpt-oss-20b"]["found"] == checks["gpt-oss-120b"]["found"] == "reference"


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.skipif(not VLLM.is_dir(), reason=f"needs {VLLM.relative_to(ROOT)}")
def test_gfx950_is_served_by_vllms_triton_kernels(tmp_path: Path) -> None:
    """The genuine package, where vLLM keeps it: its generation, and where it came from."""
    exit_code, checks = doctor(write(tmp_path, ours()), VLLM, arch="gfx950")
    assert exit_code == 0
    copy = VLLM / "vllm/third_party/triton_kernels"
    assert checks["triton_ogs"]["found"].startswith(f"triton_kernels in {copy}, triton 3.")
    assert checks["triton_ogs"]["needed"] == "chosen"
    assert checks["triton_matmul"]["found"] == (
        f"triton_kernels in {copy} is of the matmul_ogs generation and has no matmul"
    )
    assert checks["triton_matmul"]["needed"] == "not needed here"
    assert checks["gpt-oss-20b"]["found"] == checks["gpt-oss-120b"]["found"] == "triton_ogs"
    assert checks["vllm"]["found"] == f"vllm 0.33.0 in {VLLM / 'vllm'}"


def test_impostor_is_named(tmp_path: Path) -> None:
    """The unrelated triton-kernels of PyPI: a fault where Triton is needed, a remark where it is not."""
    impostor = {"triton_kernels/__init__.py": "", "triton_kernels/add_vectors.py": ""}
    path = write(tmp_path, HOST | ours() | impostor)
    exit_code, checks = doctor(path, arch="gfx950")
    assert exit_code == 1
    assert failed(checks) == ["triton_ogs", "triton_matmul", "ck", "gpt-oss-20b", "gpt-oss-120b"]
    assert IMPOSTOR in checks["triton_ogs"]["found"]
    assert str(tmp_path / "triton_kernels") in checks["triton_ogs"]["found"]
    assert IMPOSTOR in checks["gpt-oss-20b"]["found"]
    exit_code, checks = doctor(path, arch="cpu")
    assert exit_code == 0
    assert IMPOSTOR in checks["triton_ogs"]["found"]


@pytest.mark.parametrize(
    ("plugins", "ok"),
    [
        ("mxfp4_triton", True),
        ("other,mxfp4_triton", True),
        ("other", False),
        ("", False),
        ("x, mxfp4_triton", False),
    ],
)
def test_vllm_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugins: str, ok: bool) -> None:
    """VLLM_PLUGINS is a list of names, without blanks, of which ours must be one."""
    monkeypatch.syspath_prepend(write(tmp_path, ours()))
    monkeypatch.setenv("VLLM_PLUGINS", plugins)
    (check,) = check_plugin()
    assert check.ok == ok
    assert check.found == f"vllm_mxfp4_gfx950.vllm_plugin:register, VLLM_PLUGINS={plugins}"
    assert check.fix == "Unset VLLM_PLUGINS or add mxfp4_triton to it"


def test_plugin_that_is_not_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An install without the entry point that vLLM looks for."""
    monkeypatch.syspath_prepend(write(tmp_path, ours(points="")))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    (check,) = check_plugin()
    assert not check.ok
    assert check.found == "not registered"
    assert check.fix == "pip install this package's checkout"


@pytest.mark.parametrize(
    ("requires", "found", "ok"),
    [
        ("", "none", True),
        ("Requires-Dist: numpy\nRequires-Dist: torch; extra == 'dev'\n", "numpy", True),
        ("Requires-Dist: numpy\nRequires-Dist: Torch>=2.9\n", "numpy, Torch>=2.9", False),
        ("Requires-Dist: triton_kernels\n", "triton_kernels", False),
        ("Requires-Dist: vllm ; python_version > '3'\n", "vllm ; python_version > '3'", False),
    ],
)
def test_dependencies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requires: str, found: str, ok: bool
) -> None:
    """What an install pulls in: never the packages that a server is made of; extras do not count."""
    monkeypatch.syspath_prepend(write(tmp_path, ours(requires=requires)))
    (check,) = check_dependencies()
    assert check.found == found
    assert check.ok == ok


def test_pyproject_requires_nothing() -> None:
    """The promise itself: an install replaces nothing, for it brings nothing."""
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "dependencies" not in project
    assert "dependencies" not in project["dynamic"]


def test_settings(tmp_path: Path) -> None:
    """Only what the settings and the GPU ask for can be at fault."""
    cases: list[tuple[dict[str, str], str, list[str]]] = [
        ({"VLLM_MXFP4_BACKEND": "cuda"}, "cpu", ["settings"]),
        ({"VLLM_MXFP4_STRICT": "yes"}, "cpu", ["settings"]),
        ({"VLLM_MXFP4_BACKEND": "reference"}, "gfx1100", []),
        ({}, "gfx1100", ["GPU", "gpt-oss-20b", "gpt-oss-120b"]),
        ({"VLLM_MXFP4_BACKEND": "ck"}, "gfx950", ["ck", "gpt-oss-20b", "gpt-oss-120b"]),
        ({}, "gfx942", ["triton_ogs", "triton_matmul", "gpt-oss-20b", "gpt-oss-120b"]),
    ]
    code = (
        "import json, os, sys\n"
        "from vllm_mxfp4_gfx950.commands.doctor import examine\n"
        "before = dict(os.environ)\n"
        "for environment, arch, _ in json.loads(sys.argv[1]):\n"
        "    os.environ.clear()\n"
        "    os.environ.update(before | environment)\n"
        "    print(json.dumps([check.what for check in examine(arch) if not check.ok]))\n"
    )
    process = run_python(["-c", code, json.dumps(cases)], [write(tmp_path, HOST | ours())])
    assert process.returncode == 0, process.stderr
    got = [json.loads(line) for line in process.stdout.splitlines()]
    assert got == [faults for _, _, faults in cases]


def test_vllm_before_0_24(tmp_path: Path) -> None:
    """A vLLM that our plugin does not import in."""
    old = {name: text for name, text in HOST.items() if "routed_experts" not in name}
    exit_code, checks = doctor(write(tmp_path, old | ours()))
    assert exit_code == 1
    assert failed(checks) == ["vllm"]
    assert checks["vllm"]["found"] == f"vllm 0.33.0 in {tmp_path / 'vllm'}"


@pytest.mark.parametrize(
    ("files", "what", "found"),
    [
        (
            {"torch.py": "raise OSError('libamdhip64.so: no such file')"},
            "torch",
            "OSError: libamdhip64.so: no such file",
        ),
        (
            {
                "triton_kernels/__init__.py": "",
                "triton_kernels/matmul_ogs.py": "import torch; torch.no_such_name",
            },
            "triton_ogs",
            "module 'torch' has no attribute 'no_such_name'",
        ),
        (
            {"aiter.py": "print('[aiter] hello'); raise RuntimeError('ROCm\\nnot found')"},
            "ck",
            "ROCm\nnot found",
        ),
    ],
    ids=["torch", "triton_kernels", "aiter"],
)
def test_broken_package_is_reported(tmp_path: Path, files: dict[str, str], what: str, found: str) -> None:
    """A package that raises, or prints, when it is imported."""
    exit_code, checks = doctor(write(tmp_path, HOST | ours() | files), arch="gfx950")
    assert exit_code == 1
    assert not checks[what]["ok"]
    assert checks[what]["found"].endswith(found)


def test_lines(tmp_path: Path) -> None:
    """The text says what the JSON says, a line each, in aligned columns."""
    path = write(tmp_path, HOST | ours() | {"aiter.py": "raise RuntimeError('ROCm\\nnot found')"})
    process = run_python(["-m", "vllm_mxfp4_gfx950.cli", "doctor", "--arch", "gfx950"], [path])
    assert process.returncode == 1
    lines = process.stdout.splitlines()
    _, checks = doctor(path, arch="gfx950")
    assert len(lines) == len(checks)
    for line, check in zip(lines, checks.values(), strict=True):
        shown = [check["what"], " ".join(check["found"].split()), check["needed"]]
        fields = ["ok", *shown] if check["ok"] else ["FAIL", *shown, check["fix"]]
        assert re.split(r" {2,}", line) == fields
        assert line.index(check["what"]) == 6
        assert line.index(shown[1]) == 6 + len("triton_matmul") + 2


@pytest.mark.parametrize("platform", ["hip", "cuda"])
def test_a_gpu_that_is_not_visible(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that was built for GPUs and sees none: the commonest fault of a container."""
    monkeypatch.setattr(torch.version, platform, "7.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    [check] = check_backends(None)
    assert not check.ok
    assert check.what == "GPU"
    assert check.found == "torch is built for one and sees none"
    assert "/dev/kfd" in check.fix
    assert check_backends("gfx950")[0].ok
