"""Choose tiles by timing them on this machine's GPU; or rank gfx950's by compiling, without a GPU."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import itertools
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
from typing import Any

import torch

from vllm_mxfp4_gfx950 import backends, tuning
from vllm_mxfp4_gfx950.backends import reference
from vllm_mxfp4_gfx950.commands.compile import progress
from vllm_mxfp4_gfx950.errors import Mxfp4Error, brief
from vllm_mxfp4_gfx950.gfx950 import ranking
from vllm_mxfp4_gfx950.models import TOKENS, add_shape_arguments, layer_shape
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights
from vllm_mxfp4_gfx950.random_layer import random_tokens, random_weights
from vllm_mxfp4_gfx950.settings import TABLES_VAR
from vllm_mxfp4_gfx950.timing import Calls
from vllm_mxfp4_gfx950.tolerance import compare
from vllm_mxfp4_gfx950.tuning import Gemm, Ladder, TileConfig, encode, gemms

Pair = tuple[TileConfig, TileConfig]
"""The tiles of w13 and of w2."""

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

GIVE_UP = 1.1
"""Once our own matmuls take so many times as long as the others, no larger batch is tried with them."""

HOPPER_STEPS = ((128, 4, 0), (128, 3, 0), (128, 3, 4), (128, 2, 4), (64, 4, 0), (64, 4, 4), (256, 2, 0))
"""block_k, num_stages and waves_per_eu of matmul_ogs on Hopper; of the rest, see tuning.HOPPER_MATMUL."""

HOPPER_OWN_TILES = (
    (8, 64, 64, 1, 0), (8, 64, 128, 2, 0), (8, 32, 128, 1, 0), (8, 32, 128, 1, 5), (8, 32, 256, 2, 0),
    (8, 32, 256, 2, 5), (8, 64, 256, 4, 0), (16, 64, 64, 1, 0), (16, 64, 128, 2, 0), (16, 128, 128, 4, 0),
    (16, 128, 128, 4, 5), (32, 128, 128, 4, 0), (64, 128, 128, 4, 0),
)  # fmt: skip
"""block_m, block_n, block_k, num_warps and waves_per_eu of our own matmuls on Hopper."""

OWN_SPLITS = (1, 2, 3)
SPLIT_TOKENS = 64
"""w2's depth is split for up to so many tokens; then there are workgroups enough."""

