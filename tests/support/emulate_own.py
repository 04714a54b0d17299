"""Runs our own matmuls on the emulated gfx950: cases on stdin, what came out on stdout."""

import dataclasses
import json
import sys
from typing import Any

import torch

from vllm_mxfp4_gfx950 import backends
from vllm_mxfp4_gfx950.backends import reference
from vllm_mxfp4_gfx950.backends.triton import own
from vllm_mxfp4_gfx950.gfx950.driver import ARCH, LDS_BYTES, Launch, presented
from vllm_mxfp4_gfx950.gfx950.emulator.execution import execute
from vllm_mxfp4_gfx950.gfx950.report import read
from vllm_mxfp4_gfx950.moe import MoeShape
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
    reports = [read(one) for one in launches]
    found = compare(out, truth, plain)
    return {
        "miss": found.miss,
        "frobenius": found.frobenius,
        "kernels": [one.name for one in launches],
        "misfits": [
            f"{one.name}: {report}"
            for one, report in zip(launches, reports, strict=True)
            if report.vgpr_spills or report.sgpr_spills or report.scratch_bytes or one.lds_bytes > LDS_BYTES
        ],
    }


if __name__ == "__main__":
    # Memory that is allocated and not written holds NaN, or the largest integer.
    torch.use_deterministic_algorithms(True)
    json.dump([check(case) for case in json.load(sys.stdin)], sys.stdout)
