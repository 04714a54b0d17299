"""From the router's logits to all that triton_kernels' matmuls and our own need, in one launch to three.

And back from their rows to the tokens, in one. The package's own routing takes four launches, and about ten
where a rank has some of the experts. What all of its generations want to know is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from vllm_mxfp4_gfx950.backends import reference
from vllm_mxfp4_gfx950.backends.triton import routing_kernels as kernels
from vllm_mxfp4_gfx950.backends.triton.package import launch_options

BLOCK_TOKENS = 16
"""Tokens that a workgroup which shares the work takes at once: a block. With 32, a wave of gfx950's `place`
executes 1.2 times as many instructions."""

MAX_WARPS = 8
"""Warps of a workgroup; one for each token up to there. With 4, a wave of gfx950's executes 1.2 to 1.5
times as many instructions; an H200 is about 2 us faster then, with 128 experts and more than 32 tokens."""

MIN_COLUMNS = 32
"""Experts, made up ones included. With 8, Triton 3.5 and 3.6 fail on fp32's `place` for a topk of 6."""

FEW = 8
"""Tokens up to which one workgroup does it all, from bf16 logits, in half as many instructions of a wave as
sharing takes. On gfx950 that is so at 16, too, with 26 scalar registers spilled, and at 32 no more; neither
was timed. For a topk of 1, Triton 3.5 and 3.6 do not compile it for two tokens."""

MIN_PAIRS = 4
"""Choices of that workgroup, made up ones included. With fewer, Triton 3.5 spills two scalar registers."""

ONE_LAUNCH = 32
"""Tokens up to which each workgroup counts all choices itself, instead of a launch before it, unless told."""

FEW_BLOCKS = 32
"""Blocks, a power of two, up to which each workgroup adds up their counts itself, instead of a launch of its
own."""

BLOCK_SUMS = (512, 2)
"""Blocks and columns whose counts are added up at once, in their place: no fewer than a workgroup has
threads, so that none is read by two of them."""

BLOCK_TILES = 16
"""Tiles of each expert that are scheduled together."""

BLOCK_EMPTY = 512
"""Entries behind the last tile that are written together."""

COMBINE_BLOCK = 512
"""Columns that a workgroup sums."""


@dataclass(frozen=True)
class Routing:
    """The choices of all tokens that live on this rank, sorted by expert, then by token: the rows.

    A pair is a token and one of its slots: token * topk + slot. A token's slots are in the order of their
    experts, those of other ranks behind them. Three tokens that choose 2 of 3 experts each, of which this
    rank has 0 and 1, E = 2; and tiles of 2 rows:

        token    chooses (best first)    pair: expert
        0        1, 0                    0: 0    1: 1
        1        2, 1                    2: 1    3: 2, not here
        2        1, 0                    4: 0    5: 1

        expert         0       1
        row            0   1   2   3   4
        gather         0   4   1   2   5  -1
        pair           0   1   2   3   4   5
        scatter        0   2   3  -1   1   4
        count          2       3
        start          0       2              5
        tile           0       1       2
        block_start    0       1              3
        schedule       0|0     0|1     1|1   -1    which of its expert's tiles | expert

    Args:
        gather: int32[T * topk], the pair of each row; -1 behind the last row.
        scatter: int32[T * topk], the row of each pair; -1 where its expert is on another rank.
        weights: [T * topk] in the logits' dtype, of each row in its token's sum; anything behind the last.
        count: int32[E], rows of each expert.
        start: int32[E + 1], the first of them.
        block_start: int32[sizes, E + 1], the first of them counted in tiles of each size.
        schedule: int32[sizes, tiles], what each tile of a size computes: the expert, and in the upper half
            of the bits which of its tiles it is; -1 behind the last tile.
    """

    gather: torch.Tensor
    scatter: torch.Tensor
    weights: torch.Tensor
    count: torch.Tensor
    start: torch.Tensor
    block_start: torch.Tensor
    schedule: torch.Tensor


