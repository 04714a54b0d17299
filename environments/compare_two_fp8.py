"""Counted work of the kernels with two FP8 addends against triton_kernels' with the tiles that serve.

    python environments/compare_two_fp8.py [MODEL [TOKENS ...]]

Needs a Triton and triton_kernels, no GPU: kernels are compiled for gfx950, and one workgroup of each is
executed on the emulator, times the workgroups that are expected when each expert is as likely as any other.
Instructions of a wave count once for each of its 64 lanes. A matrix instruction takes 16 cycles (16x16x32
bf16), or 32 (16x16x128, FP8 by FP4). Bytes are of weights and scales, over those of the experts chosen.
Not counted: the routing and the sum over the experts on either side, the split of the tokens, which is done
once beside the routing, and workgroups of w13 that only write zeros behind the rows, 6 of 96 for one token.
"""

from __future__ import annotations

import argparse
import dataclasses
import math

import torch
import triton

from vllm_mxfp4_gfx950.backends.triton import two_fp8
from vllm_mxfp4_gfx950.gfx950.driver import ARCH, WAVE, Launch, presented
from vllm_mxfp4_gfx950.gfx950.emulator.execution import Counts, execute
from vllm_mxfp4_gfx950.gfx950.layer import MATMULS, CompiledLayer
from vllm_mxfp4_gfx950.gfx950.ranking import expected_tiles
from vllm_mxfp4_gfx950.gfx950.report import KernelReport, read
from vllm_mxfp4_gfx950.models import layer_shape
from vllm_mxfp4_gfx950.options import MODELS, TOKENS
from vllm_mxfp4_gfx950.tables import ladder
from vllm_mxfp4_gfx950.tiles import TileConfig, gemms, release_of

CYCLES = {"v_mfma_f32_16x16x32_bf16": 16, "v_mfma_scale_f32_16x16x128_f8f6f4": 32}
FEW_EXPERTS = 4
"""Of the layer whose workgroups are executed: what a workgroup does depends on its sizes alone."""

Counted = tuple[Counts, KernelReport]


@dataclasses.dataclass
class Total:
    """What both matmuls of a layer take.

    Args:
        vector: vector instructions of a lane, conversions included.
        matrix: cycles of matrix instructions.
        read: bytes of weights and scales.
        spills: registers that did not fit.
    """

    vector: float = 0.0
    matrix: float = 0.0
    read: float = 0.0
    spills: int = 0


class Layers:
    """The model's layer on one GPU, with few experts."""

    def __init__(self, model: str) -> None:
        self.shape = layer_shape(model)
        few = dataclasses.replace(self.shape, experts=FEW_EXPERTS, global_experts=FEW_EXPERTS)
        self.theirs, self.ours = CompiledLayer(few), CompiledLayer(few, backend="two_fp8")
        self.done: dict[tuple[TileConfig, bool], list[Counted]] = {}

    def counted(self, tile: TileConfig, index: int, *, ours: bool) -> Counted:
        """One workgroup of a matmul (w13 is 0)."""
        if (tile, ours) not in self.done:
            self.done[tile, ours] = self.execute(tile, ours=ours)
        return self.done[tile, ours][index]

    def execute(self, tile: TileConfig, *, ours: bool) -> list[Counted]:
        """One workgroup of each matmul with a tile."""
        found: list[Counted] = []
        tokens = min(tile.block_m, 64)

        def run(launch: Launch) -> None:
            if launch.name.startswith(MATMULS):
                # Of all workgroups that share a tile's depth.
                step = launch.grid[0] * launch.grid[1]
                found.append((execute(launch, [step * z for z in range(tile.split_k)]), read(launch)))
            elif launch.name != "combine":
                execute(launch)

        layer = self.ours if ours else self.theirs
        x = torch.zeros(tokens, self.shape.hidden, dtype=torch.bfloat16)
        logits = torch.zeros(tokens, FEW_EXPERTS, dtype=torch.bfloat16)
        with presented(run):
            layer.with_tiles(layer.tried_plan, tile, tile).run(x, logits)
        return found

    def total(self, tokens: int, *, ours: bool) -> Total:
        """The layer with the tiles that serve so many tokens."""
        total = Total()
        for index, gemm in enumerate(gemms(self.shape)):
            theirs = ladder(ARCH, self.theirs.backend.KERNELS, triton.__version__, gemm)
            assert theirs is not None
            own = two_fp8.tiles_for(self.shape, release_of(triton.__version__))[index]
            tile = (own if ours else theirs).at(tokens)
            counts, report = self.counted(tile, index, ours=ours)
            rows, _ = expected_tiles(tokens, self.shape.topk / gemm.global_experts, tile.block_m)
            tiles_of_rows = gemm.experts * rows
            workgroups = tiles_of_rows * math.ceil(gemm.n / tile.block_n)
            total.vector += workgroups * WAVE * sum(counts.instructions[kind] for kind in ("vector", "fp4"))
            total.matrix += workgroups * sum(n * counts.mnemonics.get(name, 0) for name, n in CYCLES.items())
            weights = sum(n for name, n in counts.bytes_read.items() if name.split("+")[0] in WEIGHTS)
            # Columns behind the last are those before them, read again.
            total.read += tiles_of_rows * gemm.n / tile.block_n * weights
            total.spills += report.vgpr_spills + report.sgpr_spills
        return total


WEIGHTS = ("W", "S", "WMxScale", "BMxScale")
"""Parameters that hold weights and their scales, in our kernels and in the package's."""


def main(model: str, tokens: list[int]) -> None:
    """Print one row for each number of tokens."""
    layers = Layers(model)
    print(f"{model}, TP 1, triton {triton.__version__}: two FP8 addends / {layers.theirs.backend.NAME}\n")
    print("| tokens | vector instructions a weight | ratio | matrix cycles, ratio | bytes | spills |")
    print("|---|---|---|---|---|---|")
    for count in tokens:
        ours, theirs = layers.total(count, ours=True), layers.total(count, ours=False)
        weights = bytes_ = 0.0
        for gemm in gemms(layers.shape):
            _, active = expected_tiles(count, layers.shape.topk / gemm.global_experts, 1)
            weights += gemm.experts * active * gemm.n * gemm.k
            bytes_ += gemm.experts * active * gemm.n * gemm.k * 17 / 32
        print(
            f"| {count} | {ours.vector / weights:.3f} / {theirs.vector / weights:.3f} "
            f"| {ours.vector / theirs.vector:.2f} | {ours.matrix / theirs.matrix:.2f} "
            f"| {ours.read / bytes_:.3f} / {theirs.read / bytes_:.3f} | {ours.spills} / {theirs.spills} |",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", choices=MODELS, default="gpt-oss-120b")
    parser.add_argument("tokens", nargs="*", type=int, help="of a forward; 1 to 8192 by default")
    args = parser.parse_args()
    main(args.model, args.tokens or list(TOKENS))
