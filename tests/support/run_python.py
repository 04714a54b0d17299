"""Another interpreter, for what depends on sys.path, on sys.modules or on the environment."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

ROOT = Path(__file__).parents[2]
SUPPORT = Path(__file__).parent
R = TypeVar("R")
OURS = ("PYTHONPATH", "VLLM_PLUGINS", "VLLM_MXFP4_")
"""How the variables begin that a test sets itself."""


def run_python(
    arguments: Sequence[str],
    path: Sequence[Path] = (),
    stdin: str | None = None,
    cwd: Path | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run this interpreter on this machine's packages, without a GPU and without the caller's settings.

    It waits without a limit of its own: patience.py ends what hangs.

    Args:
        arguments: of the command line.
        path: directories that come before the project's own and before the installed packages.
        stdin: what it reads.
        cwd: where it runs; None for here.
        environment: variables to set.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    return subprocess.run(
        [sys.executable, *arguments],
        env=inherited
        | {"PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT, SUPPORT)))}
        | {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
        | environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        input=stdin,
    )


def once(function: Callable[..., R]) -> Callable[..., R]:
    """`functools.cache` that keeps what a call raises, too: what several tests share fails once."""

    @functools.cache
    def outcome(*arguments: Any) -> tuple[Any, BaseException | None]:
        try:
            return function(*arguments), None
        except (Exception, pytest.fail.Exception) as error:
            return None, error

    @functools.wraps(function)
    def call(*arguments: Any) -> R:
        result: R
        result, error = outcome(*arguments)
        if error:
            raise error
        return result

    return call
