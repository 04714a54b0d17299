"""Choose the decode path's tiles on this GPU: correctness first, then time. Writes tables/<arch>.json anew.

    python benchmarks/tune_decode.py [--experts 32 128] [--out FILE]

Each candidate is a tile for both matmuls. Its layer must be within the tolerance of float64, and each of its
matmuls is then timed alone, as in `layer.py`; the layer of the fastest pair is checked once more. Up to the
largest number of tokens at which the whole layer is faster than through matmul_ogs, the decode path serves.
Two minutes on an H200.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import torch
import triton
from layer import CALLS, microseconds

from vllm_mxfp4_gfx950 import backends, settings
from vllm_mxfp4_gfx950.backends import reference, triton_decode
from vllm_mxfp4_gfx950.moe import MoeShape
from vllm_mxfp4_gfx950.random_layer import make_shape, random_tokens, random_weights
from vllm_mxfp4_gfx950.tolerance import compare
from vllm_mxfp4_gfx950.tuning import Ladder, TileConfig, columns, encode, gemms

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SHAPES = (
    (8, 64, 256, 4), (8, 128, 128, 4), (8, 64, 128, 2), (8, 32, 256, 2),
    (16, 64, 256, 4), (16, 128, 128, 4), (32, 128, 128, 4), (64, 128, 128, 4),
)  # fmt: skip
"""block_m, block_n, block_k, num_warps."""

STAGES, WAVES, SPLITS = (3, 4), (0, 6), (1, 2, 3)
LAYERS = {32: 8, 128: 4}
"""Copies of the weights, so that a call finds none of its own in the cache."""


def candidates() -> list[TileConfig]:
    """Every tile that is tried."""
    found = []
    for (m, n, k, warps), stages, waves in itertools.product(SHAPES, STAGES, WAVES):
        if m <= 16 or not waves:
            found.append(TileConfig(m, n, k, 1, warps, stages, waves))
    return found


def warm(tile: TileConfig) -> None:
    """Compile a tile's kernels, which Triton keeps on disk."""
    shape = make_shape(4, 4, 2880, 2880)
    backend = backends.select(shape, "sm90", settings.Settings("triton")).backend
    prepared = backend.prepare(random_weights(shape, 0, "cuda"), shape)
    for split in SPLITS:
        decode = with_tiles(shape, tile, replace(tile, split_k=split))
        triton_decode.run(decode, *random_tokens(shape, 2, 0, "cuda"), prepared.parts(0), prepared.parts(1))


def with_tiles(shape: MoeShape, up: TileConfig, down: TileConfig) -> triton_decode.Decode:
    """The decode path with one pair of tiles for all tokens."""
    return triton_decode.Decode("hopper", shape, (Ladder((10**6,), (up,)), Ladder((10**6,), (down,))), None)


