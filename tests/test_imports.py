"""Imports go one way, each foreign package has one file that may import it, and none comes uncalled."""

import ast
import json
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
from run_python import ROOT, run_python

PACKAGE = "vllm_mxfp4_gfx950"

MAY_IMPORT: dict[str, str] = {
    "__init__": "",
    "mxfp4": "",
    "errors": "",
    "moe": "errors mxfp4",
    "models": "errors mxfp4 moe",
    "settings": "errors",
    "process": "errors",
    "plugins": "",
    "tiles": "moe",
    "arch": "moe tiles",
    "tables": "errors moe tiles arch",
    "backends": "errors mxfp4 moe settings tiles arch tables",
    "random_layer": "moe",
    "timing": "",
    "tolerance": "",
    "choice": "moe tiles backends random_layer timing",
    "self_check": "errors moe settings tiles backends tolerance",
    "checkpoint": "errors mxfp4 moe settings",
    "files": "errors moe settings checkpoint",
    "serving": "errors moe settings tiles backends choice self_check",
    "vllm_checks": "errors settings plugins backends checkpoint files",
    "vllm_plugin": "errors mxfp4 moe models settings plugins backends checkpoint files serving vllm_checks",
    "sglang_layer": "errors mxfp4 moe settings backends checkpoint serving",
    "sglang_plugin": "errors settings sglang_layer",
    "gfx950": "errors mxfp4 moe models settings tiles arch tables backends tolerance",
    "tuning": "errors moe models settings tiles arch tables backends random_layer timing tolerance",
    "bench": "errors moe models settings process backends random_layer serving timing tolerance",
    "evaluation": "errors settings process",
    "diagnosis": "errors moe models settings plugins tiles arch tables backends checkpoint files",
    "options": "settings",
    "commands": "errors options process diagnosis mxfp4 moe models settings plugins tiles arch tables "
    "backends choice checkpoint files gfx950 random_layer timing tolerance tuning bench evaluation",
    "cli": "errors options commands",
}
"""Each part of the package, and the parts below it that it may import beside itself."""

ONLY_IN = {
    "triton_kernels": "backends/triton/*.py",
    "aiter": "backends/ck.py backends/aiter_triton.py",
    "vllm": "vllm_plugin.py vllm_checks.py bench/vllm_*.py",
    "sglang": "sglang_layer.py",
    "matplotlib": "bench/report.py evaluation/report.py",
}
"""Foreign packages, and the files that may import them."""

INSIDE = {
    "cli.py": "a command, and nothing of the others",
    "models.py": "transformers, where it is installed",
    "sglang_plugin.py": "SGLang, where it is asked for",
    "backends/triton/package.py": "triton_kernels, and our file for it: the registry's",
    "backends/ck.py": "aiter: likewise",
    "backends/aiter_triton.py": "aiter, and our routing and sum, which need Triton: likewise",
    "diagnosis/*.py": "all that may be broken",
    "commands/bench.py": "vLLM's layers, which need vLLM",
    "process.py": "requests, which comes with vLLM and with the extra `eval`",
    "bench/vllm_*.py": "vLLM, which may be missing, and of its layers one and not the other's package",
    "bench/report.py": "matplotlib, for --plot",
    "commands/eval.py": "scipy, of the extra `eval`",
    "evaluation/*.py": "the packages of the extra `eval`",
}
"""Files that import inside of a function what may be missing, and what that is. Others do it at their top."""

HEAVY = ("vllm", "sglang", "aiter", "triton", "triton_kernels")
IMPORT_LIMIT = 500
"""Calls of functions that an import of the package may take, which do not depend on the machine."""


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that a file names in an import, `importlib.import_module` with a literal included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            callee = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[0]
            if isinstance(name, ast.JoinedStr) and name.values:
                name = name.values[0]
            if callee in ("import_module", "__import__") and isinstance(name, ast.Constant):
                yield str(name.value)


