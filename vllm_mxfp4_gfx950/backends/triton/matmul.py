"""The experts through triton_kernels' `matmul` on ragged tensors, the generation for Triton 3.8 and later."""

from __future__ import annotations

from typing import Any

import torch
from triton_kernels.matmul import (
    FlexCtx,
    FnSpecs,
    FusedActivation,
    OptFlags,
    PrecisionConfig,
    matmul,
    scoped_opt_flags,
)
from triton_kernels.numerics import InFlexData
from triton_kernels.reduce import reduce
from triton_kernels.swiglu import swiglu_fn
from triton_kernels.tensor import (
    FP4,
    RaggedTensorMetadata,
    Storage,
    Tensor,
    convert_layout,
    wrap_torch_tensor,
)
from triton_kernels.tensor_details.layout import (
    StridedLayout,
    make_default_matmul_mxfp4_w_layout,
    make_default_matmul_mxfp4_w_scale_layout,
)

from vllm_mxfp4_gfx950.backends.triton import package
from vllm_mxfp4_gfx950.backends.triton.layer import Prepared
from vllm_mxfp4_gfx950.backends.triton.routing import Routing
from vllm_mxfp4_gfx950.mxfp4 import BLOCK
from vllm_mxfp4_gfx950.tiles import TileConfig


class Generation(Prepared):
    """A layer for matmul."""

    NAME = "triton_matmul"
    KERNELS = "matmul"
    OWN = False
    SCATTERS = True
    block_sizes = staticmethod(RaggedTensorMetadata.block_sizes)

    @staticmethod
    def pads() -> bool:
        """Whether the layout of the values is Hopper's, whose depth ends at whole groups only."""
        return not isinstance(make_default_matmul_mxfp4_w_layout(mx_axis=-2), StridedLayout)

    @staticmethod
    def to_weight(blocks: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor) -> package.Weight:
        """Swizzle uint8 blocks [E, N, K/2] and scales [E, N, K/32]; the bias is fp32[E, N]."""
        experts, rows, packed = blocks.shape
        layout = make_default_matmul_mxfp4_w_layout(mx_axis=-2)
        values = package.swizzle(
            blocks, lambda some: convert_layout(wrap_torch_tensor(some, dtype=FP4), layout).data
        )
        tensor = Tensor(Storage(values, layout), dtype=FP4, shape=[experts, 2 * packed, rows])

        scales = package.pad_scales(scales)
        scale_layout = make_default_matmul_mxfp4_w_scale_layout(mx_axis=-2)
        swizzled = package.swizzle(
            scales, lambda some: convert_layout(wrap_torch_tensor(some), scale_layout).data
        )
        precision = PrecisionConfig(
            b_mx_scale=wrap_torch_tensor(swizzled, shape=list(scales.mT.shape), layout=scale_layout),
            b_microblock_size=BLOCK,
            flex_ctx=FlexCtx(rhs_data=InFlexData()),
        )
        return package.Weight(tensor, precision, bias, values.mT, swizzled.mT, (layout, scale_layout))

    @staticmethod
    def fused_swiglu(alpha: float, limit: float) -> Any:
        """The SwiGLU that w13 ends in, as FusedActivation."""
        swiglu = FnSpecs("swiglu", swiglu_fn, ("alpha", "limit"), reduction_n=2)
        return FusedActivation(swiglu, (alpha, limit))

    @staticmethod
    def to_opt_flags(tile: TileConfig, arch: str) -> Any:
        """A tile as OptFlags."""
        return OptFlags(**package.opt_flags_fields(tile, arch), occupancy_target=1)

    def matmuls(self, x: torch.Tensor, routed: Routing, w13_flags: Any, w2_flags: Any) -> torch.Tensor:
        """Two calls, and a sum over a token's experts."""
        topk = self.shape.topk
        experts = RaggedTensorMetadata(routed.count, routed.start, routed.block_start, routed.schedule)
        with scoped_opt_flags(w13_flags):
            rows = matmul(
                x,
                self.w13.tensor,
                self.w13.bias,
                a_ragged_metadata=experts,
                gather_indx=routed.gather // topk,
                precision_config=self.w13.precision,
                fused_activation=self.activation,
            )
        with scoped_opt_flags(w2_flags):
            rows = matmul(
                rows,
                self.w2.tensor,
                self.w2.bias,
                a_ragged_metadata=experts,
                scatter_indx=routed.gather,
                precision_config=self.w2.precision,
                gammas=routed.weights,
            )
        # Rows of experts on other ranks were never written: they are masked, not multiplied by zero.
        rows = rows.view(x.shape[0], topk, x.shape[1])
        mask = None
        if self.order is not None:
            mask = (routed.scatter >= 0).view(x.shape[0], topk, 1).expand(rows.shape)
        out: torch.Tensor = reduce(rows, dim=1, mask=mask)[0]
        return out
