"""The search: candidates compiled, checked against float64, and timed one matmul after the other."""

from __future__ import annotations

import contextlib
import functools
import math
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import astuple, replace
from pathlib import Path

import torch

from vllm_mxfp4_gfx950 import backends
from vllm_mxfp4_gfx950.arch import ARCHES
from vllm_mxfp4_gfx950.backends import reference
from vllm_mxfp4_gfx950.errors import Mxfp4Error, brief
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights, first_experts
from vllm_mxfp4_gfx950.random_layer import random_tokens, random_weights
from vllm_mxfp4_gfx950.tiles import TileConfig
from vllm_mxfp4_gfx950.timing import Calls, progress
from vllm_mxfp4_gfx950.tolerance import compare
from vllm_mxfp4_gfx950.tuning.record import OWN_MOST, Pair, Table

Tiles = tuple[str, Pair]
"""Kernels, and a pair for them."""

Job = tuple[MoeShape, str, int, Tiles]
"""A layer, its arch, tokens, and what to compile for them."""

Group = tuple[list[TileConfig], list[TileConfig]]
"""Tiles of w13 and of w2 that go together."""

ROTATED_BYTES = 3 << 30
"""The copies of a layer that are timed in turn hold so much, so that no call finds its weights in a cache."""

COPIES = (8, 64)
"""But no fewer and no more."""

OWN_SPLITS = (1, 2, 3)
SPLIT_TOKENS = 64
"""w2's depth is split for up to so many tokens; then there are workgroups enough."""

REPEATS = 200
"""Runs of the fastest tiles that must all give the same bits: of kernels that are wrong in one run of 50, one
in 57 passes."""

WORKER_BYTES = 3 << 30
"""What a process that compiles needs of the GPU's memory, beside four times its layer."""


