"""The experts through aiter's `fused_moe`: its CK kernels for bf16 activations and MXFP4 weights.

The chosen experts are summed by atomics in bf16, so two runs may differ in their last bits.

Source: ROCm/aiter, aiter/fused_moe.py, aiter/ops/shuffle.py and csrc/ck_tile_gemm_moe_2stages,
0.1.7.post2 to 0.1.20.post1; vllm-project/vllm, fused_moe/oracle/mxfp4.py (AITER_MXFP4_BF16), 0.33.0.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from vllm_mxfp4_gfx950.backends.reference import route
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights
from vllm_mxfp4_gfx950.mxfp4 import BLOCK

NAME = "ck"
ARCH = "gfx950"
GET = "install amd-aiter 0.1.14 or later"
ALPHA, LIMIT = 1.702, 7.0
"""The SwiGLU that the kernels are compiled with."""

NEEDS = ("expert_mask", "activation", "quant_type", "w1_scale", "w2_scale", "bias1", "bias2")
"""Parameters of fused_moe that every call uses."""

TILE = 256
"""The kernels read and write whole tiles along hidden and intermediate, and check neither size."""

BOUND_VAR = "AITER_BF16_FP8_MOE_BOUND"
"""aiter's variable, which it reads at every call: batches of so many tokens get fp8 activations."""

EVERY_BATCH = 1_000_000
"""More tokens than any batch has."""


