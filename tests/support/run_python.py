"""Another interpreter, for what depends on sys.path, on sys.modules or on the environment."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUPPORT = Path(__file__).parent
OURS = ("PYTHONPATH", "VLLM_PLUGINS", "VLLM_MXFP4_")
"""How the variables begin that a test sets itself."""


def run_python(
    arguments: Sequence[str],
    path: Sequence[Path] = (),
    stdin: str | None = None,
    timeout: int = 120,
    cwd: Path | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run this interpreter on this machine's packages, without a GPU and without the caller's settings.

    Args:
        arguments: of the command line.
        path: directories that come before the project's own and before the installed packages.
        stdin: what it reads.
        timeout: in seconds.
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
        timeout=timeout,
        cwd=cwd,
        input=stdin,
    )