class Layers:
    """Copies of a random layer, prepared as for serving.

    Args:
        shape: the layer.
        arch: of the GPU.
        device: where it is.
        copies: how many; as many as it takes to get round the caches when None.
        tables: the directory of the user's tile tables.

    Raises:
        Mxfp4Error: no Triton backend can serve it, or none that takes tiles here.
    """

    def __init__(
        self,
        shape: MoeShape,
        arch: str,
        device: str,
        copies: int | None = None,
        tables: Path | None = None,
    ) -> None:
        backend = backends.select_tiled(shape, arch)
        if not ARCHES[arch].candidates.get(backend.KERNELS):
            fix = "Serve without a table of your own"
            raise Mxfp4Error("the backend", "one that takes tiles here", f"{backend.NAME} on {arch}", fix)
        self.shape, self.arch, self.device, self.backend = shape, arch, device, backend
        expert_map = first_experts(shape)
        self.expert_map = None if expert_map is None else expert_map.to(device)
        weights = self.weights(0)
        layer_bytes = sum(each.nbytes for each in vars(weights).values() if each is not None)
        if copies is None:
            copies = min(max(-(-ROTATED_BYTES // layer_bytes), COPIES[0]), COPIES[1])
        self.layer_bytes = layer_bytes
        self.prepared = [backend.prepare(self.weights(seed), shape, tables) for seed in range(copies)]
        # Whether our own matmuls read this layout is theirs to say, of any tile.
        own = ARCHES[arch].candidates.get("own", ())[:1]
        self.has_own = any(self.prepared[0].with_own_tiles(tile, tile) is not None for tile in own)

    def weights(self, seed: int) -> MoeWeights:
        """A layer as it is loaded."""
        return replace(random_weights(self.shape, seed, self.device), expert_map=self.expert_map)

    @property
    def kernels(self) -> tuple[str, ...]:
        """Which kernels there are to choose from."""
        return (self.backend.KERNELS, "own") if self.has_own else (self.backend.KERNELS,)

    def with_tiles(self, layer: backends.TiledLayer, tiles: Tiles) -> backends.Layer:
        """A layer that serves every batch through these kernels with these tiles."""
        kernels, pair = tiles
        if kernels != "own":
            return layer.with_tiles(*pair)
        changed = layer.with_own_tiles(*pair)
        assert changed is not None
        return changed


class Batch:
    """Some tokens for each copy of a layer, and what the first of them must become.

    Args:
        layers: the layer.
        tokens: T.
    """

    def __init__(self, layers: Layers, tokens: int) -> None:
        self.layers, self.tokens = layers, tokens
        self.inputs = [
            random_tokens(layers.shape, tokens, seed, layers.device) for seed in range(len(layers.prepared))
        ]
        self.truth, self.plain = reference.truth_and_plain(*self.inputs[0], layers.weights(0), layers.shape)

    def miss(self, tiles: Tiles) -> str:
        """Why a layer with these tiles is wrong, or does not run; "" when it is right."""
        try:
            prepared = self.layers.with_tiles(self.layers.prepared[0], tiles)
            with nan_in_new_memory():
                out = prepared.run(*self.inputs[0])
            return compare(out, self.truth, self.plain).miss
        except Exception as error:  # A compiler or a driver may raise anything.
            return brief(error)

    def unsteady(self, tiles: Tiles) -> str:
        """How often a layer with these tiles, which was right once, gives other bits; "" if never."""
        prepared = self.layers.with_tiles(self.layers.prepared[0], tiles)
        try:
            first = prepared.run(*self.inputs[0])
            others = sum(not torch.equal(first, prepared.run(*self.inputs[0])) for _ in range(REPEATS))
        except Exception as error:  # A driver may raise anything.
            return brief(error)
        return f"{others} of {REPEATS} runs give other bits" if others else ""

    def time_us(self, tiles: Tiles) -> float:
        """Microseconds of a layer with these tiles."""
        layers = [self.layers.with_tiles(each, tiles) for each in self.layers.prepared]
        device = torch.device(self.layers.device)
        calls = Calls(lambda i: layers[i].run(*self.inputs[i]), len(layers), device)
        return statistics.median(calls.microseconds())


@contextmanager
def nan_in_new_memory() -> Iterator[None]:
    """Inside, `torch.empty` gives NaN: else it may give the right result of the candidate before."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def groups(arch: str, kernels: str, shape: MoeShape, tokens: int) -> list[Group]:
    """The candidates for so many tokens: those whose rows are about as many as an expert gets."""
    rows = tokens * shape.topk / shape.global_experts
    tiles = list(ARCHES[arch].candidates.get(kernels, ()))
    if kernels != "own":
        middle = min(max(16, 1 << (math.ceil(rows) - 1).bit_length()), 128)
        tiles = [tile for tile in tiles if tile.block_m in (middle // 2, middle, 2 * middle)]
        return [(tiles, tiles)]
    found = []
    for block_m in sorted({tile.block_m for tile in tiles}):
        w13_tiles = [tile for tile in tiles if tile.block_m == block_m]
        splits = OWN_SPLITS if tokens <= SPLIT_TOKENS else (1,)
        if rows / 4 <= block_m and (block_m <= 16 or block_m <= 4 * rows):
            w2_tiles = [replace(tile, split_k=split) for tile in w13_tiles for split in splits]
            found.append((w13_tiles, w2_tiles))
    return found


def fastest(some: list[Group], cost: Callable[[Pair], float]) -> Pair | None:
    """The pair that costs least: one matmul's tile after the other, as neither's time depends on the other's.

    Args:
        some: what may be paired.
        cost: of a pair; infinite for one that must not serve.

    Returns:
        None when all are infinite.
    """
    found: list[Pair] = []
    for w13_tiles, w2_tiles in some:
        start = next((tile for tile in w13_tiles if cost((tile, tile)) < math.inf), None)
        if start is not None:
            w13 = min(w13_tiles, key=lambda tile: cost((tile, start)))
            w2 = min(w2_tiles, key=lambda tile: cost((w13, tile)))
            found.append((w13, w2))
    return min(found, key=cost, default=None)


def tune(batch: Batch, table: Table) -> str:
    """Find the fastest right tiles of all kernels for some tokens, and note them.

    Returns:
        a line that says what was found.

    Raises:
        Mxfp4Error: no tile of `table.kernels` is right.
    """
    layers, tokens = batch.layers, batch.tokens
    refused: list[str] = []
    found: dict[str, tuple[Pair, float]] = {}
    for kernels in layers.kernels:
        if kernels == "own" and tokens > OWN_MOST:
            continue
        best = search(batch, kernels, refused)
        if best is not None:
            found[kernels] = best
    if table.kernels not in found:
        raise Mxfp4Error(
            f"{table.kernels} with {tokens} tokens", "right with some tile", refused[0], "Report this"
        )
    table.add(tokens, found)
    columns = "".join(
        f"  {kernels} {us:.1f} {' '.join(str(astuple(tile)) for tile in pair)}"
        for kernels, (pair, us) in found.items()
    )
    return f"{tokens:6}{columns}" + (f"  ({len(refused)} refused; {refused[0]})" if refused else "")


def search(batch: Batch, kernels: str, refused: list[str]) -> tuple[Pair, float] | None:
    """The fastest right tiles of these kernels, and the microseconds of the layer with them.

    What is not right is added to `refused`, and not timed. None where there is nothing, or nothing right.
    """
    some = groups(batch.layers.arch, kernels, batch.layers.shape, batch.tokens)
    total = 1 + sum(len(each) for pair in some for each in pair)
    seen: dict[Pair, float] = {}
    varying: set[TileConfig] = set()

    def refuse(pair: Pair, miss: str) -> None:
        refused.append(f"{kernels} {astuple(pair[0])} {astuple(pair[1])}: {miss}")

    def cost(pair: Pair) -> float:
        if varying.intersection(pair):
            return math.inf
        if pair not in seen:
            miss = batch.miss((kernels, pair))
            seen[pair] = math.inf if miss else batch.time_us((kernels, pair))
            if miss:
                refuse(pair, miss)
            progress(min(len(seen), total - 1), total)
        return seen[pair]

    found = fastest(some, cost)
    while found is not None and (miss := batch.unsteady((kernels, found))):
        refuse(found, miss)
        varying.update(found)  # Which of the two it is was not looked at.
        found = fastest(some, cost)
    progress(total, total)
    return None if found is None else (found, seen[found])


def warm_up(layers: Layers, some_tokens: list[int]) -> None:
    """Compile the candidates, many at once; Triton keeps them on disk."""
    jobs = [
        (layers.shape, layers.arch, tokens, tiles)
        for tokens in some_tokens
        for kernels in layers.kernels
        for _, w2_tiles in groups(layers.arch, kernels, layers.shape, tokens)
        for tiles in ((kernels, (replace(tile, split_k=1), tile)) for tile in w2_tiles)
    ]
    free_bytes, _ = torch.cuda.mem_get_info()
    room = free_bytes // (WORKER_BYTES + 4 * layers.layer_bytes)
    compile_all(jobs, max(1, min(len(os.sched_getaffinity(0)), int(room))))


def compile_all(jobs: list[Job], workers: int) -> None:
    """Run each candidate once, in so many processes.

    Raises:
        Mxfp4Error: one of them took its process with it, as LLVM does where it aborts.
    """
    futures: dict[Future[None], Job] = {}
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            for job in jobs:
                futures[pool.submit(compile_one, job)] = job
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                progress(done, len(jobs))
        except BrokenProcessPool as error:
            # They are begun in order.
            begun = [job for future, job in futures.items() if future.exception() is not None][:workers]
            names = " or ".join(
                f"{kernels} {astuple(w13)} {astuple(w2)} with {tokens} tokens"
                for _, _, tokens, (kernels, (w13, w2)) in begun
            )
            fix = "Free memory if the machine ran out of it; else report this with what stands above"
            raise Mxfp4Error(
                "the compiler", "alive after every candidate", f"dead from {names}", fix
            ) from error


def compile_one(job: Job) -> None:
    """Run one candidate once. What fails here is met again, and told, when its turn comes."""
    shape, arch, tokens, tiles = job
    with contextlib.suppress(Exception):
        layers = _one_layer(shape, arch)
        prepared = layers.with_tiles(layers.prepared[0], tiles)
        prepared.run(*random_tokens(shape, tokens, 0, "cuda"))


@functools.cache
def _one_layer(shape: MoeShape, arch: str) -> Layers:
    return Layers(shape, arch, "cuda", copies=1)
