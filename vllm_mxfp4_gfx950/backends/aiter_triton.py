"""The experts through aiter's Triton kernel for bf16 activations and MXFP4 weights, `moe_gemm_a16w4`.

It descends from triton_kernels' matmul_ogs: it reads the same layouts, and wants to know what our routing
writes. aiter's own routing knows no experts of other ranks; only its types are used.

Source: ROCm/aiter, aiter/ops/triton/moe/moe_op_gemm_a16w4.py and moe_routing/routing.py, 0.1.14 to
0.1.20.post1 and e404860; vllm-project/vllm, fused_moe/experts/aiter_mxfp4_w4a16_moe.py, 0.33.0.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from vllm_mxfp4_gfx950.backends import ck
from vllm_mxfp4_gfx950.backends.triton import package
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights

NAME = "aiter_triton"
ARCH = "gfx950"

LEAST_ROWS, MOST_ROWS = 16, 128
"""Rows of a tile. Source: `routing` in moe_routing/routing.py, which chooses as `tile_rows` does."""

MOST_TOKENS = 2**14
"""A batch of more takes no larger tiles: the self-check runs the smallest batch of each through float64."""

FEW = (2, 4, 16)
"""Batches with so few workgroups that aiter cuts the columns more finely, which is another kernel.

Source: `get_kernel_config` in moe_op_gemm_a16w4.py."""

CALL = (
    "x", "w", "x_scales", "w_scales", "bias", "routing_data", "gather_indx", "gammas", "swizzle_mx_scale",
    "apply_swiglu", "alpha", "limit",
)  # fmt: skip
"""The arguments of `moe_gemm_a16w4` that are given."""

ROUTING_DATA = ("block_m", "gate_scal", "expt_hist", "n_expts_tot", "n_expts_act", "expt_data")
EXPT_DATA = ("hist", "token_offs_raw", "token_offs_pad", "block_pid_map")


@dataclass(frozen=True)
class Weight:
    """One matmul's weights.

    Args:
        values: uint8[E, K / 2, N], K contiguous: the checkpoint's own memory.
        scales: uint8[E, K, N / 32] in the layout of `two_fp8_kernels`, K contiguous; K and N widened.
        bias: fp32[E, N].
    """

    values: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class Prepared:
    """The weights in kernel layout, and everything else that stays the same from call to call.

    Args:
        shape: the layer.
        w13, w2: its matmuls.
        order: as `routing.order_of` returns it.
        gemm: aiter's function.
        options: its arguments that are the same in every call.
        types: the module with aiter's RoutingData and ExptData.
        route, combine: our functions, of a module that needs Triton.
    """

    shape: MoeShape
    w13: Weight
    w2: Weight
    order: torch.Tensor | None
    gemm: Callable[..., torch.Tensor]
    options: Mapping[str, Any]
    types: ModuleType
    route: Callable[..., Any]
    combine: Callable[..., torch.Tensor]

    def run(self, x: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        """Route by our routing, multiply by aiter's kernel, and sum over a token's experts by ours.

        bf16[T, H] and bf16 or fp32[T, global_experts] to bf16[T, H].
        """
        shape = self.shape
        if not len(x):
            return torch.empty_like(x)
        rows = tile_rows(shape, len(x))
        routed = self.route(router_logits, shape.topk, shape.experts, self.order, sizes=1, smallest=rows)
        tiles = self.types.ExptData(
            hist=routed.count,
            token_offs_raw=routed.start,
            token_offs_pad=routed.block_start[0],
            block_pid_map=routed.schedule[0],
        )
        data = self.types.RoutingData(
            block_m=rows,
            gate_scal=routed.weights,
            expt_hist=routed.count,
            n_expts_tot=shape.experts,
            n_expts_act=shape.topk,
            expt_data=tiles,
        )
        between = self.gemm(
            x, self.w13.values, None, self.w13.scales, bias=self.w13.bias, routing_data=data,
            gather_indx=routed.gather, apply_swiglu=True, alpha=shape.alpha, limit=shape.limit,
            **self.options,
        )  # fmt: skip
        # Not by aiter's sum, which reads a row even where the expert is on another rank.
        parts = self.gemm(
            between, self.w2.values, None, self.w2.scales, bias=self.w2.bias, routing_data=data,
            gammas=routed.weights, **self.options,
        )  # fmt: skip
        return self.combine(parts[None], routed.scatter, shape.topk, overlaps=False)

    def tensors(self) -> list[torch.Tensor]:
        """What the kernels read."""
        return package.tensors_of(self.w13, self.w2, self.order)

    def first_batches(self) -> set[int]:
        """The smallest batch of each size of tiles, and FEW."""
        sizes = (LEAST_ROWS << size for size in range(1, (MOST_ROWS // LEAST_ROWS).bit_length()))
        experts, topk = self.shape.global_experts, self.shape.topk
        firsts = (-(-(rows // 2 + 1) * experts // topk) for rows in sizes)
        return {first for first in firsts if first <= MOST_TOKENS} | set(FEW)


def tile_rows(shape: MoeShape, tokens: int) -> int:
    """Rows of a tile for so many tokens: the power of two at the rows that an expert gets on average."""
    average = max(1, min(tokens, MOST_TOKENS) * shape.topk // shape.global_experts)
    return min(MOST_ROWS, max(LEAST_ROWS, 1 << (average - 1).bit_length()))


def why_not(shape: MoeShape, arch: str) -> str | None:
    """The reason why this shape cannot run on this arch with the aiter at hand."""
    if arch != ARCH:
        return f"it runs on {ARCH}, not on {arch}"
    reason = package.why_not_routing(shape)
    if reason is not None:
        return reason
    try:
        gemm, types = _gemm(), _types()
        _routing()
    except Exception as error:  # An import of aiter looks for ROCm, a GPU and Triton.
        return f"aiter's moe_gemm_a16w4 does not import here: {error}; {ck.GET}"
    for function, given in ((gemm, CALL), (types.RoutingData, ROUTING_DATA), (types.ExptData, EXPT_DATA)):
        try:
            inspect.signature(function).bind(**dict.fromkeys(given))
        except TypeError as error:
            return f"{function.__name__} of {source()} does not take our call: {error}; {ck.GET}"
    return None


def source() -> str:
    """Which aiter it is, where it lies, and under which Triton it runs."""
    return f"{ck.source()}, triton {importlib.import_module('triton').__version__}"


def prepare(weights: MoeWeights, shape: MoeShape, tables: Path | None = None) -> Prepared:
    """Bring the scales into the layout of CDNA 4; the values stay where and as they are.

    Args:
        weights: consumed; their tensors must not be used afterwards.
        shape: the layer's sizes.
        tables: not used; aiter has its own.
    """
    gemm, routing = _gemm(), _routing()
    options = {"swizzle_mx_scale": "CDNA4_SCALE"}
    if "backend" in inspect.signature(gemm).parameters:
        # Without it, it looks for a Gluon kernel, and warns at each call that there is none.
        options["backend"] = "triton"
    return Prepared(
        shape=shape,
        w13=_to_weight(weights.w13, weights.w13_scale, weights.w13_bias),
        w2=_to_weight(weights.w2, weights.w2_scale, weights.w2_bias),
        order=routing.order_of(weights.expert_map),
        gemm=gemm,
        options=options,
        types=_types(),
        route=routing.route,
        combine=routing.combine,
    )


def _gemm() -> Callable[..., torch.Tensor]:
    gemm: Callable[..., torch.Tensor] = importlib.import_module(
        "aiter.ops.triton.moe.moe_op_gemm_a16w4"
    ).moe_gemm_a16w4
    return gemm


def _types() -> ModuleType:
    return importlib.import_module("aiter.ops.triton.moe.moe_routing.routing")


def _routing() -> ModuleType:
    return importlib.import_module("vllm_mxfp4_gfx950.backends.triton.routing")


def _to_weight(blocks: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor) -> Weight:
    """uint8[E, N, K / 2], uint8[E, N, K / 32] and fp32[E, N] as the kernel reads them."""
    return Weight(blocks.mT, package.swizzle(package.pad_scales(scales), _swizzle), bias)


def _swizzle(scales: torch.Tensor) -> torch.Tensor:
    """uint8[E, K / 32, N] to uint8[E, K, N / 32], K contiguous.

    The inverse of `two_fp8_kernels.scales_in_torch`.

    Source: ROCm/aiter, `swizzle_scales` in moe_op_gemm_a16w4.py, 0.1.14.
    """
    experts, groups, rows = scales.shape
    split = scales.mT.reshape(experts, rows // 32, 2, 16, groups // 8, 2, 4)
    return split.permute(0, 1, 4, 6, 3, 5, 2).reshape(experts, rows // 32, groups * 32).mT
