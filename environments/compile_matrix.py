"""Compile every matmul that GPT-OSS needs on gfx950, with each Triton and each triton_kernels that imports.

make compile-matrix    one line for each Triton, model and division; fails if any kernel does not fit
make tune              search the tiles anew, and write the table
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from vllm_mxfp4_gfx950.models import DIVISIONS, GPT_OSS

ROOT = Path(__file__).parents[1]
VENV = ROOT / ".venv"
KERNELS = {
    "matmul_ogs": VENV / "packages/vllm-0.33.0/vllm/third_party",
    "ragged_ogs": VENV / "packages/sglang-kernel",
    "matmul": VENV / "packages/tokenspeed-triton-kernels",
}
TABLE = ROOT / "vllm_mxfp4_gfx950/tables/gfx950.json"
MATMUL_SINCE = (3, 8)
"""triton_kernels of the matmul generation does not import with an older Triton."""


def run(triton: str, kernels: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of ours under a Triton and a triton_kernels."""
    path = (VENV / "triton" / triton, KERNELS[kernels], ROOT)
    command = [sys.executable, "-m", "vllm_mxfp4_gfx950.cli", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)


def pairs(tritons: list[str]) -> Iterator[tuple[str, str]]:
    """Each Triton with each generation of triton_kernels that imports with it."""
    for triton in tritons:
        yield triton, "matmul_ogs"
        yield triton, "ragged_ogs"
        if tuple(map(int, triton.split(".")[:2])) >= MATMUL_SINCE:
            yield triton, "matmul"


def tune(tritons: list[str]) -> int:
    """Search the tiles anew."""
    for triton, kernels in pairs(tritons):
        if kernels == "ragged_ogs":  # It takes the tiles of matmul_ogs.
            continue
        print(f"triton {triton} {kernels}", flush=True)
        run(triton, kernels, "tune", "--arch", "gfx950", "--table", str(TABLE)).check_returncode()
    return 0


def check(tritons: list[str]) -> int:
    """Compile everything and print the matrix."""
    total = misfits = 0
    for triton, kernels in pairs(tritons):
        for model, (tp, ep) in itertools.product(GPT_OSS, DIVISIONS):
            arguments = ["--json", f"--model={model}", f"--tp={tp}", f"--ep={ep}"]
            result = run(triton, kernels, "compile", *arguments)
            if not result.stdout:
                result.check_returncode()
            matmuls = json.loads(result.stdout)["ours"]
            bad = sum(not matmul["fits"] or matmul["report"]["workgroups"] < 2 for matmul in matmuls)
            print(
                f"triton {triton} {kernels:10} {model:12} TP {tp} EP {ep}: {len(matmuls)}, {bad} bad",
                flush=True,
            )
            total, misfits = total + len(matmuls), misfits + bad
    print(f"{total} matmuls compiled for gfx950, {misfits} of them misfits or alone on a compute unit")
    return 1 if misfits else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = {"check": check, "tune": tune}
    parser.add_argument("command", choices=commands)
    parser.add_argument("tritons", nargs="+", metavar="triton", help="a release that lies in .venv/triton")
    args = parser.parse_args()
    sys.exit(commands[args.command](args.tritons))