class Batch:
    """Some layers of GPT-OSS's sizes, and tokens for each call."""

    def __init__(self, experts: int, tokens: int) -> None:
        self.shape = make_shape(experts, 4, 2880, 2880)
        self.backend, self.layers = prepared_layers(experts)
        self.inputs = [random_tokens(self.shape, tokens, seed, "cuda") for seed in range(CALLS)]
        self.truth, self.plain = reference.truth_and_plain(
            *self.inputs[0], random_weights(self.shape, 0, "cuda"), self.shape
        )
        self.y = torch.empty(4 * tokens, 2880, device="cuda", dtype=torch.bfloat16)

    def miss(self, decode: triton_decode.Decode) -> str:
        """Why a layer is wrong; "" when it is right."""
        out = triton_decode.run(decode, *self.inputs[0], self.layers[0].parts(0), self.layers[0].parts(1))
        return compare(out, self.truth, self.plain).miss

    def routings(self, decode: triton_decode.Decode, tile: TileConfig) -> list[triton_decode.Routing]:
        """Of each call."""
        twisted = decode.twists(tile)
        return [
            triton_decode.route(decode, logits, tile.block_m, x if twisted else None)
            for x, logits in self.inputs
        ]

    def up(self, tile: TileConfig) -> float:
        """Microseconds of w13."""
        decode = with_tiles(self.shape, tile, tile)
        routings, twisted = self.routings(decode, tile), decode.twists(tile)

        def call(i: int) -> None:
            x, weights = routings[i].x if twisted else self.inputs[i][0], self.weights(i, 0)
            triton_decode.multiply(decode, tile, x, routings[i], weights, self.y, gated=True, twisted=twisted)

        return microseconds(call)

    def down(self, tile: TileConfig) -> float:
        """Microseconds of w2."""
        decode = with_tiles(self.shape, tile, tile)
        routings = self.routings(decode, tile)
        parts = torch.empty(tile.split_k, *self.y.shape, device="cuda")

        def call(i: int) -> None:
            weights = self.weights(i, 1)
            triton_decode.multiply(
                decode, tile, self.y, routings[i], weights, parts, gated=False, twisted=False
            )

        return microseconds(call)

    def layer(self, up: TileConfig, down: TileConfig) -> float:
        """Microseconds of a layer."""
        decode = with_tiles(self.shape, up, down)
        return microseconds(
            lambda i: triton_decode.run(decode, *self.inputs[i], self.weights(i, 0), self.weights(i, 1))
        )

    def peer(self) -> float:
        """Microseconds of a layer through matmul_ogs."""
        run = self.backend.run_matmul_ogs
        return microseconds(lambda i: run(self.layers[i % len(self.layers)], *self.inputs[i]))

    def weights(self, i: int, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What a call multiplies by."""
        parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = self.layers[i % len(self.layers)].parts(
            index
        )
        return parts

    def best(self) -> tuple[TileConfig, TileConfig]:
        """The fastest right tiles of both matmuls, which share their block_m."""
        fastest: dict[int, list[list[tuple[float, TileConfig]]]] = {}
        tokens, experts = len(self.inputs[0][0]), self.shape.experts
        for tile in candidates():
            if tile.block_m > 16 and 16 * tokens < tile.block_m * experts:
                continue
            miss = self.miss(with_tiles(self.shape, tile, tile))
            if miss:
                print(f"{tile}: {miss}")
                continue
            up, down = fastest.setdefault(tile.block_m, [[], []])
            up.append((self.up(tile), tile))
            splits = [replace(tile, split_k=split) for split in SPLITS[: 3 if tokens <= 64 else 1]]
            down += [(self.down(split), split) for split in splits]
        pairs = [[min(each, key=lambda found: found[0]) for each in pair] for pair in fastest.values()]
        up, down = min(pairs, key=lambda pair: pair[0][0] + pair[1][0])
        miss = self.miss(with_tiles(self.shape, up[1], down[1]))
        if miss:
            raise RuntimeError(f"{up[1]} with {down[1]}: {miss}")
        print(f"  w13 {up[0]:.1f} us {astuple(up[1])}, w2 {down[0]:.1f} us {astuple(down[1])}")
        return up[1], down[1]


@functools.cache
def prepared_layers(experts: int) -> tuple[Any, list[Any]]:
    """The backend, and layers that it prepared."""
    shape = make_shape(experts, 4, 2880, 2880)
    backend: Any = backends.select(shape, "sm90", settings.Settings("triton")).backend
    return backend, [
        backend.prepare(random_weights(shape, seed, "cuda"), shape) for seed in range(LAYERS[experts])
    ]


def main() -> None:
    """Tune and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, nargs="+", default=sorted(LAYERS))
    parser.add_argument("--out", type=Path, default=Path("vllm_mxfp4_gfx950/tables/sm90.json"))
    args = parser.parse_args()
    with ProcessPoolExecutor(12, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(warm, candidates()))
    rows = []
    for experts in args.experts:
        best: dict[int, tuple[TileConfig, TileConfig]] = {}
        for tokens in TOKENS:
            batch = Batch(experts, tokens)
            tiles = batch.best()
            ours, peer = batch.layer(*tiles), batch.peer()
            print(f"E={experts} T={tokens}: {ours:.1f} us, matmul_ogs {peer:.1f} us", flush=True)
            if ours >= peer:
                break
            best[tokens] = tiles
        for index, gemm in enumerate(gemms(make_shape(experts, 4, 2880, 2880))):
            rungs = Ladder(tuple(best), tuple(pair[index] for pair in best.values()))
            rows += encode("decode", triton.__version__, gemm, rungs)
    provenance = {
        f"decode {triton.__version__}": {
            "evidence": f"timed on one {torch.cuda.get_device_name()}, torch {torch.__version__}",
            "command": "python benchmarks/tune_decode.py",
        }
    }
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    head = json.dumps({"provenance": provenance, "columns": columns()}, indent=1)[:-2]
    args.out.write_text(f'{head},\n "rows": [\n  {lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
