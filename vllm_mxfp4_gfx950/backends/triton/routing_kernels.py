"""Triton kernels of `routing`.

A "pair" is a token and one of its slots, numbered token * TOPK + slot. A column is an expert, as `Order` has
them.
OVERLAP: see `await_previous`.
"""

import triton
import triton.language as tl


@triton.jit
def await_previous(OVERLAP: tl.constexpr):
    """Where a kernel of ours begins while the one before it still runs, on Hopper: wait for that one's end.

    The one behind is let in then, so that only one is ever ahead, and waits here in its turn.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit(do_not_specialize=["tokens", "stride_schedule"])
def few(
    Logits, Order, Gather, Scatter, Weights, Count, Starts, Schedule,
    tokens, experts, local, stride, stride_starts, stride_schedule,
    TOPK: tl.constexpr, SLOTS: tl.constexpr, SMALLEST: tl.constexpr, SIZES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr, BLOCK_TILES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Place all choices of a few tokens, by one workgroup: each is compared with each."""
    await_previous(OVERLAP)
    column = tl.arange(0, BLOCK_EXPERTS)
    token = tl.arange(0, BLOCK_TOKENS)
    key = _keys(Logits, Order, token, tokens, experts, stride, BLOCK_EXPERTS)
    chosen, weight = _choose(key, token, tokens, local, TOPK, SLOTS, BLOCK_EXPERTS)
    before = (chosen[:, None, :] < chosen[:, :, None]).to(tl.int32)
    P: tl.constexpr = BLOCK_TOKENS * SLOTS
    pair = (token[:, None] * TOPK + tl.sum(before, 2)).reshape(P)
    chosen = chosen.reshape(P)
    rank = chosen * P + pair
    row = tl.sum((rank[None, :] < rank[:, None]).to(tl.int32), 1)
    present = chosen < BLOCK_EXPERTS
    there = pair < tokens * TOPK
    if SLOTS > TOPK:
        there = there & (chosen < BLOCK_EXPERTS + 2 * TOPK)
    tl.store(Gather + row, tl.where(present, pair, -1), mask=there)
    tl.store(Scatter + pair, tl.where(present, row, -1), mask=there)
    tl.store(Weights + row, weight.reshape(P).to(Weights.dtype.element_ty), mask=present)

    same = chosen[:, None] == column[None, :]
    tl.store(Count + column, tl.sum(same.to(tl.int32), 0), mask=column < local)
    smaller = chosen[:, None] < column[None, :]
    tl.store(Starts + column, tl.sum(smaller.to(tl.int32), 0), mask=column < local)
    # The largest, as Triton 3.6 counts elements of a vector twice where threads share them.
    tl.store(Starts + local, tl.max(tl.where(present, row + 1, 0), 0))
    earlier = (chosen[None, :] == chosen[:, None]) & (pair[None, :] < pair[:, None])
    within = tl.sum(earlier.to(tl.int32), 1)
    slots = tl.arange(0, BLOCK_TILES)
    for size in tl.static_range(SIZES):
        begins = present & (within % (SMALLEST << size) == 0)
        first = Starts + (1 + size) * stride_starts
        tl.store(first + column, tl.sum((begins[:, None] & smaller).to(tl.int32), 0), mask=column < local)
        tile = tl.sum((begins[None, :] & (rank[None, :] < rank[:, None])).to(tl.int32), 1)
        used = tl.max(tl.where(begins, tile + 1, 0), 0)
        tl.store(first + local, used)
        entry = within // (SMALLEST << size) << 16 | chosen
        schedule = Schedule + size * stride_schedule
        tl.store(schedule + tile, entry, mask=begins)
        tl.store(schedule + slots, -1, mask=(slots >= used) & (slots < stride_schedule))


