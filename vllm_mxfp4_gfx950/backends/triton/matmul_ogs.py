"""The experts through triton_kernels' `routing` and `matmul_ogs`, the generation that vLLM vendors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_mxfp4_gfx950.backends.triton import package
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights, pad_intermediate
from vllm_mxfp4_gfx950.tuning import Ladder, TileConfig, gemms, ladder

if TYPE_CHECKING:
    from vllm_mxfp4_gfx950.backends.triton.own import Decode, Parts
    from vllm_mxfp4_gfx950.backends.triton.routing import Routing

NAME = "triton_ogs"
KERNELS = "matmul_ogs"
"""The package's generation, as the tile table names it."""

TILE_ROWS = (16, 32, 64, 128, 256)
"""The sizes of tiles that matmul_ogs may choose among."""

NEEDS = {
    "matmul_ogs": ("matmul_ogs", "FlexCtx", "FnSpecs", "FusedActivation", "PrecisionConfig"),
    "matmul_ogs_details.opt_flags": ("OptFlags", "_opt_flags", "_opt_flags_constraints"),
    "numerics": ("InFlexData",),
    "routing": ("ExptData", "GatherIndx", "RoutingData", "ScatterIndx"),
    "swiglu": ("swiglu_fn",),
    "tensor": ("FP4", "Storage", "Tensor"),
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
        constraints: what such a call must keep to.
        decode: our own kernels, for few tokens; None where they do not serve.
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
    constraints: dict[str, int]
    decode: Decode | None

    def parts(self, index: int) -> Parts:
        """Values, scales and bias of w13 (0) or w2 (1), as the decode path takes them."""
        w = (self.w13, self.w2)[index]
        scale = (self.w13_precision, self.w2_precision)[index].weight_scale
        return w.storage.data.mT, scale.storage.data.mT, (self.w13_bias, self.w2_bias)[index]


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
    from triton_kernels.matmul_ogs import FnSpecs, FusedActivation
    from triton_kernels.swiglu import swiglu_fn
    from triton_kernels.tensor_details.layout import StridedLayout, make_default_matmul_mxfp4_w_layout

    from vllm_mxfp4_gfx950.backends.triton import own, routing

    if make_default_matmul_mxfp4_w_layout(mx_axis=1)[0] is not StridedLayout:
        weights = pad_intermediate(weights, package.HOPPER_K)
    w13, w13_precision = _to_kernel_layout(weights.w13, weights.w13_scale)
    w2, w2_precision = _to_kernel_layout(weights.w2, weights.w2_scale)
    swiglu = FnSpecs("swiglu", swiglu_fn, ("alpha", "limit"))
    order = routing.order_of(weights.expert_map)
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
        activation=FusedActivation(swiglu, (shape.alpha, shape.limit), 2),
        topk=shape.topk,
        order=order,
        flags=(w13_flags, w2_flags),
        # Splitting K is right but slow on Hopper; vLLM pins this too, for the whole process.
        constraints={"split_k": 1} if arch == "sm90" else {},
        decode=own.decode_for(
            arch,
            shape,
            (w13.storage.layout, w13_precision.weight_scale.storage.layout),
            (w13_precision.weight_scale.storage.data, w2_precision.weight_scale.storage.data),
            order,
            tables,
        ),
    )


