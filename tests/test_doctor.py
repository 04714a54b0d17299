"""`vllm-mxfp4 doctor`, run as a user runs it, in environments made of real directories."""

import importlib
import json
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine
import pytest
import tiny_checkpoint
import torch
from run_python import ROOT, run_python
from safetensors.torch import load_file, save_file
from tiny_checkpoint import TinyGptOss

from vllm_mxfp4_gfx950 import cli, tiles
from vllm_mxfp4_gfx950.backends.triton import package
from vllm_mxfp4_gfx950.diagnosis import interface
from vllm_mxfp4_gfx950.diagnosis.environment import (
    check_dependencies,
    check_other_plugins,
    check_plugin,
    check_sglang,
    check_vllm,
)
from vllm_mxfp4_gfx950.diagnosis.machine import MASKS
from vllm_mxfp4_gfx950.diagnosis.model import check_backends
from vllm_mxfp4_gfx950.models import GPT_OSS, layer_shape
from vllm_mxfp4_gfx950.tables import store

VLLM = ROOT / ".venv/packages/vllm-0.33.0"
IMPOSTOR = "so it is not OpenAI's (the triton-kernels on PyPI is an unrelated package"
EVERYTHING = [
    "torch",
    "dependencies",
    "vllm",
    "plugin",
    "other plugins",
    "sglang",
    "GPU",
    "settings",
    "triton",
    "triton_ogs",
    "triton_ragged",
    "triton_matmul",
    "two_fp8_ogs",
    "two_fp8_ragged",
    "two_fp8_matmul",
    "ck",
    "aiter_triton",
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
    **{
        f"{module.replace('.', '/')}/{name}.py": ""
        for module, names in interface.needed().items()
        for name in names
    },
    **distribution("vllm", "0.33.0", "vllm"),
    "aiter.py": "raise ModuleNotFoundError(\"No module named 'aiter'\", name='aiter')",
}
"""A vLLM without a copy of triton_kernels, and no aiter."""


