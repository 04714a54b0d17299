"""Compiles the tiles of two FP8 addends for gfx950, at GPT-OSS-20B's sizes: what each takes, on stdout."""

import dataclasses
import json
from typing import Any

from vllm_mxfp4_gfx950.backends.triton import two_fp8
from vllm_mxfp4_gfx950.gfx950.layer import CompiledLayer
from vllm_mxfp4_gfx950.models import TOKENS, layer_shape
from vllm_mxfp4_gfx950.tiles import TileConfig


def compiled(layer: CompiledLayer, rows: float, w13: TileConfig, w2: TileConfig) -> list[dict[str, Any]]:
    """Both matmuls with the most tokens that their tiles serve.

    Args:
        layer: of which.
        rows: of an expert, up to which the tiles serve.
        w13, w2: their tiles.
    """
    layer.prepared = layer.with_tiles("two_fp8", w13, w2)
    tokens = int(min(rows * layer.shape.experts / layer.shape.topk, TOKENS[-1]))
    return [dataclasses.asdict(matmul) | {"fits": matmul.fits} for matmul in layer.served(tokens)]


def main() -> None:
    """All tiles that serve with any Triton."""
    layer = CompiledLayer(layer_shape("gpt-oss-20b"), backend="two_fp8")
    everywhere = [compiled(layer, *rung) for rung in two_fp8.TILES]
    large = {
        release: [compiled(layer, rows, tile, tile) for rows, tile in rungs]
        for release, rungs in two_fp8.LARGE.items()
    }
    print(json.dumps({"everywhere": everywhere, "large": large}))


if __name__ == "__main__":
    main()
