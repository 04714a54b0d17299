"""Search the tiles of gfx950's table for the Triton and triton_kernels that are installed here."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_mxfp4_gfx950.commands.compile import TOKENS, progress
from vllm_mxfp4_gfx950.models import DIVISIONS, GPT_OSS, layer_shape
from vllm_mxfp4_gfx950.moe import Mxfp4Error
from vllm_mxfp4_gfx950.tuning import Gemm, Ladder, TileConfig, columns, decode, encode, gemms

if TYPE_CHECKING:
    from vllm_mxfp4_gfx950.gfx950.report import KernelReport

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
# and 8 TB/s at 2.4 GHz over 256 compute units), and two guesses (the cache's bandwidth and the latency).
# They weigh counts against each other: the result is a ranking by counted work, not a prediction of time.
COMPUTE_UNITS = 256
SIMDS = 4
ISSUE_CYCLES = 4
MFMA_CYCLES = 16
HBM_BYTES_PER_CYCLE = 3300
L2_BYTES_PER_CYCLE = 3 * HBM_BYTES_PER_CYCLE
LATENCY_CYCLES = 1500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--table", type=Path, required=True, help="the JSON file to bring up to date")


def run(args: argparse.Namespace) -> int:
    """Compile every candidate, choose for every matmul and token count, and write this Triton's rows."""
    import triton

    from vllm_mxfp4_gfx950.gfx950.layer import CompiledLayer

    layer = CompiledLayer(layer_shape("gpt-oss-20b"))
    kernels = layer.backend.KERNELS
    tiles = list(candidates(kernels))
    reports: dict[tuple[str, TileConfig], KernelReport] = {}
    for done, tile in enumerate(tiles):
        progress(done, len(tiles))
        for matmul in layer.tried(64, tile):
            if matmul.fits and matmul.report is not None and matmul.report.workgroups >= MIN_WORKGROUPS:
                reports[matmul.gemm, tile] = matmul.report
    progress(len(tiles), len(tiles))

    topk = 4
    rows: list[list[Any]] = []
    found = {gemm for model in GPT_OSS for tp, ep in DIVISIONS for gemm in gemms(layer_shape(model, tp, ep))}
    for gemm in sorted(found, key=lambda g: (g.name, -g.global_experts, -g.experts, -g.k, -g.n)):
        usable = {tile: report for (name, tile), report in reports.items() if name == gemm.name}
        best: list[TileConfig] = []
        for tokens in TOKENS:
            fair = [t for t in usable if tokens > WEIGHT_BOUND_TOKENS or overread(gemm, t) <= MAX_OVERREAD]
            if not fair:
                raise Mxfp4Error("the tiles", f"able to compute {gemm}", "none without a spill", "Try others")
            work = {tile: cycles(gemm, tile, usable[tile], tokens, topk) for tile in fair}
            least = min(work, key=work.__getitem__)
            keep = best and work.get(best[-1], math.inf) * WORTH_A_CHANGE <= work[least]
            best.append(best[-1] if keep else least)
        # A rung serves up to its bound, so equal neighbours are one.
        last = [i for i in range(len(best)) if i + 1 == len(best) or best[i] != best[i + 1]]
        rungs = Ladder(tuple(TOKENS[i] for i in last), tuple(best[i] for i in last))
        rows += encode(kernels, triton.__version__, gemm, rungs)
    write(args.table, kernels, rows, triton.__version__, len(tiles), len(reports))
    return 0


def candidates(kernels: str) -> Iterator[TileConfig]:
    """The tiles that are tried."""
    for block_m, block_n, num_warps, num_stages in itertools.product(
        (16, 32, 64, 128), (32, 64, 128, 256), (2, 4, 8), (1, 2)
    ):
        # Fewer than 512 outputs a wave leave its matrix instructions idle; more than 8,192 cannot be held.
        if 512 <= block_m * block_n // num_warps <= 8192:
            yield TileConfig(block_m, block_n, BLOCK_K, 1, num_warps, num_stages, 0)


def cycles(gemm: Gemm, tile: TileConfig, report: KernelReport, tokens: int, topk: int) -> float:
    """The counted work of one matmul on the busiest resource, in cycles.

    Args:
        gemm: the matmul.
        tile: how it is cut up.
        report: what the tile's kernel takes.
        tokens: T.
        topk: experts per token, each as likely as any other.
    """
    m_tiles, active = expected_tiles(tokens, topk / gemm.global_experts, tile.block_m)
    steps = math.ceil(gemm.k / tile.block_k)
    workgroups = gemm.experts * m_tiles * math.ceil(gemm.n / tile.block_n)
    # Issue slots of the busiest compute unit; the tail of a tile without rows or columns costs as much.
    outside = report.instructions - report.loop_instructions
    vector = ISSUE_CYCLES * (report.loop_instructions - report.loop_mfma)
    matrix = MFMA_CYCLES * report.loop_mfma
    # One wave alone on a SIMD does first one, then the other.
    per_step = max(vector, matrix) if report.occupancy > 1 else vector + matrix
    # Whole waves go to whole SIMDs: a lone workgroup of two waves leaves two of them idle.
    waves = math.ceil(math.ceil(workgroups / COMPUTE_UNITS) * report.waves / SIMDS)
    issue = waves * (steps * per_step + ISSUE_CYCLES * outside)
    # A workgroup waits for each step's loads unless another one, or another stage, hides them.
    waits = (
        math.ceil(workgroups / (COMPUTE_UNITS * report.workgroups)) * steps * LATENCY_CYCLES / tile.num_stages
    )
    weight_bytes = gemm.experts * active * gemm.n * gemm.k * 17 / 32
    tile_bytes = steps * tile.block_k * (tile.block_n * 17 / 32 + tile.block_m * 2)
    memory = max(weight_bytes / HBM_BYTES_PER_CYCLE, workgroups * tile_bytes / L2_BYTES_PER_CYCLE)
    return max(issue, memory) + waits


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


def write(table: Path, kernels: str, rows: list[list[Any]], triton: str, tried: int, usable: int) -> None:
    """Replace the rows of this Triton in a table, and say where they come from.

    Args:
        table: the file; made where it is missing.
        kernels: whose rows these are.
        rows: as `encode` gives them.
        triton: the Triton that compiled them.
        tried, usable: how many tiles were compiled, and how many kernels fit, two to a compute unit.
    """
    content = json.loads(table.read_text()) if table.is_file() else {"provenance": {}, "rows": []}
    release = rows[0][1]
    provenance = content["provenance"] | {
        f"{kernels} {release}": {
            "command": "make tune",
            "triton": triton,
            "evidence": "compiled for gfx950 and counted; not run on a gfx950",
            "tiles_tried": tried,
            "kernels_usable": usable,
        }
    }
    kept = [row for row in content["rows"] if row[:2] != [kernels, release]]
    rows = sorted(kept + rows, key=lambda row: [str(value).rjust(12) for value in row])
    decode(rows)
    text = ",\n".join("  " + json.dumps(row) for row in rows)
    head = json.dumps({"arch": "gfx950", "provenance": provenance, "columns": columns()}, indent=1)
    table.write_text(f'{head[:-2]},\n "rows": [\n{text}\n ]\n}}\n')
