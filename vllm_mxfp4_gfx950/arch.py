"""What is known of each GPU: its backends, the tiles that its kernels take, and how they are launched.

A fact about one GPU stands here; what an installed package can do is told by looking at the package.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from vllm_mxfp4_gfx950.moe import MoeShape
from vllm_mxfp4_gfx950.tiles import TileConfig

Integers: TypeAlias = range | tuple[int, ...]

TILE_BOUNDS: Mapping[str, Integers] = {
    "block_m": (8, 16, 32, 64, 128, 256),
    # No larger, as scales are padded so far: see triton.package.SCALE_ROWS.
    "block_n": (16, 32, 64, 128, 256, 512),
    "block_k": (32, 64, 128, 256),
    "split_k": range(1, 9),
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": range(1, 9),
    "waves_per_eu": range(9),
}
"""What the integers of a tile may be, whatever the GPU and the kernels."""

HOPPER_K = 64
"""Hopper's layout shuffles the values of 64 columns, so K can only end between such groups."""


@dataclass(frozen=True)
class Arch:
    """One instruction set.

    Args:
        name: "gfx950", "sm90", "cpu".
        families: the families of backends that "auto" tries, best first.
        needs_layout: triton_kernels must have a layout of one of these names; () for whatever it has.
        two_fp8: whether its matrix unit multiplies FP8 by FP4, scales included, for `two_fp8`.
        narrower: by kernels, what of TILE_BOUNDS they can take.
        candidates: by kernels, the tiles to try where the best are sought.
        ranked: kernels whose tiles in our table were ranked by compiling: those of the nearest Triton are
            better than the package's own, which spill. All others were timed, and serve with it alone.
        why_not: the reason why triton_kernels cannot compute a shape.
        constraints: what triton_kernels' own choice of flags must keep to.
        flags: those fields of triton_kernels' OptFlags that differ from GPU to GPU.
    """

    name: str
    families: tuple[str, ...]
    needs_layout: tuple[str, ...] = ()
    two_fp8: bool = False
    narrower: Mapping[str, Mapping[str, Integers]] = field(default_factory=dict)
    candidates: Mapping[str, tuple[TileConfig, ...]] = field(default_factory=dict)
    ranked: tuple[str, ...] = ()
    why_not: Callable[[MoeShape], str | None] = lambda shape: None
    constraints: Mapping[str, int] = field(default_factory=dict)
    flags: Callable[[TileConfig], dict[str, Any]] = lambda tile: {}

    def takes(self, kernels: str) -> dict[str, Integers]:
        """What the integers of a tile for some kernels may be."""
        found = {**TILE_BOUNDS, **self.narrower.get(kernels, {})}
        if kernels != "own":
            # Routing schedules no tiles of fewer rows for them.
            found["block_m"] = tuple(rows for rows in found["block_m"] if rows >= 16)
        return found


def _cdna_flags(tile: TileConfig) -> dict[str, Any]:
    return {
        "group_m": 4,
        "xcd_swizzle": 8,
        "w_cache_modifier": ".cg" if tile.block_m <= 32 else None,
        "target_kernel_kwargs": {
            "waves_per_eu": tile.waves_per_eu,
            "matrix_instr_nonkdim": 16,
            "kpack": 1,
        },
    }


def _hopper_flags(tile: TileConfig) -> dict[str, Any]:
    return {
        "group_m": 8,
        "xcd_swizzle": 1,
        "w_cache_modifier": None,
        "target_kernel_kwargs": hopper_registers(tile),
    }


