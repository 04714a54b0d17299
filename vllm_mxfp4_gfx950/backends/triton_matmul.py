"""The experts through triton_kernels' `matmul` on ragged tensors, the generation for Triton 3.8 and later."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from vllm_mxfp4_gfx950.backends import triton_package
from vllm_mxfp4_gfx950.backends.triton_ogs import SCALE_GROUPS, SCALE_ROWS, _swizzle
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights, Mxfp4Error
from vllm_mxfp4_gfx950.mxfp4 import BLOCK

NAME = "triton_matmul"
ARCHES = ("gfx950", "gfx942", "sm90")
NEEDS = {
    "matmul": (
        "FlexCtx",
        "FnSpecs",
        "FusedActivation",
        "PrecisionConfig",
        "matmul",
        "scoped_opt_flags_constraints",
    ),
    "numerics": ("InFlexData",),
    "reduce": ("reduce",),
    "swiglu": ("swiglu_fn",),
    "tensor": (
        "FP4",
        "SparseMatrix",
        "Storage",
        "Tensor",
        "convert_layout",
        "make_ragged_tensor_metadata",
        "remap_ragged_tensor_metadata",
        "wrap_torch_tensor",
    ),
    "tensor_details.layout": (
        "make_default_matmul_mxfp4_w_layout",
        "make_default_matmul_mxfp4_w_scale_layout",
    ),
    "topk": ("topk",),
}
CDNA4_SCALE_LAYOUT = "CDNA4MXScaleLayout"
CDNA4_TILE = {"block_m": 32, "block_n": 64, "block_k": 256}
"""The CDNA4 scale layout is read 256 values of K at a time; the package's own choice is 128."""


@dataclass(frozen=True)
class Prepared:
    """The weights in kernel layout, and everything else that stays the same from call to call.

    Args:
        w13, w2: triton_kernels FP4 tensors of shape [E, K, N].
        w13_bias, w2_bias: fp32[E, N].
        w13_precision, w2_precision: PrecisionConfigs that hold the swizzled scales.
        activation: the fused SwiGLU.
        topk: experts per token.
        tile: constraints on the kernels' tiles; empty where the package's choice works.
        expert_map: int32[global_experts] as in MoeWeights; None when all are here.
    """

    w13: Any
    w13_bias: torch.Tensor
    w13_precision: Any
    w2: Any
    w2_bias: torch.Tensor
    w2_precision: Any
    activation: Any
    topk: int
    tile: dict[str, int]
    expert_map: torch.Tensor | None


def why_not(shape: MoeShape, arch: str) -> str | None:
    """The reason why this shape cannot run on this arch with the packages at hand."""
    if arch not in ARCHES:
        return f"it runs on {', '.join(ARCHES)}, not on {arch}"
    if shape.topk & (shape.topk - 1):
        return f"routing takes a topk that is a power of two, not {shape.topk}"
    reason = triton_package.why_not("matmul", NEEDS)
    if reason is None and arch == "gfx950":
        layout = triton_package.load("tensor_details.layout")
        if not hasattr(layout, CDNA4_SCALE_LAYOUT):
            return f"triton_kernels in {triton_package.locate()} has no {CDNA4_SCALE_LAYOUT}"
    return reason


def source() -> str:
    """Which package does the work. Only asked when why_not is None."""
    return triton_package.source()


