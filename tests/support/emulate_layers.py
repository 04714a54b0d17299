"""Runs layers on the emulated gfx950: cases on stdin, what was checked on stdout."""

import dataclasses
from typing import Any

from emulated import answer, layer_of

from vllm_mxfp4_gfx950.gfx950.verification import EmulatedLayer
from vllm_mxfp4_gfx950.random_layer import random_tokens
from vllm_mxfp4_gfx950.tiles import TileConfig


def check(case: dict[str, Any]) -> dict[str, Any]:
    """One layer on one batch of tokens."""
    shape, weights = layer_of(case)
    layer = EmulatedLayer(weights, shape)
    if case["tile"] is not None:
        tile = TileConfig(*case["tile"])
        # K is not split where rows are scattered.
        splits = layer.prepared.SCATTERS and tile.split_k > 1
        w2 = layer.prepared.tiles_at(case["tokens"])[1] if splits else tile
        layer.prepared = layer.prepared.with_tiles(tile, w2)
    x, logits = random_tokens(shape, case["tokens"], seed=case["tokens"], unchosen=case["unchosen"])
    checks = layer.check(x, logits, sample=case["sample"])
    return {"backend": layer.backend.NAME, "checks": [dataclasses.asdict(each) for each in checks]}


if __name__ == "__main__":
    answer(lambda cases: [check(case) for case in cases])