def hopper_registers(tile: TileConfig) -> dict[str, Any]:
    """A thread's registers where each scheduler must have room for so many warps; None: any number."""
    return {"maxnreg": 512 // tile.waves_per_eu // 8 * 8 if tile.waves_per_eu else None}


def scales_codes(tile: TileConfig) -> bool:
    """Whether a tile of `own` scales codes, which pays where many rows share them, and not sums."""
    return tile.block_m >= 16 and tile.num_warps >= 4


def own_warps(tile: TileConfig) -> int:
    """The most warps of a tile of `own` that keep both halves of a sum in one thread.

    With more warps than groups of 64 columns, Triton 3.6 moves them from warp to warp in every step. Each
    tile of 8 warps that scales sums is such; on an H200 `vllm-mxfp4 tune` found tiles of 8 warps that are
    wrong, and why is not known. No tile of our table is such.
    """
    return 4 if scales_codes(tile) else tile.block_k // HOPPER_K


def _why_not_hopper(shape: MoeShape) -> str | None:
    if shape.hidden % HOPPER_K == 0 and shape.hidden > 128 and shape.intermediate > 64:
        return None
    return (
        f"on sm90 it takes a hidden size above 128 in steps of {HOPPER_K} and an intermediate size "
        f"above 64, not {shape.hidden} and {shape.intermediate}"
    )


GFX950_TILES = tuple(
    TileConfig(block_m, block_n, 256, 1, num_warps, num_stages, 0)  # The scale layout is read in 256 columns.
    for block_m, block_n, num_warps, num_stages in itertools.product(
        (16, 32, 64, 128), (32, 64, 128, 256), (2, 4, 8), (1, 2)
    )
    # Fewer than 512 outputs a wave leave its matrix instructions idle; more than 8,192 cannot be held.
    if 512 <= block_m * block_n // num_warps <= 8192
)

GFX950 = Arch(
    "gfx950",
    ("triton", "ck"),
    # One layout under its present name and under that of triton_kernels before 3.6.
    needs_layout=("CDNA4MXScaleLayout", "GFX950MXScaleLayout"),
    two_fp8=True,
    candidates={"matmul_ogs": GFX950_TILES, "matmul": GFX950_TILES},
    ranked=("matmul_ogs", "matmul"),
    flags=_cdna_flags,
)

GFX942 = Arch("gfx942", ("triton",), flags=_cdna_flags)

HOPPER_LAYOUTS = ("HopperMXValueLayout", "HopperMXScaleLayout")
"""triton_kernels' layouts of the values and the scales that our own matmuls read."""

HOPPER_SCALE_WARPS = 8
"""The warps that the scales are laid out for, side by side."""

OWN_MAX_SCALE = 128
"""The largest E8M0 scale that our own matmuls take, 2^1: a code is widened to itself times 2^-126, and where
codes are scaled the rest of its scale must be a bf16. The weights of such a block reach 12."""

OWN_TILES = (
    (8, 64, 64, 1, 0), (8, 64, 128, 1, 0), (8, 64, 128, 2, 0), (8, 32, 128, 1, 0), (8, 32, 128, 1, 5),
    (8, 32, 128, 2, 0), (8, 32, 256, 2, 0), (8, 32, 256, 2, 5), (16, 64, 64, 1, 0), (16, 128, 128, 4, 0),
    (32, 128, 128, 4, 0), (32, 128, 128, 4, 3), (32, 256, 64, 4, 0), (32, 256, 64, 4, 3),
    (64, 128, 128, 4, 0), (64, 256, 64, 4, 0), (64, 256, 64, 4, 2),
)  # fmt: skip
"""block_m, block_n, block_k, num_warps and waves_per_eu of our own matmuls."""

SM90 = Arch(
    "sm90",
    ("triton",),
    narrower={
        # With fewer warps than the scales are laid out for, the kernel takes one row's scale for another's.
        # Source: triton_kernels in vLLM 0.26, tensor_details/layout_details/hopper_scale.py,
        # matmul_ogs_details/_matmul_ogs.py, routing.py.
        "matmul_ogs": {
            "block_m": (16, 32, 64, 128),
            "block_n": (256,),
            "block_k": (64, 128, 256),
            "num_warps": (HOPPER_SCALE_WARPS,),
        },
        # A line of the values is 64 columns. Of the warps, see also `own_warps`.
        "own": {"block_k": (64, 128, 256), "num_warps": (1, 2, 4)},
    },
    candidates={
        "matmul_ogs": tuple(
            TileConfig(block_m, 256, block_k, 1, HOPPER_SCALE_WARPS, stages, waves)
            for block_m, (block_k, stages, waves) in itertools.product(
                (16, 32, 64, 128),
                ((128, 4, 0), (128, 3, 0), (128, 3, 4), (128, 2, 4), (64, 4, 0), (64, 4, 4), (256, 2, 0)),
            )
        ),
        "own": tuple(
            TileConfig(block_m, block_n, block_k, 1, warps, stages, waves)
            for (block_m, block_n, block_k, warps, waves), stages in itertools.product(OWN_TILES, (3, 4))
        ),
    },
    why_not=_why_not_hopper,
    # Splitting K is right but slow; vLLM pins this too, for the whole process.
    constraints={"split_k": 1},
    flags=_hopper_flags,
)

ARCHES = {arch.name: arch for arch in (GFX950, GFX942, SM90, Arch("cpu", ("reference",)))}


def arch_named(name: str) -> Arch:
    """What is known of an arch, which for others than ARCHES is its name."""
    return ARCHES.get(name) or Arch(name, ())
