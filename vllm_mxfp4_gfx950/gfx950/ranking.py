"""Rank gfx950's tiles by compiling them, for the Triton and triton_kernels that are installed here."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.runtime.errors import OutOfResources

from vllm_mxfp4_gfx950.arch import GFX950
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.gfx950.emulator.memory import Fault
from vllm_mxfp4_gfx950.gfx950.layer import CompiledLayer
from vllm_mxfp4_gfx950.gfx950.time_model import CARDS, Card, Prediction, Profile, Work, along, launch, work
from vllm_mxfp4_gfx950.models import DIVISIONS, GPT_OSS, TOKENS, layer_shape
from vllm_mxfp4_gfx950.tables.store import Content, read, write
from vllm_mxfp4_gfx950.tiles import Gemm, Ladder, TileConfig, gemms, release_of

OVERREAD_TOKENS = 64
MAX_OVERREAD = 1.02
"""Up to so many tokens, reading the weights is most of the work, and no more of them may be read."""

WORTH_A_CHANGE = 0.95
"""A tile gives way to another only for less work than this: each one that serves is a kernel to compile."""

SPLITS = (1, 2, 4, 8)
SPLIT_TOKENS = 16
"""Ways to split w2's depth in a wider search, up to so many tokens; above, there are workgroups enough."""

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
    content = read(table, "gfx950")
    installed = Installed()
    kernels = installed.layer.backend.KERNELS
    tiles = GFX950.candidates[kernels]
    measured: dict[tuple[str, TileConfig], Measured] = {}
    for done, tile in enumerate(tiles):
        progress(done, len(tiles))
        measured |= {(name, tile): each for name, each in installed.measured(tile).items()}
    progress(len(tiles), len(tiles))

    chosen: dict[Gemm, Ladder[TileConfig]] = {}
    found = {gemm for model in GPT_OSS for tp, ep in DIVISIONS for gemm in gemms(layer_shape(model, tp, ep))}
    for gemm in sorted(found, key=lambda g: (g.name, -g.global_experts, -g.experts, -g.k, -g.n)):
        best: list[TileConfig] = []
        for tokens in TOKENS:
            cost, _ = costs(gemm, measured, tokens, installed.layer.shape.topk)
            least = min(cost, key=cost.__getitem__)
            keep = best and cost.get(best[-1], math.inf) * WORTH_A_CHANGE <= cost[least]
            best.append(best[-1] if keep else least)
        chosen[gemm] = Ladder(TOKENS, tuple(best)).merged()
    update(table, content, kernels, chosen, triton.__version__, len(tiles), len(measured))


@dataclass(frozen=True)
class Measured:
    """What one workgroup of a tile does at two depths, SHORT_K and LONG_K.

    Args:
        few, many: by card, in the order of `time_model.CARDS`.
    """

    few: tuple[Work, ...]
    many: tuple[Work, ...]

    @classmethod
    def of(cls, few: Profile, many: Profile) -> Measured:
        """From what was executed."""
        return cls(tuple(work(few, card) for card in CARDS), tuple(work(many, card) for card in CARDS))

    def at(self, tile: TileConfig, k: int) -> tuple[Work, ...]:
        """At another depth."""
        steps = math.ceil(SHORT_K / tile.block_k), math.ceil(LONG_K / tile.block_k)
        wanted = math.ceil(k / tile.split_k / tile.block_k)
        return tuple(map(lambda few, many: along(few, many, steps, wanted), self.few, self.many))


