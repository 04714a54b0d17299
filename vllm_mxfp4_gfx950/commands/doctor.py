"""Say what is installed here, what serving GPT-OSS needs of it, and which backend would be chosen."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable

from vllm_mxfp4_gfx950.diagnosis import Check
from vllm_mxfp4_gfx950.diagnosis.environment import (
    check_dependencies,
    check_other_plugins,
    check_plugin,
    check_sglang,
    check_torch,
    check_vllm,
)
from vllm_mxfp4_gfx950.diagnosis.model import check_backends
from vllm_mxfp4_gfx950.errors import Mxfp4Error, brief

COLUMN = 48
"""A longer text runs over its column's end, so that one line does not stretch them all."""


def run(args: argparse.Namespace) -> int:
    """Print the checks, a line each; the exit code is 1 when one of them failed."""
    with contextlib.redirect_stdout(sys.stderr):  # Some packages print when they are imported.
        checks = examine(args.arch, args.model, args.tp, args.ep)
    if args.json:
        print(json.dumps([dataclasses.asdict(check) for check in checks], indent=1))
    else:
        print(table(checks))
    return 0 if all(check.ok for check in checks) else 1


def table(checks: list[Check]) -> str:
    """Aligned columns: ok or FAIL, what, found, needed, fix."""
    rows = [
        ("ok" if c.ok else "FAIL", c.what, " ".join(c.found.split()), c.needed, "" if c.ok else c.fix)
        for c in checks
    ]
    widths = [min(COLUMN, max(map(len, column))) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def examine(arch: str | None = None, model: str | None = None, tp: int = 1, ep: int = 1) -> list[Check]:
    """Every check, in the order in which faults should be mended.

    Args:
        arch: the GPU to answer for, also as rocminfo prints it; None for those that torch sees.
        model: as `models.layer_shape` takes it; None for both of GPT-OSS.
        tp, ep: likewise.
    """
    return [
        *guarded("torch", check_torch),
        *guarded("dependencies", check_dependencies),
        *guarded("vllm", check_vllm),
        *guarded("plugin", check_plugin),
        *guarded("other plugins", check_other_plugins),
        *guarded("sglang", check_sglang),
        *guarded("backends", lambda: check_backends(arch, model, tp, ep)),
    ]


def guarded(what: str, check: Callable[[], list[Check]]) -> list[Check]:
    """A check's answer, or what a missing or broken package raised."""
    try:
        return check()
    except Mxfp4Error:
        raise  # What was asked for is wrong, not what is here.
    except Exception as error:
        return [Check(False, what, brief(error), "to be found without an error", "Install it again")]
