"""A kernel's tile, and which one serves a matmul of how many tokens."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, TypeAlias, TypeVar, get_args

from vllm_mxfp4_gfx950.moe import MoeShape

T_co = TypeVar("T_co", covariant=True)
U = TypeVar("U")

KERNELS = ("matmul_ogs", "matmul", "own")
"""Those that have tiles: triton_kernels' two matmuls, and our own."""


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

    @classmethod
    def of(cls, rungs: Mapping[int, T_co]) -> Ladder[T_co]:
        """From at least one value, by bound."""
        bounds = tuple(sorted(rungs))
        return cls(bounds, tuple(rungs[bound] for bound in bounds))

    def pairs(self) -> Iterator[tuple[int, T_co]]:
        """Each bound and its value."""
        return zip(self.bounds, self.rungs, strict=True)

    def merged(self) -> Ladder[T_co]:
        """The same ladder with equal neighbours made one: a rung serves up to its bound."""
        runs = itertools.groupby(self.pairs(), lambda pair: pair[1])
        return Ladder.of({max(bound for bound, _ in run): rung for rung, run in runs})


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


def release_of(triton: str) -> str:
    """The first two numbers of a Triton version, by which tables go."""
    return ".".join(triton.split(".")[:2])