def matmul(
    gemm: Gemm, tile: TileConfig, done: Work, card: Card, tokens: int, topk: int, activation_bytes: int = 2
) -> Prediction:
    """How long one matmul takes on one card.

    Args:
        gemm: the matmul.
        tile: how it is cut up.
        done: by each workgroup, at the gemm's depth.
        card: where.
        tokens: T.
        topk: experts per token, each as likely as any other.
        activation_bytes: of one value of a row that is read; what is written is bf16.
    """
    m_tiles, active = expected_tiles(tokens, topk / gemm.global_experts, tile.block_m)
    workgroups = gemm.experts * m_tiles * math.ceil(gemm.n / tile.block_n) * tile.split_k
    rows = tokens * topk * gemm.experts / gemm.global_experts
    weights = gemm.experts * active * gemm.n * gemm.k * 17 / 32 * max(1.0, overread(gemm, tile))
    is_w13 = gemm.name == "w13"
    read = min(rows, tokens) if is_w13 else rows
    written = rows * (gemm.n // 2 if is_w13 else gemm.n) * tile.split_k
    return launch(done, card, workgroups, weights + read * gemm.k * activation_bytes + 2 * written)


class Installed:
    """The matmuls that can be compiled here, executed at two depths.

    Args:
        backend: "triton" for those of the triton_kernels that are installed here, "two_fp8" for ours.

    Raises:
        Mxfp4Error: there are none.
    """

    def __init__(self, backend: str = "triton") -> None:
        shape = layer_shape("gpt-oss-20b")
        self.layer = CompiledLayer(shape, backend=backend)
        shape = dataclasses.replace(shape, hidden=SHORT_K, intermediate=SHORT_K)
        self.short = CompiledLayer(shape, backend=backend)

    def measured(self, tile: TileConfig) -> dict[str, Measured]:
        """What w13 and w2 do with a tile, without the one that it does not fit, or that is refused."""
        tried = self.layer.tried(TRIED_TOKENS, tile)
        if not any(compiled.fits for compiled in tried):
            return {}
        try:
            few, many = (each.profiled(TRIED_TOKENS, tile) for each in (self.short, self.layer))
        except (OutOfResources, Fault):
            return {}  # One of the two does not fit, or is refused; the other cannot be reached without it.
        seen = zip(tried, few, many, strict=True)
        return {compiled.gemm: Measured.of(*each) for compiled, *each in seen if compiled.fits}


def wide(rows: Sequence[int], depths: Sequence[int] = (256,)) -> Iterator[TileConfig]:
    """The tiles of a wider search: up to 512 columns, and registers for 2 to 4 waves of a SIMD.

    A split depth is not among them, as each workgroup does the same there: see `SPLITS`.

    Args:
        rows, depths: block_m and block_k.
    """
    ways = itertools.product(rows, (32, 64, 128, 256, 512), depths, (2, 4, 8), (1, 2), (0, 2, 3, 4))
    for block_m, block_n, block_k, num_warps, num_stages, waves in ways:
        # The matrix unit has 16 rows.
        if 512 <= max(16, block_m) * block_n // num_warps <= 16384:
            yield TileConfig(block_m, block_n, block_k, 1, num_warps, num_stages, waves)


def best(
    gemm: Gemm, measured: Mapping[tuple[str, TileConfig], Measured], tokens: int, topk: int
) -> tuple[TileConfig, tuple[Prediction, ...]]:
    """The tile of least regret, and what it takes by card.

    Args:
        gemm: the matmul.
        measured: by matmul and tile.
        tokens: T.
        topk: experts per token.

    Raises:
        Mxfp4Error: none may serve.
    """
    splits = SPLITS if gemm.name == "w2" and tokens <= SPLIT_TOKENS else (1,)
    cost, times = costs(gemm, measured, tokens, topk, splits)
    least = min(cost, key=cost.__getitem__)
    return least, times[least]


def costs(
    gemm: Gemm,
    measured: Mapping[tuple[str, TileConfig], Measured],
    tokens: int,
    topk: int,
    splits: Sequence[int] = (1,),
) -> tuple[dict[TileConfig, float], dict[TileConfig, tuple[Prediction, ...]]]:
    """The regret of each tile that may serve, and what it takes by card.

    Args:
        gemm, measured, tokens, topk: as in `best`.
        splits: ways to split the depth.

    Raises:
        Mxfp4Error: none may serve.
    """
    times: dict[TileConfig, tuple[Prediction, ...]] = {}
    for (name, tile), each in measured.items():
        if name == gemm.name and (tokens > OVERREAD_TOKENS or overread(gemm, tile) <= MAX_OVERREAD):
            for split in splits:
                cut = dataclasses.replace(tile, split_k=split)
                times[cut] = predicted(gemm, cut, each.at(cut, gemm.k), tokens, topk)
    if not times:
        raise Mxfp4Error("the tiles", f"able to compute {gemm}", "none without a spill", "Try others")
    return regrets({tile: tuple(each.us for each in some) for tile, some in times.items()}), times


def predicted(
    gemm: Gemm, tile: TileConfig, done: tuple[Work, ...], tokens: int, topk: int
) -> tuple[Prediction, ...]:
    """What `matmul` says, by card."""
    pairs = zip(done, CARDS, strict=True)
    return tuple(matmul(gemm, tile, each, card, tokens, topk) for each, card in pairs)


def regrets(times: dict[TileConfig, tuple[float, ...]]) -> dict[TileConfig, float]:
    """By how much each tile is slower than the best, on the card where it is worst off."""
    best = [min(column) for column in zip(*times.values(), strict=True)]
    return {tile: max(map(operator.truediv, each, best)) for tile, each in times.items()}


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
    content: Content,
    kernels: str,
    chosen: dict[Gemm, Ladder[TileConfig]],
    triton: str,
    tried: int,
    usable: int,
) -> None:
    """Replace the tiles of this Triton in a table, and say where they come from.

    Args:
        table: the file.
        content: what it has so far.
        kernels: whose tiles these are.
        chosen: for each matmul.
        triton: the Triton that compiled them.
        tried, usable: how many tiles were compiled, and how many kernels fit, two to a compute unit.
    """
    release = release_of(triton)
    content.provenance[f"{kernels} {release}"] = {
        "commands": ["make tune"],
        "triton": triton,
        "evidence": "compiled for gfx950, executed on the emulator and counted; not run on a gfx950",
        "tiles_tried": tried,
        "kernels_usable": usable,
    }
    kept = {key: rungs for key, rungs in content.tiles.items() if key[:2] != (kernels, release)}
    content.tiles = kept | {(kernels, release, gemm): rungs for gemm, rungs in chosen.items()}
    write(table, "gfx950", content)
