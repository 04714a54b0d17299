"""The experts through triton_kernels' `matmul_ogs` on ragged tensors, the generation of Triton 3.6."""

from __future__ import annotations

from typing import Any

from triton_kernels.matmul_ogs import FnSpecs, FusedActivation, GatherIndx, RoutingData, ScatterIndx
from triton_kernels.matmul_ogs_details.opt_flags import OptFlags
from triton_kernels.swiglu import swiglu_fn
from triton_kernels.tensor import RaggedTensorMetadata

from vllm_mxfp4_gfx950.backends.triton import package
from vllm_mxfp4_gfx950.backends.triton.ogs import Ogs
from vllm_mxfp4_gfx950.backends.triton.routing import Routing
from vllm_mxfp4_gfx950.tiles import TileConfig


class Generation(Ogs):
    """A layer for matmul_ogs with RaggedTensorMetadata."""

    NAME = "triton_ragged"
    OWN = False
    SCATTERS = True
    block_sizes = staticmethod(RaggedTensorMetadata.block_sizes)

    @staticmethod
    def fused_swiglu(alpha: float, limit: float) -> Any:
        """The SwiGLU that w13 ends in, as FusedActivation."""
        return FusedActivation(
            FnSpecs("swiglu", swiglu_fn, ("alpha", "limit"), reduction_n=2), (alpha, limit)
        )

    @staticmethod
    def to_opt_flags(tile: TileConfig, arch: str) -> Any:
        """A tile as OptFlags."""
        return OptFlags(**package.opt_flags_fields(tile, arch))

    def arguments(self, routed: Routing) -> tuple[Any, Any, Any]:
        """A routing as RoutingData, GatherIndx and ScatterIndx."""
        tiles = RaggedTensorMetadata(routed.count, routed.start, routed.block_start, routed.schedule)
        experts = RoutingData(routed.weights, routed.count, len(routed.count), self.shape.topk, tiles)
        return experts, GatherIndx(routed.gather, routed.scatter), ScatterIndx(routed.scatter, routed.gather)
