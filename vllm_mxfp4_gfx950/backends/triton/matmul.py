"""The experts through triton_kernels' `matmul` on ragged tensors, the generation for Triton 3.8 and later."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_mxfp4_gfx950.backends.triton import package
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights, pad_intermediate
from vllm_mxfp4_gfx950.mxfp4 import BLOCK
from vllm_mxfp4_gfx950.tuning import Ladder, TileConfig, gemms, ladder

if TYPE_CHECKING:
    from vllm_mxfp4_gfx950.backends.triton.routing import Routing

NAME = "triton_matmul"
KERNELS = "matmul"
NEEDS = {
    "matmul": (
        "FlexCtx",
        "FnSpecs",
        "FusedActivation",
        "OptFlags",
        "PrecisionConfig",
        "matmul",
        "scoped_opt_flags",
    ),
    "numerics": ("InFlexData",),
    "reduce": ("reduce",),
    "swiglu": ("swiglu_fn",),
    "tensor": (
        "FP4",
        "RaggedTensorMetadata",
        "Storage",
        "Tensor",
        "convert_layout",
        "wrap_torch_tensor",
    ),
    "tensor_details.layout": (
        "StridedLayout",
        "make_default_matmul_mxfp4_w_layout",
        "make_default_matmul_mxfp4_w_scale_layout",
    ),
}


@dataclass(frozen=True)
class Prepared:
    """The weights in kernel layout, and everything else that stays the same from call to call.

    Args:
        w13, w2: triton_kernels FP4 tensors of shape [E, K, N].
        w13_bias, w2_bias: fp32[E, N].
        w13_precision, w2_precision: PrecisionConfigs that hold the swizzled scales.
        activation: the fused SwiGLU.
        topk: experts per token.
        order: as `routing.order_of` returns it.
        flags: w13's and w2's OptFlags by number of tokens; None leaves a call to the package.
        sizes: how many sizes of tiles the package has on this GPU, from 16 rows on.
    """

    w13: Any
    w13_bias: torch.Tensor
    w13_precision: Any
    w2: Any
    w2_bias: torch.Tensor
    w2_precision: Any
    activation: Any
    topk: int
    order: torch.Tensor | None
    flags: tuple[Ladder[Any], Ladder[Any]]
    sizes: int


def why_not(shape: MoeShape, arch: str) -> str | None:
    """The reason why this shape cannot run on this arch with the packages at hand."""
    return package.why_not_layer(shape, arch, KERNELS, NEEDS, to_opt_flags)


def source() -> str:
    """Where the kernels come from."""
    return package.source()


def prepare(weights: MoeWeights, shape: MoeShape, tables: Path | None = None) -> Prepared:
    """Swizzle blocks and scales into the layouts that this GPU's kernels read.

    Blocks are swizzled expert by expert in the memory that they already hold, so that no second
    copy of a layer ever exists.

    Args:
        weights: consumed; their tensors must not be used afterwards.
        shape: the layer's sizes.
        tables: the directory of the user's tile tables.
    """
    import triton
    from triton_kernels.matmul import FnSpecs, FusedActivation
    from triton_kernels.swiglu import swiglu_fn
    from triton_kernels.tensor import RaggedTensorMetadata
    from triton_kernels.tensor_details.layout import StridedLayout, make_default_matmul_mxfp4_w_layout

    from vllm_mxfp4_gfx950.backends.triton import routing

    if not isinstance(make_default_matmul_mxfp4_w_layout(mx_axis=-2), StridedLayout):
        weights = pad_intermediate(weights, package.HOPPER_K)
    w13, w13_precision = _to_kernel_layout(weights.w13, weights.w13_scale)
    w2, w2_precision = _to_kernel_layout(weights.w2, weights.w2_scale)
    swiglu = FnSpecs("swiglu", swiglu_fn, ("alpha", "limit"), reduction_n=2)
    arch = package.arch_of_target()
    tiles = (ladder(arch, KERNELS, triton.__version__, gemm, tables) for gemm in gemms(shape))
    w13_flags, w2_flags = (
        rungs.map(lambda tile: to_opt_flags(tile, arch)) if rungs else Ladder((1,), (None,))
        for rungs in tiles
    )
    return Prepared(
        w13=w13,
        w13_bias=weights.w13_bias,
        w13_precision=w13_precision,
        w2=w2,
        w2_bias=weights.w2_bias,
        w2_precision=w2_precision,
        activation=FusedActivation(swiglu, (shape.alpha, shape.limit)),
        topk=shape.topk,
        order=routing.order_of(weights.expert_map),
        flags=(w13_flags, w2_flags),
        sizes=len(RaggedTensorMetadata.block_sizes()),
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
    from triton_kernels.matmul import matmul, scoped_opt_flags
    from triton_kernels.reduce import reduce
    from triton_kernels.tensor import RaggedTensorMetadata

    if not len(x):
        return torch.empty_like(x)
    routing = route(prepared, router_logits)
    experts = RaggedTensorMetadata(routing.count, routing.start, routing.block_start, routing.schedule)
    w13_flags, w2_flags = (flags.at(x.shape[0]) for flags in prepared.flags)
    with scoped_opt_flags(w13_flags):
        rows = matmul(
            x,
            prepared.w13,
            prepared.w13_bias,
            a_ragged_metadata=experts,
            gather_indx=routing.gather // prepared.topk,
            precision_config=prepared.w13_precision,
            fused_activation=prepared.activation,
        )
    with scoped_opt_flags(w2_flags):
        rows = matmul(
            rows,
            prepared.w2,
            prepared.w2_bias,
            a_ragged_metadata=experts,
            scatter_indx=routing.gather,
            precision_config=prepared.w2_precision,
            gammas=routing.weights,
        )
    # Rows of experts on other ranks were never written: they are masked, not multiplied by zero.
    rows = rows.view(x.shape[0], prepared.topk, x.shape[1])
    mask = None
    if prepared.order is not None:
        mask = (routing.scatter >= 0).view(x.shape[0], prepared.topk, 1).expand(rows.shape)
    out: torch.Tensor = reduce(rows, dim=1, mask=mask)[0]
    return out


def without_decode(prepared: Prepared) -> None:
    """It has no kernels for few tokens."""


def route(prepared: Prepared, router_logits: torch.Tensor) -> Routing:
    """Choose experts, and sort the choices that live on this rank."""
    from vllm_mxfp4_gfx950.backends.triton import routing

    experts = prepared.w13_bias.shape[0]
    return routing.route(router_logits, prepared.topk, experts, prepared.order, prepared.sizes)


def choices(prepared: Prepared, router_logits: torch.Tensor) -> package.Choices:
    """The routing of some logits, for comparison; `run` does not need it in this form."""
    routing = route(prepared, router_logits)
    start, count = routing.start[:-1].tolist(), routing.count.tolist()
    return package.Choices(routing.gather, routing.weights, routing.gather, start, count)


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
    values = package.swizzle(
        blocks, lambda some: convert_layout(wrap_torch_tensor(some, dtype=FP4), layout).data
    )
    w = Tensor(Storage(values, layout), dtype=FP4, shape=[experts, 2 * packed, rows])

    scales = package.pad_scales(scales)
    scale_layout = make_default_matmul_mxfp4_w_scale_layout(mx_axis=-2)
    swizzled = package.swizzle(
        scales, lambda some: convert_layout(wrap_torch_tensor(some), scale_layout).data
    )
    w_scale = wrap_torch_tensor(swizzled, shape=list(scales.mT.shape), layout=scale_layout)
    return w, PrecisionConfig(
        b_mx_scale=w_scale, b_microblock_size=BLOCK, flex_ctx=FlexCtx(rhs_data=InFlexData())
    )


def to_opt_flags(tile: TileConfig, arch: str) -> Any:
    """A tile as this generation of triton_kernels takes it."""
    from triton_kernels.matmul import OptFlags

    return OptFlags(**package.opt_flags_fields(tile, arch), occupancy_target=1)
