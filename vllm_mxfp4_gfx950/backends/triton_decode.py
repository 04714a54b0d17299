"""Kernels of our own for few tokens: routing, w13 with SwiGLU, w2, and the sum over a token's experts.

matmul_ogs gives each expert a tile of many rows. Where an expert has a handful, reading its weights is the
work, so these kernels cut the weights finely instead and put them on the matrix unit's long side. They read
the layouts that `prepare` has made for matmul_ogs. Nothing is added up in an order that varies.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import triton

from vllm_mxfp4_gfx950.backends import decode_kernels as kernels
from vllm_mxfp4_gfx950.backends.triton_package import CDNA4_SCALE_LAYOUTS, hopper_registers
from vllm_mxfp4_gfx950.moe import MoeShape
from vllm_mxfp4_gfx950.tuning import Ladder, TileConfig, gemms, ladder, releases

# Loggers below `vllm` print where vLLM's own do.
logger = logging.getLogger("vllm.mxfp4_triton.decode")

MAX_SCALE = 128
"""The largest E8M0 scale, 2^1: on Hopper a code is widened to itself times 2^-126, and the rest of its scale
must be a bf16. GPT-OSS's largest is far below."""

HOPPER_WARPS = 8
"""What Hopper's scale layout is laid out for."""

ROUTE_TOKENS = {"hopper": 64, "cdna4": 16}
"""Tokens that the routing kernel looks at together; with more, CDNA spills scalar registers."""

COMBINE_BLOCK = 512
"""Columns that a workgroup sums."""

Parts: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""A matmul's values and scales, uint8 as the layout has them with the depth last, and bias: fp32[E, N]."""


@dataclass(frozen=True)
class Decode:
    """What the kernels need beside a layer's weights.

    Args:
        layout: "hopper" or "cdna4".
        shape: the layer.
        tiles: w13's and w2's by number of tokens.
        expert_map: as in MoeWeights.
    """

    layout: str
    shape: MoeShape
    tiles: tuple[Ladder[TileConfig], Ladder[TileConfig]]
    expert_map: torch.Tensor | None

    def twists(self, tile: TileConfig) -> bool:
        """Whether the columns of a matmul's input are in the order of `decode_kernels.twist`."""
        return self.layout == "hopper" and (tile.block_m < 16 or tile.num_warps < 4)

    def launch(self, num_warps: int) -> dict[str, Any]:
        """Options of every launch: on Hopper a kernel starts while the one before it ends."""
        return {"num_warps": num_warps} | ({"launch_pdl": True} if self.layout == "hopper" else {})

    def serves(self, router_logits: torch.Tensor) -> bool:
        """Whether the table has tiles for so many tokens; their logits must be bf16."""
        return router_logits.dtype == torch.bfloat16 and 0 < len(router_logits) <= self.tiles[0].bounds[-1]


def decode_for(
    arch: str,
    shape: MoeShape,
    layouts: tuple[object, object],
    scales: tuple[torch.Tensor, torch.Tensor],
    expert_map: torch.Tensor | None,
    tables: Path | None = None,
) -> Decode | None:
    """The decode path for a prepared layer; None where the table has no tiles, or the kernels cannot read it.

    Args:
        arch: "sm90" or "gfx950".
        shape: the layer.
        layouts: triton_kernels' layouts of the values and of the scales.
        scales: uint8, w13's and w2's in that layout.
        expert_map: as in MoeWeights.
        tables: the directory of the user's tile tables.
    """
    tiles = [ladder(arch, "decode", triton.__version__, gemm, tables) for gemm in gemms(shape)]
    if tiles[0] is None or tiles[1] is None:
        known = releases(arch, "decode")
        if known:
            # From 3.8 on, the same tiles get wgmma instead of mma, and spill.
            timed = f"their tiles are those of triton {', '.join(known)}, and this is {triton.__version__}"
            _log_once(f"the decode kernels do not serve: {timed}")
        return None
    if tiles[0].bounds[-1] == 0:
        _log_once("the decode kernels do not serve: by the table they are slower at every number of tokens")
        return None
    names = tuple(type(each).__name__ for each in layouts)
    largest = max(int(each.max()) for each in scales)
    if names == ("HopperMXValueLayout", "HopperMXScaleLayout"):
        readable = getattr(layouts[1], "num_warps", None) == HOPPER_WARPS and largest <= MAX_SCALE
        layout = "hopper"
    else:
        readable, layout = names[1] in CDNA4_SCALE_LAYOUTS, "cdna4"
    if not readable:
        _log_once(f"the decode kernels do not serve: {' and '.join(names)}, largest scale {largest}")
        return None
    _log_once(f"batches of up to {tiles[0].bounds[-1]} tokens run through the decode kernels")
    return Decode(layout, shape, (tiles[0], tiles[1]), expert_map)


@functools.cache
def _log_once(text: str) -> None:
    logger.info(text)


@dataclass(frozen=True)
class Routing:
    """A token's experts, and the tokens of each expert.

    Args:
        experts: int32[T, topk], the best first; this rank's numbers, -1 for those of other ranks.
        weights: bf16[T, topk], of each in its token's sum.
        tiles: int32[tiles, 2 + rows]: an expert, its number of rows from here on, and the pair of each row:
            token * topk + slot. Sorted by the model's number of the expert, then by token. An expert of -1 is
            no tile.
        x: bf16[T, H], the tokens with their columns in the order of `decode_kernels.twist`, if asked for.
    """

    experts: torch.Tensor
    weights: torch.Tensor
    tiles: torch.Tensor
    x: torch.Tensor | None


