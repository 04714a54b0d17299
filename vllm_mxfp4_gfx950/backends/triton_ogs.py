"""The experts through triton_kernels' `routing` and `matmul_ogs`, the generation that vLLM vendors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from vllm_mxfp4_gfx950.backends import triton_package
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights, pad_intermediate

NAME = "triton_ogs"
ARCHES = ("gfx950", "gfx942", "sm90")
NEEDS = {
    "matmul_ogs": ("matmul_ogs", "FlexCtx", "FnSpecs", "FusedActivation", "PrecisionConfig"),
    "matmul_ogs_details.opt_flags": ("update_opt_flags_constraints",),
    "numerics": ("InFlexData",),
    "routing": ("routing", "prune_routing", "routing_from_bitmatrix"),
    "swiglu": ("swiglu_fn",),
    "tensor": ("FP4", "Storage", "Tensor"),
    "tensor_details.layout": (
        "StridedLayout",
        "make_default_matmul_mxfp4_w_layout",
        "make_default_matmul_mxfp4_w_scale_layout",
    ),
    "topk": ("topk",),
}
CDNA4_SCALE_LAYOUTS = ("CDNA4MXScaleLayout", "GFX950MXScaleLayout")
"""One layout under its present name and under that of triton_kernels before 3.6."""

SCALE_GROUPS = 8
SCALE_ROWS = 512
"""The kernels load whole tiles of scales, unmasked: K up to 256 values (8 groups), N up to 512 rows."""

HOPPER_K = 64
"""Hopper's layout shuffles the values of 64 columns, so K can only end between such groups."""

EXPERTS_AT_ONCE = 4
"""Swizzled together: enough to keep the GPU busy, few enough that the temporaries stay small."""


@dataclass(frozen=True)
class Prepared:
    """The weights in kernel layout, and everything else that stays the same from call to call.

    Args:
        w13, w2: triton_kernels FP4 tensors of shape [E, K, N].
        w13_bias, w2_bias: fp32[E, N].
        w13_precision, w2_precision: PrecisionConfigs that hold the swizzled scales.
        activation: the fused SwiGLU.
        topk: experts per token.
        local: how to narrow the routing to this rank's experts; None when all are here.
    """

    w13: Any
    w13_bias: torch.Tensor
    w13_precision: Any
    w2: Any
    w2_bias: torch.Tensor
    w2_precision: Any
    activation: Any
    topk: int
    local: LocalExperts | None


@dataclass(frozen=True)
class LocalExperts:
    """A renumbering of the model's experts in which this rank's come first.

    Args:
        count: experts on this rank.
        order: int64[global_experts], the old number of each new one.
        rank: int32[global_experts], the new number of each old one; topk would shift bits out of int16.
    """

    count: int
    order: torch.Tensor
    rank: torch.Tensor


def why_not(shape: MoeShape, arch: str) -> str | None:
    """The reason why this shape cannot run on this arch with the packages at hand."""
    if arch not in ARCHES:
        return f"it runs on {', '.join(ARCHES)}, not on {arch}"
    if shape.topk & (shape.topk - 1):
        return f"routing takes a topk that is a power of two, not {shape.topk}"
    if arch == "sm90" and (shape.hidden % HOPPER_K or shape.hidden <= 128 or shape.intermediate <= 64):
        return (
            f"on sm90 it takes a hidden size above 128 in steps of {HOPPER_K} and an intermediate size "
            f"above 64, not {shape.hidden} and {shape.intermediate}"
        )
    reason = triton_package.why_not("matmul_ogs", NEEDS)
    if reason is None and arch == "gfx950":
        layout = triton_package.load("tensor_details.layout")
        if not any(hasattr(layout, name) for name in CDNA4_SCALE_LAYOUTS):
            return f"triton_kernels in {triton_package.locate()} has no {' or '.join(CDNA4_SCALE_LAYOUTS)}"
    return reason


def source() -> str:
    """Where the kernels come from."""
    return triton_package.source()


def prepare(weights: MoeWeights, shape: MoeShape) -> Prepared:
    """Swizzle blocks and scales into the layouts that this GPU's kernels read.

    Blocks are swizzled expert by expert in the memory that they already hold, so that no second
    copy of a layer ever exists.

    Args:
        weights: consumed; their tensors must not be used afterwards.
        shape: the layer's sizes.
    """
    from triton_kernels.matmul_ogs import FnSpecs, FusedActivation
    from triton_kernels.swiglu import swiglu_fn
    from triton_kernels.tensor_details.layout import StridedLayout, make_default_matmul_mxfp4_w_layout

    if make_default_matmul_mxfp4_w_layout(mx_axis=1)[0] is not StridedLayout:
        weights = pad_intermediate(weights, HOPPER_K)
    w13, w13_precision = _to_kernel_layout(weights.w13, weights.w13_scale)
    w2, w2_precision = _to_kernel_layout(weights.w2, weights.w2_scale)
    swiglu = FnSpecs("swiglu", swiglu_fn, ("alpha", "limit"))
    return Prepared(
        w13=w13,
        w13_bias=weights.w13_bias.float(),
        w13_precision=w13_precision,
        w2=w2,
        w2_bias=weights.w2_bias.float(),
        w2_precision=w2_precision,
        activation=FusedActivation(swiglu, (shape.alpha, shape.limit), 2),
        topk=shape.topk,
        local=None if weights.expert_map is None else _local_experts(weights.expert_map),
    )


