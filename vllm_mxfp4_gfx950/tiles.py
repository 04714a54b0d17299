"""A kernel's tile, and a table's rows: which tile serves a matmul of how many tokens."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from typing import Any, Generic, Literal, TypeAlias, TypeVar, get_args

from vllm_mxfp4_gfx950.moe import MoeShape

T_co = TypeVar("T_co", covariant=True)
U = TypeVar("U")

KERNELS = ("matmul_ogs", "matmul", "own")
"""Those that have tiles: triton_kernels' two generations, and our own matmuls."""


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
class Ladder(Generic[T_co]):
    """What to use for up to how many tokens.

    Args:
        bounds: token counts, ascending.
        rungs: one value a bound; the last one also serves everything above.
    """

    bounds: tuple[int, ...]
    rungs: tuple[T_co, ...]

    def at(self, tokens: int) -> T_co:
        """The value for this many tokens."""
        return self.rungs[min(bisect_left(self.bounds, tokens), len(self.rungs) - 1)]

    def map(self, convert: Callable[[T_co], U]) -> Ladder[U]:
        """The same ladder with converted values."""
        return Ladder(self.bounds, tuple(convert(rung) for rung in self.rungs))

    def merged(self) -> Ladder[T_co]:
        """The same ladder with equal neighbours made one: a rung serves up to its bound."""
        pairs = list(zip(self.bounds, self.rungs, strict=True))
        last = [
            pair
            for pair, later in zip(pairs, [*pairs[1:], None], strict=True)
            if later is None or pair[1] != later[1]
        ]
        return Ladder(tuple(bound for bound, _ in last), tuple(rung for _, rung in last))


Plan: TypeAlias = Literal["own", "two_fp8", "table", "package"]
"""What computes a batch: our own matmuls, those with two FP8 addends, or the package's, with a table's tiles
or with those that it chooses itself."""

PLANS: tuple[Plan, ...] = get_args(Plan)

Key: TypeAlias = tuple[str, str, Gemm]
"""Kernels, Triton release and matmul."""


def gemms(shape: MoeShape) -> tuple[Gemm, Gemm]:
    """A layer's two matmuls."""
    return (
        Gemm("w13", shape.hidden, 2 * shape.intermediate, shape.experts, shape.global_experts),
        Gemm("w2", shape.intermediate, shape.hidden, shape.experts, shape.global_experts),
    )


def encode(kernels: str, triton: str, gemm: Gemm, tiles: Ladder[TileConfig]) -> list[list[Any]]:
    """Rows of a table's file, in the order of `columns`."""
    key = [kernels, release_of(triton), *astuple(gemm)]
    return [[*key, bound, *astuple(tile)] for bound, tile in zip(tiles.bounds, tiles.rungs, strict=True)]


def columns() -> list[str]:
    """What each value of a row is."""
    names = [field.name for kind in (Gemm, TileConfig) for field in fields(kind)]
    return ["kernels", "triton", *names[:5], "tokens", *names[5:]]


PLAN_COLUMNS = ["triton", "k", "n", "experts", "global_experts", "tokens", "plan"]
"""What each value of a plan's row is; the sizes are those of the layer's w13."""


def encode_plans(triton: str, shape: MoeShape, plans: Ladder[Plan]) -> list[list[Any]]:
    """Rows of a table's plans, in the order of PLAN_COLUMNS."""
    key = [release_of(triton), *astuple(gemms(shape)[0])[1:]]
    return [[*key, bound, plan] for bound, plan in zip(plans.bounds, plans.rungs, strict=True)]


def parse_plans(rows: list[list[Any]], triton: str, shape: MoeShape) -> Ladder[Plan] | None:
    """Which plan serves how many tokens of a layer; None where no row is of it."""
    others = without_plans(rows, triton, shape)
    rungs = sorted((row[-2], row[-1]) for row in rows if row not in others)
    return Ladder(*map(tuple, zip(*rungs, strict=True))) if rungs else None


def without_plans(rows: list[list[Any]], triton: str, shape: MoeShape) -> list[list[Any]]:
    """The rows that are of other layers or releases."""
    key = encode_plans(triton, shape, Ladder((1,), ("package",)))[0][:-2]
    return [row for row in rows if row[:-2] != key]


def parse(rows: list[list[Any]]) -> dict[Key, Ladder[TileConfig]]:
    """The ladders of a table's rows."""
    found: dict[Key, list[tuple[int, TileConfig]]] = {}
    for kernels, triton, *rest in rows:
        found.setdefault((kernels, triton, Gemm(*rest[:5])), []).append((rest[5], TileConfig(*rest[6:])))
    return {
        key: Ladder(*map(tuple, zip(*sorted(rungs, key=lambda rung: rung[0]), strict=True)))
        for key, rungs in found.items()
    }


def release_of(triton: str) -> str:
    """The first two numbers of a Triton version, by which tables go."""
    return ".".join(triton.split(".")[:2])
