"""One mixture-of-experts layer as data: its shape, its weights, and the rules that both must meet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.mxfp4 import BLOCK, SCALE_NAN

MAX_EXPERTS = 2**12
MAX_WIDTH = 2**16
"""Larger is a mistake in a config.json, and no reason to ask for that much memory."""

VERIFY = (
    "Run `hf cache verify`, and download anew, with --force-download, what differs; "
    "if nothing does, take another checkpoint"
)
"""What to do about values that no sound checkpoint has, in files that are whole."""


@dataclass(frozen=True)
class MoeShape:
    """Sizes of one rank's share of a GPT-OSS MoE layer.

    Args:
        experts: experts that live on this rank.
        global_experts: experts of the model, the width of the router's logits.
        topk: experts that each token chooses.
        hidden: width of the residual stream.
        intermediate: width of this rank's slice of the SwiGLU, a multiple of 32.
        alpha: SwiGLU's sigmoid factor.
        limit: SwiGLU's clamp.

    Raises:
        Mxfp4Error: a size breaks its rule.
    """

    experts: int
    global_experts: int
    topk: int
    hidden: int
    intermediate: int
    alpha: float
    limit: float

    def __post_init__(self) -> None:
        check_multiple_of_block("hidden", self.hidden)
        check_multiple_of_block("intermediate", self.intermediate)
        for name, most, key in (
            ("global_experts", MAX_EXPERTS, "num_local_experts"),
            ("hidden", MAX_WIDTH, "hidden_size"),
            ("intermediate", MAX_WIDTH, "intermediate_size"),
        ):
            size = getattr(self, name)
            if type(size) is not int or not 1 <= size <= most:
                fix = f"Correct {key} in the model's config.json"
                raise Mxfp4Error(name, f"an integer from 1 to {most}", repr(size), fix)
        for name in ("alpha", "limit"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                fix = f"Correct swiglu_{name} in the model's config.json"
                raise Mxfp4Error(name, "a positive number", repr(value), fix)
        if not 1 <= self.experts <= self.global_experts:
            raise Mxfp4Error(
                "experts",
                f"between 1 and the model's {self.global_experts}",
                self.experts,
                "Use fewer expert-parallel ranks",
            )
        if type(self.topk) is not int or not 1 <= self.topk <= self.global_experts:
            raise Mxfp4Error(
                "topk",
                f"between 1 and the number of experts, {self.global_experts}",
                self.topk,
                "Correct num_experts_per_tok in the model's config.json",
            )

    def __str__(self) -> str:
        local = "" if self.experts == self.global_experts else f" of {self.global_experts}"
        return (
            f"E={self.experts}{local} topk={self.topk} H={self.hidden} I={self.intermediate} "
            f"alpha={self.alpha:g} limit={self.limit:g}"
        )


def whole_layer(config: Any) -> MoeShape:
    """One layer of a model, all of it.

    Args:
        config: what the model's config.json says, as attributes. Configs older than transformers'
            `swiglu_alpha` mean the value that its default has.

    Raises:
        Mxfp4Error: a size breaks its rule.
    """
    check_multiple_of_block("hidden_size", config.hidden_size)
    check_multiple_of_block("intermediate_size", config.intermediate_size)
    return MoeShape(
        experts=config.num_local_experts,
        global_experts=config.num_local_experts,
        topk=config.num_experts_per_tok,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        alpha=getattr(config, "swiglu_alpha", 1.702),
        limit=getattr(config, "swiglu_limit", 7.0),
    )


@dataclass(frozen=True)
class MoeWeights:
    """The experts of one rank, in checkpoint layout: w13's rows interleave gate and up.

    Biases are fp32 whatever a checkpoint has, which loses nothing: kernels add them to fp32 sums.

    Args:
        w13: uint8[experts, 2 * intermediate, hidden / 2], packed E2M1 blocks.
        w13_scale: uint8[experts, 2 * intermediate, hidden / 32], E8M0.
        w13_bias: fp32[experts, 2 * intermediate].
        w2: uint8[experts, hidden, intermediate / 2], packed E2M1 blocks.
        w2_scale: uint8[experts, hidden, intermediate / 32], E8M0.
        w2_bias: fp32[experts, hidden].
        expert_map: int32[global_experts], the local index of each of the model's experts and -1
            where it lives on another rank; None when all of them are here, in order.

    Source: openai/gpt-oss, gpt_oss/torch/weights.py; huggingface.co/openai/gpt-oss-20b.
    """

    w13: torch.Tensor
    w13_scale: torch.Tensor
    w13_bias: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor
    w2_bias: torch.Tensor
    expert_map: torch.Tensor | None = None

    def clone(self) -> MoeWeights:
        """A copy for a backend's `prepare`, which consumes what it is given."""
        return MoeWeights(
            **{name: tensor.clone() for name, tensor in vars(self).items() if tensor is not None}
        )