def run(prepared: Prepared, x: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
    """Route, multiply by w13 with the SwiGLU fused, multiply by w2 and combine.

    Args:
        prepared: what `prepare` returned.
        x: bf16[T, H].
        router_logits: bf16 or fp32[T, global_experts].

    Returns:
        bf16[T, H]
    """
    from triton_kernels.matmul_ogs import matmul_ogs

    routing_data, gather, scatter = route(prepared, router_logits)
    with _opt_flags_constraints():
        rows = matmul_ogs(
            x,
            prepared.w13,
            prepared.w13_bias,
            routing_data,
            gather_indx=gather,
            precision_config=prepared.w13_precision,
            fused_activation=prepared.activation,
        )
        out: torch.Tensor = matmul_ogs(
            rows,
            prepared.w2,
            prepared.w2_bias,
            routing_data,
            scatter_indx=scatter,
            precision_config=prepared.w2_precision,
            gammas=routing_data.gate_scal,
        )
    return out


def route(prepared: Prepared, router_logits: torch.Tensor) -> Any:
    """Choose experts and sort the choices by expert.

    Returns:
        triton_kernels' RoutingData, GatherIndx and ScatterIndx, over this rank's experts.
    """
    from triton_kernels.routing import prune_routing, routing, routing_from_bitmatrix
    from triton_kernels.topk import topk

    local = prepared.local
    if local is None:
        return routing(router_logits, prepared.topk)
    # Every rank chooses among all experts in the model's own order, so that ties fall alike.
    _, topk_ids, _ = topk(router_logits, prepared.topk)
    renumbered = local.rank[topk_ids.int()]
    chosen = topk(router_logits[:, local.order], prepared.topk, y_indx=renumbered)
    # It keeps the first n_expts_tot / simulated_ep experts; any such pair with that quotient will do.
    weights, ids, bitmatrix = prune_routing(*chosen, n_expts_tot=2 * local.count, simulated_ep=2)
    return routing_from_bitmatrix(bitmatrix, weights, ids, local.count, prepared.topk)


def _local_experts(expert_map: torch.Tensor) -> LocalExperts:
    absent = expert_map < 0
    # Present experts by local index, then the absent ones.
    order = torch.where(absent, expert_map.numel(), expert_map).argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device)
    return LocalExperts(int((~absent).sum()), order, rank.int())


def _to_kernel_layout(blocks: torch.Tensor, scales: torch.Tensor) -> tuple[Any, Any]:
    """[E, N, K/2] and [E, N, K/32] to an FP4 tensor [E, K, N] and its PrecisionConfig."""
    from triton_kernels.matmul_ogs import FlexCtx, PrecisionConfig
    from triton_kernels.numerics import InFlexData
    from triton_kernels.tensor import FP4, Storage, Tensor
    from triton_kernels.tensor_details.layout import (
        make_default_matmul_mxfp4_w_layout,
        make_default_matmul_mxfp4_w_scale_layout,
    )

    experts, rows, packed = blocks.shape
    layout, options = make_default_matmul_mxfp4_w_layout(mx_axis=1)
    value_layout = layout((experts, packed, rows), **options)
    values = _swizzle(blocks, value_layout.swizzle_data)
    w = Tensor(Storage(values, value_layout), dtype=FP4, shape=[experts, 2 * packed, rows])

    groups = scales.shape[2]
    scales = torch.nn.functional.pad(scales, (0, -groups % SCALE_GROUPS, 0, -rows % SCALE_ROWS))
    layout, options = make_default_matmul_mxfp4_w_scale_layout(mx_axis=1)
    scale_layout = layout(scales.mT.shape, **options)
    w_scale = Tensor(Storage(_swizzle(scales, scale_layout.swizzle_data), scale_layout))
    return w, PrecisionConfig(weight_scale=w_scale, flex_ctx=FlexCtx(rhs_data=InFlexData()))


def _swizzle(data: torch.Tensor, swizzle: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Apply a layout to [E, N, K] a few experts at a time; [E, K', N'], K' contiguous.

    The result takes the place of the input where it has the same number of bytes.
    """
    out: torch.Tensor | None = None
    for first in range(0, data.shape[0], EXPERTS_AT_ONCE):
        some = data[first : first + EXPERTS_AT_ONCE]
        swizzled = swizzle(some.mT).mT
        if out is None:
            size = (data.shape[0], *swizzled.shape[1:])
            out = data.view(size) if swizzled.numel() == some.numel() else data.new_empty(size)
        out[first : first + EXPERTS_AT_ONCE].copy_(swizzled)
    assert out is not None
    return out.mT


@contextmanager
def _opt_flags_constraints() -> Iterator[None]:
    """Pin what the kernels are better off with for the calls inside, and put back what was before.

    Without it, up to 16 tokens take 1.2 to 1.8 times as long on an H200 (triton 3.6.0).
    """
    from triton_kernels.matmul_ogs_details import opt_flags

    before = opt_flags._opt_flags_constraints
    opt_flags._opt_flags_constraints = {"split_k": 1}
    try:
        yield
    finally:
        opt_flags._opt_flags_constraints = before
