"""What all generations of OpenAI's triton_kernels share: finding the package, and its layouts' rules.

What a package can do is told by importing our file for its generation, never by its version.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from vllm_mxfp4_gfx950.arch import ARCHES, arch_named
from vllm_mxfp4_gfx950.moe import MoeShape
from vllm_mxfp4_gfx950.tiles import TileConfig

VENDORED = Path("third_party") / "triton_kernels"
"""Where vLLM keeps its own copy, under the package `vllm`."""

GET = (
    "pip install --no-deps "
    "'git+https://github.com/triton-lang/triton@v3.5.1#subdirectory=python/triton_kernels'"
)
"""How to install the release of triton_kernels that vLLM vendors, whatever Triton there is."""

SCALE_GROUPS = 8
SCALE_ROWS = 512
"""The kernels load whole tiles of scales, unmasked: K up to 256 values (8 groups), N up to 512 rows."""

MAX_EXPERTS, MAX_TOPK = 512, 32
"""The largest that `routing` has been executed with, on the emulated gfx950."""

EXPERTS_AT_ONCE = 4
"""Swizzled together: enough to keep the GPU busy, few enough that the temporaries stay small."""


@dataclass(frozen=True)
class Weight:
    """One matmul's weights as the package and as our own matmuls take them, in the same memory.

    Args:
        tensor: triton_kernels' FP4 tensor [E, K, N].
        precision: its PrecisionConfig, which holds the scales.
        bias: fp32[E, N].
        values, scales: uint8 in the GPU's layout, the depth last.
        layouts: triton_kernels' layouts of the values and of the scales.
    """

    tensor: Any
    precision: Any
    bias: torch.Tensor
    values: torch.Tensor
    scales: torch.Tensor
    layouts: tuple[object, object]


def tensors_of(w13: Any, w2: Any, order: torch.Tensor | None) -> list[torch.Tensor]:
    """What a layer's kernels read: each matmul's values, scales and bias, and the experts' order."""
    parts = [part for weight in (w13, w2) for part in (weight.values, weight.scales, weight.bias)]
    return parts if order is None else [*parts, order]


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


def why_not_layer(generation: str, shape: MoeShape, arch: str) -> str | None:
    """The reason why a shape cannot run on an arch with the package at hand.

    Args:
        generation: of triton_kernels, by the name of our file for it.
        shape: the layer.
        arch: as `backends.arch_of` names it.

    Returns:
        None when everything is there and imports.
    """
    known = arch_named(arch)
    if "triton" not in known.families:
        there = (name for name, each in ARCHES.items() if "triton" in each.families)
        return f"it runs on {', '.join(there)}, not on {arch}"
    reason = why_not_routing(shape) or known.why_not(shape) or why_not(generation)
    if reason is None and known.needs_layout:
        layout = load("tensor_details.layout")
        if not any(hasattr(layout, name) for name in known.needs_layout):
            return f"triton_kernels in {locate()} has no {' or '.join(known.needs_layout)}"
        try:
            backend(generation).to_opt_flags(TileConfig(16, 64, 256, 1, 4, 1, 0), arch)
        except TypeError as error:
            return f"triton_kernels in {locate()} does not take our tiles: {error}"
    return reason


def why_not_routing(shape: MoeShape) -> str | None:
    """The reason why our routing cannot take a shape."""
    if shape.global_experts <= MAX_EXPERTS and shape.topk <= MAX_TOPK:
        return None
    return (
        f"routing takes up to {MAX_EXPERTS} experts and a topk of up to {MAX_TOPK}, "
        f"not {shape.global_experts} and {shape.topk}"
    )


def why_not_two_fp8(generation: str, shape: MoeShape, arch: str) -> str | None:
    """The reason why our kernels with two FP8 addends cannot stand in front of a generation's; as above."""
    if not arch_named(arch).two_fp8:
        there = (name for name, each in ARCHES.items() if each.two_fp8)
        return f"its matrix instructions are those of {', '.join(there)}, not of {arch}"
    return why_not_layer(generation, shape, arch)


def two_fp8(generation: str) -> Any:
    """A generation's backend with our kernels with two FP8 addends in front of it."""
    return importlib.import_module(f"{__package__}.two_fp8").TwoFp8Backend(backend(generation))


def backend(generation: str) -> Any:
    """The class of a generation's layers, from our file for it, which imports triton_kernels by that name."""
    find()
    return importlib.import_module(f"{__package__}.{generation}").Generation


def why_not(generation: str) -> str | None:
    """The reason why the package at hand is not of a generation, or why our file for it does not import."""
    directory = locate()
    if directory is None:
        return "triton_kernels is not installed, and there is no vLLM that vendors it"
    generations = generations_of(directory)
    if not generations:
        stranger = (
            "has neither matmul_ogs nor matmul, so it is not OpenAI's "
            "(the triton-kernels on PyPI is an unrelated package; pip uninstall triton-kernels)"
        )
        leftover = "is a folder without any Python, as an uninstall leaves it (remove it)"
        return f"triton_kernels in {directory} {leftover if is_leftover(directory) else stranger}"
    if generation not in generations:
        return f"triton_kernels in {directory} is of the {generations[0]} generation and has no {generation}"
    try:
        backend(generation)
    except Exception as error:  # An import meets whatever Triton and driver there are.
        return f"triton_kernels in {directory} does not import here: {error}"
    return None


