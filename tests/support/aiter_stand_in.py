"""A stand-in for aiter's compiled kernels and for the machine, under aiter's own Python.

Real, from the package: fused_moe.py with its dispatch, ops/shuffle.py, the kernels' signatures
(ops/moe_op.py, ops/moe_sorting.py), the constants and the operator registration. Stood in for: what
`compile_ops` would compile, the look at the GPU, and the Triton quantizers, which must not be reached.

The kernels here reject what the compiled ones misread, undo the shuffles by their own arithmetic,
compute in float64 and round where the compiled ones round.

Source: ROCm/aiter csrc/include/aiter_enum.h, csrc/py_itfs_ck/moe_sorting_kernels.cu and
csrc/ck_tile_gemm_moe_2stages, v0.1.7.post2; ROCm/composable_kernel
include/ck_tile/ops/flatmm/kernel/moe_flatmm_kernel.hpp, as in that package.
"""

import enum
import functools
import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from vllm_mxfp4_gfx950.mxfp4 import dequantize

TREE = Path(__file__).parents[2] / ".venv/packages/amd-aiter"
TILE = 256
"""The kernels' tile along K, and twice the narrowest along N."""

TOKEN_BITS = 24


class Rejected(Exception):
    """The compiled kernels would crash on this, or read it as something else."""


class ActivationType(enum.Enum):  # noqa: D101
    No = -1
    Silu = 0
    Gelu = 1
    Swiglu = 2


class QuantType(enum.Enum):  # noqa: D101
    No = 0
    per_Tensor = 1
    per_Token = 2
    per_1x32 = 3
    per_1x128 = 4
    per_128x128 = 5


def require(name: str, value: object, *allowed: object) -> None:
    """Raise Rejected unless a value is one of those allowed."""
    if value not in allowed:
        raise Rejected(f"{name} must be {' or '.join(map(str, allowed))}; got {value}")


def require_tensor(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise Rejected unless a kernel may read a tensor through its pointer."""
    require(f"{name}'s dtype", tensor.dtype, dtype)
    require(f"{name}'s shape", tuple(tensor.shape), shape)
    require(f"{name}'s contiguity", tensor.is_contiguous(), True)


def moe_sorting_fwd(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    sorted_token_ids: torch.Tensor,
    sorted_weights: torch.Tensor,
    sorted_expert_ids: torch.Tensor,
    num_valid_ids: torch.Tensor,
    moe_buf: torch.Tensor,
    num_experts: int,
    unit_size: int,
    local_expert_mask: torch.Tensor | None,
    num_local_tokens: torch.Tensor | None,
    dispatch_policy: int,
) -> None:
    """Sort the choices by expert, each expert's padded to whole blocks; clear the output."""
    tokens, topk = topk_ids.shape
    require_tensor("topk_ids", topk_ids, torch.int32, (tokens, topk))
    require_tensor("topk_weights", topk_weights, torch.float32, (tokens, topk))
    require("topk_ids within num_experts", bool(((topk_ids >= 0) & (topk_ids < num_experts)).all()), True)
    require("num_local_tokens", num_local_tokens, None)
    require("dispatch_policy", dispatch_policy, 0)
    here = torch.ones(num_experts, dtype=torch.int32)
    if local_expert_mask is not None:
        require_tensor("local_expert_mask", local_expert_mask, torch.int32, (num_experts,))
        require("local_expert_mask's values", set(local_expert_mask.tolist()) <= {0, 1}, True)
        here = local_expert_mask
    nobody = topk << TOKEN_BITS | tokens
    ids, weights, experts = [], [], []
    for local, expert in enumerate(here.nonzero().flatten().tolist()):
        token, slot = torch.where(topk_ids == expert)
        padding = -len(token) % unit_size
        ids += (slot << TOKEN_BITS | token).tolist() + padding * [nobody]
        weights += topk_weights[token, slot].tolist() + padding * [0.0]
        experts += (len(token) + padding) // unit_size * [local]
    sorted_token_ids[: len(ids)] = torch.tensor(ids, dtype=torch.int32)
    sorted_weights[: len(ids)] = torch.tensor(weights)
    sorted_expert_ids[: len(experts)] = torch.tensor(experts, dtype=torch.int32)
    num_valid_ids[0] = len(ids)
    moe_buf.zero_()


def cktile_moe_gemm1(  # noqa: D103
    XQ: torch.Tensor,
    WQ: torch.Tensor,
    Y: torch.Tensor,
    sorted_ids: torch.Tensor,
    sorted_expert_ids: torch.Tensor,
    max_token_ids: torch.Tensor,
    topk: int,
    n_padded_zeros: int,
    k_padded_zeros: int,
    topk_weight: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    w_scale: torch.Tensor,
    exp_bias: torch.Tensor,
    block_m: int,
) -> torch.Tensor:
    intermediate = WQ.shape[1] // 2
    require_tensor("XQ", XQ, torch.bfloat16, (len(XQ), 2 * WQ.shape[2]))
    require_tensor("Y", Y, torch.bfloat16, (len(XQ), topk, intermediate))
    require("topk_weight", topk_weight, None)
    require("x_scale", x_scale, None)
    require("pads", (n_padded_zeros, k_padded_zeros), (0, 0))
    require_weights(WQ, w_scale, exp_bias)
    # Whoever reads a row that is not written here shall know.
    Y.fill_(float("nan"))
    for expert, chosen in blocks_by_expert(sorted_ids, sorted_expert_ids, max_token_ids, block_m):
        token, slot = token_and_slot(sorted_ids[chosen], len(XQ))[:2]
        w = unshuffled(WQ, w_scale, expert, gate_up=True)
        acc = XQ[token].double() @ w.mT + exp_bias[expert].double()
        gate = acc[:, :intermediate].clamp(max=7.0)
        up = acc[:, intermediate:].clamp(min=-7.0, max=7.0)
        Y[token, slot] = (gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)).bfloat16()
    return Y