def doctor(
    *path: Path, arch: str | None = "cpu", more: tuple[str, ...] = (), **environment: str
) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit code, and each check by what it is about."""
    asked = [f"--arch={arch}"] if arch else []
    process = run_python(
        ["-m", "vllm_mxfp4_gfx950.cli", "doctor", "--json", *asked, *more], path, **environment
    )
    assert "Traceback" not in process.stderr, process.stderr
    checks = json.loads(process.stdout)
    assert all(check["ok"] for check in checks) == (process.returncode == 0)
    for check in checks:
        assert list(check) == ["ok", "what", "found", "needed", "fix"]
        assert check["ok"] or check["fix"]
    return process.returncode, {check["what"]: check for check in checks}


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
        "VLLM_MXFP4_BACKEND=auto, VLLM_MXFP4_STRICT=0, VLLM_MXFP4_SELF_CHECK=first, VLLM_MXFP4_TABLES=unset, "
        "VLLM_MXFP4_TIME_AT_LOAD=1"
    )
    for what in ("triton_ogs", "triton_ragged", "triton_matmul"):
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
    for model, experts in (("gpt-oss-20b", 32), ("gpt-oss-120b", 128)):
        assert checks[model]["found"] == "triton_ogs, tiles of this package"
        assert checks[model]["needed"].startswith(f"a backend for E={experts} topk=4 H=2880 I=2880 ")
    assert checks["vllm"]["found"] == f"vllm 0.33.0 in {VLLM / 'vllm'}"


def test_impostor_is_named(tmp_path: Path) -> None:
    """The unrelated triton-kernels of PyPI: a fault where Triton is needed, a remark where it is not."""
    impostor = {"triton_kernels/__init__.py": "", "triton_kernels/add_vectors.py": ""}
    path = write(tmp_path, HOST | ours() | impostor)
    exit_code, checks = doctor(path, arch="gfx950")
    assert exit_code == 1
    assert failed(checks) == [
        "triton_ogs",
        "triton_ragged",
        "triton_matmul",
        "ck",
        "gpt-oss-20b",
        "gpt-oss-120b",
    ]
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


SGLANG = {"sglang/srt/plugins/hook_registry.py": "", **distribution("sglang", "0.5.23", "sglang")}
INSTALL, CHECKOUT = "Install SGLang 0.5.16 or later", "pip install this package's checkout"


@pytest.mark.parametrize(
    ("files", "variables", "fix"),
    [
        ({}, {"VLLM_MXFP4_SGLANG": "1"}, INSTALL),
        ({"sglang/__init__.py": ""} | ours(), {"VLLM_MXFP4_SGLANG": "1"}, INSTALL),
        (SGLANG | ours(points=""), {"VLLM_MXFP4_SGLANG": "1"}, CHECKOUT),
        (
            SGLANG | ours(),
            {"VLLM_MXFP4_SGLANG": "1", "SGLANG_PLUGINS": "other"},
            "Unset SGLANG_PLUGINS or add mxfp4_triton to it",
        ),
        (SGLANG | ours(), {"VLLM_MXFP4_SGLANG": "on"}, "Set VLLM_MXFP4_SGLANG to one of these or unset it"),
        (SGLANG | ours(), {"VLLM_MXFP4_SGLANG": "1", "SGLANG_PLUGINS": "other, mxfp4_triton"}, None),
        ({}, {}, None),
    ],
    ids=["none", "before 0.5.16", "not registered", "not loaded", "wrong value", "served", "not asked for"],
)
def test_sglang(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, str],
    variables: dict[str, str],
    fix: str | None,
) -> None:
    """It is named wherever it is, and fails only where it is asked for and would not call us."""
    monkeypatch.syspath_prepend(write(tmp_path, files))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (check,) = check_sglang()
    assert check.ok == (fix is None)
    if fix is not None:
        assert check.fix == fix
    elif files:
        assert check.found == (
            f"sglang 0.5.23 in {tmp_path / 'sglang'}, VLLM_MXFP4_SGLANG=1, SGLANG_PLUGINS=other, mxfp4_triton"
        )


def test_no_vllm_beside_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """One host is enough, and it must be the one that is asked for."""
    monkeypatch.setattr("vllm_mxfp4_gfx950.diagnosis.environment.directory_of", lambda package: None)
    assert [check.ok for check in check_vllm()] == [False]
    monkeypatch.setenv("VLLM_MXFP4_SGLANG", "1")
    assert [check.ok for check in check_vllm()] == [True]


def test_another_plugin_that_replaces_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ATOM beside us: our flag would be accepted, and its model served."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    (check,) = check_other_plugins()
    assert check.ok
    points = "[vllm.general_plugins]\natom_model_registry = atom.plugin.vllm.register:register_model\n"
    monkeypatch.syspath_prepend(write(tmp_path, distribution("atom", "1.0", points=points)))
    (check,) = check_other_plugins()
    assert not check.ok
    assert check.found == "atom_model_registry (atom.plugin.vllm.register:register_model)"
    assert check.fix == "Set ATOM_DISABLE_VLLM_PLUGIN=1"
    monkeypatch.setenv("ATOM_DISABLE_VLLM_PLUGIN", "1")
    (check,) = check_other_plugins()
    assert check.ok


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
    wrong = ["settings", "gpt-oss-20b", "gpt-oss-120b"]
    none = ["triton_ogs", "triton_ragged", "triton_matmul", "ck", "gpt-oss-20b", "gpt-oss-120b"]
    cases: list[tuple[dict[str, str], str, list[str]]] = [
        ({"VLLM_MXFP4_BACKEND": "cuda"}, "cpu", wrong),
        ({"VLLM_MXFP4_STRICT": "yes"}, "cpu", wrong),
        ({"VLLM_MXFP4_BACKENDS": "ck"}, "gfx950", wrong),
        ({"VLLM_MXFP4_TABLES": "/nowhere"}, "gfx950", wrong),
        ({"VLLM_MXFP4_BACKEND": "reference"}, "gfx1100", []),
        ({}, "gfx1100", ["GPU", "gpt-oss-20b", "gpt-oss-120b"]),
        ({"VLLM_MXFP4_BACKEND": "ck"}, "gfx950", ["ck", "gpt-oss-20b", "gpt-oss-120b"]),
        ({"VLLM_MXFP4_BACKEND": "fastest"}, "gfx950", none),
        ({}, "gfx942", ["triton_ogs", "triton_ragged", "triton_matmul", "gpt-oss-20b", "gpt-oss-120b"]),
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
    old = {name: text for name, text in HOST.items() if "RoutedExperts" not in name}
    exit_code, checks = doctor(write(tmp_path, old | ours()))
    assert exit_code == 1
    assert failed(checks) == ["vllm"]
    lacks = "without vllm.model_executor.layers.fused_moe.RoutedExperts"
    assert checks["vllm"]["found"] == f"vllm 0.33.0 in {tmp_path / 'vllm'}, {lacks}"


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
        assert line.index(shown[1]) == 6 + len("two_fp8_matmul") + 2


@pytest.mark.parametrize("platform", ["hip", "cuda"])
def test_a_gpu_that_is_not_visible(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that was built for GPUs and sees none: the commonest fault of a container."""
    monkeypatch.setattr(torch.version, platform, "7.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for variable in MASKS["hip"]:
        monkeypatch.delenv(variable, raising=False)
    masks, check = check_backends(None, None, 1, 1)
    assert masks.ok
    assert not check.ok
    assert check.what == "GPU"
    assert check.found == "torch is built for one and sees none"
    assert "/dev/kfd" in check.fix
    assert check_backends("gfx950", None, 1, 1)[1].ok


NEEDS_VLLM = pytest.mark.skipif(not VLLM.is_dir(), reason=f"needs {VLLM.relative_to(ROOT)}")


@pytest.mark.parametrize(
    ("gpus", "masks", "faults", "texts"),
    [
        (
            "gfx950:sramecc+:xnack-,gfx1036",
            {},
            [],
            {"GPU": ("0: gfx950, 1: gfx1036", ""), "masks": ("none", "")},
        ),
        (
            "gfx1036,gfx950:sramecc+:xnack-",
            {},
            ["GPU"],
            {"GPU": ("0: gfx1036, 1: gfx950", "HIP_VISIBLE_DEVICES=1, as a server takes the first")},
        ),
        (
            "gfx1036,gfx950",
            {"CUDA_VISIBLE_DEVICES": "3,2"},
            ["GPU"],
            {"GPU": ("0: gfx1036, 1: gfx950", "CUDA_VISIBLE_DEVICES=2, as")},
        ),
        (
            "gfx1036,gfx950",
            {"HIP_VISIBLE_DEVICES": "0"},
            ["GPU"],
            {"GPU": ("0: gfx1036, 1: gfx950", "HIP_VISIBLE_DEVICES=1, as")},
        ),
        (
            "",
            {"HIP_VISIBLE_DEVICES": "1", "ROCR_VISIBLE_DEVICES": "1"},
            ["masks", "GPU"],
            {
                "masks": (
                    "ROCR_VISIBLE_DEVICES=1 HIP_VISIBLE_DEVICES=1",
                    "Unset ROCR_VISIBLE_DEVICES and HIP_VISIBLE_DEVICES: the GPUs that ROCR",
                )
            },
        ),
        (
            "",
            {"ROCR_VISIBLE_DEVICES": ""},
            ["masks", "GPU"],
            {"masks": ("ROCR_VISIBLE_DEVICES=", "Unset ROCR")},
        ),
        ("", {}, ["GPU"], {"GPU": ("torch is built for one and sees none", "Give the container the GPU")}),
        (
            "gfx950",
            {"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"},
            ["masks"],
            {"masks": ("HIP_VISIBLE_DEVICES=0 CUDA_VISIBLE_DEVICES=1", "Set one of HIP_VISIBLE_DEVICES and")},
        ),
        ("gfx950,gfx950", {"HIP_VISIBLE_DEVICES": "0,1"}, [], {"GPU": ("2 x gfx950", "")}),
    ],
    ids=["both", "other-first", "masked", "other-count", "hidden", "blank", "none", "contradict", "two"],
)
def test_gpus_and_what_hides_them(
    gpus: str,
    masks: dict[str, str],
    faults: list[str],
    texts: dict[str, tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every GPU that ROCm's torch shows, with its arch, and the variables by which others are not shown."""
    arches = [name for name in gpus.split(",") if name]
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(arches))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(arches))
    properties = [SimpleNamespace(gcnArchName=name) for name in arches]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties[device.index])
    for variable in MASKS["hip"]:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in masks.items():
        monkeypatch.setenv(variable, value)
    lines = {line.what: line for line in check_backends(None, None, 1, 1)}
    assert [what for what in ("masks", "GPU") if not lines[what].ok] == faults
    for what, (found, fix) in texts.items():
        assert lines[what].found == found
        assert lines[what].fix.startswith(fix)


