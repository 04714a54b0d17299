"""Time one GPT-OSS MoE layer on this GPU: this package beside vLLM's own TRITON and MARLIN, same weights.

    python benchmarks/layer.py [--experts 32 128] [--tokens 1 2 4 ... 8192] [--json FILE]

Needs vLLM 0.26 on an NVIDIA Hopper GPU. A time is the median of CUDA-graph replays of 16 calls, which take
other tokens and another layer's weights each, so that these come from memory and not from the cache; every
backend is timed twice, in the order a, b, c, c, b, a. Every layer is checked against float64 first. The floor
is the bytes of the chosen experts' weights over the measured copy bandwidth, or the matmuls over the measured
bf16 rate, whichever takes longer.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vllm_mxfp4_gfx950 import backends, settings
from vllm_mxfp4_gfx950.backends import reference
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights
from vllm_mxfp4_gfx950.random_layer import make_shape, random_tokens, random_weights
from vllm_mxfp4_gfx950.tolerance import compare

CALLS = 16
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
LAYERS = {32: 8, 128: 3}
Layer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def ours(weights: MoeWeights, shape: MoeShape) -> Layer:
    """This package's Triton backend."""
    arch = backends.arch_of(torch.device("cuda"))
    selection = backends.select(shape, arch, settings.Settings("triton"))
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


def vllm_marlin(weights: MoeWeights, shape: MoeShape) -> Layer:
    """vLLM's own preparation and forward of its MARLIN MXFP4 backend (vLLM 0.26), padded as vLLM pads it."""
    from types import SimpleNamespace

    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import fused_topk
    from vllm.model_executor.layers.quantization.utils.marlin_utils_fp4 import (
        prepare_moe_mxfp4_layer_for_marlin,
    )
    from vllm.scalar_type import scalar_types

    pad = torch.nn.functional.pad
    hidden, inner = -shape.hidden % 256, -shape.intermediate % 128
    marlin = prepare_moe_mxfp4_layer_for_marlin(
        SimpleNamespace(params_dtype=torch.bfloat16),
        pad(weights.w13, (0, hidden // 2, 0, 2 * inner)),
        pad(weights.w2, (0, inner // 2, 0, hidden)),
        pad(weights.w13_scale, (0, hidden // 32, 0, 2 * inner)),
        pad(weights.w2_scale, (0, inner // 32, 0, hidden)),
        pad(weights.w13_bias, (0, 2 * inner)),
        pad(weights.w2_bias, (0, hidden)),
    )
    w13, w2, w13_scale, w2_scale, w13_bias, w2_bias = marlin

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


BACKENDS: dict[str, Callable[[MoeWeights, MoeShape], Layer]] = {
    "ours": ours,
    "TRITON": vllm_triton,
    "MARLIN": vllm_marlin,
}


def microseconds(call: Callable[[int], object], calls: int = CALLS) -> float:
    """Median time of one call inside a replayed graph of some, numbered."""
    for i in range(calls):
        call(i)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    times = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / calls)
    return statistics.median(times[2:])


def rates() -> tuple[float, float]:
    """Bytes a second that a kernel copies, read and written, and FLOPs a second of a large bf16 matmul."""
    # Not Tensor.copy_, whose cudaMemcpy moves 2.7 TB/s on an H200 where a kernel moves 4.25.
    a, b = (torch.zeros(2**28, device="cuda") for _ in range(2))
    copy = microseconds(lambda _: torch.mul(b, 2.0, out=a), 2)
    m = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    multiply = microseconds(lambda _: m @ m, 2)
    return 2 * 2**30 / copy * 1e6, 2 * 8192**3 / multiply * 1e6


def floor(
    shape: MoeShape, inputs: list[tuple[torch.Tensor, torch.Tensor]], speeds: tuple[float, float]
) -> float:
    """Microseconds that no layer can undercut, on average over the calls."""
    expert_bytes = 3 * shape.hidden * shape.intermediate * (1 / 2 + 1 / 32)
    chosen = [len(reference.route(logits, shape.topk)[0].unique()) for _, logits in inputs]
    flops = 6 * len(inputs[0][0]) * shape.topk * shape.hidden * shape.intermediate
    return 1e6 * max(statistics.mean(chosen) * expert_bytes / speeds[0], flops / speeds[1])


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, nargs="+", default=sorted(LAYERS))
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    speeds = rates()
    device = torch.cuda.get_device_name()
    copy, multiply = speeds[0] / 1e12, speeds[1] / 1e12
    print(f"{device}, torch {torch.__version__}, copy {copy:.2f} TB/s, bf16 {multiply:.0f} TFLOP/s")
    names = "".join(f"{name:>9}" for name in args.backends)
    print(f"experts tokens    floor {names}  over floor  over best peer")
    rows: list[dict[str, Any]] = []
    for experts in args.experts:
        shape = make_shape(experts, 4, 2880, 2880)
        truth_weights = random_weights(shape, 0, "cuda")
        layers = {
            name: [
                BACKENDS[name](random_weights(shape, seed, "cuda"), shape) for seed in range(LAYERS[experts])
            ]
            for name in args.backends
        }
        for tokens in args.tokens:
            inputs = [random_tokens(shape, tokens, seed, "cuda") for seed in range(CALLS)]
            truth, plain = reference.truth_and_plain(*inputs[0], truth_weights, shape)
            errors = {name: compare(some[0](*inputs[0]), truth, plain) for name, some in layers.items()}
            missed = {name: error.miss for name, error in errors.items() if error.miss}
            times: dict[str, list[float]] = {name: [] for name in args.backends}
            for name in [*args.backends, *reversed(args.backends)]:
                some = layers[name]
                call = lambda i, some=some, inputs=inputs: some[i % len(some)](*inputs[i])  # noqa: E731
                times[name].append(microseconds(call))
            mean = {name: statistics.mean(each) for name, each in times.items()}
            least = floor(shape, inputs, speeds)
            peer = min((mean[name] for name in mean if name != "ours"), default=float("nan"))
            mine = mean.get("ours", float("nan"))
            rows.append(
                {"experts": experts, "tokens": tokens, "floor": least, "us": times}
                | {"frobenius": {name: error.frobenius for name, error in errors.items()}, "miss": missed}
            )
            figures = "".join(f"{each:9.1f}" for each in mean.values())
            print(
                f"{experts:7} {tokens:6} {least:8.1f} {figures} {mine / least:11.2f} "
                f"{mine / peer:15.3f}  {missed or ''}",
                flush=True,
            )
            if args.json:
                args.json.write_text(json.dumps({"device": device, "speeds": speeds, "rows": rows}, indent=1))
        del layers, truth_weights


if __name__ == "__main__":
    main()
