"""The experts on gfx950's scaled matrix unit: bf16 activations as two FP8 addends, FP4 weights as they are.

The unit multiplies FP8 by FP4, both E8M0 scales included. A bf16 is the sum of two e4m3, as `two_fp8_kernels`
says, so that a matmul converts nothing, and nothing is lost. Tokens are split once, the rows between w13 and
w2 by w13's own kernel, after it has rounded them to bf16. Nothing is added up in an order that varies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton

from vllm_mxfp4_gfx950.backends.triton import two_fp8_kernels as kernels
from vllm_mxfp4_gfx950.backends.triton.package import Weight
from vllm_mxfp4_gfx950.backends.triton.routing import Beside, Routing, combine, route
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights
from vllm_mxfp4_gfx950.tiles import Ladder, TileConfig, release_of

STEP = 512
"""The deepest step. Split rows end at a multiple of it."""

PAIRED_ROWS = 8
"""Rows of a tile up to which their hi and lo together are the matrix unit's columns."""

ONE_LAUNCH = 64
"""Tokens up to which the routing is one launch: on this GPU one costs more than what it saves."""

WIDE = 2**31
"""Bytes or numbers of all rows from which on their offsets need more than 31 bits."""

BLOCK_GROUPS = 64
"""Groups of 32 values that a workgroup splits."""

FP32_TOKENS = 64
"""Tokens up to which what each expert adds is kept in fp32 until it is summed. Above, its bytes cost time."""

TILES: tuple[tuple[float, TileConfig, TileConfig], ...] = (
    (0.125, TileConfig(8, 64, 512, 1, 2, 2, 2), TileConfig(8, 64, 512, 2, 2, 2, 2)),
    (2, TileConfig(8, 128, 512, 1, 4, 2, 0), TileConfig(8, 64, 512, 1, 2, 2, 0)),
    (8, TileConfig(16, 128, 256, 1, 4, 2, 0), TileConfig(16, 64, 256, 1, 2, 2, 0)),
    (24, TileConfig(32, 128, 256, 1, 4, 2, 0), TileConfig(32, 128, 256, 1, 4, 2, 0)),
    (64, TileConfig(32, 256, 256, 1, 4, 2, 0), TileConfig(32, 256, 256, 1, 4, 2, 0)),
)
"""Tiles of w13 and w2 for up to so many rows an expert, which both cut alike. Chosen by the time that
`gfx950/time_model.py` predicts, one token having workgroups for every compute unit; not run on a gfx950."""

LARGE = {
    "3.6": ((192, TileConfig(64, 256, 256, 1, 4, 2, 2)), (math.inf, TileConfig(128, 256, 256, 1, 8, 2, 0)))
}
"""Of both for more rows, by Triton release: others spill registers of these, or need more LDS for two stages
of them than there is. There the last of TILES goes on."""

FILLED, FILLED_ROWS = 512, 32
"""Where w13 has so many tiles of 256 columns in all experts, two for each compute unit, the last of TILES
serves up to so many rows an expert, as LARGE is faster from there on."""


