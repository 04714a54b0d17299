"""vLLM's own MXFP4 MoE layers, prepared and called as vLLM 0.26 does, to measure beside ours.

Each imports what it needs when it is prepared, so that one which is missing does not take the other with it.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from vllm_mxfp4_gfx950.backends.triton import package
from vllm_mxfp4_gfx950.bench.layer import Builder, Layer
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights, pad_intermediate


def triton(weights: MoeWeights, shape: MoeShape) -> Layer:
    """TRITON, padded as vLLM pads it on a GPU of NVIDIA's."""
    from vllm.model_executor.layers.fused_moe.config import mxfp4_w4a16_moe_quant_config
    from vllm.model_executor.layers.fused_moe.experts.gpt_oss_triton_kernels_moe import (
        triton_kernel_moe_forward,
    )
    from vllm.model_executor.layers.quantization.utils.mxfp4_utils import _swizzle_mxfp4

    ogs = package.load("matmul_ogs")
    weights = pad_intermediate(weights, 64)
    tensors, scales = [], []
    for blocks, block_scales in ((weights.w13, weights.w13_scale), (weights.w2, weights.w2_scale)):
        values, flex, swizzled = _swizzle_mxfp4(blocks, block_scales)
        tensors.append(values)
        scales.append(ogs.PrecisionConfig(weight_scale=swizzled, flex_ctx=ogs.FlexCtx(rhs_data=flex)))
    config = mxfp4_w4a16_moe_quant_config(
        w1_bias=weights.w13_bias,
        w2_bias=weights.w2_bias,
        w1_scale=scales[0],
        w2_scale=scales[1],
    )
    return lambda x, logits: triton_kernel_moe_forward(
        x, *tensors, logits, shape.topk, renormalize=True, quant_config=config
    )


def marlin(weights: MoeWeights, shape: MoeShape) -> Layer:
    """MARLIN, padded as vLLM pads it."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import fused_topk
    from vllm.model_executor.layers.quantization.utils.marlin_utils_fp4 import (
        prepare_moe_mxfp4_layer_for_marlin,
    )
    from vllm.scalar_type import scalar_types

    pad = torch.nn.functional.pad
    hidden, inner = -shape.hidden % 256, -shape.intermediate % 128
    w13, w2, w13_scale, w2_scale, w13_bias, w2_bias = prepare_moe_mxfp4_layer_for_marlin(
        SimpleNamespace(params_dtype=torch.bfloat16),
        pad(weights.w13, (0, hidden // 2, 0, 2 * inner)),
        pad(weights.w2, (0, inner // 2, 0, hidden)),
        pad(weights.w13_scale, (0, hidden // 32, 0, 2 * inner)),
        pad(weights.w2_scale, (0, inner // 32, 0, hidden)),
        pad(weights.w13_bias, (0, 2 * inner)),
        pad(weights.w2_bias, (0, hidden)),
    )

    def run(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        topk_weights, topk_ids, _ = fused_topk(x, logits, shape.topk, renormalize=True)
        out: torch.Tensor = fused_marlin_moe(
            pad(x, (0, hidden)),
            w13,
            w2,
            w13_bias,
            w2_bias,
            w13_scale,
            w2_scale,
            topk_weights,
            topk_ids,
            quant_type_id=scalar_types.float4_e2m1f.id,
            global_num_experts=shape.experts,
            activation=MoEActivation.SWIGLUOAI,
        )
        return out[:, : shape.hidden]

    return run


BUILDERS: dict[str, Builder] = {"TRITON": triton, "MARLIN": marlin}