def cktile_moe_gemm2(  # noqa: D103
    XQ: torch.Tensor,
    WQ: torch.Tensor,
    Y: torch.Tensor,
    sorted_ids: torch.Tensor,
    sorted_expert_ids: torch.Tensor,
    max_token_ids: torch.Tensor,
    topk: int,
    n_padded_zeros: int,
    k_padded_zeros: int,
    topk_weight: torch.Tensor,
    x_scale: torch.Tensor | None,
    w_scale: torch.Tensor,
    exp_bias: torch.Tensor,
    block_m: int,
) -> torch.Tensor:
    require_tensor("XQ", XQ, torch.bfloat16, (len(Y), topk, 2 * WQ.shape[2]))
    require_tensor("Y", Y, torch.bfloat16, (len(Y), WQ.shape[1]))
    require("x_scale", x_scale, None)
    require("pads", (n_padded_zeros, k_padded_zeros), (0, 0))
    require_weights(WQ, w_scale, exp_bias)
    for expert, chosen in blocks_by_expert(sorted_ids, sorted_expert_ids, max_token_ids, block_m):
        token, slot, valid = token_and_slot(sorted_ids[chosen], len(Y))
        acc = XQ[token, slot].double() @ unshuffled(WQ, w_scale, expert, gate_up=False).mT
        acc = (acc + exp_bias[expert].double()) * topk_weight[chosen][valid].double()[:, None]
        # An atomic addition in bf16 for each choice; an expert has a token once at most.
        Y[token] += acc.bfloat16()
    return Y


