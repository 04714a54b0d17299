"""Say what is installed here, what serving GPT-OSS needs of it, and which backend would be chosen."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_mxfp4_gfx950.errors import brief

if TYPE_CHECKING:
    from vllm_mxfp4_gfx950.backends import Entry
    from vllm_mxfp4_gfx950.moe import MoeShape

DISTRIBUTION = "vllm-mxfp4-gfx950"
PLUGIN_GROUP, PLUGIN = "vllm.general_plugins", "mxfp4_triton"
NEVER_REQUIRED = ("torch", "triton", "triton-kernels", "vllm")
"""What an install of ours must not replace."""

ROUTED_EXPERTS = Path("model_executor", "layers", "fused_moe", "routed_experts.py")
"""The file of vLLM that our plugin's layer came with, in 0.24."""

FIXES = {
    "triton": "Leave only the triton_kernels that vLLM's build for this GPU brings",
    "ck": "Install the aiter that vLLM's build for this GPU names",
    "reference": "",
}
"""For each family of backends."""

COLUMN = 48
"""A longer text runs over its column's end, so that one line does not stretch them all."""


@dataclass(frozen=True)
class Check:
    """One line of the answer.

    Args:
        ok: False when GPT-OSS cannot be served because of this.
        what: the piece.
        found: what is here.
        needed: what has to be.
        fix: what to do when it is not ok.
    """

    ok: bool
    what: str
    found: str
    needed: str
    fix: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--arch", help="answer for this GPU, such as gfx950, instead of the one found")


def run(args: argparse.Namespace) -> int:
    """Print the checks, a line each; the exit code is 1 when one of them failed."""
    with contextlib.redirect_stdout(sys.stderr):  # Some packages print when they are imported.
        checks = examine(args.arch)
    served = all(check.ok for check in checks)
    if args.json:
        print(json.dumps({"served": served, "checks": [dataclasses.asdict(check) for check in checks]}))
    else:
        print(table(checks))
    return 0 if served else 1