def generations_of(directory: Path) -> list[str]:
    """Which of the generations a package is of; none of an unrelated one."""
    is_ragged = (directory / "tensor_details/ragged_tensor.py").is_file()
    files = {"ragged_ogs" if is_ragged else "matmul_ogs": "matmul_ogs.py", "matmul": "matmul.py"}
    return [name for name, file in files.items() if (directory / file).is_file()]


def is_leftover(directory: Path) -> bool:
    """Whether only folders and caches are left of a package; Python finds it still, before vLLM's copy."""
    return not any(directory.rglob("*.py"))


def remedy() -> str:
    """What to do where triton_kernels is at fault, by what `locate` finds.

    Source: vLLM, cmake/external_projects/triton_kernels.cmake, for where vLLM takes its own copy from.
    """
    directory = locate()
    if directory is None:
        return f"Install it from Triton's repository, as vLLM's build for this GPU lacks it: {GET}"
    if is_leftover(directory):
        return f"rm -r {directory}"
    if not generations_of(directory):
        return "pip uninstall triton-kernels"
    return "Leave only the triton_kernels and the triton that vLLM's build for this GPU brings"


def load(name: str) -> ModuleType:
    """Import a module of the package that `locate` found.

    Raises:
        ImportError: it is not there, or it needs another Triton.
    """
    find()
    return importlib.import_module(f"triton_kernels.{name}")


def find() -> None:
    """Make the package that `locate` found known as `triton_kernels`.

    vLLM's copy imports itself by that name, and vLLM makes it known so, too.

    Raises:
        ImportError: it is not there, or it needs another Triton.
    """
    if importlib.util.find_spec("triton_kernels") is not None:
        return
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
    try:
        spec.loader.exec_module(package)
    except BaseException:
        del sys.modules["triton_kernels"]
        raise


def arch_of_target() -> str:
    """What Triton compiles for, as `backends.arch_of` names it."""
    target = importlib.import_module("triton").runtime.driver.active.get_current_target()
    return f"sm{target.arch}" if target.backend == "cuda" else str(target.arch)


def source() -> str:
    """Where the package lies, and under which Triton it runs."""
    return f"triton_kernels in {locate()}, triton {importlib.import_module('triton').__version__}"


def swizzle(data: torch.Tensor, layout: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Bring experts into a layout a few at a time, in place where the number of bytes stays the same.

    Args:
        data: uint8[E, N, K], blocks or scales; consumed.
        layout: takes some experts as [e, K, N] and gives them as [e, K', N'], K' contiguous.

    Returns:
        uint8[E, K', N'], K' contiguous.
    """
    out: torch.Tensor | None = None
    for first in range(0, data.shape[0], EXPERTS_AT_ONCE):
        some = data[first : first + EXPERTS_AT_ONCE]
        swizzled = layout(some.mT).mT
        if out is None:
            size = (data.shape[0], *swizzled.shape[1:])
            out = data.view(size) if swizzled.numel() == some.numel() else data.new_empty(size)
        if swizzled.data_ptr() != some.data_ptr():
            out[first : first + EXPERTS_AT_ONCE].copy_(swizzled)
    assert out is not None
    return out.mT


def opt_flags_fields(tile: TileConfig, arch: str) -> dict[str, Any]:
    """The OptFlags that all generations have; what a tile does not say is as they have it on that GPU."""
    return {
        "block_m": tile.block_m,
        "block_n": tile.block_n,
        "block_k": tile.block_k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "split_k": tile.split_k,
        "is_persistent": False,
        "idle_sms": 0,
        "epilogue_subtile": 1,
        "arch": None,
        **ARCHES[arch].flags(tile),
    }


def launch_options(num_warps: int, overlaps: bool) -> dict[str, Any]:
    """Options of a launch of our own kernels.

    Args:
        num_warps: of a workgroup.
        overlaps: whether, on Hopper, it begins while the launch before it runs, and waits there: see
            `routing_kernels.await_previous`.
    """
    return {"num_warps": num_warps, "OVERLAP": overlaps} | ({"launch_pdl": True} if overlaps else {})


def pad_scales(scales: torch.Tensor) -> torch.Tensor:
    """Widen scales with zeros until no tile of them reaches past their end.

    Args:
        scales: uint8[E, N, K/32].

    Returns:
        uint8[E, N up to a multiple of 512, K/32 up to a multiple of 8].
    """
    groups, rows = scales.shape[2], scales.shape[1]
    return torch.nn.functional.pad(scales, (0, -groups % SCALE_GROUPS, 0, -rows % SCALE_ROWS))
