"""The experts in plain torch, on dequantized weights: the truth for every backend, and the CPU path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights
from vllm_mxfp4_gfx950.mxfp4 import dequantize

NAME = "reference"


def why_not(shape: MoeShape, arch: str) -> str | None:
    """It runs anywhere."""
    return None


def source() -> str:
    """Where the computation comes from."""
    return f"torch {torch.__version__}"


def prepare(weights: MoeWeights, shape: MoeShape, tables: Path | None = None) -> Prepared:
    """Keep the weights as they are; they are dequantized expert by expert as tokens choose them."""
    return Prepared(weights, shape)


@dataclass(frozen=True)
class Prepared:
    """A layer as it was loaded."""

    weights: MoeWeights
    shape: MoeShape

    def run(self, x: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        """Route each token and compute its experts in fp32, rounding where the kernels round.

        Args:
            x: bf16 or fp32[T, H], the tokens.
            router_logits: bf16 or fp32[T, global_experts].

        Returns:
            x.dtype[T, H]
        """
        weights, shape = self.weights, self.shape
        out: torch.Tensor = torch.ops.vllm_mxfp4.reference_moe(
            x, router_logits, weights.w13, weights.w13_scale, weights.w13_bias,
            weights.w2, weights.w2_scale, weights.w2_bias, weights.expert_map,
            shape.topk, shape.alpha, shape.limit,
        )  # fmt: skip
        return out

    def tensors(self) -> list[torch.Tensor]:
        """What `run` reads."""
        return [tensor for tensor in vars(self.weights).values() if tensor is not None]


def route(router_logits: torch.Tensor, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts and weigh them: top-k, ties to the lower index, then softmax over the chosen.

    A NaN of either sign is above all numbers, as torch.topk has it; its token's weights are NaN, all of them.

    Args:
        router_logits: float[T, global_experts].
        topk: experts per token.

    Returns:
        topk_ids: int64[T, topk], the best first.
        topk_weights: float[T, topk] in the logits' dtype, summing to 1 up to its rounding.

    Source: openai/gpt-oss, gpt_oss/torch/model.py (MLPBlock); ties as in triton_kernels' topk.
    """
    values, ids = router_logits.sort(dim=-1, descending=True, stable=True)
    values = values[:, :topk]
    compute_dtype = torch.promote_types(values.dtype, torch.float32)
    return ids[:, :topk], values.to(compute_dtype).softmax(dim=-1).to(values.dtype)


def swiglu(x: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """GPT-OSS's clamped SwiGLU on interleaved columns.

    Args:
        x: float[..., 2 * I], gate and up in alternating columns.

    Returns:
        float[..., I]

    Source: openai/gpt-oss, gpt_oss/torch/model.py (swiglu).
    """
    gate = x[..., ::2].clamp(max=limit)
    up = x[..., 1::2].clamp(min=-limit, max=limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def experts(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    weights: MoeWeights,
    shape: MoeShape,
    compute_dtype: torch.dtype,
) -> torch.Tensor:
    """The experts' weighted sum, every operation in one dtype.

    Args:
        x: float[T, H]; its dtype is also that of the rows between the two matmuls.
        topk_ids: int64[T, topk], global expert indices.
        topk_weights: float[T, topk].
        weights: this rank's experts; choices that live on other ranks add nothing.
        compute_dtype: dtype of the matmuls, activation and sum: fp64 for the truth in tests.

    Returns:
        x.dtype[T, H]
    """
    local_ids = topk_ids if weights.expert_map is None else weights.expert_map.to(topk_ids)[topk_ids]
    out = torch.zeros(x.shape, dtype=compute_dtype, device=x.device)
    for expert in range(shape.experts):
        token, slot = torch.where(local_ids == expert)
        if not token.numel():
            continue
        rows = through_w13(x[token].to(compute_dtype), expert, weights, shape).to(x.dtype)
        rows = through_w2(rows.to(compute_dtype), expert, weights)
        out.index_add_(0, token, rows * topk_weights[token, slot, None].to(compute_dtype))
    return out.to(x.dtype)


def truth_and_plain(
    x: torch.Tensor, logits: torch.Tensor, weights: MoeWeights, shape: MoeShape
) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer in float64, and with every step in bf16."""
    topk_ids, topk_weights = route(logits, shape.topk)
    truth = experts(x.double(), topk_ids, topk_weights, weights, shape, torch.float64)
    plain = experts(x, topk_ids, topk_weights, weights, shape, torch.bfloat16)
    return truth, plain


def through_w13(x: torch.Tensor, expert: int, weights: MoeWeights, shape: MoeShape) -> torch.Tensor:
    """One expert's w13, bias and SwiGLU: float[rows, H] to [rows, I], in the dtype of x."""
    w13 = dequantize(weights.w13[expert], weights.w13_scale[expert], x.dtype)
    return swiglu(x @ w13.mT + weights.w13_bias[expert].to(x.dtype), shape.alpha, shape.limit)


def through_w2(x: torch.Tensor, expert: int, weights: MoeWeights) -> torch.Tensor:
    """One expert's w2 and bias: float[rows, I] to [rows, H], in the dtype of x."""
    w2 = dequantize(weights.w2[expert], weights.w2_scale[expert], x.dtype)
    return x @ w2.mT + weights.w2_bias[expert].to(x.dtype)


@torch.library.custom_op("vllm_mxfp4::reference_moe", mutates_args=())
def _reference_moe(
    x: torch.Tensor,
    router_logits: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w13_bias: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    w2_bias: torch.Tensor,
    expert_map: torch.Tensor | None,
    topk: int,
    alpha: float,
    limit: float,
) -> torch.Tensor:
    # An opaque operator, because which experts are dequantized depends on the data and vLLM's
    # compiler traces through the CPU path.
    weights = MoeWeights(w13, w13_scale, w13_bias, w2, w2_scale, w2_bias, expert_map)
    shape = MoeShape(w13.shape[0], router_logits.shape[1], topk, x.shape[1], w2.shape[2] * 2, alpha, limit)
    topk_ids, topk_weights = route(router_logits, topk)
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    return experts(x, topk_ids, topk_weights, weights, shape, compute_dtype)


@_reference_moe.register_fake
def _(x: torch.Tensor, *_args: object) -> torch.Tensor:
    return torch.empty_like(x)
