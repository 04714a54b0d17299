"""The kernels' tiles as data: one table an arch, looked up once when a layer is prepared."""

from __future__ import annotations

import functools
import json
import logging
import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from importlib import resources
from typing import Any, Generic, TypeVar

from vllm_mxfp4_gfx950.moe import MoeShape

logger = logging.getLogger(__name__)
T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class TileConfig:
    """How a matmul is cut up, and what the compiler may use for it.

    Args:
        block_m, block_n, block_k: rows, columns and depth of a workgroup's tile.
        split_k: workgroups that share one tile's depth.
        num_warps: waves of a workgroup.
        num_stages: tiles of the depth in flight.
        waves_per_eu: waves that each SIMD must have room for, on Hopper warps of each scheduler, which caps
            the registers; 0 leaves it to the compiler.
    """

    block_m: int
    block_n: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int
    waves_per_eu: int


@dataclass(frozen=True)
class Gemm:
    """One matmul of a layer as the table knows it.

    Args:
        name: "w13" or "w2".
        k, n: depth and columns.
        experts: experts on this rank.
        global_experts: experts of the model; with the tokens, it sets how many rows an expert gets.
    """

    name: str
    k: int
    n: int
    experts: int
    global_experts: int


@dataclass(frozen=True)
class Ladder(Generic[T]):
    """What to use for up to how many tokens.

    Args:
        bounds: token counts, ascending.
        rungs: one value a bound; the last one also serves everything above.
    """

    bounds: tuple[int, ...]
    rungs: tuple[T, ...]

    def at(self, tokens: int) -> T:
        """The value for this many tokens."""
        return self.rungs[min(bisect_left(self.bounds, tokens), len(self.rungs) - 1)]

    def map(self, convert: Callable[[T], U]) -> Ladder[U]:
        """The same ladder with converted values."""
        return Ladder(self.bounds, tuple(convert(rung) for rung in self.rungs))


def gemms(shape: MoeShape) -> tuple[Gemm, Gemm]:
    """A layer's two matmuls."""
    return (
        Gemm("w13", shape.hidden, 2 * shape.intermediate, shape.experts, shape.global_experts),
        Gemm("w2", shape.intermediate, shape.hidden, shape.experts, shape.global_experts),
    )


def ladder(arch: str, kernels: str, triton: str, gemm: Gemm) -> Ladder[TileConfig] | None:
    """The tiles of a matmul.

    Args:
        arch: whose table.
        kernels: "matmul_ogs", "matmul", or "decode" for our own.
        triton: Triton's release, such as "3.6.0"; tables go by its first two numbers.
        gemm: the matmul. Where the table does not have it, the nearest one that it has serves, which
            is logged; the nearest Triton likewise.

    Returns:
        None where the arch has no table for these kernels.
    """
    table = _table(arch)
    if table is None:
        return None
    release = release_of(triton)
    found = releases(arch, kernels)
    if not found:
        return None
    closest = min(sorted(found), key=lambda r: abs(_number(r) - _number(release)))
    candidates = {g: rungs for (kind, r, g), rungs in table.items() if (kind, r) == (kernels, closest)}
    nearest = min(
        (g for g in candidates if g.name == gemm.name),
        key=lambda g: sum(
            abs(math.log(a / b)) for a, b in zip(astuple(g)[1:], astuple(gemm)[1:], strict=True)
        ),
    )
    if nearest != gemm or closest != release:
        _log_once(f"no tiles for {gemm} on {arch} with triton {triton}; using those of {nearest}, {closest}")
    return candidates[nearest]


def releases(arch: str, kernels: str) -> set[str]:
    """The Triton releases, such as "3.6", that an arch's table has tiles of these kernels for."""
    return {key[1] for key in _table(arch) or () if key[0] == kernels}


def encode(kernels: str, triton: str, gemm: Gemm, tiles: Ladder[TileConfig]) -> list[list[Any]]:
    """Rows of a table's file, in the order of `columns`."""
    key = [kernels, release_of(triton), *astuple(gemm)]
    return [[*key, bound, *astuple(tile)] for bound, tile in zip(tiles.bounds, tiles.rungs, strict=True)]


def columns() -> list[str]:
    """What each value of a row is."""
    names = [field.name for kind in (Gemm, TileConfig) for field in fields(kind)]
    return ["kernels", "triton", *names[:5], "tokens", *names[5:]]


@functools.cache
def _table(arch: str) -> dict[tuple[str, str, Gemm], Ladder[TileConfig]] | None:
    file = resources.files("vllm_mxfp4_gfx950") / "tables" / f"{arch}.json"
    if not file.is_file():
        return None
    return decode(json.loads(file.read_text())["rows"])


def decode(rows: list[list[Any]]) -> dict[tuple[str, str, Gemm], Ladder[TileConfig]]:
    """The ladders of a table's rows, by kernels, Triton release and matmul."""
    found: dict[tuple[str, str, Gemm], list[tuple[int, TileConfig]]] = {}
    for kernels, triton, *rest in rows:
        found.setdefault((kernels, triton, Gemm(*rest[:5])), []).append((rest[5], TileConfig(*rest[6:])))
    return {
        key: Ladder(*map(tuple, zip(*sorted(rungs, key=lambda rung: rung[0]), strict=True)))
        for key, rungs in found.items()
    }


def release_of(triton: str) -> str:
    """The first two numbers of a Triton version, by which tables go."""
    return ".".join(triton.split(".")[:2])


def _number(release: str) -> int:
    major, minor = release.split(".")
    return 1000 * int(major) + int(minor)


@functools.cache
def _log_once(text: str) -> None:
    logger.warning(text)
