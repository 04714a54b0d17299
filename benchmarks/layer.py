"""Time one GPT-OSS MoE layer on this GPU: this package beside vLLM's own TRITON path, same weights.

    python benchmarks/layer.py [--experts 32 128] [--tokens 1 4 16 64 256 1024 4096]

Each time is the median of CUDA-graph replays of 16 calls with different tokens, so that the chosen
experts come from memory and not from the cache, and the mean of two such, in the order ours, vLLM, vLLM,
ours. Every shape is checked against float64 first.
"""

import argparse
import statistics
from collections.abc import Callable

import torch

from vllm_mxfp4_gfx950 import backends, settings
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights
from vllm_mxfp4_gfx950.random_layer import make_shape, random_tokens, random_weights, truth_and_plain
from vllm_mxfp4_gfx950.tolerance import assert_rows_close

CALLS = 16
Layer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def ours(weights: MoeWeights, shape: MoeShape) -> Layer:
    """This package's Triton backend."""
    arch = backends.arch_of(torch.device("cuda"))
    selection = backends.select(shape, arch, settings.Settings("triton"))
    print(selection)
    prepared = selection.backend.prepare(weights, shape)
    return lambda x, logits: selection.backend.run(prepared, x, logits)


def vllm_triton(weights: MoeWeights, shape: MoeShape) -> Layer:
    """vLLM's own preparation and forward of its TRITON MXFP4 backend (vLLM 0.26)."""
    from triton_kernels.matmul_ogs import FlexCtx, PrecisionConfig
    from vllm.model_executor.layers.fused_moe.config import mxfp4_w4a16_moe_quant_config
    from vllm.model_executor.layers.fused_moe.experts.gpt_oss_triton_kernels_moe import (
        triton_kernel_moe_forward,
    )
    from vllm.model_executor.layers.quantization.utils.mxfp4_utils import _swizzle_mxfp4

    tensors, scales = [], []
    for blocks, block_scales in ((weights.w13, weights.w13_scale), (weights.w2, weights.w2_scale)):
        values, flex, swizzled = _swizzle_mxfp4(blocks, block_scales)
        tensors.append(values)
        scales.append(PrecisionConfig(weight_scale=swizzled, flex_ctx=FlexCtx(rhs_data=flex)))
    config = mxfp4_w4a16_moe_quant_config(
        w1_bias=weights.w13_bias.float(),
        w2_bias=weights.w2_bias.float(),
        w1_scale=scales[0],
        w2_scale=scales[1],
    )
    return lambda x, logits: triton_kernel_moe_forward(
        x, *tensors, logits, shape.topk, renormalize=True, quant_config=config
    )


def microseconds(layer: Layer, inputs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Median time of one call inside a replayed graph."""
    for x, logits in inputs:
        layer(x, logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x, logits in inputs:
            layer(x, logits)
    times = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / len(inputs))
    return statistics.median(times[2:])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024, 4096])
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for experts in args.experts:
        shape = make_shape(experts, 4, 2880, 2880)
        truth_weights = random_weights(shape, 0, "cuda")
        layers = [
            ours(random_weights(shape, 0, "cuda"), shape),
            vllm_triton(random_weights(shape, 0, "cuda"), shape),
        ]
        for tokens in args.tokens:
            inputs = [random_tokens(shape, tokens, seed, "cuda") for seed in range(CALLS)]
            for layer in layers:
                assert_rows_close(layer(*inputs[0]), *truth_and_plain(*inputs[0], truth_weights, shape))
            times = [microseconds(layers[i], inputs) for i in (0, 1, 1, 0)]
            mine, peer = (times[0] + times[3]) / 2, (times[1] + times[2]) / 2
            figures = f"ours {mine:.1f} us, vLLM {peer:.1f} us, ratio {peer / mine:.3f}"
            print(f"E={experts} T={tokens}: {figures}", flush=True)


if __name__ == "__main__":
    main()