def inside_functions(tree: ast.AST) -> Iterator[str]:
    """Every module that a function imports."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from imported(node)


def complaints(root: Path) -> list[str]:
    """What a source tree of the package does against the rules."""
    found = []
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        part = name.parts[0].removesuffix(".py")
        if part not in MAY_IMPORT:
            found.append(f"{name} is a part without a rule")
            continue
        tree = ast.parse(file.read_text())
        if not any(fnmatch(name.as_posix(), pattern) for pattern in INSIDE):
            found += [
                f"{name} imports {module} in a function" for module in sorted(set(inside_functions(tree)))
            ]
        for module in imported(tree):
            package, *rest = module.split(".")
            if not package:
                found.append(f"{name} imports {module} relatively")
            elif package == PACKAGE:
                target = rest[0] if rest and rest[0] in MAY_IMPORT else "__init__"
                if target not in (part, *MAY_IMPORT[part].split()):
                    found.append(f"{name} imports {target}")
            elif package in ONLY_IN and not any(
                fnmatch(name.as_posix(), pattern) for pattern in ONLY_IN[package].split()
            ):
                found.append(f"{name} imports {package}")
    return found


def test_source_keeps_the_rules() -> None:
    """The package as it stands."""
    assert (ROOT / PACKAGE / "moe.py").is_file()
    assert complaints(ROOT / PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("mxfp4.py", f"from {PACKAGE}.moe import MoeShape", "mxfp4.py imports moe"),
        ("mxfp4.py", f"from {PACKAGE} import __version__", "mxfp4.py imports __init__"),
        ("moe.py", f"import {PACKAGE}.settings", "moe.py imports settings"),
        ("tiles.py", f"from {PACKAGE} import arch", "tiles.py imports arch"),
        ("arch.py", f"from {PACKAGE}.tables import ladder", "arch.py imports tables"),
        ("tables/store.py", f"from {PACKAGE} import backends", "tables/store.py imports backends"),
        ("backends/ck.py", f"from {PACKAGE} import tuning", "backends/ck.py imports tuning"),
        ("tuning/search.py", f"from {PACKAGE} import gfx950", "tuning/search.py imports gfx950"),
        ("moe.py", "def f():\n    import torch", "moe.py imports torch in a function"),
        (
            "backends/triton/matmul_ogs.py",
            "f = lambda: __import__('triton_kernels')",
            "backends/triton/matmul_ogs.py imports triton_kernels in a function",
        ),
        ("backends/ck.py", f"from {PACKAGE} import vllm_plugin", "backends/ck.py imports vllm_plugin"),
        ("commands/doctor.py", f"from {PACKAGE} import cli", "commands/doctor.py imports cli"),
        ("cli.py", f"from {PACKAGE} import backends", "cli.py imports backends"),
        ("backends/__init__.py", "from . import ck", "backends/__init__.py imports ..ck relatively"),
        (
            "backends/ck.py",
            "from triton_kernels.routing import routing",
            "backends/ck.py imports triton_kernels",
        ),
        ("backends/triton/matmul_ogs.py", "import aiter.ops", "backends/triton/matmul_ogs.py imports aiter"),
        ("commands/doctor.py", "import vllm", "commands/doctor.py imports vllm"),
        (
            "diagnosis/model.py",
            "import importlib\ndef f():\n    importlib.import_module('vllm.envs')",
            "diagnosis/model.py imports vllm",
        ),
        ("bench/serve.py", "import vllm", "bench/serve.py imports vllm"),
        ("serving.py", "from sglang import srt", "serving.py imports sglang"),
        ("moe.py", "NAME = ''\n__import__(f'aiter.{NAME}')", "moe.py imports aiter"),
        ("utils.py", "", "utils.py is a part without a rule"),
    ],
)
def test_rules_notice(tmp_path: Path, file: str, line: str, complaint: str) -> None:
    """Negative control: one bad line in a tree that is otherwise good."""
    good = {
        "backends/triton/x.py": f"import triton_kernels.matmul\nfrom {PACKAGE}.mxfp4 import BLOCK",
        "backends/ck.py": "from aiter import fused_moe",
        "vllm_plugin.py": f"import vllm\nfrom {PACKAGE} import backends, moe",
    }
    for name, text in {**good, file: good.get(file, "") + "\n" + line}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert complaints(tmp_path) == [complaint]


def loaded_by(module: str, path: tuple[Path, ...] = ()) -> tuple[list[str], int]:
    """What a fresh interpreter holds of the heavy packages and CUDA after an import, and its calls."""
    code = (
        "import sys, json\n"
        "calls = 0\n"
        "def count(frame, event, argument):\n"
        "    global calls\n"
        "    calls += event in ('call', 'c_call')\n"
        "sys.setprofile(count)\n"
        f"import {module}\n"
        "sys.setprofile(None)\n"
        f"heavy = [name for name in {('torch', *HEAVY)} if name in sys.modules]\n"
        "torch = sys.modules.get('torch')\n"
        "if torch is not None and torch.cuda.is_initialized():\n"
        "    heavy.append('CUDA')\n"
        "print(json.dumps([heavy, calls]))\n"
    )
    process = run_python(["-c", code], path)
    assert process.returncode == 0, process.stderr
    heavy, calls = json.loads(process.stdout)
    return heavy, calls


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("errors", []),
        ("settings", []),
        ("sglang_plugin", []),
        ("options", []),
        ("cli", []),
        ("mxfp4", ["torch"]),
        ("moe", ["torch"]),
        ("arch", ["torch"]),
        ("tables", ["torch"]),
        ("backends", ["torch"]),
    ],
)
def test_import_is_light(module: str, heavy: list[str]) -> None:
    """Torch where they compute with it, and none of the others; no GPU is touched."""
    assert loaded_by(f"{PACKAGE}.{module}")[0] == heavy


def test_import_of_the_package_is_instant() -> None:
    """The package alone does not even load torch."""
    heavy, calls = loaded_by(PACKAGE)
    assert heavy == []
    assert 0 < calls < IMPORT_LIMIT


def test_light_notices(tmp_path: Path) -> None:
    """Negative control: a package that loads aiter, and takes its time."""
    (tmp_path / "aiter.py").touch()
    (tmp_path / "heavy.py").write_text("import aiter\nfor _ in range(500):\n    abs(0)")
    heavy, calls = loaded_by("heavy", (tmp_path,))
    assert heavy == ["aiter"]
    assert calls > IMPORT_LIMIT
