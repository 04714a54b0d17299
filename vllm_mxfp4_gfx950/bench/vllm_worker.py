"""What a vLLM worker does before it is measured: it says which path its layers take, and changes weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vllm_mxfp4_gfx950.errors import Mxfp4Error

OURS = "Mxfp4TritonMoEMethod"
BUILT_IN = "GptOssMxfp4MoEMethod"

SPREAD = ("norm", "embedding", "router")
"""How the names of the modules end whose weights `spread` changes."""


class Worker:
    """Added to the class of vLLM's workers (`--worker-extension-cls`), whose `get_model` it calls.

    Each method returns JSON: what it found under "done", or what makes a Mxfp4Error under "refused".
    """

    get_model: Callable[[], torch.nn.Module]

    def path_for_bench(self, engine: str) -> dict[str, Any]:
        """The path of all MoE layers, which is the one that the engine's name says, and the device."""
        return outcome(lambda: {"path": check_path(engine, moe_paths(self.get_model())), "device": device()})

    def spread_for_bench(self) -> dict[str, Any]:
        """`spread` this rank's weights."""
        return outcome(lambda: spread(self.get_model()))


def outcome(function: Callable[[], Any]) -> dict[str, Any]:
    """What a function returns or refuses, in JSON."""
    try:
        return {"done": function()}
    except Mxfp4Error as error:
        return {"refused": error.__reduce__()[1]}


def device() -> str:
    """What it is called."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def moe_paths(model: torch.nn.Module) -> list[str]:
    """The class that computes each MoE layer, and the backend that it chose; each once."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    found = set()
    for layer in model.modules():
        if isinstance(layer, RoutedExperts):
            method = layer.quant_method
            selection = getattr(getattr(method, "layers", None), "selection", "")
            ours = str(selection).partition(" on ")[0]
            theirs = getattr(getattr(method, "mxfp4_backend", None), "value", "")
            found.add(f"{type(method).__name__} {ours or theirs}".strip())
    return sorted(found)


def check_path(engine: str, paths: list[str]) -> str:
    """The one path. Raise Mxfp4Error unless all layers take that which the engine's name says."""
    if engine == "ours":
        right = len(paths) == 1 and paths[0].startswith(f"{OURS} ")
        wanted, fix = OURS, "See `vllm-mxfp4 doctor`: vLLM ignores the flag where the plugin is not installed"
    else:
        from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import map_mxfp4_backend

        allowed = [f"{BUILT_IN} {backend.value}" for backend in map_mxfp4_backend(engine.lower())]
        right = len(paths) == 1 and paths[0] in allowed
        wanted, fix = " or ".join(allowed), "Name another of vLLM's MoE backends"
    if not right:
        raise Mxfp4Error(f"the path of {engine}'s MoE layers", wanted, ", ".join(paths) or "none", fix)
    return paths[0]


def spread(model: torch.nn.Module) -> None:
    """Let tokens choose experts of their own, which vLLM's dummy weights do not.

    Those of a norm and of a router are so small that the router's bias decides, for all tokens alike.

    Raises:
        Mxfp4Error: the model has no such weights, as on most CPUs, where vLLM packs those of the router.
    """
    generator = torch.Generator().manual_seed(0)
    found = set()
    for name, parameter in model.named_parameters():
        kind = next((kind for kind in SPREAD if name.endswith(f"{kind}.weight") and parameter.numel()), "")
        found.add(kind)
        if kind == "norm":
            parameter.data.fill_(1)
        elif kind:
            size = 1.0 if kind == "embedding" else parameter.shape[1] ** -0.5
            values = torch.randn(parameter.shape, generator=generator) * size
            parameter.data.copy_(values.to(parameter.dtype))
    absent = sorted(set(SPREAD) - found)
    if absent:
        rule = f"one with weights of {', '.join(SPREAD)}"
        raise Mxfp4Error(
            "the model", rule, f"none of {' or '.join(absent)}", "Measure it as it is: --routing alike"
        )
