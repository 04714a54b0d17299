"""Matmuls of our own on Hopper: w13 with SwiGLU, and w2.

matmul_ogs gives each expert a tile of many rows. Where an expert has a handful, reading its weights is the
work, so these kernels cut the weights finely instead and put them on the matrix unit's long side. They take
the same routing, and read the layouts that `prepare` has made for matmul_ogs. Nothing is added up in an order
that varies. And they take the CPU little to launch, which counts for more tokens where there is no graph.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton

from vllm_mxfp4_gfx950.arch import (
    HOPPER_LAYOUTS,
    HOPPER_SCALE_WARPS,
    OWN_MAX_SCALE,
    hopper_registers,
    scales_codes,
)
from vllm_mxfp4_gfx950.backends.triton import own_kernels as kernels
from vllm_mxfp4_gfx950.backends.triton.package import Weight, launch_options
from vllm_mxfp4_gfx950.backends.triton.routing import Routing, combine, route
from vllm_mxfp4_gfx950.moe import MoeShape
from vllm_mxfp4_gfx950.tables import ladder, releases
from vllm_mxfp4_gfx950.tiles import Ladder, TileConfig, gemms

# Loggers below `vllm` print where vLLM's own do.
logger = logging.getLogger("vllm.mxfp4_triton.own")


@dataclass(frozen=True)
class Own:
    """A layer as these kernels take it.

    Args:
        shape: the layer.
        w13, w2: its matmuls, with their values as int32.
        tiles: w13's and w2's by number of tokens.
        order: as `routing.order_of` returns it.
    """

    shape: MoeShape
    w13: Weight
    w2: Weight
    tiles: tuple[Ladder[TileConfig], Ladder[TileConfig]]
    order: torch.Tensor | None

    @property
    def most(self) -> int:
        """The largest number of tokens that the table has tiles for."""
        return self.tiles[0].bounds[-1]

    def run(self, x: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        """bf16[T, H] and bf16 or fp32[T, global_experts] to bf16[T, H]."""
        x = x.contiguous()
        tokens, hidden = x.shape
        topk = self.shape.topk
        w13_tile, w2_tile = (rungs.at(tokens) for rungs in self.tiles)
        routing = route(
            router_logits, topk, self.shape.experts, self.order, sizes=1, smallest=w13_tile.block_m,
            overlaps=True,
        )  # fmt: skip
        rows = x.new_empty(tokens * topk, self.w13.bias.shape[1] // 2)
        self.multiply(w13_tile, x, routing, self.w13, rows, gated=True)
        parts = x.new_empty(w2_tile.split_k, tokens * topk, hidden, dtype=torch.float32)
        self.multiply(w2_tile, rows, routing, self.w2, parts, gated=False)
        return combine(parts, routing.scatter, topk, overlaps=True)

    def multiply(
        self,
        tile: TileConfig,
        x: torch.Tensor,
        routing: Routing,
        weight: Weight,
        y: torch.Tensor,
        *,
        gated: bool,
    ) -> None:
        """One matmul over the tiles of a routing whose smallest are this tile's.

        Args:
            tile: how to cut it up.
            x: bf16[T, H], the tokens, for w13; bf16[T * topk, I], the rows, for w2.
            routing: of the tokens.
            weight: w13 or w2.
            y: bf16[T * topk, I] for w13, fp32[split_k, T * topk, H] for w2.
            gated: whether it is w13, with the SwiGLU.
        """
        values, scales, bias = weight.values, weight.scales, weight.bias
        depth, columns = x.shape[1], bias.shape[1]
        options = launch_options(tile.num_warps, overlaps=True) | hopper_registers(tile)
        options |= {"WARPS": tile.num_warps, "STAGES": tile.num_stages}
        codes = scales_codes(tile)
        if codes:
            # Which reads the scales of two rows, 8 apart, at once.
            scales = scales.view(torch.int16)
        block_k = min(tile.block_k, 1 << depth.bit_length() - 1)
        kernels.mxfp4_matmul[(triton.cdiv(columns, tile.block_n), routing.schedule.shape[1], tile.split_k)](
            x, values, scales, bias, y, routing.gather, routing.weights, routing.start, routing.schedule,
            depth, columns, x.stride(0),
            values.stride(0), values.stride(1), scales.stride(0), scales.stride(1),
            y.stride(-2), y.stride(0), self.shape.alpha, self.shape.limit,
            TOPK=self.shape.topk, GATED=gated, CODES=codes, SPLIT_K=tile.split_k,
            BLOCK_T=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=block_k, **options,
        )  # fmt: skip


def own_for(
    arch: str, shape: MoeShape, w13: Weight, w2: Weight, order: torch.Tensor | None, tables: Path | None
) -> Own | None:
    """A prepared layer for our own matmuls; None where the table has no tiles, or they cannot read it.

    Args:
        arch: the GPU.
        shape: the layer.
        w13, w2: its matmuls.
        order: as `routing.order_of` returns it.
        tables: the directory of the user's tile tables.
    """
    w13_tiles, w2_tiles = (ladder(arch, "own", triton.__version__, gemm, tables) for gemm in gemms(shape))
    if w13_tiles is None or w2_tiles is None:
        known = releases(arch, "own")
        if known:
            # From 3.8 on, the same tiles get wgmma instead of mma, and spill.
            timed = f"their tiles are those of triton {', '.join(known)}, and this is {triton.__version__}"
            _log_once(f"our own matmuls do not serve: {timed}")
        return None
    made = make(shape, w13, w2, order, (w13_tiles, w2_tiles))
    if made is not None:
        _log_once(f"our own matmuls can serve batches of up to {w13_tiles.bounds[-1]} tokens")
    return made


def make(
    shape: MoeShape,
    w13: Weight,
    w2: Weight,
    order: torch.Tensor | None,
    tiles: tuple[Ladder[TileConfig], Ladder[TileConfig]],
) -> Own | None:
    """A prepared layer for our own matmuls with some tiles; None where they cannot read it."""
    names = tuple(type(layout).__name__ for layout in w13.layouts)
    largest = max(int(weight.scales.max()) for weight in (w13, w2))
    readable = names == HOPPER_LAYOUTS and getattr(w13.layouts[1], "num_warps", None) == HOPPER_SCALE_WARPS
    if not readable or largest > OWN_MAX_SCALE:
        _log_once(f"our own matmuls do not serve: {' and '.join(names)}, largest scale {largest}")
        return None
    w13, w2 = (replace(weight, values=weight.values.view(torch.int32)) for weight in (w13, w2))
    return Own(shape, w13, w2, tiles, order)


@functools.cache
def _log_once(text: str) -> None:
    logger.info(text)