@pytest.mark.parametrize(
    ("arch", "fix"),
    [
        ("MI355X", "Write --arch gfx950, which MI355X is"),
        ("AMD Instinct MI300X", "Write --arch gfx942, which"),
        ("H100", "Write --arch sm90, which"),
        ("GFX950", "Write --arch gfx950"),
        ("gfx-950", "Write --arch gfx950"),
        ("sm_90", "Write --arch sm90"),
        ("gfx1100", "Run on one of these"),
    ],
)
def test_arch_by_another_name(arch: str, fix: str) -> None:
    """What the user meant."""
    line = next(check for check in check_backends(arch, None, 1, 1) if check.what == "GPU")
    assert not line.ok
    assert line.fix.startswith(fix)


def test_arch_as_rocminfo_prints_it() -> None:
    """With its features."""
    with_features, plain = (check_backends(f"gfx950{features}", None, 1, 1) for features in (":xnack-", ""))
    assert with_features == plain
    assert next(check for check in plain if check.what == "GPU").ok


@NEEDS_VLLM
def test_leftover_of_an_uninstall(tmp_path: Path) -> None:
    """It hides vLLM's own copy, and no package is there to uninstall."""
    (tmp_path / "triton_kernels/__pycache__").mkdir(parents=True)
    _, checks = doctor(write(tmp_path, ours()), VLLM, arch="gfx950")
    assert not checks["triton_ogs"]["ok"]
    assert "is a folder without any Python, as an uninstall leaves it" in checks["triton_ogs"]["found"]
    assert checks["triton_ogs"]["fix"] == f"rm -r {tmp_path / 'triton_kernels'}"
    shutil.rmtree(tmp_path / "triton_kernels")  # The fix.
    assert doctor(tmp_path, VLLM, arch="gfx950")[0] == 0


