"""Plugins of vLLM beside ours, of which one may replace the model that our layers belong to."""

from __future__ import annotations

import os
from importlib import metadata

GROUP, OURS = "vllm.general_plugins", "mxfp4_triton"
"""The entry points that vLLM calls in all of its processes, and the name of ours."""

ATOM, ATOM_OFF_VAR = "atom", "ATOM_DISABLE_VLLM_PLUGIN"
"""ROCm's ATOM has a GPT-OSS of its own.

Source: ROCm/ATOM, atom/plugin/vllm/register.py (register_model) and pyproject.toml, in 2026.
"""


def replacing_model() -> str | None:
    """The plugin that vLLM would load here and that is known to replace GPT-OSS; none is imported.

    Others show only when vLLM has called them: loading the model looks at that.
    """
    for point in metadata.entry_points(group=GROUP):
        if package_of(point.module) == ATOM and is_loaded(point.name) and os.environ.get(ATOM_OFF_VAR) != "1":
            return f"{point.name} ({point.value})"
    return None


def how_to_turn_off(module: str) -> str:
    """What to do for vLLM's own GPT-OSS to be served, instead of the model in this module."""
    package = package_of(module)
    if package == ATOM:
        return f"Set {ATOM_OFF_VAR}=1"
    points = metadata.entry_points(group=GROUP)
    names = sorted(point.name for point in points if package_of(point.module) == package)
    if names:
        return f"Leave {', '.join(names)} out of VLLM_PLUGINS: set VLLM_PLUGINS={OURS}"
    return "Leave out what registers it: a plugin, or --model-class-overrides"


def is_loaded(name: str) -> bool:
    """Whether vLLM loads a plugin of this name."""
    names = os.environ.get("VLLM_PLUGINS")
    return names is None or name in names.split(",")


def package_of(module: str) -> str:
    """The first part of its name."""
    return module.partition(".")[0]
