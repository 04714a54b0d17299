"""The experts through triton_kernels' `routing` and `matmul_ogs`, the generation that vLLM vendors."""

from __future__ import annotations

from typing import Any

from triton_kernels.matmul_ogs import FnSpecs, FusedActivation
from triton_kernels.matmul_ogs_details.opt_flags import OptFlags
from triton_kernels.routing import ExptData, GatherIndx, RoutingData, ScatterIndx
from triton_kernels.swiglu import swiglu_fn

from vllm_mxfp4_gfx950.backends.triton import package
from vllm_mxfp4_gfx950.backends.triton.ogs import Ogs
from vllm_mxfp4_gfx950.backends.triton.routing import Routing
from vllm_mxfp4_gfx950.tiles import TileConfig

TILE_ROWS = (16, 32, 64, 128, 256)
"""The sizes of tiles that matmul_ogs may choose among."""


class Generation(Ogs):
    """A layer for matmul_ogs with a dictionary of tiles."""

    NAME = "triton_ogs"
    OWN = True
    SCATTERS = False

    @staticmethod
    def fused_swiglu(alpha: float, limit: float) -> Any:
        """The SwiGLU that w13 ends in, as FusedActivation."""
        return FusedActivation(FnSpecs("swiglu", swiglu_fn, ("alpha", "limit")), (alpha, limit), 2)

    @staticmethod
    def block_sizes() -> tuple[int, ...]:
        """The same on every GPU."""
        return TILE_ROWS

    @staticmethod
    def to_opt_flags(tile: TileConfig, arch: str) -> Any:
        """A tile as OptFlags."""
        return OptFlags(**package.opt_flags_fields(tile, arch), fused_scatter=False)

    def arguments(self, routed: Routing) -> tuple[Any, Any, Any]:
        """A routing as RoutingData, GatherIndx and ScatterIndx."""
        blocks = (dict(zip(TILE_ROWS, each, strict=True)) for each in (routed.block_start, routed.schedule))
        tiles = ExptData(routed.count, routed.start, *blocks)
        experts = RoutingData(routed.weights, routed.count, len(routed.count), self.shape.topk, tiles)
        return experts, GatherIndx(routed.gather, routed.scatter), ScatterIndx(routed.scatter, routed.gather)