def table(checks: list[Check]) -> str:
    """Aligned columns: ok or FAIL, what, found, needed, fix."""
    rows = [
        ("ok" if c.ok else "FAIL", c.what, " ".join(c.found.split()), c.needed, "" if c.ok else c.fix)
        for c in checks
    ]
    widths = [min(COLUMN, max(map(len, column))) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def examine(arch: str | None) -> list[Check]:
    """Every check, in the order in which faults should be mended.

    Args:
        arch: the GPU to answer for; None for the one that torch sees.
    """
    return [
        *guarded("torch", check_torch),
        *guarded("dependencies", check_dependencies),
        *guarded("vllm", check_vllm),
        *guarded("plugin", check_plugin),
        *guarded("backends", lambda: check_backends(arch)),
    ]


def guarded(what: str, check: Callable[[], list[Check]]) -> list[Check]:
    """A check's answer, or what a missing or broken package raised."""
    try:
        return check()
    except Exception as error:
        return [Check(False, what, brief(error), "to be found without an error", "Install it again")]


def directory_of(package: str) -> Path | None:
    """Where a package would be imported from."""
    spec = util.find_spec(package)
    places = (spec.submodule_search_locations or [str(spec.origin)]) if spec else []
    return next(map(Path, places), None)


def installed(package: str) -> str:
    """Which distribution a package is of and where it lies, found without importing it."""
    directory = directory_of(package)
    if directory is None:
        return "not installed"
    for name in metadata.packages_distributions().get(package, ()):
        distribution = metadata.distribution(name)
        if Path(str(distribution.locate_file(package))).resolve() == directory.resolve():
            return f"{name} {distribution.version} in {directory}"
    return f"in {directory}"


def check_torch() -> list[Check]:
    """Torch, and the GPU platform that it was built for."""
    torch = importlib.import_module("torch")
    platforms = {"hip": torch.version.hip, "cuda": torch.version.cuda}
    built_for = [f"{name} {version}" for name, version in platforms.items() if version] or ["cpu only"]
    return [Check(True, "torch", f"{torch.__version__}, {built_for[0]}", "the build that vllm needs")]


def check_dependencies() -> list[Check]:
    """What installing this package pulls in."""
    required = [r for r in metadata.requires(DISTRIBUTION) or () if "extra ==" not in r]
    names = {re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower() for requirement in required}
    found = ", ".join(required) or "none"
    rule = f"none of {', '.join(NEVER_REQUIRED)}"
    fix = f"Install {DISTRIBUTION} with --no-deps, and report this"
    return [Check(names.isdisjoint(NEVER_REQUIRED), "dependencies", found, rule, fix)]


def check_vllm() -> list[Check]:
    """The host, looked at without importing it, which takes seconds."""
    directory = directory_of("vllm")
    ok = directory is not None and (directory / ROUTED_EXPERTS).is_file()
    return [Check(ok, "vllm", installed("vllm"), "0.24 or later", "Install vLLM 0.24 or later")]


def check_plugin() -> list[Check]:
    """Whether vLLM would find this package and load it."""
    points = metadata.entry_points(group=PLUGIN_GROUP, name=PLUGIN)
    found = ", ".join(point.value for point in points) or "not registered"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None:
        found += f", VLLM_PLUGINS={allowed}"
    ok = bool(points) and (allowed is None or PLUGIN in allowed.split(","))
    fix = f"Unset VLLM_PLUGINS or add {PLUGIN} to it" if points else "pip install this package's checkout"
    return [Check(ok, "plugin", found, f"{PLUGIN} in {PLUGIN_GROUP}", fix)]


def check_backends(arch: str | None) -> list[Check]:
    """The GPU, the settings, each backend and its package, and what each of the two models would run on."""
    import torch

    from vllm_mxfp4_gfx950 import backends, settings
    from vllm_mxfp4_gfx950.errors import Mxfp4Error
    from vllm_mxfp4_gfx950.models import GPT_OSS, layer_shape

    if arch is None and not torch.cuda.is_available() and (torch.version.hip or torch.version.cuda):
        fix = "Give the container the GPU (/dev/kfd and /dev/dri on ROCm), or ask with --arch"
        return [Check(False, "GPU", "torch is built for one and sees none", "a visible GPU", fix)]
    arch = arch or backends.arch_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    asked, fault = settings.Settings(), ""
    try:
        asked = settings.from_environment()
    except Mxfp4Error as error:
        fault = str(error)

    shapes = {model: layer_shape(model) for model in GPT_OSS}
    chosen: dict[str, str] = {}
    refused: dict[str, str] = {}
    for model, shape in shapes.items():
        try:
            chosen[model] = backends.select(shape, arch, asked).backend.NAME
        except Exception as error:
            refused[model] = str(error) if isinstance(error, Mxfp4Error) else brief(error)
    tried = backends.ORDER.get(arch, ()) if asked.backend == "auto" else (asked.backend,)

    def backend_check(family: str, entry: Entry) -> Check:
        works, found = state_of(entry, shapes["gpt-oss-20b"], arch)
        if entry.name in chosen.values():
            return Check(True, entry.name, found, "chosen")
        if refused and family in tried:
            return Check(works, entry.name, found, "one that works", FIXES[family])
        return Check(True, entry.name, found, "not needed here")

    return [
        Check(
            arch in backends.ORDER or not refused,
            "GPU",
            arch,
            f"one of {', '.join(backends.ORDER)}",
            f"Run on one of these, or slowly with {settings.BACKEND_VAR}=reference and --enforce-eager",
        ),
        Check(
            not fault,
            "settings",
            fault
            or f"{settings.BACKEND_VAR}={asked.backend}, {settings.STRICT_VAR}={int(asked.strict)}, "
            f"{settings.SELF_CHECK_VAR}={asked.self_check}, {settings.TABLES_VAR}={asked.tables or 'unset'}",
            "values that exist",
            "Correct it or unset it",
        ),
        Check(True, "triton", installed("triton"), "for the triton backends"),
        *(backend_check(family, entry) for family, members in backends.FAMILIES.items() for entry in members),
        *(
            Check(model in chosen, model, chosen.get(model) or refused[model], "a backend", "See above")
            for model in shapes
        ),
    ]


def state_of(entry: Entry, shape: MoeShape, arch: str) -> tuple[bool, str]:
    """Whether a backend works on this arch; and why not, or which package does the work.

    It is asked about gfx950 too, so that a package's own faults show wherever one looks.
    """
    try:
        here, package = (entry.why_not(shape, a) for a in (arch, "gfx950"))
        texts = dict.fromkeys((here, package or entry.load().source()))
    except Exception as error:
        return False, brief(error)
    return here is None, "; ".join(filter(None, texts))
