"""aiter's Triton kernels for MXFP4 experts, from a copy of aiter at hand, compiled for gfx950.

They are what AMD's engineers timed on a gfx950, so the time model can be held to them (`trial`). They serve
nothing here.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from vllm_mxfp4_gfx950.backends.triton.package import pad_scales
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.gfx950.driver import Launch, presented
from vllm_mxfp4_gfx950.tiles import TileConfig

PLACES = ("aiter.ops.triton._triton_kernels.moe", "aiter.ops.triton._triton_kernels")
"""Packages of aiter that may hold the kernels: since February 2026, and before."""

EXPERTS = 8
"""Of a launch, each with one tile of rows: a workgroup executes the same however many there are."""


@contextmanager
def without_init(source: Path) -> Iterator[None]:
    """Inside, aiter's modules can be imported from a directory; aiter itself cannot, without ROCm."""
    before = {name: each for name, each in sys.modules.items() if name.partition(".")[0] == "aiter"}
    for name in before:
        del sys.modules[name]
    packages = {"aiter"}
    for file in (source / "aiter/ops/triton").rglob("*.py"):
        packages.add(".".join(file.parent.relative_to(source).parts))
    packages |= {name.rpartition(".")[0] for name in packages if name.count(".")}
    for name in packages:
        package = ModuleType(name)
        package.__path__ = [str(source.joinpath(*name.split(".")))]
        sys.modules[name] = package
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "aiter"]:
            del sys.modules[name]
        sys.modules.update(before)


def kernel(source: Path, name: str) -> Any:
    """One of aiter's kernels.

    Args:
        source: the directory that has `aiter/`, such as an unpacked wheel.
        name: "a8w4" or "a16w4": the formats of its activations and weights.

    Raises:
        Mxfp4Error: the directory has no such kernel.
    """
    file = f"moe_op_gemm_{name}.py"
    for place in PLACES:
        if source.joinpath(*place.split("."), file).is_file():
            with without_init(source):
                module = importlib.import_module(f"{place}.moe_op_gemm_{name}")
            return getattr(module, f"_moe_gemm_{name}")
    fix = "Give the directory of an unpacked amd-aiter, or of a checkout of ROCm/aiter"
    raise Mxfp4Error("--aiter", f"a directory with aiter's {file}", source, fix)


def compiled(
    function: Any,
    tile: TileConfig,
    k: int,
    n: int,
    gather: bool,
    instruction: int = 16,
    swizzled: bool = True,
) -> Launch:
    """A launch of one of aiter's kernels, with a tile of rows for each of EXPERTS.

    Args:
        function: from `kernel`; its activations are FP8 with one scale where it is of a8w4, else bf16.
        tile: how it is cut up.
        k, n: depth and columns.
        gather: whether it is w13, which gathers its rows and ends in the SwiGLU; else w2.
        instruction: rows and columns of a matrix instruction.
        swizzled: whether the scales are in CDNA 4's layout; else as in the checkpoint, which is what aiter
            does where k is no multiple of 256.
    """
    fp8 = "a8w4" in function.__name__
    rows = EXPERTS * tile.block_m
    x = torch.zeros(rows, k, dtype=torch.float8_e4m3fn if fp8 else torch.bfloat16)
    w = torch.zeros(EXPERTS, n, k // 2, dtype=torch.uint8)
    scale = torch.zeros(EXPERTS, n, k // 32, dtype=torch.uint8)
    if swizzled:
        scale = pad_scales(scale)
        scale = scale.view(EXPERTS, scale.shape[1] // 32, scale.shape[2] * 32)
    one = torch.ones(1)
    out = n // 2 if gather else n
    y = torch.zeros(tile.split_k, rows, out, dtype=torch.bfloat16)
    grid_n = math.ceil(n / tile.block_n)
    values = {
        "Y": y,
        "stride_y_k": y.stride(0),
        "stride_y_m": y.stride(1),
        "stride_y_n": 1,
        "X": x,
        "stride_x_m": k,
        "stride_x_k": 1,
        "XMxScale": None,
        "stride_x_mx_m": 0,
        "stride_x_mx_k": 0,
        "W": w,
        "stride_w_e": w.stride(0),
        "stride_w_k": 1,
        "stride_w_n": w.stride(1),
        "WMxScale": scale,
        "stride_w_mx_e": scale.stride(0),
        "stride_w_mx_k": 1,
        "stride_w_mx_n": scale.stride(1),
        "X_static_scale": one if fp8 else None,
        "Quant_static_scale": None,
        "B": torch.zeros(EXPERTS, n),
        "stride_b_e": n,
        "Gammas": None if gather else torch.ones(rows),
        "N": n,
        "K": k,
        "GatherIndx": torch.arange(rows, dtype=torch.int32) if gather else None,
        "ExptHist": torch.full((EXPERTS,), tile.block_m, dtype=torch.int32),
        "ExptOffs": torch.arange(EXPERTS, dtype=torch.int32) * tile.block_m,
        "ExptOffsSum": torch.tensor([EXPERTS], dtype=torch.int32),
        "ExptData": torch.arange(EXPERTS, dtype=torch.int32),
        "grid_m": EXPERTS,
        "grid_n": grid_n,
        "APPLY_SWIGLU": gather,
        "alpha": 1.702,
        "limit": 7.0,
        "ACTIVATION_REDUCTION_N": 2 if gather else 1,
        "SWIGLU_ADD_RESIDUAL": True,
        "N_EXPTS_ACT": 1,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": 4,
        "XCD_SWIZZLE": 8,
        "SWIZZLE_MX_SCALE": "CDNA4_SCALE" if swizzled else None,
        "EVEN_K": k % (tile.block_k * tile.split_k) == 0,
        "MASK_K_LIMIT": k % (tile.block_k * tile.split_k),
        "SPLIT_K": tile.split_k,
        "W_CACHE_MODIFIER": ".cg" if tile.block_m <= 32 else None,
        "UPCAST_INDICES": False,
    }
    options = {
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "waves_per_eu": tile.waves_per_eu,
        "matrix_instr_nonkdim": instruction,
        "kpack": 1,
    }
    launches: list[Launch] = []
    given = {name: value for name, value in values.items() if name in function.arg_names}
    with presented(launches.append):
        function[(EXPERTS * grid_n * tile.split_k,)](**given, **options)
    return launches[0]