def prepare(weights: MoeWeights, shape: MoeShape) -> Prepared:
    """Swizzle blocks and scales into the layouts that this GPU's kernels read.

    Blocks are swizzled expert by expert in the memory that they already hold, so that no second
    copy of a layer ever exists.

    Args:
        weights: consumed; their tensors must not be used afterwards.
        shape: the layer's sizes.

    Raises:
        Mxfp4Error: this rank's experts are not in the model's order.
    """
    from triton_kernels.matmul import FnSpecs, FusedActivation
    from triton_kernels.swiglu import swiglu_fn

    if weights.expert_map is not None:
        _check_order(weights.expert_map)
    w13, w13_precision = _to_kernel_layout(weights.w13, weights.w13_scale)
    w2, w2_precision = _to_kernel_layout(weights.w2, weights.w2_scale)
    swiglu = FnSpecs("swiglu", swiglu_fn, ("alpha", "limit"), reduction_n=2)
    scale_layout = w13_precision.b_mx_scale.storage.layout
    return Prepared(
        w13=w13,
        w13_bias=weights.w13_bias.float(),
        w13_precision=w13_precision,
        w2=w2,
        w2_bias=weights.w2_bias.float(),
        w2_precision=w2_precision,
        activation=FusedActivation(swiglu, (shape.alpha, shape.limit)),
        topk=shape.topk,
        tile=CDNA4_TILE if type(scale_layout).__name__ == CDNA4_SCALE_LAYOUT else {},
        expert_map=weights.expert_map,
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
    from triton_kernels.matmul import matmul, scoped_opt_flags_constraints
    from triton_kernels.reduce import reduce

    chosen, ragged, absent = route(prepared, router_logits)
    by_expert = chosen.mask_metadata.col_sorted_indx
    with scoped_opt_flags_constraints(prepared.tile) if prepared.tile else nullcontext():
        rows = matmul(
            x,
            prepared.w13,
            prepared.w13_bias,
            a_ragged_metadata=ragged,
            gather_indx=by_expert // prepared.topk,
            precision_config=prepared.w13_precision,
            fused_activation=prepared.activation,
        )
        rows = matmul(
            rows,
            prepared.w2,
            prepared.w2_bias,
            a_ragged_metadata=ragged,
            scatter_indx=by_expert,
            precision_config=prepared.w2_precision,
            gammas=chosen.vals.flatten()[by_expert],
        )
    # Rows of absent experts were never written: they are masked, not multiplied by zero.
    rows = rows.view(x.shape[0], prepared.topk, -1)
    mask = None if absent is None else (~absent).unsqueeze(-1).expand(rows.shape)
    out: torch.Tensor = reduce(rows, dim=1, mask=mask)[0]
    return out


def route(prepared: Prepared, router_logits: torch.Tensor) -> tuple[Any, Any, torch.Tensor | None]:
    """Choose experts among all of the model's, and lay out the choices that live on this rank.

    Returns:
        chosen: SparseMatrix of triton_kernels, over all experts.
        ragged: RaggedTensorMetadata of this rank's experts.
        absent: bool[T, topk], the choices that live on other ranks; None when there are none.
    """
    from triton_kernels.tensor import make_ragged_tensor_metadata, remap_ragged_tensor_metadata
    from triton_kernels.topk import topk

    chosen = topk(router_logits, prepared.topk)
    ragged = make_ragged_tensor_metadata(chosen.mask_metadata.col_sum, chosen.indx.numel())
    if prepared.expert_map is None:
        return chosen, ragged, None
    absent = prepared.expert_map[chosen.indx.int()] < 0
    return chosen, remap_ragged_tensor_metadata(ragged, prepared.expert_map), absent


def _check_order(expert_map: torch.Tensor) -> None:
    present = expert_map[expert_map >= 0].tolist()
    if present != list(range(len(present))):
        raise Mxfp4Error(
            "expert_map",
            "in the model's order on each rank",
            present,
            "Choose linear or round-robin expert placement",
        )


def _to_kernel_layout(blocks: torch.Tensor, scales: torch.Tensor) -> tuple[Any, Any]:
    """[E, N, K/2] and [E, N, K/32] to an FP4 tensor [E, K, N] and its PrecisionConfig."""
    from triton_kernels.matmul import FlexCtx, PrecisionConfig
    from triton_kernels.numerics import InFlexData
    from triton_kernels.tensor import FP4, Storage, Tensor, convert_layout, wrap_torch_tensor
    from triton_kernels.tensor_details.layout import (
        make_default_matmul_mxfp4_w_layout,
        make_default_matmul_mxfp4_w_scale_layout,
    )

    experts, rows, packed = blocks.shape
    layout = make_default_matmul_mxfp4_w_layout(mx_axis=-2)
    values = _swizzle(blocks, lambda data: convert_layout(wrap_torch_tensor(data, dtype=FP4), layout).data)
    w = Tensor(Storage(values, layout), dtype=FP4, shape=[experts, 2 * packed, rows])

    groups = scales.shape[2]
    scales = torch.nn.functional.pad(scales, (0, -groups % SCALE_GROUPS, 0, -rows % SCALE_ROWS))
    scale_layout = make_default_matmul_mxfp4_w_scale_layout(mx_axis=-2)
    swizzled = _swizzle(scales, lambda data: convert_layout(wrap_torch_tensor(data), scale_layout).data)
    w_scale = wrap_torch_tensor(swizzled, shape=list(scales.mT.shape), layout=scale_layout)
    return w, PrecisionConfig(
        b_mx_scale=w_scale, b_microblock_size=BLOCK, flex_ctx=FlexCtx(rhs_data=InFlexData())
    )
