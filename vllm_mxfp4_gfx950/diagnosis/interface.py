"""What this package's adapter takes from vLLM, looked up in a vLLM's source, without importing either."""

from __future__ import annotations

import ast
from pathlib import Path

ADAPTER = ("vllm_plugin.py", "vllm_checks.py")
"""Files whose imports from vLLM are the list of what is needed: without one, vLLM loads no plugin."""


def needed() -> dict[str, set[str]]:
    """The names that the adapter imports from vLLM, by module."""
    names: dict[str, set[str]] = {}
    for file in ADAPTER:
        for node in ast.parse((Path(__file__).parents[1] / file).read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                names.setdefault(str(node.module), set()).update(alias.name for alias in node.names)
    return names


def missing(vllm: Path) -> list[str]:
    """Those that this vLLM does not have, as module.name.

    Args:
        vllm: the package's directory.
    """
    return sorted(
        f"{module}.{name}"
        for module, names in needed().items()
        for name in names - _names_of(vllm.joinpath(*module.split(".")[1:]))
    )


def _names_of(module: Path) -> set[str]:
    """What can be imported from a module: its definitions, what it imports itself, and its files."""
    names = {each.stem for each in module.iterdir()} if module.is_dir() else set()
    file = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
    for node in ast.walk(ast.parse(file.read_text() if file.is_file() else "")):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names
