"""Rank gfx950's tiles by compiling them, for the Triton and triton_kernels that are installed here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.runtime.errors import OutOfResources

from vllm_mxfp4_gfx950.arch import GFX950
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.gfx950.emulator.execution import Counts
from vllm_mxfp4_gfx950.gfx950.layer import CompiledLayer
from vllm_mxfp4_gfx950.gfx950.report import KernelReport
from vllm_mxfp4_gfx950.models import DIVISIONS, GPT_OSS, TOKENS, layer_shape
from vllm_mxfp4_gfx950.tables.store import read, write
from vllm_mxfp4_gfx950.tiles import Gemm, Ladder, TileConfig, encode, gemms

MIN_WORKGROUPS = 2
"""On a compute unit at once: while one waits, another works."""

BLOCK_K = 256
"""What the CDNA4 scale layout is read in."""

WEIGHT_BOUND_TOKENS = 64
MAX_OVERREAD = 1.02
"""Up to so many tokens, reading the weights is most of the work, and no more of them may be read."""

WORTH_A_CHANGE = 0.95
"""A tile gives way to another only for less work than this: each one that serves is a kernel to compile."""

# A gfx950 as far as the choice between tiles depends on it: published peaks (2.5 PFLOP/s of dense bf16
# and 8 TB/s at 2.4 GHz over 256 compute units, 128 bytes of LDS a cycle in each), and two guesses (the
# cache's bandwidth and the latency). They weigh counts of executed instructions against each other: the
# result is a ranking by counted work, not a prediction of time.
COMPUTE_UNITS = 256
SIMDS = 4
ISSUE_CYCLES = 4
MFMA_CYCLES = 16
HBM_BYTES_PER_CYCLE = 3300
L2_BYTES_PER_CYCLE = 3 * HBM_BYTES_PER_CYCLE
LATENCY_CYCLES = 1500
LDS_PASS_CYCLES = 2

ISSUED = ("vector", "fp4", "memory", "lds")
"""Kinds of instruction that take a slot of ISSUE_CYCLES; scalar ones are issued beside them."""

TRIED_TOKENS = 64
LONG_K = 2880
SHORT_K = 832
"""Executed beside GPT-OSS's K, and with a tail like it: tells each block's cost from what is done once."""


def rank(table: Path, progress: Callable[[int, int], None]) -> None:
    """Compile and execute each candidate, choose one per matmul and token count, and write the rows.

    Args:
        table: the JSON file to bring up to date.
        progress: told how many tiles of how many are done.

    Raises:
        Mxfp4Error: the file is not a table.
    """
    table.parent.mkdir(parents=True, exist_ok=True)
    content = read(table, "gfx950") if table.exists() else {"provenance": {}, "rows": [], "measured": []}
    shape = layer_shape("gpt-oss-20b")
    layer = CompiledLayer(shape)
    short = CompiledLayer(dataclasses.replace(shape, hidden=SHORT_K, intermediate=SHORT_K))
    kernels = layer.backend.KERNELS
    tiles = GFX950.candidates[kernels]
    work: dict[tuple[str, TileConfig], Work] = {}
    for done, tile in enumerate(tiles):
        progress(done, len(tiles))
        tried = layer.tried(TRIED_TOKENS, tile)
        if not any(matmul.fits for matmul in tried):
            continue
        try:
            counts = zip(short.executed(TRIED_TOKENS, tile), layer.executed(TRIED_TOKENS, tile), strict=True)
        except OutOfResources:
            continue  # One of the two does not fit; the other cannot be reached without it.
        for matmul, (few, many) in zip(tried, counts, strict=True):
            if matmul.fits and matmul.report is not None and matmul.report.workgroups >= MIN_WORKGROUPS:
                work[matmul.gemm, tile] = Work.of(matmul.report, few, many)
    progress(len(tiles), len(tiles))

    rows: list[list[Any]] = []
    found = {gemm for model in GPT_OSS for tp, ep in DIVISIONS for gemm in gemms(layer_shape(model, tp, ep))}
    for gemm in sorted(found, key=lambda g: (g.name, -g.global_experts, -g.experts, -g.k, -g.n)):
        usable = {tile: each for (name, tile), each in work.items() if name == gemm.name}
        best: list[TileConfig] = []
        for tokens in TOKENS:
            fair = [t for t in usable if tokens > WEIGHT_BOUND_TOKENS or overread(gemm, t) <= MAX_OVERREAD]
            if not fair:
                raise Mxfp4Error("the tiles", f"able to compute {gemm}", "none without a spill", "Try others")
            cost = {tile: cycles(gemm, tile, usable[tile], tokens, shape.topk) for tile in fair}
            least = min(cost, key=cost.__getitem__)
            keep = best and cost.get(best[-1], math.inf) * WORTH_A_CHANGE <= cost[least]
            best.append(best[-1] if keep else least)
        rows += encode(kernels, triton.__version__, gemm, Ladder(TOKENS, tuple(best)).merged())
    update(table, content, kernels, rows, triton.__version__, len(tiles), len(work))


@dataclass(frozen=True)
class Work:
    """What one workgroup executes: once, and for every block of K.

    Args:
        report: what the tile's kernel takes.
        issued: instructions of a wave that occupy the vector unit or a path to memory.
        matrix: matrix instructions of a wave.
        lds: passes of LDS of the workgroup, those of conflicts included.
    """

    report: KernelReport
    issued: tuple[float, float]
    matrix: tuple[float, float]
    lds: tuple[float, float]

    @classmethod
    def of(cls, report: KernelReport, few: Counts, many: Counts) -> Work:
        """From what was counted over SHORT_K and over GPT-OSS's K."""
        few_steps, many_steps = math.ceil(SHORT_K / BLOCK_K), math.ceil(LONG_K / BLOCK_K)

        def line(count: Callable[[Counts], float]) -> tuple[float, float]:
            step = (count(many) - count(few)) / (many_steps - few_steps)
            return count(few) - few_steps * step, step

        return cls(
            report,
            line(lambda counts: sum(counts.instructions[kind] for kind in ISSUED) / report.waves),
            line(lambda counts: counts.instructions["matrix"] / report.waves),
            line(lambda counts: counts.lds_passes + counts.lds_conflicts),
        )


