"""The GPUs, and what hides them."""

from __future__ import annotations

import importlib
import os
import re

from vllm_mxfp4_gfx950.diagnosis import Check

MASKS = {
    "hip": ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"),
    "cuda": ("CUDA_VISIBLE_DEVICES",),
}
"""The variables that hide GPUs, by the platform that torch is built for."""

PRODUCTS = {
    "gfx950": ("mi350", "mi355"),
    "gfx942": ("mi300", "mi308", "mi325"),
    "sm90": ("h100", "h200", "h800", "h20", "hopper"),
}
"""How else people call an arch, to say which one they mean."""


def platform() -> str:
    """What torch is built for: "hip", "cuda" or "cpu"."""
    torch = importlib.import_module("torch")
    return "hip" if torch.version.hip else "cuda" if torch.version.cuda else "cpu"


def masks_set() -> dict[str, str]:
    """The variables that may hide GPUs from this platform, as they are set."""
    found = {name: os.environ[name] for name in MASKS.get(platform(), ()) if name in os.environ}
    # To HIP a blank one of its own is none.
    blank_hides = ("ROCR_VISIBLE_DEVICES",) if platform() == "hip" else found
    return {name: value for name, value in found.items() if value or name in blank_hides}


def visible() -> list[str]:
    """The arch of each GPU that torch sees; "cpu" alone where it is built for none."""
    import torch

    from vllm_mxfp4_gfx950.backends import arch_of

    if platform() == "cpu":
        return [arch_of(torch.device("cpu"))]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [arch_of(torch.device("cuda", index)) for index in range(count)]


def check_masks(must_show: bool) -> list[Check]:
    """What hides GPUs from this process, or makes vLLM stop.

    Args:
        must_show: whether a GPU has to be left.

    Source: vLLM 0.33, platforms/rocm.py, _sync_hip_cuda_env_vars.
    """
    if platform() == "cpu":
        return []
    masks = masks_set()
    found = " ".join(f"{name}={value}" for name, value in masks.items()) or "none"
    hip, cuda = masks.get("HIP_VISIBLE_DEVICES"), masks.get("CUDA_VISIBLE_DEVICES")
    fix = ""
    if platform() == "hip" and hip and cuda and hip != cuda:
        fix = "Set one of HIP_VISIBLE_DEVICES and CUDA_VISIBLE_DEVICES alone: vLLM stops where they differ"
    elif masks and must_show and not visible():
        fix = f"Unset {' and '.join(masks)}"
        if "ROCR_VISIBLE_DEVICES" in masks and len(masks) > 1:
            fix += ": the GPUs that ROCR_VISIBLE_DEVICES leaves are counted from 0 again"
    return [Check(not fix, "masks", found, "none that hides all GPUs or contradicts another", fix)]


def no_gpu() -> Check:
    """The line of a build for GPUs that sees none."""
    fix = "Give the container the GPU (/dev/kfd and /dev/dri on ROCm), or ask with --arch"
    if masks_set():
        fix = f"Mend the masks. If that is not it: {fix[0].lower()}{fix[1:]}"
    return Check(False, "GPU", "torch is built for one and sees none", "a visible GPU", fix)


def check_gpus(arches: list[str], asked: str | None, tp: int, served: bool) -> Check:
    """The GPUs, of which a server takes the first, or one for each rank.

    Args:
        arches: of all of them.
        asked: what the user wrote for an arch; None where these are what torch sees.
        tp: ranks.
        served: whether the model is served on the first one.
    """
    from vllm_mxfp4_gfx950 import settings
    from vllm_mxfp4_gfx950.arch import ARCHES

    others = [arch for arch in arches[:tp] if arch not in ARCHES and arch != arches[0]]
    ok = (arches[0] in ARCHES or served) and not others
    if len({*arches}) == 1:
        found = arches[0] if len(arches) == 1 else f"{len(arches)} x {arches[0]}"
    else:
        found = ", ".join(f"{index}: {arch}" for index, arch in enumerate(arches))
    right = [index for index, arch in enumerate(arches) if arch in ARCHES]
    fix = f"Run on one of these, or slowly with {settings.BACKEND_VAR}=reference and --enforce-eager"
    if asked:
        fix = hint(asked) or fix
    elif right:
        default = "HIP_VISIBLE_DEVICES" if platform() == "hip" else "CUDA_VISIBLE_DEVICES"
        mask = next((name for name in masks_set() if name != "ROCR_VISIBLE_DEVICES"), default)
        numbers = os.environ.get(mask, "").split(",")
        if len(numbers) != len(arches):  # It is not set, or another one hides more.
            numbers = [str(index) for index in range(len(arches))]
        shown = ",".join(numbers[index] for index in right)
        fix = f"{mask}={shown}, as a server takes the first GPUs that it sees"
    return Check(ok, "GPU", found, f"one of {', '.join(ARCHES)}", "" if ok else fix)


def hint(arch: str) -> str:
    """Which arch the user may have meant; "" where that cannot be told."""
    from vllm_mxfp4_gfx950.arch import ARCHES

    word = re.sub(r"[^a-z0-9]", "", arch.lower())
    for name, products in PRODUCTS.items():
        if any(product in word for product in products):
            return f"Write --arch {name}, which {arch} is"
    return f"Write --arch {word}" if word in ARCHES else ""