@triton.jit(do_not_specialize=["tokens"])
def count(
    Logits, Order, Counts, tokens, experts, local, stride,
    TOPK: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """How many of a block's tokens chose each column."""
    await_previous(OVERLAP)
    block = tl.program_id(0)
    chosen = _count(Logits, Order, block, tokens, experts, local, stride, TOPK, BLOCK_TOKENS, BLOCK_EXPERTS)
    tl.store(Counts + block * BLOCK_EXPERTS + tl.arange(0, BLOCK_EXPERTS), chosen)


@triton.jit(do_not_specialize=["blocks"])
def add_up(
    Counts, blocks,
    BLOCK_EXPERTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Put in the place of each block's counts the sum of those before it, and behind the last that of all."""
    await_previous(OVERLAP)
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros((BLOCK_COLUMNS,), tl.int32)
    for first in range(0, blocks, BLOCK_ROWS):
        block = first + tl.arange(0, BLOCK_ROWS)[:, None]
        at = Counts + block * BLOCK_EXPERTS + column[None, :]
        chosen = tl.load(at, mask=block < blocks, other=0)
        tl.store(at, total[None, :] + tl.cumsum(chosen, 0) - chosen, mask=block < blocks)
        total += tl.sum(chosen, 0)
    tl.store(Counts + blocks * BLOCK_EXPERTS + column, total)


@triton.jit(do_not_specialize=["tokens", "blocks", "stride_schedule"])
def place(
    Logits, Order, Counts, Gather, Scatter, Weights, Count, Starts, Schedule,
    tokens, experts, local, blocks, stride, stride_starts, stride_schedule,
    TOPK: tl.constexpr, SLOTS: tl.constexpr, SMALLEST: tl.constexpr, SIZES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr, FEW_BLOCKS: tl.constexpr, SUMMED: tl.constexpr,
    BLOCK_TILES: tl.constexpr, BLOCK_EMPTY: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Place a block's choices among all; behind the blocks, a workgroup for each size schedules its tiles.

    The first of these also writes how many rows each column has, and which is its first.
    """
    await_previous(OVERLAP)
    this = tl.program_id(0)
    if this < blocks:
        column = tl.arange(0, BLOCK_EXPERTS)
        token = this * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        key = _keys(Logits, Order, token, tokens, experts, stride, BLOCK_EXPERTS)
        parts, taken = _take(key, token, tokens, TOPK)
        taken = taken & (column < local)[None, :]
        present = taken.to(tl.int32)
        before, total = _counts(
            tl.sum(present, 0), Logits, Order, Counts, this, tokens, experts, local, blocks, stride,
            TOPK, BLOCK_TOKENS, BLOCK_EXPERTS, FEW_BLOCKS, SUMMED,
        )  # fmt: skip
        end = tl.cumsum(total, 0)
        row = (end - total + before)[None, :] + tl.cumsum(present, 0) - present
        pair = (token * TOPK)[:, None] + tl.cumsum(present, 1) - present
        weight = tl.exp(_logit(key) - _logit(tl.max(key, 1))[:, None]) / parts[:, None]
        tl.store(Gather + row, pair, mask=taken)
        tl.store(Scatter + pair, row, mask=taken)
        tl.store(Weights + row, weight.to(Weights.dtype.element_ty), mask=taken)
        if Order is not None:
            slot = tl.arange(0, SLOTS)[None, :]
            absent = (slot >= tl.sum(present, 1)[:, None]) & (slot < TOPK) & (token < tokens)[:, None]
            tl.store(Scatter + (token * TOPK)[:, None] + slot, -1, mask=absent)
            # Where there are more slots than choices, the next block writes some of these, too.
            empty = this * BLOCK_TOKENS * TOPK + tl.arange(0, BLOCK_TOKENS * SLOTS)
            tl.store(Gather + empty, -1, mask=(empty >= tl.max(end, 0)) & (empty < tokens * TOPK))
    else:
        _, total = _counts(
            tl.zeros((BLOCK_EXPERTS,), tl.int32), Logits, Order, Counts, blocks, tokens, experts, local,
            blocks, stride, TOPK, BLOCK_TOKENS, BLOCK_EXPERTS, FEW_BLOCKS, SUMMED,
        )  # fmt: skip
        if this == blocks:
            tl.store(Count + tl.arange(0, BLOCK_EXPERTS), total, mask=tl.arange(0, BLOCK_EXPERTS) < local)
            _starts(total, Starts, local, BLOCK_EXPERTS)
        size = this - blocks
        needed = (total + SMALLEST - 1) // SMALLEST + (1 << size) - 1 >> size
        _schedule(
            needed, Starts + (1 + size) * stride_starts, Schedule + size * stride_schedule,
            local, stride_schedule, BLOCK_EXPERTS, BLOCK_TILES, BLOCK_EMPTY,
        )  # fmt: skip


@triton.jit
def combine(
    Parts, Scatter, Out, stride_split, hidden, TOPK: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Add up the parts of a token's experts, in the order of its slots."""
    await_previous(OVERLAP)
    token = tl.program_id(0)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(TOPK):
        row = tl.load(Scatter + token * TOPK + slot)
        for split in tl.static_range(SPLITS):
            at = Parts + split * stride_split + row * hidden + h
            total += tl.load(at, mask=(h < hidden) & (row >= 0), other=0.0)
    tl.store(Out + token * hidden + h, total.to(tl.bfloat16), mask=h < hidden)


@triton.jit
def _counts(
    own, Logits, Order, Counts, this, tokens, experts, local, blocks, stride,
    TOPK: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr, FEW_BLOCKS: tl.constexpr,
    SUMMED: tl.constexpr,
):  # fmt: skip
    """How many chose each column in the blocks before this one, which has `own`, and in all."""
    column = tl.arange(0, BLOCK_EXPERTS)
    if SUMMED:
        before = tl.load(Counts + this * BLOCK_EXPERTS + column)
        total = tl.load(Counts + blocks * BLOCK_EXPERTS + column)
    elif Counts is not None:
        block = tl.arange(0, FEW_BLOCKS)[:, None]
        counts = tl.load(Counts + block * BLOCK_EXPERTS + column[None, :], mask=block < blocks, other=0)
        before = tl.sum(tl.where(block < this, counts, 0), 0)
        total = tl.sum(counts, 0)
    else:
        before = tl.zeros((BLOCK_EXPERTS,), tl.int32)
        total = own
        for block in range(blocks):
            if block != this:
                chosen = _count(
                    Logits, Order, block, tokens, experts, local, stride, TOPK, BLOCK_TOKENS, BLOCK_EXPERTS
                )
                total += chosen
                before += tl.where(block < this, chosen, 0)
    return before, total


@triton.jit
def _starts(count, Starts, local, BLOCK_EXPERTS: tl.constexpr):
    """Write the sum of the counts before each column, and behind the last that of all; both are returned."""
    column = tl.arange(0, BLOCK_EXPERTS)
    end = tl.cumsum(count, 0)
    used = tl.max(end, 0)
    tl.store(Starts + column, end - count, mask=column < local)
    tl.store(Starts + local, used)
    return end - count, used


@triton.jit
def _schedule(
    needed, Starts, Schedule, local, tiles,
    BLOCK_EXPERTS: tl.constexpr, BLOCK_TILES: tl.constexpr, BLOCK_EMPTY: tl.constexpr,
):  # fmt: skip
    """Write all tiles of one size, of which each column needs so many."""
    column = tl.arange(0, BLOCK_EXPERTS)[:, None]
    start, used = _starts(needed, Starts, local, BLOCK_EXPERTS)
    for first in range(0, tl.max(needed, 0), BLOCK_TILES):
        tile = first + tl.arange(0, BLOCK_TILES)[None, :]
        tl.store(Schedule + start[:, None] + tile, tile << 16 | column, mask=tile < needed[:, None])
    for first in range(used, tiles, BLOCK_EMPTY):
        empty = first + tl.arange(0, BLOCK_EMPTY)
        tl.store(Schedule + empty, -1, mask=empty < tiles)


@triton.jit
def _count(
    Logits, Order, block, tokens, experts, local, stride,
    TOPK: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    """int32[BLOCK_EXPERTS], how many of a block's tokens chose each column of this rank."""
    token = block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    key = _keys(Logits, Order, token, tokens, experts, stride, BLOCK_EXPERTS)
    _, taken = _take(key, token, tokens, TOPK)
    return tl.sum((taken & (tl.arange(0, BLOCK_EXPERTS) < local)[None, :]).to(tl.int32), 0)


@triton.jit
def _keys(Logits, Order, token, tokens, experts, stride, BLOCK_EXPERTS: tl.constexpr):
    """Integers [tokens, columns] in the order of the logits, and among equals of falling experts.

    A bf16 leaves 16 bits of 32 for the expert, an fp32 takes 64.
    """
    column = tl.arange(0, BLOCK_EXPERTS)
    expert = column
    if Order is not None:
        expert = tl.load(Order + column, mask=column < experts, other=0)
    there = (token < tokens)[:, None] & (column < experts)[None, :]
    at = Logits + token[:, None] * stride + expert[None, :]
    # Adding zero makes -0.0 the 0.0 that it is equal to. All NaN are equal, too, and above all others.
    logit = tl.load(at, mask=there, other=0.0).to(tl.float32) + 0.0
    bits = tl.where(logit <= float("inf"), logit, float("nan")).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    rank = (BLOCK_EXPERTS - expert)[None, :]
    if Logits.dtype.element_ty == tl.float32:
        key = (bits.to(tl.int64) << 32) | rank
    else:
        tl.static_assert(Logits.dtype.element_ty == tl.bfloat16)
        key = (bits & -65536) | rank
    return tl.where(there, key, _lowest(key))


@triton.jit
def _lowest(key):
    """A key below those of all logits."""
    return -(2**63) if key.dtype == tl.int64 else -(2**31)


@triton.jit
def _logit(key):
    """The logit that a key was made of."""
    if key.dtype == tl.int64:
        bits = (key >> 32).to(tl.int32)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    else:
        bits = (key ^ ((key >> 31) & 0x7FFFFFFF)) & -65536
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _choose(
    key, token, tokens, local, TOPK: tl.constexpr, SLOTS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr
):  # fmt: skip
    """Each token's columns in its slots, the best first, and their weights; [tokens, SLOTS].

    Where a slot has none of this rank, it has a number behind all columns.
    """
    best = _logit(tl.max(key, 1))
    total = tl.zeros_like(best)
    slot = tl.arange(0, SLOTS)[None, :]
    chosen = tl.zeros((token.shape[0], SLOTS), tl.int32)
    weight = tl.zeros((token.shape[0], SLOTS), tl.float32)
    column = tl.arange(0, BLOCK_EXPERTS)
    for each in tl.static_range(TOPK):
        most = tl.max(key, 1)
        taken = key == most[:, None]
        key = tl.where(taken, _lowest(key), key)
        part = tl.exp(_logit(most) - best)
        total += part
        at = tl.sum(tl.where(taken, column[None, :], 0), 1)
        # Choices of other ranks' experts come behind, then those of no token; no two of a token are equal.
        at = tl.where(at < local, at, BLOCK_EXPERTS + each)
        at = tl.where(token < tokens, at, BLOCK_EXPERTS + TOPK + each)
        chosen = tl.where(slot == each, at[:, None], chosen)
        weight = tl.where(slot == each, part[:, None], weight)
    if SLOTS > TOPK:
        chosen = tl.where(slot < TOPK, chosen, BLOCK_EXPERTS + 2 * TOPK)
    return chosen, weight / total[:, None]


@triton.jit
def _take(key, token, tokens, TOPK: tl.constexpr):
    """The sum over a token's choices that its weights are parts of, and which columns they are."""
    best = _logit(tl.max(key, 1))
    total = tl.zeros_like(best)
    left = key
    for _ in tl.static_range(TOPK):
        most = tl.max(left, 1)
        left = tl.where(left == most[:, None], _lowest(key), left)
        total += tl.exp(_logit(most) - best)
    return total, (left != key) & (token < tokens)[:, None]
