"""A layer's kernels for gfx950, compiled through the same `prepare` and `run` that serve."""

from __future__ import annotations

import dataclasses
import math
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
from vllm_mxfp4_gfx950.tiles import Ladder, Plan, TileConfig

MATMULS = ("_matmul", "_p_matmul", "two_fp8_matmul")
"""How the names of the two matmuls' kernels begin: in all generations of triton_kernels, and ours."""

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
        plan: whose kernel it is.
        tile: with which; None for the package's own choice.
        error: why it does not compile.
    """

    gemm: str
    tokens: int
    workgroups: int
    report: KernelReport | None
    plan: Plan
    tile: TileConfig | None
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
        self.tried_plan: Plan = "two_fp8" if backend == "two_fp8" else "table"
        sizes = tensor_shapes(shape.experts, shape.hidden, shape.intermediate).items()
        tensors = {name: torch.empty(size, dtype=dtype) for name, (dtype, size) in sizes}
        weights = MoeWeights(**tensors, expert_map=first_experts(shape))
        with presented(lambda launch: None):
            self.prepared: Any = self.backend.prepare(weights, shape, tables)

    def with_tiles(self, plan: Plan, w13: TileConfig | None, w2: TileConfig | None) -> Any:
        """The prepared layer with these tiles of a plan for every batch."""
        if plan != "two_fp8":
            return self.prepared.with_tiles(w13, w2)
        tiles = Ladder((1,), (w13,)), Ladder((1,), (w2,))
        two_fp8 = dataclasses.replace(self.prepared.two_fp8, tiles=tiles)
        return dataclasses.replace(self.prepared, two_fp8=two_fp8, plans=Ladder((1,), (plan,)))

    def served(self, tokens: int) -> list[CompiledMatmul]:
        """Both matmuls as they serve this many tokens."""
        plan, tiles = self.prepared.plans.at(tokens), self.prepared.tiles_at(tokens)
        return [self._compiled(tokens, index, tile, plan) for index, tile in enumerate(tiles)]

    def upstream(self, tokens: int) -> list[CompiledMatmul]:
        """Both matmuls with the package's own tiles."""
        return [self._compiled(tokens, index, None, "package") for index in (0, 1)]

    def tried(self, tokens: int, tile: TileConfig) -> list[CompiledMatmul]:
        """Both matmuls with one tile."""
        return [self._compiled(tokens, index, tile, self.tried_plan) for index in (0, 1)]

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
            self.with_tiles(self.tried_plan, tile, tile).run(x, logits.bfloat16())
        return found

    def _compiled(self, tokens: int, index: int, tile: TileConfig | None, plan: Plan) -> CompiledMatmul:
        # The other matmul takes a tile that fits, so that one failure does not hide behind another.
        other = SMALL
        if tile is not None and plan == "two_fp8":  # Whose two matmuls have the same tiles of rows.
            other = dataclasses.replace(SMALL, block_m=tile.block_m)
        prepared = self.with_tiles(plan, *((tile, other) if index == 0 else (other, tile)))
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
                    text = f"{type(error).__name__}: {error}"
                    return CompiledMatmul(gemm, tokens, 0, None, plan, tile, text)
        launch = launches[index]
        return CompiledMatmul(gemm, tokens, math.prod(launch.grid), read(launch), plan, tile)