WORKER_BYTES = 3 << 30
"""What a process that compiles needs of the GPU's memory, beside four times its layer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_shape_arguments(parser)
    parser.add_argument("--out", type=Path, help=f"the directory of your tables, as for {TABLES_VAR}")
    parser.add_argument("--arch", choices=["gfx950"], help="rank its tiles by compiling, all models at once")
    parser.add_argument("--table", type=Path, help="with --arch: the file to bring up to date")


def run(args: argparse.Namespace) -> int:
    """Bring a table up to date, and say what was gained."""
    fix = "Give --out DIR to time on this GPU, or --arch gfx950 --table FILE to rank by compiling"
    needed = "table" if args.arch else "out"
    if getattr(args, needed) is None:
        raise Mxfp4Error(f"--{needed}", "given", "nothing", fix)
    others = {"out": None, "model": "gpt-oss-20b", "tp": 1, "ep": 1} if args.arch else {"table": None}
    for name, default in others.items():
        if getattr(args, name) != default:
            rule = f"left out {'with' if args.arch else 'without'} --arch"
            raise Mxfp4Error(f"--{name}", rule, getattr(args, name), fix)
    if args.arch:
        ranking.rank(args.table, progress)
        return 0
    shape = layer_shape(args.model, args.tp, args.ep)
    if not torch.cuda.is_available():
        fix = "Run where the model is served, or rank gfx950's tiles by compiling: --arch gfx950 --table FILE"
        raise Mxfp4Error("the machine", "one with a GPU", "none that torch sees", fix)
    import triton

    arch = backends.arch_of(torch.device("cuda"))
    backend = backends.select_tiled(shape, arch)
    args.out.mkdir(parents=True, exist_ok=True)
    table = Table(
        args.out / f"{arch}.json",
        arch,
        shape,
        backend.KERNELS,
        triton.__version__,
        f"timed on one {torch.cuda.get_device_name()}, torch {torch.__version__}",
        f"vllm-mxfp4 tune --model {args.model} --tp {args.tp} --ep {args.ep}",
    )
    missing = [tokens for tokens in TOKENS if not table.has(tokens)]
    if missing:
        layers = Layers(shape, arch, "cuda")
        warm_up(layers, missing)
        print(f"{args.model}: {shape}, {layers.backend.NAME}, {layers.backend.source()}, {table.evidence}")
        print("tokens  us before  us after  kernels     w13 tile, w2 tile")
        for tokens in missing:
            print(tune(Batch(layers, tokens), table), flush=True)
    print(f"{table.file} is complete for this layer. To serve with it: {TABLES_VAR}={args.out.resolve()}")
    return 0


class Layers:
    """Copies of a random layer, prepared as for serving.

    Args:
        shape: the layer.
        arch: of the GPU.
        device: where it is.
        copies: how many; as many as it takes to get round the caches when None.

    Raises:
        Mxfp4Error: no Triton backend can serve it, or none that takes tiles here.
    """

    def __init__(self, shape: MoeShape, arch: str, device: str, copies: int | None = None) -> None:
        from vllm_mxfp4_gfx950.gfx950.layer import first_experts

        backend = backends.select_tiled(shape, arch)
        if not candidates(arch, backend.KERNELS):
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
        self.prepared = [backend.prepare(self.weights(seed), shape) for seed in range(copies)]
        # Whether our own matmuls read this layout is theirs to say, of any tile.
        own = candidates(arch, "own")[:1]
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

    def time_us(self, tiles: Tiles | None) -> float:
        """Microseconds of a layer with these tiles; as it serves now when None."""
        layers: list[backends.Layer] = [*self.layers.prepared]
        if tiles is not None:
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


def candidates(arch: str, kernels: str) -> list[TileConfig]:
    """The tiles that are tried; none where these kernels take none."""
    if (arch, kernels) == ("sm90", "matmul_ogs"):
        rows, (block_n,), (warps,) = (
            tuning.HOPPER_MATMUL[name] for name in ("block_m", "block_n", "num_warps")
        )
        return [
            TileConfig(block_m, block_n, block_k, 1, warps, stages, waves)
            for block_m, (block_k, stages, waves) in itertools.product(rows, HOPPER_STEPS)
        ]
    if (arch, kernels) == ("sm90", "own"):
        return [
            TileConfig(block_m, block_n, block_k, 1, warps, stages, waves)
            for (block_m, block_n, block_k, warps, waves), stages in itertools.product(
                HOPPER_OWN_TILES, (3, 4)
            )
        ]
    if arch == "gfx950" and kernels == "own":
        return [
            TileConfig(block_m, block_n, ranking.BLOCK_K, 1, warps, stages, 0)
            for block_m, block_n, warps, stages in itertools.product((16, 32), (32, 64, 128), (2, 4), (1, 2))
        ]
    return list(ranking.candidates(kernels)) if arch == "gfx950" else []


def groups(arch: str, kernels: str, shape: MoeShape, tokens: int) -> list[Group]:
    """The candidates for so many tokens: those whose rows are about as many as an expert gets."""
    rows = tokens * shape.topk / shape.global_experts
    tiles = candidates(arch, kernels)
    if kernels != "own":
        middle = min(max(16, 1 << (math.ceil(rows) - 1).bit_length()), 128)
        tiles = [tile for tile in tiles if tile.block_m in (middle // 2, middle, 2 * middle)]
        return [(tiles, tiles)]
    found = []
    for block_m in sorted({tile.block_m for tile in tiles}):
        ups = [tile for tile in tiles if tile.block_m == block_m]
        splits = OWN_SPLITS if tokens <= SPLIT_TOKENS else (1,)
        if rows / 4 <= block_m and (block_m <= 16 or block_m <= 4 * rows):
            found.append((ups, [replace(tile, split_k=split) for tile in ups for split in splits]))
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
    for ups, downs in some:
        start = next((tile for tile in ups if cost((tile, tile)) < math.inf), None)
        if start is not None:
            up = min(ups, key=lambda tile: cost((tile, start)))
            down = min(downs, key=lambda tile: cost((up, tile)))
            found.append((up, down))
    return min(found, key=cost, default=None)


def tune(batch: Batch, table: Table) -> str:
    """Find the fastest right tiles of all kernels for some tokens, and note them.

    Returns:
        a line that says what was found.

    Raises:
        Mxfp4Error: no tile of matmul_ogs is right.
    """
    layers, tokens = batch.layers, batch.tokens
    refused: list[str] = []
    found: dict[str, Pair] = {}
    for kernels in layers.kernels:
        if kernels == "own" and table.gave_up(tokens):
            continue
        pair = search(batch, kernels, refused)
        if pair is not None:
            found[kernels] = pair
    if table.kernels not in found:
        raise Mxfp4Error(
            f"{table.kernels} with {tokens} tokens", "right with some tile", refused[0], "Report this"
        )
    before = batch.time_us(None)
    # Each twice, so that a drift of the clocks falls on both alike.
    times = [(kernels, batch.time_us((kernels, found[kernels]))) for kernels in [*found, *reversed(found)]]
    us = {kernels: sum(each for name, each in times if name == kernels) / 2 for kernels in found}
    table.add(tokens, {kernels: (pair, us[kernels]) for kernels, pair in found.items()})
    best = min(us, key=us.__getitem__)
    tiles = ", ".join(str(astuple(tile)) for tile in found[best])
    line = f"{tokens:6} {before:10.1f} {us[best]:9.1f}  {best:10}  {tiles}"
    return line + (f"  ({len(refused)} refused; {refused[0]})" if refused else "")


def search(batch: Batch, kernels: str, refused: list[str]) -> Pair | None:
    """The fastest right tiles of these kernels; what is not right is added to `refused`, and not timed."""
    some = groups(batch.layers.arch, kernels, batch.layers.shape, batch.tokens)
    total = 1 + sum(len(ups) + len(downs) for ups, downs in some)
    seen: dict[Pair, float] = {}

    def cost(pair: Pair) -> float:
        if pair not in seen:
            miss = batch.miss((kernels, pair))
            seen[pair] = math.inf if miss else batch.time_us((kernels, pair))
            if miss:
                refused.append(f"{kernels} {astuple(pair[0])} {astuple(pair[1])}: {miss}")
            progress(len(seen), total)
        return seen[pair]

    found = fastest(some, cost)
    progress(total, total)
    return found


class Table:
    """A user's table, and what is measured for one layer.

    Args:
        file: the table; made where it is missing.
        arch: whose it is.
        shape: the layer.
        kernels: of the backend that serves it, beside our own matmuls.
        triton: Triton's version.
        evidence: what the times are taken on.
        command: what takes them.

    Raises:
        Mxfp4Error: the file is not a table, or its times were taken on something else.
    """

    def __init__(
        self, file: Path, arch: str, shape: MoeShape, kernels: str, triton: str, evidence: str, command: str
    ) -> None:
        self.file, self.arch, self.kernels, self.triton = file, arch, kernels, triton
        self.gemms = gemms(shape)
        self.evidence, self.command = evidence, command
        self.read()

    def read(self) -> None:
        """Take in what the file says, which another process may be writing to as well."""
        empty: dict[str, Any] = {"provenance": {}, "rows": [], "measured": []}
        content = tuning.read(self.file, self.arch) if self.file.exists() else empty
        self.provenance, self.rows, self.measured = (content[name] for name in empty)
        for name in (self.kernels, "own"):
            other = self.provenance.get(self.source(name), {}).get("evidence", self.evidence)
            if other != self.evidence:
                raise Mxfp4Error(
                    f"{self.file}: {self.source(name)}", self.evidence, other, "Give another --out"
                )

    def source(self, kernels: str) -> str:
        """The name of these kernels' provenance."""
        return f"{kernels} {tuning.release_of(self.triton)}"

    def times(self, kernels: str) -> dict[int, float]:
        """Microseconds of the layer by tokens, as far as they are measured."""
        key = kernels, tuning.release_of(self.triton), self.gemms[0]
        return {tokens: us for tokens, (_, us) in by_matmul(self.measured).get(key, {}).items()}

    def has(self, tokens: int) -> bool:
        """Whether so many tokens are measured."""
        return tokens in self.times(self.kernels)

    def gave_up(self, tokens: int) -> bool:
        """Whether our own matmuls were too slow for fewer tokens, or not right."""
        others, own = self.times(self.kernels), self.times("own")
        return any(own.get(fewer, math.inf) > GIVE_UP * us for fewer, us in others.items() if fewer < tokens)

    def add(self, tokens: int, found: dict[str, tuple[Pair, float]]) -> None:
        """Add what was measured to the file."""
        with self.file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # Until it is closed.
            self.read()
            for kernels, (pair, us) in found.items():
                for gemm, tile in zip(self.gemms, pair, strict=True):
                    (row,) = encode(kernels, self.triton, gemm, Ladder((tokens,), (tile,)))
                    # Another process may have measured the same.
                    self.measured = [each for each in self.measured if each[:8] != row[:8]]
                    self.measured.append([*row, round(us, 2)])
                known = self.provenance.setdefault(
                    self.source(kernels), {"evidence": self.evidence, "triton": self.triton}
                )
                commands = known.setdefault("commands", [])
                if self.command not in commands:
                    commands.append(self.command)
            timed = by_matmul(self.measured)
            kept = [row for row in self.rows if (*row[:2], Gemm(*row[2:7])) not in timed]
            tuning.write(self.file, self.arch, self.provenance, kept + serving(self.measured), self.measured)


