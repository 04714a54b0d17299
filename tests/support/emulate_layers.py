"""Runs layers on the emulated gfx950: cases on stdin, what was checked on stdout."""

import dataclasses
import json
import sys
from typing import Any

from vllm_mxfp4_gfx950.gfx950.verification import EmulatedLayer
from vllm_mxfp4_gfx950.moe import MoeShape
from vllm_mxfp4_gfx950.random_layer import random_tokens, random_weights
from vllm_mxfp4_gfx950.tiles import TileConfig


def check(case: dict[str, Any]) -> dict[str, Any]:
    """One layer on one batch of tokens."""
    import torch

    shape = MoeShape(*case["shape"], alpha=1.702, limit=7.0)
    expert_map = None if case["expert_map"] is None else torch.tensor(case["expert_map"], dtype=torch.int32)
    weights = dataclasses.replace(random_weights(shape, seed=0), expert_map=expert_map)
    layer = EmulatedLayer(weights, shape)
    if case["tile"] is not None:
        tile = TileConfig(*case["tile"])
        # The matmul generation refuses to split K where it scatters rows.
        splits = layer.backend.NAME == "triton_matmul" and tile.split_k > 1
        w2 = layer.prepared.tiles_at(case["tokens"])[1] if splits else tile
        layer.prepared = layer.prepared.with_tiles(tile, w2)
    x, logits = random_tokens(shape, case["tokens"], seed=case["tokens"], unchosen=case["unchosen"])
    checks = layer.check(x, logits, sample=case["sample"])
    return {"backend": layer.backend.NAME, "checks": [dataclasses.asdict(each) for each in checks]}


if __name__ == "__main__":
    import torch

    # Memory that is allocated and not written holds NaN, or the largest integer.
    torch.use_deterministic_algorithms(True)
    json.dump([check(case) for case in json.load(sys.stdin)], sys.stdout)
