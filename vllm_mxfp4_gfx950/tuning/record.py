"""A user's table while it is made: what was measured of a layer, and the rows that serve."""

from __future__ import annotations

import fcntl
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.models import TOKENS
from vllm_mxfp4_gfx950.moe import MoeShape
from vllm_mxfp4_gfx950.tables import store
from vllm_mxfp4_gfx950.tiles import (
    Gemm,
    Key,
    Ladder,
    Plan,
    TileConfig,
    encode,
    encode_plans,
    gemms,
    release_of,
    without_plans,
)

Pair = tuple[TileConfig, TileConfig]
"""The tiles of w13 and of w2."""

SIZES = tuple(
    sorted(
        {
            *TOKENS,
            *(3 * tokens // 2 for tokens in TOKENS[1:-1]),
            *(quarters * tokens // 4 for tokens in TOKENS[6:-1] for quarters in (5, 7)),
        }
    )
)
"""Token counts that are timed. A tile serves from the count before its own on, and the fastest at a power of
two may be slow behind the power before it."""

GIVE_UP = 1.1
"""Once our own matmuls take so many times as long as the others, no larger batch is tried with them."""


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
        self.shape, self.gemms = shape, gemms(shape)
        self.evidence, self.command = evidence, command
        self.read()

    def read(self) -> None:
        """Take in what the file says, which another process may be writing to as well."""
        content = store.read_any(self.file, self.arch)
        self.provenance, self.rows = content["provenance"], content["rows"]
        self.measured, self.plans = content["measured"], content["plans"]
        for name in (self.kernels, "own", "plans"):
            other = self.provenance.get(self.source(name), {}).get("evidence", self.evidence)
            if other != self.evidence:
                raise Mxfp4Error(
                    f"{self.file}: {self.source(name)}", self.evidence, other, "Give another --out"
                )

    def source(self, kernels: str) -> str:
        """The name of these kernels' provenance."""
        return f"{kernels} {release_of(self.triton)}"

    def times(self, kernels: str) -> dict[int, float]:
        """Microseconds of the layer by tokens, as far as they are measured."""
        key = kernels, release_of(self.triton), self.gemms[0]
        return {tokens: us for tokens, (_, us) in by_matmul(self.measured).get(key, {}).items()}

    def has(self, tokens: int) -> bool:
        """Whether so many tokens are measured."""
        return tokens in self.times(self.kernels)

    def gave_up(self, tokens: int) -> bool:
        """Whether our own matmuls were too slow for fewer tokens, or not right."""
        others, own = self.times(self.kernels), self.times("own")
        return any(own.get(fewer, math.inf) > GIVE_UP * us for fewer, us in others.items() if fewer < tokens)

    @contextmanager
    def changed(self) -> Iterator[None]:
        """Read the file, let the caller change what it says, and write it, alone."""
        with self.file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # Until it is closed.
            self.read()
            yield
            store.write(self.file, self.arch, self.provenance, self.rows, self.measured, self.plans)

    def note(self, kernels: str) -> None:
        """Say where rows of these kernels come from."""
        known = self.provenance.setdefault(
            self.source(kernels), {"evidence": self.evidence, "triton": self.triton}
        )
        commands = known.setdefault("commands", [])
        if self.command not in commands:
            commands.append(self.command)

    def pin(self, plans: Ladder[Plan]) -> None:
        """Write down which plan serves how many tokens of the layer."""
        with self.changed():
            self.note("plans")
            self.plans = without_plans(self.plans, self.triton, self.shape)
            self.plans += encode_plans(self.triton, self.shape, plans)

    def add(self, tokens: int, found: dict[str, tuple[Pair, float]]) -> None:
        """Add what was measured to the file; what was pinned for the layer may no longer hold."""
        with self.changed():
            for kernels, (pair, us) in found.items():
                for gemm, tile in zip(self.gemms, pair, strict=True):
                    (row,) = encode(kernels, self.triton, gemm, Ladder((tokens,), (tile,)))
                    # Another process may have measured the same.
                    self.measured = [each for each in self.measured if each[:8] != row[:8]]
                    self.measured.append([*row, round(us, 2)])
                self.note(kernels)
            timed = by_matmul(self.measured)
            kept = [row for row in self.rows if (*row[:2], Gemm(*row[2:7])) not in timed]
            self.rows = kept + serving(self.measured)
            self.plans = without_plans(self.plans, self.triton, self.shape)


def by_matmul(measured: list[list[Any]]) -> dict[Key, dict[int, tuple[TileConfig, float]]]:
    """What was measured, by matmul and by tokens."""
    found: dict[Key, dict[int, tuple[TileConfig, float]]] = {}
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
        if not set(SIZES) <= set(peers):
            continue
        if kernels == "own":
            last = crossover(*({n: us for n, (_, us) in each.items()} for each in (found, peers)))
            tiles = {n: tile for n, (tile, _) in sorted(found.items()) if n <= last}
            rungs = tiles or {0: found[min(found)][0]}
            rows += encode(kernels, release, gemm, Ladder(tuple(rungs), tuple(rungs.values())))
        else:
            rungs = {n: found[n][0] for n in SIZES}
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
    for tokens in sorted(others):
        if tokens not in own:
            break
        gain += math.log(others[tokens] / own[tokens])
        if gain > best:
            best, last = gain, tokens
    return last
