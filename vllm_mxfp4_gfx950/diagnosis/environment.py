"""What is installed, found with as few imports as can be."""

from __future__ import annotations

import importlib
import os
import re
from importlib import metadata, util
from pathlib import Path

from vllm_mxfp4_gfx950 import plugins, settings
from vllm_mxfp4_gfx950.diagnosis import Check, interface, refusal
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.plugins import GROUP, OURS
from vllm_mxfp4_gfx950.settings import SGLANG_VAR

DISTRIBUTION = "vllm-mxfp4-gfx950"
SGLANG_GROUP = "sglang.srt.plugins"
NEVER_REQUIRED = ("torch", "triton", "triton-kernels", "vllm")
"""What an install of ours must not replace."""

HOOKS = Path("srt", "plugins", "hook_registry.py")
"""The file of SGLang by which a plugin takes part in what it builds; 0.5.16 has it."""


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
    directory, found = directory_of("vllm"), installed("vllm")
    missing = interface.missing(directory) if directory else []
    if missing:
        found += f", without {', '.join(missing)}"
    ok = not missing if directory else os.environ.get(SGLANG_VAR) == "1"
    rule = f"all that the plugin imports, or none with {SGLANG_VAR}=1"
    fix = "Install a vLLM from 0.24 to 0.33, or a later version of this package"
    return [Check(ok, "vllm", found, rule, fix)]


def check_sglang() -> list[Check]:
    """The other host, looked at in the same way, which matters where it is asked for."""
    try:
        asked = settings.for_sglang()
    except Mxfp4Error as error:
        return [refusal("sglang", error)]
    directory, names = directory_of("sglang"), os.environ.get("SGLANG_PLUGINS")
    found = f"{installed('sglang')}, {SGLANG_VAR}={int(asked)}"
    if names:
        found += f", SGLANG_PLUGINS={names}"
    fix = ""
    if directory is None or not (directory / HOOKS).is_file():
        fix = "Install SGLang 0.5.16 or later"
    elif not metadata.entry_points(group=SGLANG_GROUP, name=OURS):
        fix = "pip install this package's checkout"
    elif names and OURS not in map(str.strip, names.split(",")):
        fix = f"Unset SGLANG_PLUGINS or add {OURS} to it"
    return [Check(not (asked and fix), "sglang", found, f"0.5.16 or later with {SGLANG_VAR}=1", fix)]


def check_plugin() -> list[Check]:
    """Whether vLLM would find this package and load it."""
    points = metadata.entry_points(group=GROUP, name=OURS)
    found = ", ".join(point.value for point in points) or "not registered"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None:
        found += f", VLLM_PLUGINS={allowed}"
    ok = bool(points) and plugins.is_loaded(OURS)
    fix = f"Unset VLLM_PLUGINS or add {OURS} to it" if points else "pip install this package's checkout"
    return [Check(ok, "plugin", found, f"{OURS} in {GROUP}", fix)]


def check_other_plugins() -> list[Check]:
    """Whether another plugin puts a model of its own in the place of vLLM's GPT-OSS."""
    replacing = plugins.replacing_model()
    found, fix = replacing or "none known to replace it", plugins.how_to_turn_off(plugins.ATOM)
    return [Check(not replacing, "other plugins", found, "vLLM's own GPT-OSS", "" if not replacing else fix)]
