"""A layer's kernels for gfx950, compiled through the same `prepare` and `run` that serve."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_mxfp4_gfx950 import backends
from vllm_mxfp4_gfx950.gfx950.driver import ARCH, Launch, presented
from vllm_mxfp4_gfx950.gfx950.emulator.execution import execute
from vllm_mxfp4_gfx950.gfx950.report import KernelReport, read
from vllm_mxfp4_gfx950.gfx950.time_model import Profile, profile
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights, first_experts, tensor_shapes
from vllm_mxfp4_gfx950.settings import Settings
from vllm_mxfp4_gfx950.tiles import Ladder, TileConfig

MATMULS = ("_matmul", "_p_matmul", "mxfp4_matmul", "two_fp8_matmul")
"""How the names of the two matmuls' kernels begin: in both generations of triton_kernels, and of ours."""

SMALL = TileConfig(16, 64, 256, 1, 4, 1, 0)
"""A tile that fits with every Triton."""

INDEX_DTYPES = (torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class CompiledMatmul:
    """What became of one matmul.

    Args:
        gemm: "w13" or "w2".
        tokens: T.
        workgroups: how many the launch has.
        report: its kernel's report; None when it does not compile.
        error: why it does not.
    """

    gemm: str
    tokens: int
    workgroups: int
    report: KernelReport | None
    error: str = ""

    @property
    def fits(self) -> bool:
        """Compiles, spills nothing, touches no scratch memory, and loses nothing of an activation."""
        report = self.report
        if report is None or not report.is_lossless:
            return False
        return not (report.vgpr_spills or report.sgpr_spills or report.scratch_bytes)


class CompiledLayer:
    """One layer, prepared for gfx950 on the CPU from weights of no particular value.

    Args:
        shape: the layer.
        tables: the directory of the user's own tiles.
        backend: "triton", or "two_fp8" for our own matmuls with two FP8 addends.

    Raises:
        Mxfp4Error: the packages here have no Triton backend for it, or the user's table is not a table.
    """

    def __init__(self, shape: MoeShape, tables: Path | None = None, backend: str = "triton") -> None:
        self.shape = shape
        self.backend: Any = backends.select(shape, ARCH, Settings(backend, tables=tables)).backend
        self.two_fp8 = backend == "two_fp8"
        sizes = tensor_shapes(shape.experts, shape.hidden, shape.intermediate).items()
        tensors = {name: torch.empty(size, dtype=dtype) for name, (dtype, size) in sizes}
        weights = MoeWeights(**tensors, expert_map=first_experts(shape))
        with presented(lambda launch: None):
            prepared: Any = self.backend.prepare(weights, shape, tables)
        self.prepared: Any = prepared if self.two_fp8 else prepared.without("own")

    def tiles_at(self, tokens: int) -> tuple[TileConfig, TileConfig]:
        """The tiles of w13 and of w2 that serve this many tokens."""
        w13, w2 = self.prepared.tiles_at(tokens)
        return w13, w2

    def with_tiles(self, w13: TileConfig | None, w2: TileConfig | None) -> Any:
        """The prepared layer with these tiles for every batch."""
        if not self.two_fp8:
            return self.prepared.with_tiles(w13, w2)
        tiles = Ladder((2**30,), (w13,)), Ladder((2**30,), (w2,))
        two_fp8 = dataclasses.replace(self.prepared.two_fp8, tiles=tiles)
        return dataclasses.replace(self.prepared, two_fp8=two_fp8)

    def served(self, tokens: int) -> list[CompiledMatmul]:
        """Both matmuls with the tiles that serve this many tokens."""
        return [self._compiled(tokens, i, self.tiles_at(tokens)[i]) for i in (0, 1)]

    def upstream(self, tokens: int) -> list[CompiledMatmul]:
        """Both matmuls with the package's own tiles."""
        return [self._compiled(tokens, index, None) for index in (0, 1)]

    def tried(self, tokens: int, tile: TileConfig) -> list[CompiledMatmul]:
        """Both matmuls with one tile."""
        return [self._compiled(tokens, index, tile) for index in (0, 1)]

    def profiled(self, tokens: int, tile: TileConfig) -> list[Profile]:
        """What the first workgroup of each matmul executes with one tile, on tokens that chose at random."""
        found = []
        x = torch.zeros(tokens, self.shape.hidden, dtype=torch.bfloat16)
        logits = torch.randn(tokens, self.shape.global_experts, generator=torch.Generator().manual_seed(0))

        def run(launch: Launch) -> None:
            if launch.name.startswith(MATMULS):
                found.append(profile(launch))
            else:
                execute(launch)

        with presented(run):
            self.with_tiles(tile, tile).run(x, logits.bfloat16())
        return found

    def _compiled(self, tokens: int, index: int, tile: TileConfig | None) -> CompiledMatmul:
        # The other matmul takes a tile that fits, so that one failure does not hide behind another.
        prepared = self.with_tiles(*((tile, SMALL) if index == 0 else (SMALL, tile)))
        launches: list[Launch] = []
        gemm = ("w13", "w2")[index]
        x = torch.empty(tokens, self.shape.hidden, dtype=torch.bfloat16)
        logits = torch.empty(tokens, self.shape.global_experts, dtype=torch.bfloat16)

        def note(launch: Launch) -> None:
            # Nothing is computed. Host code indexes with what routing would have written: zero is an index.
            for argument in launch.arguments:
                if isinstance(argument, torch.Tensor) and argument.dtype in INDEX_DTYPES:
                    argument.zero_()
            if launch.name.startswith(MATMULS):
                launches.append(launch)

        with presented(note):
            try:
                prepared.run(x, logits)
            except Exception as error:  # Triton has a dozen kinds, from out of LDS to a failed pass.
                if len(launches) <= index:
                    return CompiledMatmul(gemm, tokens, 0, None, f"{type(error).__name__}: {error}")
        launch = launches[index]
        return CompiledMatmul(gemm, tokens, launch.grid[0], read(launch))
