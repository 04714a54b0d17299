"""Tunes a small layer with kernels that run on the emulated gfx950: what came out, as JSON, on stdout.

    python emulate_tune.py DIR

All is as on a GPU, correctness included, but for the cost of a candidate: the instructions that it executes,
as time on an emulator says nothing.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton

from vllm_mxfp4_gfx950 import tables
from vllm_mxfp4_gfx950.arch import ARCHES
from vllm_mxfp4_gfx950.backends import Layer, reference
from vllm_mxfp4_gfx950.choice import choose
from vllm_mxfp4_gfx950.gfx950.driver import ARCH, Launch, presented
from vllm_mxfp4_gfx950.gfx950.emulator.execution import execute
from vllm_mxfp4_gfx950.random_layer import make_shape, random_tokens
from vllm_mxfp4_gfx950.tables import content, store
from vllm_mxfp4_gfx950.tiles import TileConfig
from vllm_mxfp4_gfx950.tolerance import compare
from vllm_mxfp4_gfx950.tuning import record
from vllm_mxfp4_gfx950.tuning import search as tune

SHAPE = make_shape(4, 2, 256, 96)
TOKENS = (1, 3)
TILES = {
    "matmul_ogs": [TileConfig(16, 64, 256, 1, 4, 1, 0), TileConfig(32, 128, 256, 1, 4, 1, 0)],
    "matmul": [TileConfig(16, 64, 256, 1, 4, 1, 0), TileConfig(32, 128, 256, 1, 4, 1, 0)],
}


class Counted(tune.Batch):
    """Costs are instructions, in thousands."""

    asked = 0

    def time_us(self, tiles: tune.Tiles) -> float:
        """What the layer executes."""
        Counted.asked += 1
        return executed(self.layers.with_tiles(self.layers.prepared[0], tiles), self.tokens)


def executed(layer: Layer, tokens: int) -> float:
    """Thousands of instructions for so many tokens."""
    counts = []

    def count(launch: Launch) -> None:
        counts.append(sum(execute(launch).instructions.values()))

    with presented(count):
        layer.run(*random_tokens(SHAPE, tokens, 0))
    return sum(counts) / 1e3


def cost(layer: Layer, tokens: int) -> float:
    """What it executes; infinite where it does not compile, as some of the package's own tiles do not."""
    try:
        return executed(layer, tokens)
    except Exception:  # As of `choice.clock`.
        return math.inf


class Spoilt(tune.Layers):
    """One tile of w13 multiplies by another row's scales."""

    wrong: TileConfig

    def with_tiles(self, prepared: Any, tiles: tune.Tiles) -> Any:
        """The layer with these tiles."""
        layer = super().with_tiles(prepared, tiles)
        if tiles[1][0] != self.wrong:
            return layer
        scale = layer.w13.precision.weight_scale
        storage = dataclasses.replace(scale.storage, data=scale.storage.data.roll(1, dims=1))
        rolled = dataclasses.replace(scale, storage=storage)
        precision = dataclasses.replace(layer.w13.precision, weight_scale=rolled)
        return dataclasses.replace(layer, w13=dataclasses.replace(layer.w13, precision=precision))


def tuned(layers: tune.Layers, directory: Path, tokens: tuple[int, ...]) -> tuple[list[str], dict[str, Any]]:
    """Bring a table up to date; its lines and its content."""
    table = table_in(directory, layers)
    lines = [tune.tune(Counted(layers, n), table) for n in tokens if not table.has(n)]
    return lines, shown(store.read(table.file, ARCH))


def table_in(directory: Path, layers: tune.Layers) -> record.Table:
    """Of these layers, as far as it is made."""
    return record.Table(
        directory / f"{ARCH}.json",
        ARCH,
        SHAPE,
        layers.backend.KERNELS,
        triton.__version__,
        "emulated",
        "this",
    )


def shown(content: store.Content) -> dict[str, Any]:
    """A table's content as JSON, its tiles and times row by row."""
    rows = [(key, n, tile, None) for key, rungs in content.tiles.items() for n, tile in rungs.pairs()]
    measured = [(key, n, *found) for key, times in content.measured.items() for n, found in times.items()]

    def named(some: list[Any]) -> list[dict[str, Any]]:
        return [
            {"kernels": key[0], "triton": key[1], "name": key[2].name, "tokens": n}
            | {"tile": dataclasses.astuple(tile), "us": us}
            for key, n, tile, us in some
        ]

    return {"provenance": content.provenance, "rows": named(rows), "measured": named(measured)}


def main(directory: Path) -> dict[str, Any]:
    """Tune, interrupted once; serve from what was written; and tune where the best tile is wrong."""
    record.SIZES, tune.REPEATS = TOKENS, 1
    tune.ARCHES = {ARCH: dataclasses.replace(ARCHES[ARCH], candidates=TILES)}
    found: dict[str, Any] = {}
    with presented(execute):
        layers = tune.Layers(SHAPE, ARCH, "cpu", copies=1)
        found["kernels"] = layers.kernels
        _, found["interrupted"] = tuned(layers, directory, TOKENS[:1])
        asked = Counted.asked
        found["lines"], found["whole"] = tuned(layers, directory, TOKENS)
        found["asked"] = asked, Counted.asked - asked
        found["again"], _ = tuned(layers, directory, TOKENS)

        with mock.patch.object(tables, "logger") as told:
            chosen = tune.Layers(SHAPE, ARCH, "cpu", copies=1, tables=directory).prepared[0]
        found["told"] = [text for _, text in (call.args for call in told.log.call_args_list)]
        choice = choose(chosen, TOKENS[-1], cost)
        table = table_in(directory, layers)
        found["pinned"] = [chosen.pinned, table.pinned]
        table.pin(choice.plans)
        content.cache_clear()
        served = layers.backend.prepare(layers.weights(0), SHAPE, directory)
        found["pinned"] += [served.pinned, table.pinned]
        found["plans"] = [choice.us[n] | {"serves": served.plans.at(n)} for n in TOKENS]
        found["served"] = [[rungs.at(n).block_n for n in TOKENS] for rungs in served.tiles]
        x, logits = random_tokens(SHAPE, 3, 9)
        truth = reference.truth_and_plain(x, logits, layers.weights(0), SHAPE)
        found["miss"] = compare(served.run(x, logits), *truth).miss

        if layers.backend.KERNELS == "matmul_ogs":
            found["wrong"] = next(row["tile"] for row in found["whole"]["measured"] if row["name"] == "w13")
            spoilt = Spoilt(SHAPE, ARCH, "cpu", copies=1)
            spoilt.wrong = TileConfig(*found["wrong"])
            (directory / "spoilt").mkdir()
            found["spoilt_lines"], found["spoilt"] = tuned(spoilt, directory / "spoilt", TOKENS[:1])
    return found


if __name__ == "__main__":
    # Memory that is allocated and not written holds NaN, or the largest integer.
    torch.use_deterministic_algorithms(True)
    json.dump(main(Path(sys.argv[1])), sys.stdout)