def cycles(gemm: Gemm, tile: TileConfig, work: Work, tokens: int, topk: int) -> float:
    """The counted work of one matmul on the busiest resource, in cycles.

    Args:
        gemm: the matmul.
        tile: how it is cut up.
        work: what one of its workgroups executes.
        tokens: T.
        topk: experts per token, each as likely as any other.
    """
    m_tiles, active = expected_tiles(tokens, topk / gemm.global_experts, tile.block_m)
    steps = math.ceil(gemm.k / tile.block_k)
    workgroups = gemm.experts * m_tiles * math.ceil(gemm.n / tile.block_n)
    # The busiest compute unit; the tail of a tile without rows or columns costs as much.
    report, rounds = work.report, math.ceil(workgroups / COMPUTE_UNITS)
    vector = ISSUE_CYCLES * (work.issued[0] + steps * work.issued[1])
    matrix = MFMA_CYCLES * (work.matrix[0] + steps * work.matrix[1])
    # One wave alone on a SIMD does first one, then the other.
    wave = max(vector, matrix) if report.occupancy > 1 else vector + matrix
    # Whole waves go to whole SIMDs: a lone workgroup of two waves leaves two of them idle.
    issue = math.ceil(rounds * report.waves / SIMDS) * wave
    lds = rounds * LDS_PASS_CYCLES * (work.lds[0] + steps * work.lds[1])
    # A workgroup waits for each step's loads unless another one, or another stage, hides them.
    waits = (
        math.ceil(workgroups / (COMPUTE_UNITS * report.workgroups)) * steps * LATENCY_CYCLES / tile.num_stages
    )
    weight_bytes = gemm.experts * active * gemm.n * gemm.k * 17 / 32
    tile_bytes = steps * tile.block_k * (tile.block_n * 17 / 32 + tile.block_m * 2)
    memory = max(weight_bytes / HBM_BYTES_PER_CYCLE, workgroups * tile_bytes / L2_BYTES_PER_CYCLE)
    return max(issue, lds, memory) + waits


def overread(gemm: Gemm, tile: TileConfig) -> float:
    """Bytes of weights and scales that one pass reads, over those that the checkpoint has.

    Columns past the last tile's end wrap around to the first and are read again; rows past K are
    masked, their scales are not.
    """
    columns_read = math.ceil(gemm.n / tile.block_n) * tile.block_n
    groups_read = math.ceil(gemm.k / tile.block_k) * tile.block_k // 32
    return columns_read * (gemm.k / 2 + groups_read) / (gemm.n * gemm.k * 17 / 32)


def expected_tiles(tokens: int, chance: float, block_m: int) -> tuple[float, float]:
    """Tiles of rows that an expert is expected to need, and how likely it is to need any.

    Args:
        tokens: T.
        chance: that one token chooses this expert.
        block_m: rows of a tile.
    """
    tiles, probability = 0.0, (1 - chance) ** tokens
    active = 1 - probability
    if tokens * chance > 40:
        # The binomial is narrow against its mean: half a tile is lost on average.
        return tokens * chance / block_m + 0.5, 1.0
    for rows in range(1, tokens + 1):
        probability *= (tokens - rows + 1) / rows * chance / (1 - chance)
        tiles += probability * math.ceil(rows / block_m)
    return tiles, active


def update(
    table: Path,
    content: dict[str, Any],
    kernels: str,
    rows: list[list[Any]],
    triton: str,
    tried: int,
    usable: int,
) -> None:
    """Replace the rows of this Triton in a table, and say where they come from.

    Args:
        table: the file.
        content: what it has so far, as `read` gives it.
        kernels: whose rows these are.
        rows: as `encode` gives them.
        triton: the Triton that compiled them.
        tried, usable: how many tiles were compiled, and how many kernels fit, two to a compute unit.
    """
    release = rows[0][1]
    provenance = content["provenance"] | {
        f"{kernels} {release}": {
            "commands": ["make tune"],
            "triton": triton,
            "evidence": "compiled for gfx950, executed on the emulator and counted; not run on a gfx950",
            "tiles_tried": tried,
            "kernels_usable": usable,
        }
    }
    kept = [row for row in content["rows"] if row[:2] != [kernels, release]]
    write(table, "gfx950", provenance, kept + rows, content["measured"])
