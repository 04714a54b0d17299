"""Find OpenAI's triton_kernels and tell what it can do, by looking at it and never by its version."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

VENDORED = Path("third_party") / "triton_kernels"
"""Where vLLM keeps its own copy, under the package `vllm`."""


def locate() -> Path | None:
    """The directory of the installed triton_kernels, else of vLLM's copy, else None.

    The installed one comes first, as it does for vLLM, so that one process never holds two.
    """
    for package, inner in (("triton_kernels", Path()), ("vllm", VENDORED)):
        spec = importlib.util.find_spec(package)
        for root in (spec and spec.submodule_search_locations) or ():
            if (Path(root) / inner).is_dir():
                return Path(root) / inner
    return None


def why_not(entry: str, needs: dict[str, tuple[str, ...]]) -> str | None:
    """The reason why the package at hand lacks an interface.

    Args:
        entry: the module that makes the generation: "matmul_ogs" or "matmul".
        needs: the names that are used, by module of the package.

    Returns:
        None when everything is there and imports.
    """
    directory = locate()
    if directory is None:
        return "triton_kernels is not installed, and there is no vLLM that vendors it"
    generations = [name for name in ("matmul_ogs", "matmul") if (directory / f"{name}.py").is_file()]
    if not generations:
        return (
            f"triton_kernels in {directory} has neither matmul_ogs nor matmul, so it is not OpenAI's "
            "(the triton-kernels on PyPI is an unrelated package; pip uninstall triton-kernels)"
        )
    if entry not in generations:
        return f"triton_kernels in {directory} is of the {generations[0]} generation and has no {entry}"
    for name, attributes in needs.items():
        try:
            module = load(name)
        except ImportError as error:
            return f"triton_kernels in {directory} does not import here: {error}"
        for attribute in attributes:
            if not hasattr(module, attribute):
                return f"triton_kernels in {directory} is of an unknown generation: no {name}.{attribute}"
    return None


def load(name: str) -> ModuleType:
    """Import a module of the package that `locate` found.

    vLLM's copy imports itself as `triton_kernels`, so it is made known by that name, which is also
    what vLLM does.

    Raises:
        ImportError: it is not there, or it needs another Triton.
    """
    if importlib.util.find_spec("triton_kernels") is None:
        directory = locate()
        if directory is None:
            raise ModuleNotFoundError("triton_kernels is not installed", name="triton_kernels")
        spec = importlib.util.spec_from_file_location(
            "triton_kernels", directory / "__init__.py", submodule_search_locations=[str(directory)]
        )
        assert spec is not None
        assert spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules["triton_kernels"] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"triton_kernels.{name}")


def source() -> str:
    """Where the package lies, and under which Triton it runs."""
    return f"triton_kernels in {locate()}, triton {importlib.import_module('triton').__version__}"