@dataclass(frozen=True)
class Beside:
    """Other work that needs no routing, done in its last launch.

    Args:
        few, place: kernels that do what the routing's of that name do in as many workgroups as those have,
            and the other work in those behind them.
        workgroups: how many the other work has.
        arguments: of it, by name.
    """

    few: Any
    place: Any
    workgroups: int
    arguments: dict[str, Any]


def order_of(expert_map: torch.Tensor | None) -> torch.Tensor | None:
    """int32[global_experts], the model's experts with this rank's first, in its order; None for all.

    Args:
        expert_map: as in MoeWeights.
    """
    if expert_map is None:
        return None
    last = torch.where(expert_map < 0, expert_map.numel(), expert_map)
    return last.argsort(stable=True).int()


def route(
    router_logits: torch.Tensor,
    topk: int,
    experts: int,
    order: torch.Tensor | None,
    sizes: int,
    *,
    smallest: int = 16,
    overlaps: bool = False,
    beside: Beside | None = None,
    one_launch: int = ONE_LAUNCH,
) -> Routing:
    """Choose experts among all of the model's, weigh them, and sort the choices that live on this rank.

    Args:
        router_logits: bf16 or fp32[T, global_experts], T > 0.
        topk: experts per token.
        experts: of this rank, E.
        order: what `order_of` returned.
        sizes: how many sizes of tiles to schedule, each of twice as many rows as the one before.
        smallest: rows of the first.
        overlaps: as in `package.launch_options`.
        beside: other work to do in the last launch.
        one_launch: tokens up to which each workgroup counts all choices itself.
    """
    tokens, global_experts = router_logits.shape
    pairs = tokens * topk
    tiles = most_tiles(pairs, experts, smallest)
    integers: Any = {"dtype": torch.int32, "device": router_logits.device}
    # Triton compiles a kernel anew for a pointer that is not a multiple of 16 bytes: each row begins on one.
    starts = torch.empty(1 + sizes, aligned(experts + 1), **integers)
    routing = Routing(
        gather=torch.empty(pairs, **integers),
        scatter=torch.empty(pairs, **integers),
        weights=router_logits.new_empty(pairs),
        count=torch.empty(experts, **integers),
        start=starts[0, : experts + 1],
        block_start=starts[1:, : experts + 1],
        schedule=torch.empty(sizes, aligned(tiles), **integers)[:, :tiles],
    )
    block_experts = max(MIN_COLUMNS, triton.next_power_of_2(global_experts))
    into = routing.gather, routing.scatter, routing.weights, routing.count, starts, routing.schedule
    slots = triton.next_power_of_2(topk)
    constants: Any = {"TOPK": topk, "SLOTS": slots, "SMALLEST": smallest, "SIZES": sizes}
    constants |= {"BLOCK_EXPERTS": block_experts} | (beside.arguments if beside else {})
    strides = router_logits.stride(0), starts.stride(0), routing.schedule.stride(0)
    if tokens <= FEW and topk > 1 and router_logits.dtype == torch.bfloat16:
        block_tokens = max(MIN_PAIRS // slots, triton.next_power_of_2(tokens))
        few, more = (beside.few, beside.workgroups) if beside else (kernels.few, 0)
        few[(1 + more,)](
            router_logits, order, *into, tokens, global_experts, experts, *strides,
            BLOCK_TOKENS=block_tokens, BLOCK_TILES=triton.next_power_of_2(strides[2]),
            **constants, **launch_options(min(MAX_WARPS, block_tokens), overlaps),
        )  # fmt: skip
        return routing
    blocks = triton.cdiv(tokens, BLOCK_TOKENS)
    launch = launch_options(MAX_WARPS, overlaps)
    options = launch | {"BLOCK_TOKENS": BLOCK_TOKENS}
    counts, summed = None, False
    if tokens > one_launch:
        counts = torch.empty(blocks + 1, block_experts, **integers)
        kernels.count[(blocks,)](
            router_logits, order, counts, tokens, global_experts, experts, strides[0],
            TOPK=topk, BLOCK_EXPERTS=block_experts, **options,
        )  # fmt: skip
        summed = blocks > FEW_BLOCKS
    if summed:
        rows, columns = BLOCK_SUMS
        kernels.add_up[(block_experts // columns,)](
            counts, blocks, BLOCK_EXPERTS=block_experts, BLOCK_ROWS=rows, BLOCK_COLUMNS=columns, **launch,
        )  # fmt: skip
    place, more = (beside.place, beside.workgroups) if beside else (kernels.place, 0)
    place[(blocks + sizes + more,)](
        router_logits, order, counts, *into, tokens, global_experts, experts, blocks, *strides,
        FEW_BLOCKS=FEW_BLOCKS, SUMMED=summed, BLOCK_TILES=BLOCK_TILES, BLOCK_EMPTY=BLOCK_EMPTY, **constants,
        **options,
    )  # fmt: skip
    return routing


def combine(parts: torch.Tensor, scatter: torch.Tensor, topk: int, *, overlaps: bool) -> torch.Tensor:
    """Add up the parts of each token's experts, in the order of its slots.

    Args:
        parts: float[splits, T * topk, H], contiguous, in the order of the rows.
        scatter: as in Routing.
        topk: experts per token.
        overlaps: as in `package.launch_options`.

    Returns:
        bf16[T, H]
    """
    splits, rows, hidden = parts.shape
    out = parts.new_empty(rows // topk, hidden, dtype=torch.bfloat16)
    kernels.combine[(len(out), triton.cdiv(hidden, COMBINE_BLOCK))](
        parts, scatter, out, rows * hidden, hidden, TOPK=topk, SPLITS=splits, BLOCK=COMBINE_BLOCK,
        **launch_options(4, overlaps),
    )  # fmt: skip
    return out


def route_in_torch(
    router_logits: torch.Tensor,
    topk: int,
    experts: int,
    order: torch.Tensor | None,
    sizes: int,
    *,
    smallest: int = 16,
) -> Routing:
    """What `route` gives, in torch: its twin, to read and to compare with."""
    ids, weights = reference.route(router_logits, topk)
    # A column is an expert in `order`: this rank's come first, in their own numbers.
    columns = ids if order is None else order.argsort()[ids]
    columns, slots = columns.clamp(max=experts).sort(dim=1, stable=True)
    column, pair = columns.flatten().sort(stable=True)
    count = column.bincount(minlength=experts + 1)[:experts]
    rows = int(count.sum())
    gather, scatter = torch.full_like(pair, -1), torch.full_like(pair, -1)
    gather[:rows] = pair[:rows]
    scatter[pair[:rows]] = torch.arange(rows, device=pair.device)
    block_start, schedule = [], []
    for size in range(sizes):
        tiles = -(-count // (smallest << size))
        first = _sums(tiles)
        expert = torch.arange(experts, device=tiles.device).repeat_interleave(tiles)
        entries = torch.full((most_tiles(len(pair), experts, smallest),), -1, device=tiles.device)
        entries[: len(expert)] = torch.arange(len(expert), device=tiles.device) - first[expert] << 16 | expert
        block_start.append(first)
        schedule.append(entries)
    return Routing(
        gather=gather.int(),
        scatter=scatter.int(),
        weights=weights.gather(1, slots).flatten()[pair],
        count=count.int(),
        start=_sums(count).int(),
        block_start=torch.stack(block_start).int(),
        schedule=torch.stack(schedule).int(),
    )


def _sums(count: torch.Tensor) -> torch.Tensor:
    """The sum of those before each, and of all."""
    return torch.nn.functional.pad(count.cumsum(0), (1, 0))


def most_tiles(pairs: int, experts: int, smallest: int) -> int:
    """How many tiles of the smallest size there can be: an expert's last may have a single row."""
    return pairs if pairs <= experts else experts + (pairs - experts) // smallest


def aligned(count: int) -> int:
    """So many integers, or a few more, that they end at a multiple of 16 bytes."""
    return count + -count % 4