@dataclass(frozen=True)
class Prepared:
    """The weights in kernel layout, and everything else that stays the same from call to call.

    Args:
        fused_moe: aiter's function.
        w13: fp4x2[experts, 2 * padded intermediate, padded hidden / 2].
        w2: fp4x2[experts, padded hidden, padded intermediate / 2].
        options: the other arguments of fused_moe: scales, biases, expert mask and modes.
        topk: experts per token.
    """

    fused_moe: Callable[..., torch.Tensor]
    w13: torch.Tensor
    w2: torch.Tensor
    options: Mapping[str, Any]
    topk: int

    def run(self, x: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        """Route, and let aiter compute and combine the experts.

        bf16[T, H] and bf16 or fp32[T, global_experts] to bf16[T, H].
        """
        topk_ids, topk_weights = route(router_logits, self.topk)
        hidden = x.shape[1]
        padding = self.w2.shape[1] - hidden
        if padding:
            x = pad(x, (0, padding))
        out = self.fused_moe(x, self.w13, self.w2, topk_weights.float(), topk_ids.int(), **self.options)
        return out[:, :hidden].contiguous()

    def tensors(self) -> list[torch.Tensor]:
        """What the kernels read."""
        options = [option for option in self.options.values() if isinstance(option, torch.Tensor)]
        return [self.w13.view(torch.uint8), self.w2.view(torch.uint8), *options]


def why_not(shape: MoeShape, arch: str) -> str | None:
    """The reason why this shape cannot run on this arch with the aiter at hand."""
    if arch != ARCH:
        return f"it runs on {ARCH}, not on {arch}"
    if (shape.alpha, shape.limit) != (ALPHA, LIMIT):
        return f"its SwiGLU has alpha {ALPHA:g} and limit {LIMIT:g}, not {shape.alpha:g} and {shape.limit:g}"
    try:
        parameters = _parameters(importlib.import_module("aiter.fused_moe").fused_moe)
    except Exception as error:  # an import of aiter looks for ROCm and a GPU, and may compile
        return f"aiter does not import here: {error}"
    missing = [name for name in NEEDS if name not in parameters]
    if missing:
        return f"fused_moe of {source()} takes no {', '.join(missing)}; {GET}"
    return _why_not_bf16(parameters)


def source() -> str:
    """Which aiter it is, and where it lies."""
    try:
        version = metadata.version("amd-aiter")
    except metadata.PackageNotFoundError:
        version = "of unknown version"
    return f"aiter {version} in {Path(importlib.import_module('aiter').__path__[0])}"


def prepare(weights: MoeWeights, shape: MoeShape, tables: Path | None = None) -> Prepared:
    """De-interleave, pad and shuffle the weights, one expert at a time.

    The padding is zeros, and aiter is not told of it by hidden_pad and intermediate_pad: that would
    spare the reading of some of them, but aiter's kernels differ in what they make of the two
    (ROCm/aiter pull request 3538, vllm-project/vllm pull request 44679).

    Args:
        weights: consumed; their tensors must not be used afterwards.
        shape: the layer's sizes.
        tables: not used; aiter has its own.
    """
    aiter = importlib.import_module("aiter")
    fused_moe = importlib.import_module("aiter.fused_moe").fused_moe
    hidden, intermediate = (-(-size // TILE) * TILE for size in (shape.hidden, shape.intermediate))
    order = list(range(shape.experts))
    expert_mask = None
    if weights.expert_map is not None:
        here = weights.expert_map >= 0
        # The mask says which experts are here, and takes them to be in the model's order.
        expert_mask, order = here.int(), weights.expert_map[here].tolist()
    w13, w13_scale, w13_bias = _to_kernel_layout(
        weights.w13, weights.w13_scale, weights.w13_bias, order, 2, intermediate, hidden
    )
    w2, w2_scale, w2_bias = _to_kernel_layout(
        weights.w2, weights.w2_scale, weights.w2_bias, order, 1, hidden, intermediate
    )
    options = {
        "expert_mask": expert_mask,
        "activation": aiter.ActivationType.Swiglu,
        "quant_type": aiter.QuantType.per_1x32,
        "w1_scale": w13_scale,
        "w2_scale": w2_scale,
        "bias1": w13_bias,
        "bias2": w2_bias,
    }
    # Before 0.1.14, the layout of the weights was the only one for this activation.
    modes = {"gate_mode": "interleave", "quant_dtype_a": torch.bfloat16}
    options |= {name: mode for name, mode in modes.items() if name in _parameters(fused_moe)}
    return Prepared(fused_moe, w13, w2, options, shape.topk)


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _why_not_bf16(parameters: Mapping[str, inspect.Parameter]) -> str | None:
    """The reason why this fused_moe would not leave activations bf16 in every batch.

    Source: ROCm/aiter, aiter/fused_moe.py, every release from 0.1.7 to 0.1.20.post1, where the
    parameters tell the generations apart; quant_dtype_a: ROCm/aiter pull request 5439.
    """
    if "quant_dtype_a" in parameters:
        return None
    if "gate_mode" in parameters:
        bound = os.environ.get(BOUND_VAR, "256")
        if bound.isdecimal() and int(bound) >= EVERY_BATCH:
            return None
        return (
            f"{source()} makes activations fp8 in batches of {bound} tokens or more ({BOUND_VAR}); "
            f"export {BOUND_VAR}={EVERY_BATCH}"
        )
    if "splitk" in parameters:
        return f"{source()} makes activations fp8 in large batches and cannot be told not to; {GET}"
    return None


def _to_kernel_layout(
    blocks: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor,
    order: list[int],
    parts: int,
    rows: int,
    columns: int,
) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Bring one matmul into the layout of aiter's kernels.

    Args:
        blocks, scales, bias: as in MoeWeights.
        order: the experts wanted.
        parts: 2 where rows alternate between gate and up, else 1.
        rows: of each part, after padding.
        columns: values in a row, after padding.

    Returns:
        blocks: fp4x2[experts, parts * rows, columns / 2].
        scales: uint8[experts * parts * rows, columns / 32].
        bias: fp32[experts, parts * rows], all gates before all ups.
    """
    dtypes = importlib.import_module("aiter").dtypes
    shuffle = importlib.import_module("aiter.ops.shuffle")
    gate_up = parts == 2

    def shuffle_blocks(matrix: torch.Tensor) -> Any:
        return shuffle.shuffle_weight_a16w4(matrix.unsqueeze(0), 16, gate_up).squeeze(0)

    def shuffle_scales(matrix: torch.Tensor) -> Any:
        return shuffle.shuffle_scale_a16w4(matrix, 1, gate_up)

    arrange = partial(_arrange, order, parts, rows)
    fp4: Any = arrange(columns // 2, blocks, shuffle_blocks).view(dtypes.fp4x2)
    fp4.is_shuffled = True
    scales = arrange(columns // BLOCK, scales, shuffle_scales).flatten(0, 1)
    bias = arrange(1, bias.unsqueeze(2), lambda column: column).squeeze(2)
    return fp4, scales, bias


def _arrange(
    order: list[int],
    parts: int,
    rows: int,
    columns: int,
    data: torch.Tensor,
    shuffle: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """[E, N, K], its rows alternating between parts, to shuffled [E, parts * rows, columns]."""
    out = data.new_empty(len(order), parts * rows, columns)
    for slot, expert in enumerate(order):
        split = data[expert].view(-1, parts, data.shape[2]).transpose(0, 1)
        padding = (0, columns - split.shape[2], 0, rows - split.shape[1])
        out[slot] = shuffle(pad(split, padding).flatten(0, 1))
    return out