def by_matmul(measured: list[list[Any]]) -> dict[tuning.Key, dict[int, tuple[TileConfig, float]]]:
    """What was measured, by matmul and by tokens."""
    found: dict[tuning.Key, dict[int, tuple[TileConfig, float]]] = {}
    for kernels, release, *rest in measured:
        rungs = found.setdefault((kernels, release, Gemm(*rest[:5])), {})
        rungs[rest[5]] = TileConfig(*rest[6:-1]), rest[-1]
    return found


def serving(measured: list[list[Any]]) -> list[list[Any]]:
    """The rows that serve, of the layers of which every number of tokens is measured."""
    rows = []
    timed = by_matmul(measured)
    for (kernels, release, gemm), found in timed.items():
        peers = timed.get(("matmul_ogs", release, gemm), {}) if kernels == "own" else found
        if not set(TOKENS) <= set(peers):
            continue
        if kernels == "own":
            last = crossover(*({n: us for n, (_, us) in each.items()} for each in (found, peers)))
            tiles = {n: tile for n, (tile, _) in sorted(found.items()) if n <= last}
            rungs = tiles or {0: found[min(found)][0]}
            rows += encode(kernels, release, gemm, Ladder(tuple(rungs), tuple(rungs.values())))
        else:
            rungs = {n: found[n][0] for n in TOKENS}
            rows += encode(kernels, release, gemm, Ladder(tuple(rungs), tuple(rungs.values())).merged())
    return rows


def crossover(own: dict[int, float], others: dict[int, float]) -> int:
    """Up to how many tokens our own matmuls should serve; 0 if none.

    One slow batch among fast ones does not end it: what counts is the time over all batches up to there,
    each against the other kernels'.

    Args:
        own, others: microseconds by tokens.
    """
    gain = best = 0.0
    last = 0
    for tokens in TOKENS:
        if tokens not in own:
            break
        gain += math.log(others[tokens] / own[tokens])
        if gain > best:
            best, last = gain, tokens
    return last


def warm_up(layers: Layers, some_tokens: list[int]) -> None:
    """Compile the candidates, many at once; Triton keeps them on disk."""
    jobs = [
        (layers.shape, layers.arch, tokens, tiles)
        for tokens in some_tokens
        for kernels in layers.kernels
        for _, downs in groups(layers.arch, kernels, layers.shape, tokens)
        for tiles in ((kernels, (replace(down, split_k=1), down)) for down in downs)
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
                f"{kernels} {astuple(up)} {astuple(down)} with {tokens} tokens"
                for _, _, tokens, (kernels, (up, down)) in begun
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
