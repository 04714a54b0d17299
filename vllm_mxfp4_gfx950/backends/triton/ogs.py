"""A layer for triton_kernels' `matmul_ogs`: what both generations that have it share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton_kernels.matmul_ogs import FlexCtx, PrecisionConfig, matmul_ogs
from triton_kernels.matmul_ogs_details import opt_flags

# They are set below through their module. Named here, so that a package without them does not import.
from triton_kernels.matmul_ogs_details.opt_flags import _opt_flags, _opt_flags_constraints  # noqa: F401
from triton_kernels.numerics import InFlexData
from triton_kernels.tensor import FP4, Storage, Tensor
from triton_kernels.tensor_details.layout import (
    StridedLayout,
    make_default_matmul_mxfp4_w_layout,
    make_default_matmul_mxfp4_w_scale_layout,
)

from vllm_mxfp4_gfx950.arch import ARCHES
from vllm_mxfp4_gfx950.backends.triton import package
from vllm_mxfp4_gfx950.backends.triton.layer import Prepared
from vllm_mxfp4_gfx950.backends.triton.routing import Routing


class Ogs(Prepared):
    """A layer for matmul_ogs."""

    KERNELS = "matmul_ogs"

    @staticmethod
    def pads() -> bool:
        """Whether the layout of the values is Hopper's, whose depth ends at whole groups only."""
        return make_default_matmul_mxfp4_w_layout(mx_axis=1)[0] is not StridedLayout

    @staticmethod
    def to_weight(blocks: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor) -> package.Weight:
        """Swizzle uint8 blocks [E, N, K/2] and scales [E, N, K/32]; the bias is fp32[E, N]."""
        experts, rows, packed = blocks.shape
        layout, options = make_default_matmul_mxfp4_w_layout(mx_axis=1)
        value_layout = layout((experts, packed, rows), **options)
        values = package.swizzle(blocks, value_layout.swizzle_data)
        tensor = Tensor(Storage(values, value_layout), dtype=FP4, shape=[experts, 2 * packed, rows])

        scales = package.pad_scales(scales)
        layout, options = make_default_matmul_mxfp4_w_scale_layout(mx_axis=1)
        scale_layout = layout(scales.mT.shape, **options)
        swizzled = package.swizzle(scales, scale_layout.swizzle_data)
        precision = PrecisionConfig(
            weight_scale=Tensor(Storage(swizzled, scale_layout)), flex_ctx=FlexCtx(rhs_data=InFlexData())
        )
        return package.Weight(tensor, precision, bias, values.mT, swizzled.mT, (value_layout, scale_layout))

    @abstractmethod
    def arguments(self, routed: Routing) -> tuple[Any, Any, Any]:
        """A routing as this generation takes it: RoutingData, GatherIndx and ScatterIndx."""

    def matmuls(self, x: torch.Tensor, routed: Routing, w13_flags: Any, w2_flags: Any) -> torch.Tensor:
        """Two calls, the second of which adds up a token's experts."""
        experts, gather, scatter = self.arguments(routed)
        with _scoped_opt_flags(w13_flags, self.arch):
            rows = _multiply(x, self.w13, experts, gather_indx=gather, fused_activation=self.activation)
        with _scoped_opt_flags(w2_flags, self.arch):
            return _multiply(rows, self.w2, experts, scatter_indx=scatter, gammas=routed.weights)


def _multiply(x: torch.Tensor, weight: package.Weight, experts: Any, **fused: Any) -> torch.Tensor:
    """One call of matmul_ogs, with what is fused into it."""
    out: torch.Tensor = matmul_ogs(
        x, weight.tensor, weight.bias, experts, precision_config=weight.precision, **fused
    )
    return out


@contextmanager
def _scoped_opt_flags(flags: Any, arch: str) -> Iterator[None]:
    """Hand OptFlags, or constraints on the package's own, to the call inside; put back what was set."""
    before = opt_flags._opt_flags, opt_flags._opt_flags_constraints
    opt_flags._opt_flags = flags
    opt_flags._opt_flags_constraints = {} if flags else dict(ARCHES[arch].constraints)
    try:
        yield
    finally:
        opt_flags._opt_flags, opt_flags._opt_flags_constraints = before