@dataclass(frozen=True)
class Split:
    """Rows of bf16 as two FP8.

    Args:
        codes: uint8[rows, 2, D], the e4m3 of hi, then of lo; D is a multiple of STEP, and what follows the
            last value is zero.
        scales: uint8[rows, 2, D / 32], E8M0.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def empty(cls, rows: int, depth: int, device: torch.device) -> Split:
        """Room for rows of so many values."""
        padded = triton.cdiv(depth, STEP) * STEP
        integers: Any = {"dtype": torch.uint8, "device": device}
        return cls(torch.empty(rows, 2, padded, **integers), torch.empty(rows, 2, padded // 32, **integers))

    def beside(self, x: torch.Tensor) -> Beside:
        """Splitting bf16[rows, K] into this, in the launch of their routing."""
        padded = self.scales.shape[2]
        workgroups = triton.cdiv(len(x) * padded, BLOCK_GROUPS)
        arguments = {"X": x, "Codes": self.codes, "Scales": self.scales, "stride_x": x.stride(0)}
        constants = {"GROUPS": x.shape[1] // 32, "PADDED": padded, "BLOCK_GROUPS": BLOCK_GROUPS}
        return Beside(kernels.few_and_split, kernels.place_and_split, workgroups, arguments | constants)


def split_in_torch(x: torch.Tensor) -> Split:
    """What the kernels make of bf16[rows, K], K a multiple of 32, in torch: their twin."""
    rows, depth = x.shape
    made = Split.empty(rows, depth, x.device)
    padded = torch.nn.functional.pad(x, (0, made.codes.shape[2] - depth))
    blocks = padded.float().view(rows, -1, 32)
    blocks = torch.where(blocks.isfinite(), blocks, torch.nan)
    exponent = (blocks.view(torch.int32) & 0x7FFFFFFF).amax(2) >> 23
    scale = (exponent - 7).clamp(min=4)
    scaled = (blocks.double() * torch.exp2(127.0 - scale.double())[:, :, None]).float()
    hi = scaled.to(torch.float8_e4m3fn)
    lo = ((scaled - hi.float()) * 16).to(torch.float8_e4m3fn)
    for index, (codes, less) in enumerate(((hi, 0), (lo, 4))):
        made.codes[:, index] = codes.view(torch.uint8).flatten(1)
        made.scales[:, index] = (scale - less).to(torch.uint8)
    return made


def join(parts: Split) -> torch.Tensor:
    """float64[rows, D], the values that split rows stand for."""
    codes = parts.codes.view(torch.float8_e4m3fn).double().reshape(*parts.scales.shape, 32)
    values: torch.Tensor = codes * torch.exp2(parts.scales.double() - 127)[..., None]
    return values.sum(1).flatten(1)


@dataclass(frozen=True)
class TwoFp8:
    """A layer as these kernels take it.

    Args:
        shape: the layer.
        w13, w2: its matmuls, the scales in the CDNA4 layout.
        tiles: w13's and w2's by number of tokens.
        order: as `routing.order_of` returns it.
    """

    shape: MoeShape
    w13: Weight
    w2: Weight
    tiles: tuple[Ladder[TileConfig], Ladder[TileConfig]]
    order: torch.Tensor | None

    def run(self, x: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        """bf16[T, H] and bf16 or fp32[T, global_experts] to bf16[T, H]."""
        x = x.contiguous()
        tokens, hidden = x.shape
        topk, rows = self.shape.topk, tokens * self.shape.topk
        w13_tile, w2_tile = (rungs.at(tokens) for rungs in self.tiles)
        given = Split.empty(tokens, hidden, x.device)
        routing = route(
            router_logits, topk, self.shape.experts, self.order, sizes=1, smallest=w13_tile.block_m,
            beside=given.beside(x), one_launch=ONE_LAUNCH,
        )  # fmt: skip
        between = Split.empty(rows, self.w13.bias.shape[1] // 2, x.device)
        self.multiply(w13_tile, given, routing, self.w13, between, gated=True)
        kept = torch.float32 if tokens <= FP32_TOKENS else torch.bfloat16
        parts = x.new_empty(w2_tile.split_k, rows, hidden, dtype=kept)
        self.multiply(w2_tile, between, routing, self.w2, parts, gated=False)
        return combine(parts, routing.scatter, topk, overlaps=False)

    def multiply(
        self,
        tile: TileConfig,
        x: Split,
        routing: Routing,
        weight: Any,
        y: Split | torch.Tensor,
        *,
        gated: bool,
    ) -> None:
        """One matmul over the tiles of a routing whose smallest are this tile's.

        Args:
            tile: how to cut it up.
            x: the tokens for w13, the rows for w2.
            routing: of the tokens.
            weight: w13 or w2.
            y: the rows for w13; float[split_k, T * topk, H] for w2.
            gated: whether it is w13, with the SwiGLU.
        """
        values, scales, bias = weight.values, weight.scales, weight.bias
        depth, columns = 2 * values.shape[2], bias.shape[1]
        if isinstance(y, Split):
            out, out_scales, strides = y.codes, y.scales, (y.codes.stride(1), 0)
            covered = 2 * y.codes.shape[2]
        else:
            out, out_scales, strides = y, None, (y.stride(1), y.stride(0))
            covered = columns
        kernels.two_fp8_matmul[(triton.cdiv(covered, tile.block_n), routing.schedule.shape[1], tile.split_k)](
            x.codes, x.scales, values, scales, bias, out, out_scales,
            routing.gather, routing.weights, routing.start, routing.schedule,
            depth // 2, columns, x.codes.stride(1),
            values.stride(0), values.stride(1), scales.stride(0), scales.stride(1),
            *strides, self.shape.alpha, self.shape.limit,
            TOPK=self.shape.topk, GATED=gated, PAIRED=tile.block_m <= PAIRED_ROWS, SPLIT_K=tile.split_k,
            BLOCK_T=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, STAGES=tile.num_stages,
            WIDE=max(x.codes.numel(), out.numel()) >= WIDE,
            EVEN_W=depth % tile.block_k == 0, EVEN_S=scales.shape[2] % tile.block_k == 0,
            num_warps=tile.num_warps, waves_per_eu=tile.waves_per_eu, matrix_instr_nonkdim=16,
        )  # fmt: skip


class TwoFp8Backend:
    """triton_kernels' layers, of which these kernels take every batch, until a self-check fails.

    Args:
        package: the backend of a generation.
    """

    def __init__(self, package: Any) -> None:
        self.package, self.KERNELS = package, package.KERNELS
        self.NAME = package.NAME.replace("triton", "two_fp8")

    def source(self) -> str:
        """Which package prepares the weights, and where it came from."""
        return str(self.package.source())

    def prepare(self, weights: MoeWeights, shape: MoeShape, tables: Path | None = None) -> Any:
        """The package's layer, served by these kernels whatever the user's table says."""
        layer = self.package.prepare(weights, shape, tables)
        return replace(layer, plans=Ladder((1,), ("two_fp8",)), pinned=True)


def for_layer(shape: MoeShape, w13: Weight, w2: Weight, order: torch.Tensor | None) -> TwoFp8:
    """A layer whose scales are in the CDNA4 layout, as these kernels take it."""
    return TwoFp8(shape, w13, w2, tiles_for(shape, release_of(triton.__version__)), order)


def tiles_for(shape: MoeShape, release: str) -> tuple[Ladder[TileConfig], Ladder[TileConfig]]:
    """The tiles of w13 and of w2 by number of tokens, when each expert is as likely as any other.

    Args:
        shape: the layer.
        release: Triton's, such as "3.6".
    """
    *rungs, (rows, w13_tile, w2_tile) = TILES
    if shape.experts * triton.cdiv(2 * shape.intermediate, 256) >= FILLED:
        rows = FILLED_ROWS
    large = LARGE.get(release, ((math.inf, w13_tile),))
    rungs += [(rows, w13_tile, w2_tile), *((most, tile, tile) for most, tile in large)]
    bounds = tuple(int(min(rows * shape.global_experts / shape.topk, 2**30)) for rows, *_ in rungs)
    w13, w2 = zip(*(pair for _, *pair in rungs), strict=True)
    return Ladder(bounds, w13).merged(), Ladder(bounds, w2).merged()