@pytest.mark.parametrize(
    ("files", "fix"),
    [
        (None, "Install it from Triton's repository, as vLLM's build for this GPU lacks it: pip install"),
        ((), "rm -r "),
        (("__init__.py",), "pip uninstall triton-kernels"),
        (("__init__.py", "matmul_ogs.py"), "Leave only the triton_kernels and the triton that vLLM's build"),
    ],
    ids=["absent", "leftover", "impostor", "broken"],
)
def test_what_to_do_about_triton_kernels(
    files: tuple[str, ...] | None, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fix is for this cause."""
    monkeypatch.setattr(package, "locate", lambda: None if files is None else tmp_path)
    for name in files or ():
        (tmp_path / name).write_text("raise RuntimeError('no Triton for it')")
    line = next(line for line in check_backends("gfx950", None, 1, 1) if line.what == "triton_ogs")
    assert not line.ok
    assert line.fix.startswith(fix)


@NEEDS_VLLM
def test_tables(tmp_path: Path) -> None:
    """Whose tiles serve; and a corrupt table is at fault, not the backends."""
    path, tables = write(tmp_path / "site", ours()), tmp_path / "tables"
    tables.mkdir()
    gemms = tiles.gemms(layer_shape("gpt-oss-20b"))
    tile = tiles.Ladder((64,), (tiles.TileConfig(16, 64, 256, 1, 4, 1, 0),))
    release = tiles.release_of(importlib.import_module("triton").__version__)
    table = store.Content(tiles={("matmul_ogs", release, gemm): tile for gemm in gemms})
    pinned = store.Content(plans={(release, gemms[0]): tiles.Ladder((64,), ("package",))})
    for content, found in (
        (pinned, "0 matmuls and plans of 1 layers"),
        (table, "2 matmuls and plans of 0 layers"),
    ):
        store.write(tables / "gfx950.json", "gfx950", content)
        exit_code, checks = doctor(path, VLLM, arch="gfx950", VLLM_MXFP4_TABLES=str(tables))
        assert exit_code == 0
        assert checks["tables"]["found"] == f"tiles of {found} in {tables / 'gfx950.json'}"
    assert checks["gpt-oss-20b"]["found"] == f"triton_ogs, tiles of {tables / 'gfx950.json'}"
    assert checks["gpt-oss-120b"]["found"].startswith("triton_ogs, tiles of this package (")
    (tables / "gfx950.json").write_text("{}")
    exit_code, checks = doctor(path, VLLM, arch="gfx950", VLLM_MXFP4_TABLES=str(tables))
    assert failed(checks) == ["tables", "gpt-oss-20b", "gpt-oss-120b"]
    assert checks["tables"]["found"].startswith(f"{tables / 'gfx950.json'}: ")


def test_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint's own sizes, topk and files; and one that is not there is no answer but exit code 2."""
    directory = tiny_checkpoint.write(TinyGptOss(experts=6, topk=3), tmp_path / "tiny")
    files, line = check_backends(None, str(directory), 1, 1)[-2:]
    assert (files.ok, files.what) == (True, "checkpoint")
    assert files.found.startswith("1 safetensors file, ")
    assert (line.ok, line.what, line.found) == (True, str(directory), "reference")
    assert line.needed.startswith("a backend for E=6 topk=3 H=128 I=128 ")
    [line] = [line for line in check_backends("cpu", "openai/gpt-oss-120b", 8, 8) if "gpt" in line.what]
    assert line.needed.startswith("a backend for E=16 of 128 topk=4 ")
    for wrong in (["--model", "gpt-oss"], ["--tp", "0"]):
        assert cli.main(["doctor", "--arch", "cpu", *wrong]) == 2
        assert capsys.readouterr().err.startswith(f"vllm-mxfp4 doctor: {wrong[0]} must be ")


def cut_off(directory: Path) -> None:
    """A download that stopped."""
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def without(name: str) -> Callable[[Path], None]:
    """Lose a tensor."""

    def change(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        del tensors[name]
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    return change


def config(**changes: object) -> Callable[[Path], None]:
    """Change config.json."""

    def change(directory: Path) -> None:
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def nothing(_directory: Path) -> None:
    """Leave a checkpoint as it is."""


MODEL = TinyGptOss(experts=4, topk=2, layers=1)
AGREED: dict[str, tuple[Callable[[Path], object], dict[str, str], str]] = {
    "sound": (nothing, {}, ""),
    "reference": (nothing, {"VLLM_MXFP4_BACKEND": "reference", "VLLM_MXFP4_STRICT": "1"}, ""),
    "tables": (nothing, {"VLLM_MXFP4_TABLES": "."}, ""),
    "corrupt-table": (nothing, {"VLLM_MXFP4_TABLES": "{tables}"}, "tables"),
    "no-tables": (nothing, {"VLLM_MXFP4_TABLES": "/nowhere"}, "settings"),
    "misspelt-value": (nothing, {"VLLM_MXFP4_BACKEND": "trition"}, "settings"),
    "misspelt-name": (nothing, {"VLLM_MXFP4_BACKENDS": "reference"}, "settings"),
    "no-backend": (nothing, {"VLLM_MXFP4_BACKEND": "triton"}, "triton_ogs"),
    "topk-3": (config(num_experts_per_tok=3, experts_per_token=3), {}, ""),
    "topk-9": (config(num_experts_per_tok=9, experts_per_token=9), {}, "{model}"),
    "size": (config(intermediate_size=100), {}, "{model}"),
    "method": (config(quantization_config={"quant_method": "fp8"}), {}, "checkpoint"),
    "unquantized": (config(quantization_config=None), {}, "checkpoint"),
    "cut-off": (cut_off, {}, "checkpoint"),
    "router": (without("model.layers.0.mlp.router.weight"), {}, "checkpoint"),
    "no-files": (lambda directory: (directory / "model.safetensors").unlink(), {}, "checkpoint"),
}
"""What is done to a checkpoint and to the environment, and the line of doctor that fails first, if any."""


@pytest.mark.engine
@pytest.mark.parametrize("name", AGREED)
def test_doctor_and_serving_agree(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What doctor passes is served, and what it fails is refused, by vLLM on this CPU."""
    change, environment, fault = AGREED[name]
    directory = tiny_checkpoint.write(MODEL, tmp_path / "model")
    change(directory)
    write(tmp_path, {"tables/cpu.json": "{}"})
    environment = {
        variable: value.format(tables=tmp_path / "tables") for variable, value in environment.items()
    }
    outcome = engine.outcome(directory, environment, quantization=engine.FLAG, dtype="float32")
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    wrong = [line.what for line in check_backends(None, str(directory), 1, 1) if not line.ok]
    assert wrong[:1] == ([fault.format(model=directory)] if fault else []), outcome
    assert outcome.startswith("served by") == (not fault), outcome


@NEEDS_VLLM
def test_doctor_and_serving_agree_about_gfx950(tmp_path: Path) -> None:
    """The choice before loading, with vLLM's triton_kernels, by settings and sizes."""
    write(tmp_path, {"tables/gfx950.json": "{}"})
    for name, change in (("wide", {"num_experts_per_tok": 6}), ("odd", {"hidden_size": 100})):
        (tmp_path / name).write_text(json.dumps({"model_type": "gpt_oss"} | GPT_OSS["gpt-oss-20b"] | change))
    cases = [
        ({}, "gpt-oss-20b"),
        ({}, "gpt-oss-120b"),
        ({}, str(tmp_path / "wide")),
        ({}, str(tmp_path / "odd")),
        ({"VLLM_MXFP4_BACKEND": "ck"}, "gpt-oss-20b"),
        ({"VLLM_MXFP4_BACKEND": "reference"}, str(tmp_path / "wide")),
        ({"VLLM_MXFP4_STRICT": "1"}, str(tmp_path / "wide")),
        ({"VLLM_MXFP4_STRIKT": "1"}, "gpt-oss-20b"),
        ({"VLLM_MXFP4_TABLES": str(tmp_path / "tables")}, "gpt-oss-20b"),
    ]
    code = (
        "import json, os, sys\n"
        "from vllm_mxfp4_gfx950 import serving, settings\n"
        "from vllm_mxfp4_gfx950.commands.doctor import check_backends\n"
        "from vllm_mxfp4_gfx950.models import layer_shape\n"
        "before = dict(os.environ)\n"
        "for environment, model in json.loads(sys.argv[1]):\n"
        "    os.environ.clear()\n"
        "    os.environ.update(before | environment)\n"
        "    try:\n"
        "        serving.model_layers(layer_shape(model), 'gfx950', settings.from_environment(), 64)\n"
        "        refused = ''\n"
        "    except Exception as error:\n"
        "        refused = str(error)\n"
        "    lines = check_backends('gfx950', model, 1, 1)\n"
        "    print(json.dumps([refused, [line.what for line in lines if not line.ok]]))\n"
    )
    process = run_python(["-c", code, json.dumps(cases)], [write(tmp_path / "site", ours()), VLLM])
    assert process.returncode == 0, process.stderr
    found = [json.loads(line) for line in process.stdout.splitlines()]
    assert len(found) == len(cases)
    for case, (refused, wrong) in zip(cases, found, strict=True):
        assert bool(refused) == bool(wrong), (case, refused, wrong)
    assert {bool(refused) for refused, _ in found} == {True, False}
