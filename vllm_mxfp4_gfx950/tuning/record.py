"""A user's table while it is made: what was measured of a layer, and the rows that serve."""

from __future__ import annotations

import fcntl
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.models import TOKENS
from vllm_mxfp4_gfx950.moe import MoeShape
from vllm_mxfp4_gfx950.tables import store
from vllm_mxfp4_gfx950.tiles import Ladder, Plan, TileConfig, gemms, release_of

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

CAPTURED = 512
"""The most tokens of a batch for which vLLM captures a graph, where it is not told otherwise. Larger ones are
launched by the CPU, which may take longer than the GPU."""

OWN_MOST = 2048
"""The most tokens for which our own matmuls get tiles: above, matmul_ogs is as fast or faster on an H200, and
launching it takes no longer than the GPU does."""


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
        self.release, self.gemms = release_of(triton), gemms(shape)
        self.evidence, self.command = evidence, command
        self.read()

    def read(self) -> None:
        """Take in what the file says, which another process may be writing to as well."""
        self.content = store.read(self.file, self.arch)
        for name in (self.kernels, "own", "plans"):
            other = self.content.provenance.get(self.source(name), {}).get("evidence", self.evidence)
            if other != self.evidence:
                raise Mxfp4Error(
                    f"{self.file}: {self.source(name)}", self.evidence, other, "Give another --out"
                )

    def source(self, kernels: str) -> str:
        """The name of these kernels' provenance."""
        return f"{kernels} {self.release}"

    def has(self, tokens: int) -> bool:
        """Whether so many tokens are measured."""
        return tokens in self.content.measured.get((self.kernels, self.release, self.gemms[0]), {})

    @property
    def pinned(self) -> bool:
        """Whether it says which plan serves how many tokens of the layer."""
        return (self.release, self.gemms[0]) in self.content.plans

    @contextmanager
    def changed(self) -> Iterator[None]:
        """Read the file, let the caller change what it says, and write it, alone."""
        with self.file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # Until it is closed.
            self.read()
            yield
            store.write(self.file, self.arch, self.content)

    def note(self, kernels: str) -> None:
        """Say where rows of these kernels come from."""
        known = self.content.provenance.setdefault(
            self.source(kernels), {"evidence": self.evidence, "triton": self.triton}
        )
        commands = known.setdefault("commands", [])
        if self.command not in commands:
            commands.append(self.command)

    def pin(self, plans: Ladder[Plan]) -> None:
        """Write down which plan serves how many tokens of the layer."""
        with self.changed():
            self.note("plans")
            self.content.plans[self.release, self.gemms[0]] = plans

    def add(self, tokens: int, found: dict[str, tuple[Pair, float]]) -> None:
        """Add what was measured to the file; the layer's tiles serve once all numbers of tokens are there.

        What was pinned for the layer may no longer hold.
        """
        with self.changed():
            measured, tiles = self.content.measured, self.content.tiles
            for kernels, (pair, us) in found.items():
                for gemm, tile in zip(self.gemms, pair, strict=True):
                    times = measured.setdefault((kernels, self.release, gemm), {})
                    times[tokens] = tile, round(us, 2)  # Another process may have measured the same.
                self.note(kernels)
            if all(self.has(tokens) for tokens in SIZES):
                for key in itertools.product((self.kernels, "own"), (self.release,), self.gemms):
                    if key in measured:
                        rungs = Ladder.of({n: tile for n, (tile, _) in measured[key].items()})
                        # Our own matmuls need as many rungs for w13 as for w2.
                        tiles[key] = rungs if key[0] == "own" else rungs.merged()
            self.content.plans.pop((self.release, self.gemms[0]), None)