def require_weights(w: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor) -> None:
    """Raise Rejected unless w[E, N, K / 2] and what belongs to it are such as the kernels take."""
    experts, rows, row_bytes = w.shape
    require_tensor("w", w, torch.float4_e2m1fn_x2, (experts, rows, row_bytes))
    require("w's rows modulo a tile", rows % TILE, 0)
    require("w's columns modulo a tile", 2 * row_bytes % TILE, 0)
    require_tensor("scales", scales, torch.uint8, (experts * rows, row_bytes // 16))
    require_tensor("bias", bias, torch.float32, (experts, rows))


def blocks_by_expert(
    sorted_ids: torch.Tensor, sorted_expert_ids: torch.Tensor, max_token_ids: torch.Tensor, block_m: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Each local expert, and which of the sorted places are in its blocks."""
    require("block_m", block_m, 16, 32, 64)
    place = torch.arange(int(max_token_ids[0]))
    expert_of_place = sorted_expert_ids[place // block_m]
    for expert in expert_of_place.unique().tolist():
        yield expert, place[expert_of_place == expert]


def token_and_slot(ids: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens and their choices' slots without the padding, and which places these were."""
    token = ids & (1 << TOKEN_BITS) - 1
    valid = token < tokens
    return token[valid], (ids >> TOKEN_BITS)[valid], valid


def unshuffled(w: torch.Tensor, scales: torch.Tensor, expert: int, *, gate_up: bool) -> torch.Tensor:
    """One expert as float64[N, K], each byte looked up where the kernels look for it."""
    rows, row_bytes = w.shape[1:]
    groups = row_bytes // 16
    row = torch.arange(rows)[:, None]
    byte, group = torch.arange(row_bytes), torch.arange(groups)
    part, row = (row // (rows // 2), row % (rows // 2)) if gate_up else (0, row)
    sixteen, lane = row // 16, row % 16
    if gate_up:
        block, pair, half = 2 * sixteen + part, sixteen, part
    else:
        block, pair, half = sixteen, sixteen // 2, sixteen % 2
    at = ((block * (row_bytes // 64) + byte // 64) * 4 + byte % 64 // 16) * 256 + lane * 16 + byte % 16
    scale_at = ((pair * (groups // 8) + group // 8) * 4 + group % 4) * 64
    scale_at = scale_at + lane * 4 + group % 8 // 4 * 2 + half
    blocks = w[expert].view(torch.uint8).flatten()[at]
    return dequantize(blocks, scales.view(-1, rows * groups)[expert][scale_at], torch.float64)


KERNELS: dict[str, Callable[..., Any]] = {
    "ActivationType": ActivationType,
    "QuantType": QuantType,
    "moe_sorting_fwd": moe_sorting_fwd,
    "cktile_moe_gemm1": cktile_moe_gemm1,
    "cktile_moe_gemm2": cktile_moe_gemm2,
}
"""By the names that aiter gives them in its compiled modules."""


def compile_ops(_module: str, fc_name: str | None = None, **_build: object) -> Callable[..., Any]:
    """aiter's decorator, which turns the signature of a kernel into a call of it."""

    def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: object, **kwargs: object) -> object:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return KERNELS[fc_name or function.__name__](*bound.args)

        return call

    return decorator


def quantize(*_args: object, **_kwargs: object) -> None:
    """What aiter does to activations that it does not leave in bf16."""
    raise Rejected("activations must stay bf16; got a call of a quantizer")


@functools.cache
def load() -> dict[str, ModuleType]:
    """The modules of aiter by name, not left in sys.modules. They can be loaded but once a process."""
    aiter = ModuleType("aiter")
    aiter.__path__ = [str(TREE / "aiter")]
    core = ModuleType("aiter.jit.core")
    vars(core).update(
        compile_ops=compile_ops,
        AITER_CONFIG_FMOE_FILE="",
        AITER_CSRC_DIR="",
        PY="",
        bd_dir="",
        get_asm_dir=None,
        mp_lock=None,
    )
    chip_info = ModuleType("aiter.jit.utils.chip_info")
    vars(chip_info).update(get_gfx=lambda: "gfx950", get_cu_num=lambda: 256)
    fp4_utils = ModuleType("aiter.utility.fp4_utils")
    vars(fp4_utils).update(moe_mxfp4_sort=quantize)
    sys.modules |= {module.__name__: module for module in (aiter, core, chip_info, fp4_utils)}
    try:
        for name in ("ops.enum", "ops.moe_op", "ops.moe_sorting"):
            exported = vars(importlib.import_module(f"aiter.{name}")).items()
            vars(aiter).update({name: value for name, value in exported if not name.startswith("_")})
        aiter.dtypes = importlib.import_module("aiter.utility.dtypes")
        importlib.import_module("aiter.utility").fp4_utils = fp4_utils
        aiter.get_hip_quant = lambda quant_type: quantize
        aiter.logger = logging.getLogger("aiter")
        importlib.import_module("aiter.ops.shuffle")
        # No tuned table, which would need pandas; for this activation it decides nothing but block_m.
        importlib.import_module("aiter.fused_moe").cfg_2stages = {}
        # aiter names its operators twice over, on which torch stumbles as it takes them down at exit.
        importlib.import_module("aiter.jit.utils.torch_guard").aiter_lib._op_defs.clear()
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "aiter"}
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "aiter"]:
            del sys.modules[name]


def later(fused_moe: Callable[..., Any], *parameters: str) -> Callable[..., Any]:
    """A later generation of fused_moe, as far as it matters here: more parameters, and fp8 in large batches.

    Args:
        fused_moe: that of the package.
        parameters: those that the later one takes besides.

    Source: ROCm/aiter aiter/fused_moe.py, v0.1.14 to v0.1.20.post1, and pull request 5439.
    """
    old = inspect.signature(fused_moe)
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in parameters]
    signature = old.replace(parameters=[*old.parameters.values(), *more])

    def call(*args: object, **kwargs: object) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        modes = {name: arguments.pop(name, None) for name in parameters}
        require("gate_mode", modes["gate_mode"], "interleave")
        for name in ("w1", "w2"):
            require(f"{name}.is_shuffled", getattr(arguments[name], "is_shuffled", False), True)
        x = arguments["hidden_states"]
        large = len(x) >= int(os.environ.get("AITER_BF16_FP8_MOE_BOUND", "256"))
        if large and modes.get("quant_dtype_a") != torch.bfloat16:
            arguments["hidden_states"] = through_fp8(x)
        return fused_moe(**arguments)

    vars(call)["__signature__"] = signature
    return call


def through_fp8(x: torch.Tensor) -> torch.Tensor:
    """What MXFP8, blocks of 32 E4M3 values under one power of two, leaves of bf16[T, H]."""
    blocks = x.float().unflatten(1, (-1, 32))
    scale = torch.exp2(blocks.abs().amax(2, keepdim=True).clamp(min=2.0**-100).log2().floor() - 8)
    return ((blocks / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).flatten(1).to(x)
