"""A stand-in for aiter's `moe_gemm_a16w4` and for the types of its routing.

It has the true signatures, rejects what the compiled kernel would misread or read beyond its end, finds
weights, scales and rows where the kernel looks for them, computes in float64 and rounds where it rounds.

Source: ROCm/aiter, aiter/ops/triton/moe/moe_op_gemm_a16w4.py and moe_routing/routing.py, and the kernel in
aiter/ops/triton/_triton_kernels/moe/moe_op_gemm_a16w4.py; v0.1.14, v0.1.20.post1 and e404860.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from aiter_stand_in import Rejected, require

from vllm_mxfp4_gfx950.backends import reference
from vllm_mxfp4_gfx950.backends.triton.two_fp8_kernels import scales_in_torch
from vllm_mxfp4_gfx950.mxfp4 import dequantize

WIDEST, DEPTH = 512, 256
"""Columns and depth of the largest tile: scales are loaded in whole tiles, unmasked."""

REQUIRED = ("x", "w", "x_scales", "w_scales")
OPTIONAL = {
    "x_static_scale": None,
    "quant_static_scale": None,
    "bias": None,
    "routing_data": None,
    "gather_indx": None,
    "scatter_indx": None,
    "gammas": None,
    "swizzle_mx_scale": None,
    "out_dtype": torch.bfloat16,
    "apply_swiglu": False,
    "alpha": 1.0,
    "limit": 1.0,
}
UNPADDED = {"unpadded_N": None, "unpadded_K": None}
GENERATIONS: dict[str, dict[str, Any]] = {
    "0.1.14": {"add_residual": True, **UNPADDED},
    "0.1.20": {"swiglu_add_residual": True, **UNPADDED},
    "e404860": {"swiglu_add_residual": True, **UNPADDED, "backend": None},
}
"""The parameters behind the others and their defaults, by release or commit."""


@dataclass
class ExptData:
    """The rows of each expert, and what each tile computes; as in our Routing."""

    hist: torch.Tensor
    token_offs_raw: torch.Tensor
    token_offs_pad: torch.Tensor
    block_pid_map: torch.Tensor

    def __post_init__(self) -> None:
        for name, tensor in vars(self).items():
            require(f"{name}'s dtype", tensor.dtype, torch.int32)
            require(f"{name}'s stride", tensor.stride(), (1,))


@dataclass
class RoutingData:
    """A batch's routing."""

    block_m: int
    gate_scal: torch.Tensor
    expt_hist: torch.Tensor
    n_expts_tot: int
    n_expts_act: int
    expt_data: ExptData | None = None

    def n_blocks(self, n_rows: int, block_m: int) -> int:
        """How many tiles there can be at most: so many are launched."""
        experts = self.n_expts_tot
        return n_rows if n_rows <= experts else experts + (n_rows - experts) // block_m


def gemm(generation: str) -> Callable[..., torch.Tensor]:
    """`moe_gemm_a16w4` as one generation has it."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature(
        [
            *(inspect.Parameter(name, kind) for name in REQUIRED),
            *(
                inspect.Parameter(name, kind, default=default)
                for name, default in (OPTIONAL | GENERATIONS[generation]).items()
            ),
        ]
    )

    def moe_gemm_a16w4(*args: Any, **kwargs: Any) -> torch.Tensor:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for name, default in GENERATIONS[generation].items():
            # Without a name it takes a Gluon kernel where there is one, and warns where there is none.
            require(name, bound.arguments.pop(name), "triton" if name == "backend" else default)
        return multiply(**bound.arguments)

    vars(moe_gemm_a16w4)["__signature__"] = signature
    return moe_gemm_a16w4


def multiply(
    x: torch.Tensor,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    bias: torch.Tensor,
    routing_data: RoutingData,
    gather_indx: torch.Tensor | None,
    gammas: torch.Tensor | None,
    swizzle_mx_scale: str | None,
    apply_swiglu: bool,
    alpha: float,
    limit: float,
    **others: Any,
) -> torch.Tensor:
    """The kernel: bf16[rows, N], or half as many columns with the SwiGLU; rows of no tile are not written."""
    require("out_dtype", others.pop("out_dtype"), torch.bfloat16)
    for name, value in others.items():
        require(name, value, None)
    require("x's dtype", x.dtype, torch.bfloat16)
    require("w's dtype", w.dtype, torch.uint8)
    require("w's stride along the depth", w.stride(1), 1)
    require("w_scales' dtype", w_scales.dtype, torch.uint8)
    require("swizzle_mx_scale", swizzle_mx_scale, "CDNA4_SCALE")
    experts, packed, columns = w.shape
    require("x's columns", x.shape[1], 2 * packed)
    require("bias's shape", tuple(bias.shape), (experts, columns))
    require("bias's stride", bias.stride(1), 1)
    for name, size, least in (
        ("columns", 32 * w_scales.shape[2], -(-columns // WIDEST) * WIDEST),
        ("depth", w_scales.shape[1], -(-packed // (DEPTH // 2)) * DEPTH),
    ):
        if size < least:
            raise Rejected(f"w_scales' {name} must be at least {least}; got {size}")
    for name, tensor in (("gather_indx", gather_indx), ("gammas", gammas)):
        require(f"{name}'s stride", tensor is None or tensor.stride(), True, (1,))
    tiles, block_m = routing_data.expt_data, routing_data.block_m
    assert tiles is not None
    require("block_m", block_m, 16, 32, 64, 128)
    rows = len(x if gather_indx is None else gather_indx)
    count = int(tiles.token_offs_pad[-1])
    if count > routing_data.n_blocks(rows, block_m):
        raise Rejected(f"tiles must be at most {routing_data.n_blocks(rows, block_m)}; got {count}")
    scales = scales_in_torch(w_scales.mT)[:, :columns, : packed // 16]
    y = torch.full((rows, columns // (1 + apply_swiglu)), float("nan"), dtype=torch.bfloat16)
    for entry in tiles.block_pid_map[:count].tolist():
        expert, tile = entry & 0xFFFF, entry >> 16
        row = torch.arange(tile * block_m, min((tile + 1) * block_m, int(tiles.hist[expert])))
        row += int(tiles.token_offs_raw[expert])
        source = row if gather_indx is None else gather_indx[row].long() // routing_data.n_expts_act
        out = x[source].double() @ dequantize(w[expert].mT, scales[expert], torch.float64).mT
        out += bias[expert].double()
        if apply_swiglu:
            out = reference.swiglu(out, alpha, limit)
        if gammas is not None:
            out *= gammas[row, None].double()
        y[row] = out.bfloat16()
    return y


def modules(generation: str) -> dict[str, ModuleType]:
    """The modules of aiter by name, with the packages that they are in."""
    names = (
        "aiter",
        "aiter.ops",
        "aiter.ops.triton",
        "aiter.ops.triton.moe",
        "aiter.ops.triton.moe.moe_routing",
    )
    found = {name: ModuleType(name) for name in names}
    for package in found.values():
        package.__path__ = []
    found["aiter"].__path__ = ["/aiter"]
    kernel = ModuleType("aiter.ops.triton.moe.moe_op_gemm_a16w4")
    vars(kernel).update(moe_gemm_a16w4=gemm(generation))
    types = ModuleType("aiter.ops.triton.moe.moe_routing.routing")
    vars(types).update(RoutingData=RoutingData, ExptData=ExptData)
    return found | {module.__name__: module for module in (kernel, types)}
