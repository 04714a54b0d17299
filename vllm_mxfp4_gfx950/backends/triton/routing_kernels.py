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


@triton.jit(do_not_specialize=["tokens", "groups", "members"])
def count(
    Logits, Order, Counts, tokens, experts, local, groups, members, stride,
    TOPK: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """How many of a group's tokens chose each column, and of its blocks before each of them."""
    await_previous(OVERLAP)
    column = tl.arange(0, BLOCK_EXPERTS)
    group = tl.program_id(0)
    total = tl.zeros((BLOCK_EXPERTS,), tl.int32)
    for block in range(group * members, group * members + members):
        tl.store(Counts + (groups + block) * BLOCK_EXPERTS + column, total)
        total += _count(
            Logits, Order, block, tokens, experts, local, stride, TOPK, BLOCK_TOKENS, BLOCK_EXPERTS
        )
    tl.store(Counts + group * BLOCK_EXPERTS + column, total)


@triton.jit(do_not_specialize=["tokens", "blocks", "groups", "members", "stride_schedule"])
def place(
    Logits, Order, Counts, Gather, Scatter, Weights, Count, Starts, Schedule,
    tokens, experts, local, blocks, groups, members, stride, stride_starts, stride_schedule,
    TOPK: tl.constexpr, SLOTS: tl.constexpr, SMALLEST: tl.constexpr, SIZES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr, BLOCK_COUNTS: tl.constexpr,
    BLOCK_SCHEDULE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Place a block's choices among all, and write the block's share of the schedules."""
    await_previous(OVERLAP)
    this = tl.program_id(0)
    column = tl.arange(0, BLOCK_EXPERTS)
    token = this * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    key = _keys(Logits, Order, token, tokens, experts, stride, BLOCK_EXPERTS)
    parts, taken = _take(key, token, tokens, TOPK)
    taken = taken & (column < local)[None, :]
    present = taken.to(tl.int32)
    before = tl.zeros((BLOCK_EXPERTS,), tl.int32)
    if Counts is None:
        total = tl.sum(present, 0)
        for other in range(1, blocks):
            block = (this + other) % blocks
            chosen = _count(
                Logits, Order, block, tokens, experts, local, stride, TOPK, BLOCK_TOKENS, BLOCK_EXPERTS
            )
            total += chosen
            before += tl.where(block < this, chosen, 0)
    else:
        total = tl.zeros((BLOCK_EXPERTS,), tl.int32)
        before += tl.load(Counts + (groups + this) * BLOCK_EXPERTS + column)
        for first in range(0, groups, BLOCK_COUNTS):
            group = first + tl.arange(0, BLOCK_COUNTS)[:, None]
            chosen = tl.load(Counts + group * BLOCK_EXPERTS + column[None, :], mask=group < groups, other=0)
            total += tl.sum(chosen, 0)
            before += tl.sum(tl.where(group < this // members, chosen, 0), 0)
    end = tl.cumsum(total, 0)
    begin, rows = end - total, tl.max(end, 0)

    row = (begin + before)[None, :] + tl.cumsum(present, 0) - present
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
        tl.store(Gather + empty, -1, mask=(empty >= rows) & (empty < tokens * TOPK))

    if this == 0:
        tl.store(Count + column, total, mask=column < local)
        tl.store(Starts + column, begin, mask=column < local)
        tl.store(Starts + local, rows)
    for size in tl.static_range(SIZES):
        _schedule(
            total, Starts + (1 + size) * stride_starts, Schedule + size * stride_schedule,
            this, local, blocks, stride_schedule, SMALLEST << size, BLOCK_EXPERTS, BLOCK_SCHEDULE,
        )  # fmt: skip


@triton.jit
def _schedule(
    total, Starts, Schedule, this, local, blocks, tiles,
    ROWS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr, BLOCK_SCHEDULE: tl.constexpr,
):  # fmt: skip
    """Write a block's share of the tiles of so many rows, when each column has `total` rows in all."""
    column = tl.arange(0, BLOCK_EXPERTS)
    needed = (total + ROWS - 1) // ROWS
    end = tl.cumsum(needed, 0)
    used = tl.max(end, 0)
    if this == 0:
        tl.store(Starts + column, end - needed, mask=column < local)
        tl.store(Starts + local, used)
    # The tile of an expert is the first to end behind it.
    for first in range(this * BLOCK_SCHEDULE, tiles, blocks * BLOCK_SCHEDULE):
        tile = first + tl.arange(0, BLOCK_SCHEDULE)
        passed = end[None, :] <= tile[:, None]
        expert = tl.sum(passed.to(tl.int32), 1)
        behind = tile - tl.max(tl.where(passed, end[None, :], 0), 1)
        tl.store(Schedule + tile, tl.where(tile < used, behind << 16 | expert, -1), mask=tile < tiles)


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