def run(prepared: Prepared, x: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
    """The layer, through our own kernels for as many tokens as the tile table says, else through matmul_ogs.

    Args:
        prepared: what `prepare` returned.
        x: bf16[T, H].
        router_logits: bf16 or fp32[T, global_experts].

    Returns:
        bf16[T, H]
    """
    from vllm_mxfp4_gfx950.backends.triton import own

    if not len(x):
        return torch.empty_like(x)
    if prepared.decode is not None and prepared.decode.serves(x.shape[0]):
        return own.run(prepared.decode, x, router_logits, prepared.parts(0), prepared.parts(1))
    return run_matmul_ogs(prepared, x, router_logits)


def without_decode(prepared: Prepared) -> Prepared | None:
    """The same layer through matmul_ogs alone; None when it has nothing else."""
    return None if prepared.decode is None else replace(prepared, decode=None)


def run_matmul_ogs(prepared: Prepared, x: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
    """Route, multiply by w13 with the SwiGLU fused, multiply by w2 and combine; as `run`."""
    from triton_kernels.matmul_ogs import matmul_ogs
    from triton_kernels.routing import ExptData, GatherIndx, RoutingData, ScatterIndx

    routing = route(prepared, router_logits)
    blocks = (dict(zip(TILE_ROWS, each, strict=True)) for each in (routing.block_start, routing.schedule))
    tiles = ExptData(routing.count, routing.start, *blocks)
    experts = RoutingData(routing.weights, routing.count, len(routing.count), prepared.topk, tiles)
    w13_flags, w2_flags = (flags.at(x.shape[0]) for flags in prepared.flags)
    with _opt_flags(w13_flags, prepared.constraints):
        rows = matmul_ogs(
            x,
            prepared.w13,
            prepared.w13_bias,
            experts,
            gather_indx=GatherIndx(routing.gather, routing.scatter),
            precision_config=prepared.w13_precision,
            fused_activation=prepared.activation,
        )
    with _opt_flags(w2_flags, prepared.constraints):
        out: torch.Tensor = matmul_ogs(
            rows,
            prepared.w2,
            prepared.w2_bias,
            experts,
            scatter_indx=ScatterIndx(routing.scatter, routing.gather),
            precision_config=prepared.w2_precision,
            gammas=routing.weights,
        )
    return out


def route(prepared: Prepared, router_logits: torch.Tensor) -> Routing:
    """Choose experts, and sort the choices that live on this rank."""
    from vllm_mxfp4_gfx950.backends.triton import routing

    experts = prepared.w13_bias.shape[0]
    return routing.route(router_logits, prepared.topk, experts, prepared.order, len(TILE_ROWS))


def choices(prepared: Prepared, router_logits: torch.Tensor) -> package.Choices:
    """The routing of some logits, for comparison; `run` does not need it in this form."""
    routing = route(prepared, router_logits)
    output = torch.arange(len(routing.gather), device=routing.gather.device)
    start, count = routing.start[:-1].tolist(), routing.count.tolist()
    return package.Choices(routing.gather, routing.weights, output, start, count)


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
    values = package.swizzle(blocks, value_layout.swizzle_data)
    w = Tensor(Storage(values, value_layout), dtype=FP4, shape=[experts, 2 * packed, rows])

    scales = package.pad_scales(scales)
    layout, options = make_default_matmul_mxfp4_w_scale_layout(mx_axis=1)
    scale_layout = layout(scales.mT.shape, **options)
    swizzled = package.swizzle(scales, scale_layout.swizzle_data)
    w_scale = Tensor(Storage(swizzled, scale_layout))
    return w, PrecisionConfig(weight_scale=w_scale, flex_ctx=FlexCtx(rhs_data=InFlexData()))


def to_opt_flags(tile: TileConfig, arch: str) -> Any:
    """A tile as this generation of triton_kernels takes it."""
    from triton_kernels.matmul_ogs_details.opt_flags import OptFlags

    return OptFlags(**package.opt_flags_fields(tile, arch), fused_scatter=False)


@contextmanager
def _opt_flags(flags: Any, constraints: dict[str, int]) -> Iterator[None]:
    """Hand OptFlags, or constraints on the package's own, to the call inside; put back what was set."""
    from triton_kernels.matmul_ogs_details import opt_flags

    before = opt_flags._opt_flags, opt_flags._opt_flags_constraints
    opt_flags._opt_flags, opt_flags._opt_flags_constraints = flags, {} if flags else constraints
    try:
        yield
    finally:
        opt_flags._opt_flags, opt_flags._opt_flags_constraints = before