def run(
    decode: Decode,
    x: torch.Tensor,
    router_logits: torch.Tensor,
    w13: Parts,
    w2: Parts,
) -> torch.Tensor:
    """One layer.

    Args:
        decode: what stays the same from call to call.
        x: bf16[T, H].
        router_logits: bf16[T, global_experts].
        w13, w2: see Parts.

    Returns:
        bf16[T, H]
    """
    x = x.contiguous()
    tokens, hidden = x.shape
    topk = decode.shape.topk
    up, down = (ladder.at(tokens) for ladder in decode.tiles)
    routing = route(decode, router_logits, up.block_m, x if decode.twists(up) else None)
    rows = x.new_empty(tokens * topk, w13[2].shape[1] // 2)
    first = x if routing.x is None else routing.x
    multiply(decode, up, first, routing, w13, rows, gated=True, twisted=decode.twists(down))
    parts = x.new_empty(down.split_k, tokens * topk, hidden, dtype=torch.float32)
    multiply(decode, down, rows, routing, w2, parts, gated=False, twisted=False)
    out = torch.empty_like(x)
    kernels.combine[(tokens, triton.cdiv(hidden, COMBINE_BLOCK))](
        parts, routing.experts, out, tokens * topk * hidden, hidden, TOPK=topk, SPLITS=down.split_k,
        BLOCK=COMBINE_BLOCK, OVERLAP=decode.layout == "hopper", **decode.launch(4),
    )  # fmt: skip
    return out


def route(
    decode: Decode, router_logits: torch.Tensor, block_t: int, x: torch.Tensor | None = None
) -> Routing:
    """Choose experts, weigh them, and sort the choices by expert.

    Args:
        decode: the layer.
        router_logits: bf16[T, global_experts].
        block_t: rows of a tile.
        x: bf16[T, H], to be twisted by the way.
    """
    tokens, global_experts = router_logits.shape
    topk, experts = decode.shape.topk, decode.shape.experts
    pairs = tokens * topk
    tiles = router_logits.new_empty(min(pairs, experts + pairs // block_t), 2 + block_t, dtype=torch.int32)
    chosen = router_logits.new_empty(tokens, topk, dtype=torch.int32)
    weights = router_logits.new_empty(tokens, topk)
    # Triton 3.6 trips over a scan along an axis of one.
    block_tokens = min(ROUTE_TOKENS[decode.layout], max(2, triton.next_power_of_2(tokens)))
    twisted = None if x is None else torch.empty_like(x)
    kernels.route[(1 if x is None else 1 + tokens,)](
        router_logits, decode.expert_map, chosen, weights, tiles, x, twisted,
        tokens, global_experts, len(tiles), router_logits.stride(0), decode.shape.hidden,
        TOPK=topk, BLOCK_TOKENS=block_tokens, BLOCK_EXPERTS=triton.next_power_of_2(global_experts),
        BLOCK_TILES=triton.next_power_of_2(len(tiles)), BLOCK_T=block_t,
        BLOCK_H=triton.next_power_of_2(decode.shape.hidden), CHUNKS=triton.cdiv(tokens, block_tokens),
        OVERLAP=decode.layout == "hopper", **decode.launch(min(16, block_tokens)),
    )  # fmt: skip
    return Routing(chosen, weights, tiles, twisted)


def multiply(
    decode: Decode,
    tile: TileConfig,
    x: torch.Tensor,
    routing: Routing,
    weights: Parts,
    y: torch.Tensor,
    *,
    gated: bool,
    twisted: bool,
) -> None:
    """One matmul over the tiles of a routing that was made for this tile's block_m.

    Args:
        decode: the layer.
        tile: how to cut it up.
        x: bf16[T, H], the tokens, for w13; bf16[T * topk, I], a row of each pair, for w2.
        routing: what `route` returned.
        weights: as in `run`.
        y: bf16[T * topk, I] for w13, fp32[split_k, T * topk, H] for w2.
        gated: whether it is w13, with the SwiGLU.
        twisted: whether to write columns in the order of `decode_kernels.twist`.
    """
    values, scales, bias = weights
    options = decode.launch(tile.num_warps) | {"num_stages": tile.num_stages}
    if decode.layout == "hopper":
        values, scales = values.view(torch.int32), scales.view(torch.int16)
        options |= {"maxnreg": hopper_registers(tile)}
    else:
        options |= {"waves_per_eu": tile.waves_per_eu, "matrix_instr_nonkdim": 16}
    columns = bias.shape[1]
    kernels.mxfp4_matmul[(triton.cdiv(columns, tile.block_n), len(routing.tiles), tile.split_k)](
        x, values, scales, bias, y, routing.tiles, routing.weights,
        x.shape[1], columns, x.stride(0),
        values.stride(0), values.stride(1), scales.stride(0), scales.stride(1),
        y.stride(-2), y.stride(0), decode.shape.alpha, decode.shape.limit,
        TOPK=decode.shape.topk, GATED=gated, LAYOUT=decode.layout, TWISTED_X=decode.twists(tile),
        TWISTED_Y=twisted, OVERLAP=decode.layout == "hopper", SPLIT_K=tile.split_k,
        BLOCK_T=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, **options,
    )  # fmt: skip
