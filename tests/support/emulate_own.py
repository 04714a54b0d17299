"""Runs our own matmuls on the emulated gfx950: cases on stdin, what came out on stdout."""

import dataclasses
import json
import sys
from types import SimpleNamespace
from typing import Any

import torch

from vllm_mxfp4_gfx950 import backends
from vllm_mxfp4_gfx950.backends import reference
from vllm_mxfp4_gfx950.backends.triton import cdna4_kernels, own, own_kernels
from vllm_mxfp4_gfx950.backends.triton.package import Weight
from vllm_mxfp4_gfx950.gfx950.driver import ARCH, LDS_BYTES, Launch, presented
from vllm_mxfp4_gfx950.gfx950.emulator.execution import execute
from vllm_mxfp4_gfx950.gfx950.report import read
from vllm_mxfp4_gfx950.moe import MoeShape
from vllm_mxfp4_gfx950.mxfp4 import dequantize
from vllm_mxfp4_gfx950.random_layer import random_tokens, random_weights
from vllm_mxfp4_gfx950.tiles import Ladder, TileConfig
from vllm_mxfp4_gfx950.tolerance import compare


def check(case: dict[str, Any]) -> dict[str, Any]:
    """One layer on one batch of tokens."""
    shape = MoeShape(*case["shape"], alpha=1.702, limit=7.0)
    expert_map = None if case["expert_map"] is None else torch.tensor(case["expert_map"], dtype=torch.int32)
    weights = dataclasses.replace(random_weights(shape, seed=0), expert_map=expert_map)
    x, logits = random_tokens(shape, case["tokens"], seed=case["tokens"])
    logits = logits.to(getattr(torch, case["dtype"]))
    truth, plain = reference.truth_and_plain(x, logits, weights, shape)
    backend = backends.select_tiled(shape, ARCH)
    launches: list[Launch] = []

    def launch(one: Launch) -> None:
        launches.append(one)
        execute(one)

    with presented(execute):
        prepared = backend.prepare(weights.clone(), shape)
    if case["spoil"]:
        scales = prepared.w13.scales
        scales.copy_(scales.roll(256, dims=2))
    tiles = tuple(Ladder((10**6,), (TileConfig(*tile),)) for tile in case["tiles"])
    # Of either generation, though they stand in front of one of them only.
    layer = own.make(ARCH, shape, prepared.w13, prepared.w2, prepared.order, tiles)
    with presented(launch):
        out = layer.run(x, logits)
    matmuls = [one for one in launches if one.name == "mxfp4_matmul"]
    twins = [
        twin(launch, weight, shape)
        for launch, weight in zip(matmuls, (prepared.w13, prepared.w2), strict=True)
    ]
    reports = [read(one) for one in launches]
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
        "misfits": [
            f"{one.name}: {report}"
            for one, report in zip(launches, reports, strict=True)
            if report.vgpr_spills or report.sgpr_spills or report.scratch_bytes or one.lds_bytes > LDS_BYTES
        ],
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
    # Memory that is allocated and not written holds NaN, or the largest integer.
    torch.use_deterministic_algorithms(True)
    json.dump([check(case) for case in json.load(sys.stdin)], sys.stdout)
