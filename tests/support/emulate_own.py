"""Runs our own matmuls on the emulated gfx950: cases on stdin, what came out on stdout."""

from types import SimpleNamespace
from typing import Any

import torch
from emulated import Launches, answer, layer_of, tokens_of

from vllm_mxfp4_gfx950 import backends
from vllm_mxfp4_gfx950.backends import reference
from vllm_mxfp4_gfx950.backends.triton import cdna4_kernels, own, own_kernels
from vllm_mxfp4_gfx950.backends.triton.package import Weight
from vllm_mxfp4_gfx950.gfx950.driver import ARCH, Launch, presented
from vllm_mxfp4_gfx950.gfx950.emulator.execution import execute
from vllm_mxfp4_gfx950.moe import MoeShape
from vllm_mxfp4_gfx950.mxfp4 import dequantize
from vllm_mxfp4_gfx950.tiles import Ladder, TileConfig
from vllm_mxfp4_gfx950.tolerance import compare


def check(case: dict[str, Any]) -> dict[str, Any]:
    """One layer on one batch of tokens."""
    shape, weights = layer_of(case)
    x, logits = tokens_of(case, shape)
    truth, plain = reference.truth_and_plain(x, logits, weights, shape)
    backend = backends.select_tiled(shape, ARCH)
    launches = Launches()
    with presented(execute):
        prepared = backend.prepare(weights.clone(), shape)
    if case["spoil"]:
        scales = prepared.w13.scales
        scales.copy_(scales.roll(256, dims=2))
    tiles = tuple(Ladder((10**6,), (TileConfig(*tile),)) for tile in case["tiles"])
    # Of any generation, though they stand in front of one of them only.
    layer = own.make(ARCH, shape, prepared.w13, prepared.w2, prepared.order, tiles)
    with presented(launches):
        out = layer.run(x, logits)
    matmuls = [one for one in launches if one.name == "mxfp4_matmul"]
    twins = [
        twin(launch, weight, shape)
        for launch, weight in zip(matmuls, (prepared.w13, prepared.w2), strict=True)
    ]
    found = compare(out, truth, plain)
    return {
        "miss": found.miss,
        "frobenius": found.frobenius,
        "twins": twins,
        "layouts": [
            torch.equal(dequantized(weight), dequantize(blocks, scales, torch.float64))
            for weight, blocks, scales in (
                (prepared.w13, weights.w13, weights.w13_scale),
                (prepared.w2, weights.w2, weights.w2_scale),
            )
        ],
        "kernels": [one.name for one in launches],
        "misfits": launches.misfits(),
    }


def dequantized(weight: Weight) -> torch.Tensor:
    """float64[E, N, K], read from where the kernel reads it."""
    _, rows, packed = weight.values.shape
    scales = cdna4_kernels.scales_in_torch(weight.scales)[:, :rows, : packed // 16]
    return dequantize(weight.values, scales, torch.float64)


def twin(launch: Launch, weight: Weight, shape: MoeShape) -> float:
    """How far a matmul is from its twin in torch, on what it was given: the relative Frobenius error."""
    named = dict(launch.values())
    x, y, gated = named["X"], named["Y"], named["Y"].dtype == torch.bfloat16
    routing = SimpleNamespace(gather=named["Gather"], weights=named["Weights"], start=named["Starts"])
    want = own_kernels.mxfp4_matmul_in_torch(
        x.double(), dequantized(weight), weight.bias, routing, shape.topk, gated, shape.alpha, shape.limit
    )
    here = routing.gather >= 0
    got = y.double() if gated else y.double().sum(0)
    return float((got[here] - want[here]).norm() / want[here].norm())


if __name__ == "__main__":
    answer(lambda cases: [check(case) for case in cases])