def tensor_shapes(
    experts: int, hidden: int, intermediate: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each of the six tensors of MoeWeights, by field."""
    return {
        "w13": (torch.uint8, (experts, 2 * intermediate, hidden // 2)),
        "w13_scale": (torch.uint8, (experts, 2 * intermediate, hidden // BLOCK)),
        "w13_bias": (torch.float32, (experts, 2 * intermediate)),
        "w2": (torch.uint8, (experts, hidden, intermediate // 2)),
        "w2_scale": (torch.uint8, (experts, hidden, intermediate // BLOCK)),
        "w2_bias": (torch.float32, (experts, hidden)),
    }


def first_experts(shape: MoeShape) -> torch.Tensor | None:
    """The expert_map of the rank that holds the model's first experts; None when it holds all."""
    if shape.experts == shape.global_experts:
        return None
    expert_map = torch.arange(shape.global_experts, dtype=torch.int32)
    expert_map[shape.experts :] = -1
    return expert_map


def pad_intermediate(weights: MoeWeights, multiple: int) -> MoeWeights:
    """Widen the intermediate size with zeros, which add nothing to the layer's output.

    Args:
        weights: the experts.
        multiple: of how many values the new intermediate size is; itself a multiple of 32.

    Returns:
        The same tensors where they already fit.
    """
    extra = -(2 * weights.w2.shape[2]) % multiple
    if not extra:
        return weights

    def pad(tensor: torch.Tensor, *amounts: int) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, amounts)

    return MoeWeights(
        w13=pad(weights.w13, 0, 0, 0, 2 * extra),
        w13_scale=pad(weights.w13_scale, 0, 0, 0, 2 * extra),
        w13_bias=pad(weights.w13_bias, 0, 2 * extra),
        w2=pad(weights.w2, 0, extra // 2),
        w2_scale=pad(weights.w2_scale, 0, extra // BLOCK),
        w2_bias=weights.w2_bias,
        expert_map=weights.expert_map,
    )


def check_multiple_of_block(name: str, size: int) -> None:
    """Raise Mxfp4Error unless a size holds whole blocks."""
    if type(size) is not int or size <= 0 or size % BLOCK:
        raise Mxfp4Error(
            name,
            f"a positive multiple of {BLOCK}",
            size,
            "MXFP4 stores blocks of 32 values; this model cannot be stored in it",
        )


def check_weights(weights: MoeWeights, shape: MoeShape, prefix: str = "") -> None:
    """Hold the weights against the shape.

    Args:
        weights: the experts.
        shape: what they should be.
        prefix: goes before the names in error texts.

    Raises:
        Mxfp4Error: a tensor has the wrong dtype or shape, a scale is NaN (0xFF), or a bias is not finite.
    """
    tensors = tensor_shapes(shape.experts, shape.hidden, shape.intermediate)
    for name, (dtype, size) in tensors.items():
        check_tensor(f"{prefix}{name}", getattr(weights, name), dtype, size)
    for name in ("w13_scale", "w2_scale"):
        nans = int((getattr(weights, name) == SCALE_NAN).sum())
        if nans:
            raise Mxfp4Error(f"{prefix}{name}", "free of NaN scales (0xFF)", f"{nans} of them", VERIFY)
    for name in ("w13_bias", "w2_bias"):
        wrong = int((~getattr(weights, name).isfinite()).sum())
        if wrong:
            raise Mxfp4Error(f"{prefix}{name}", "free of NaN and Inf", f"{wrong} of them", VERIFY)


def check_tensor(name: str, tensor: torch.Tensor, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    """Raise Mxfp4Error unless a tensor has this dtype and this shape."""
    if tensor.dtype != dtype or tuple(tensor.shape) != size:
        raise Mxfp4Error(
            name,
            f"{dtype} {list(size)}",
            f"{tensor.dtype} {list(tensor.shape)}",
            "Check that the checkpoint is GPT-OSS in MXFP4 and fits its config.json",
        )
