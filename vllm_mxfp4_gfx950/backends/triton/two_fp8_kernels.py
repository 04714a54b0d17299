"""Triton kernels of `two_fp8`: the split, beside the routing, and the matmuls.

A bf16 has 8 significant bits, an e4m3 has 4. With a power of two for 32 values along the depth,

    x = (hi + lo / 16) * 2^s

hi and lo in e4m3, is exact down to 2^-13 of a block's largest value, and within 2^-21 of it below. A row of
`Codes` is the hi of all values, then the lo of all; a row of `Scales` likewise, that of lo being 4 less,
which is the 16. Both end with zeros at a multiple of the deepest step, so that no load of them is masked:

    Codes    uint8[rows, 2, D]
    Scales   uint8[rows, 2, D / 32]

The weights' values lie as in the checkpoint. Their scales are in the CDNA 4 layout: those of 32 rows by 8
blocks of the depth are 256 bytes, one of each lane's four dwords' bytes:

    byte = 64 * (4 * (block // 8) + block % 4) + 4 * (row % 16) + 2 * (block // 4 % 2) + row // 16 % 2

           | block 0        | block 1        | block 2        | block 3
    -------+----------------+----------------+----------------+----------------
    row  0 |   0  (4:   2)  |  64  (5:  66)  | 128  (6: 130)  | 192  (7: 194)
    row  1 |   4  (4:   6)  |  68  (5:  70)  | 132  (6: 134)  | 196  (7: 198)
    ...
    row 16 |   1  (4:   3)  |  65  (5:  67)  | 129  (6: 131)  | 193  (7: 195)

In brackets, blocks 4 to 7 of the same row. The next 8 blocks follow 256 bytes behind; 32 rows more are the
next line.

Source: triton_kernels, tensor_details/layout_details/cdna4_scale.py, in vLLM 0.33.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.hip import libdevice

from vllm_mxfp4_gfx950.backends.triton import routing_kernels


def scales_in_torch(scales):
    """The kernel's reading of the scales, in torch: uint8[E, N / 32, K] to uint8[E, N, K / 32]."""
    lines, depth = scales.shape[1:]
    row, block = torch.meshgrid(torch.arange(lines * 32), torch.arange(depth // 32), indexing="ij")
    byte = 64 * (4 * (block // 8) + block % 4) + 4 * (row % 16) + 2 * (block // 4 % 2) + row // 16 % 2
    return scales[:, row // 32, byte]


@triton.jit
def split_block(x):
    """Codes of hi and lo uint8[rows, groups, 32], and the scale of hi uint8[rows, groups].

    Args:
        x: bf16 in fp32, numbers or NaN, which both become.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = (tl.max(bits & 0x7FFFFFFF, 2) >> 23) & 0xFF
    # The largest value becomes 128 to 256 in steps of 16; the scale of lo, 4 below, must not be negative.
    scale = tl.maximum(exponent - 7, 4)
    factor = ((254 - scale) << 23).to(tl.float32, bitcast=True)
    x = x * factor[:, :, None]
    hi = x.to(tl.float8e4nv)
    lo = ((x - hi.to(tl.float32)) * 16).to(tl.float8e4nv)
    return hi.to(tl.uint8, bitcast=True), lo.to(tl.uint8, bitcast=True), scale.to(tl.uint8)


@triton.jit
def split_rows(
    X, Codes, Scales, first, rows, stride_x,
    GROUPS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Split BLOCK groups of 32 values, which are counted through all rows.

    Args:
        X: bf16[rows, 32 * GROUPS].
        first: the first of them.
        PADDED: groups of a row of `Scales`.
    """
    group = first + tl.arange(0, BLOCK)
    row = group // PADDED
    within = group % PADDED
    value = tl.arange(0, 32)
    there = (row < rows) & (within < GROUPS)
    x_at = X + row.to(tl.int64)[:, None] * stride_x + (within * 32)[:, None] + value[None, :]
    x = tl.load(x_at, mask=there[:, None], other=0.0).to(tl.float32)
    # An e4m3 has no infinity.
    finite = (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000
    x = tl.where(finite, x, float("nan"))
    hi, lo, scale = split_block(x.reshape(1, BLOCK, 32))
    at = row.to(tl.int64) * (2 * PADDED) + within
    code_at = Codes + at[:, None] * 32 + value[None, :]
    live = row < rows
    tl.store(code_at, hi.reshape(BLOCK, 32), mask=live[:, None])
    tl.store(code_at + 32 * PADDED, lo.reshape(BLOCK, 32), mask=live[:, None])
    tl.store(Scales + at, scale.reshape(BLOCK), mask=live)
    tl.store(Scales + PADDED + at, (scale - 4).reshape(BLOCK), mask=live)


@triton.jit(do_not_specialize=["tokens", "stride_schedule"])
def few_and_split(
    Logits, Order, Gather, Scatter, Weights, Count, Starts, Schedule,
    tokens, experts, local, stride, stride_starts, stride_schedule, X, Codes, Scales, stride_x,
    TOPK: tl.constexpr, SLOTS: tl.constexpr, SMALLEST: tl.constexpr, SIZES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr, BLOCK_TILES: tl.constexpr, OVERLAP: tl.constexpr,
    GROUPS: tl.constexpr, PADDED: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    """`routing_kernels.few`, and behind its workgroup those that split the tokens."""
    block = tl.program_id(0)
    if block == 0:
        routing_kernels.few(
            Logits, Order, Gather, Scatter, Weights, Count, Starts, Schedule,
            tokens, experts, local, stride, stride_starts, stride_schedule,
            TOPK, SLOTS, SMALLEST, SIZES, BLOCK_TOKENS, BLOCK_EXPERTS, BLOCK_TILES, OVERLAP,
        )  # fmt: skip
    else:
        split_rows(
            X, Codes, Scales, (block - 1) * BLOCK_GROUPS, tokens, stride_x, GROUPS, PADDED, BLOCK_GROUPS
        )


@triton.jit(do_not_specialize=["tokens", "blocks", "stride_schedule"])
def place_and_split(
    Logits, Order, Counts, Gather, Scatter, Weights, Count, Starts, Schedule,
    tokens, experts, local, blocks, stride, stride_starts, stride_schedule,
    X, Codes, Scales, stride_x,
    TOPK: tl.constexpr, SLOTS: tl.constexpr, SMALLEST: tl.constexpr, SIZES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr, FEW_BLOCKS: tl.constexpr, SUMMED: tl.constexpr,
    BLOCK_TILES: tl.constexpr, BLOCK_EMPTY: tl.constexpr, OVERLAP: tl.constexpr, GROUPS: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    """`routing_kernels.place`, and behind its workgroups those that split the tokens."""
    block = tl.program_id(0)
    if block < blocks + SIZES:
        routing_kernels.place(
            Logits, Order, Counts, Gather, Scatter, Weights, Count, Starts, Schedule,
            tokens, experts, local, blocks, stride, stride_starts, stride_schedule,
            TOPK, SLOTS, SMALLEST, SIZES, BLOCK_TOKENS, BLOCK_EXPERTS, FEW_BLOCKS, SUMMED, BLOCK_TILES,
            BLOCK_EMPTY, OVERLAP,
        )  # fmt: skip
    else:
        first = (block - blocks - SIZES) * BLOCK_GROUPS
        split_rows(X, Codes, Scales, first, tokens, stride_x, GROUPS, PADDED, BLOCK_GROUPS)


@triton.jit
def two_fp8_matmul(
    Codes, Scales, W, S, B, Y, YScales, Gather, Weights, Starts, Schedule,
    packed, N, stride_x, stride_w_e, stride_w_n, stride_s_e, stride_s_n, stride_y, stride_y_split,
    alpha, limit,
    TOPK: tl.constexpr, GATED: tl.constexpr, PAIRED: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    EVEN_W: tl.constexpr, EVEN_S: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of an expert's rows times BLOCK_N rows of its weights.

    GATED reads the rows' tokens, adds the SwiGLU and writes the rows split; otherwise they are read, and what
    each adds to its token is written. WIDE: whether an offset of rows needs more than 31 bits.
    """
    tile = tl.load(Schedule + tl.program_id(1))
    if tile < 0:
        return
    expert = (tile & 0xFFFF).to(tl.int64)
    row = tl.load(Starts + expert) + (tile >> 16) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = row < tl.load(Starts + expert + 1)
    if not GATED:
        # Loaded here, as the end of the kernel would wait for it.
        weight = tl.load(Weights + row[:, None], mask=live[:, None], other=0.0).to(tl.float32)
    n0 = tl.program_id(0) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    bias = tl.load(B + expert * N + n, mask=(n < N) & (tl.program_id(2) == 0), other=0.0)
    # Columns of the unit that are not live compute something, which nothing keeps.
    source = tl.load(Gather + row, mask=live, other=0) // TOPK if GATED else tl.where(live, row, 0)
    if WIDE:
        row, source = row.to(tl.int64), source.to(tl.int64)
    acc = _multiply(
        Codes, Scales, W + expert * stride_w_e, S + expert * stride_s_e, source, n0, packed, N,
        stride_x, stride_w_n, stride_s_n,
        PAIRED, SPLIT_K, BLOCK_T, BLOCK_N, BLOCK_K, STAGES, EVEN_W, EVEN_S,
    )  # fmt: skip
    acc += bias[None, :]
    row = row[:, None]
    if GATED:
        gate, up = tl.split(acc.reshape(BLOCK_T, BLOCK_N // 2, 2))
        # A minimum that drops a NaN would lose it.
        gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
        out = libdevice.fast_dividef(gate, 1 + libdevice.fast_expf(-alpha * gate)) * (up + 1)
        out = out.to(tl.bfloat16).to(tl.float32).reshape(BLOCK_T, BLOCK_N // 64, 32)
        hi, lo, scale = split_block(out)
        y_at = Y + row * (2 * stride_y) + (n0 // 2 + tl.arange(0, BLOCK_N // 2))[None, :]
        tl.store(y_at, hi.reshape(BLOCK_T, BLOCK_N // 2), mask=live[:, None])
        tl.store(y_at + stride_y, lo.reshape(BLOCK_T, BLOCK_N // 2), mask=live[:, None])
        ys_at = YScales + row * (stride_y // 16) + (n0 // 64 + tl.arange(0, BLOCK_N // 64))[None, :]
        tl.store(ys_at, scale, mask=live[:, None])
        tl.store(ys_at + stride_y // 32, scale - 4, mask=live[:, None])
    else:
        y_at = Y + tl.program_id(2) * stride_y_split + row * stride_y + n[None, :]
        tl.store(y_at, (acc * weight).to(Y.dtype.element_ty), mask=live[:, None] & (n < N)[None, :])


@triton.jit
def _multiply(
    Codes, Scales, W, S, source, n0, packed, N, stride_x, stride_w_n, stride_s_n,
    PAIRED: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, EVEN_W: tl.constexpr, EVEN_S: tl.constexpr,
):  # fmt: skip
    """fp32[BLOCK_T, BLOCK_N], rows of `Codes` times rows of an expert's weights.

    PAIRED: hi and lo of 8 rows are rows side by side, as the matrix unit has 16 of them; otherwise the
    weights that were read are multiplied by hi, then by lo.
    EVEN_W, EVEN_S: whether steps end where the weights end, and where their scales do.
    """
    # Tiles behind the last weights only write the zeros at the end of the rows.
    packed = tl.where(n0 < N, packed, 0)
    w_at = W + tl.minimum(n0 + tl.arange(0, BLOCK_N), N - 1)[None, :] * stride_w_n
    s_at = S + (n0 // 32 + tl.arange(0, BLOCK_N // 32))[:, None] * stride_s_n
    if PAIRED:
        # Triton sees that this is a multiple of 16, but not that two which are joined are.
        source = tl.join(source, source).reshape(2 * BLOCK_T)
        at = source * (2 * stride_x) + tl.arange(0, 2 * BLOCK_T) % 2 * stride_x
        acc = tl.zeros((2 * BLOCK_T, BLOCK_N), tl.float32)
    else:
        at = source * (2 * stride_x)
        acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    x_at = Codes + at[:, None]
    xs_at = Scales + (at // 32)[:, None]
    for first in tl.range(tl.program_id(2) * BLOCK_K, packed * 2, BLOCK_K * SPLIT_K, num_stages=STAGES):
        byte = first // 2 + tl.arange(0, BLOCK_K // 2)[:, None]
        line = first + tl.arange(0, BLOCK_K)[None, :]
        w = tl.load(w_at + byte, mask=None if EVEN_W else byte < packed, other=None if EVEN_W else 0)
        inside = None if EVEN_S else line < tl.cdiv(packed, 128) * 256
        s = tl.load(s_at + line, mask=inside, other=None if EVEN_S else 0)
        s = s.reshape(BLOCK_N // 32, BLOCK_K // 256, 4, 16, 2, 2).trans(0, 5, 3, 1, 4, 2)
        s = s.reshape(BLOCK_N, BLOCK_K // 32)
        group = first // 32 + tl.arange(0, BLOCK_K // 32)[None, :]
        acc = tl.dot_scaled(tl.load(x_at + line), tl.load(xs_at + group), "e4m3", w, s, "e2m1", acc)
        if not PAIRED:
            x, xs = tl.load(x_at + stride_x + line), tl.load(xs_at + stride_x // 32 + group)
            acc = tl.dot_scaled(x, xs, "e4m3", w, s, "e2m1", acc)
    if PAIRED:
        hi, lo = tl.split(acc.reshape(BLOCK_T, 2, BLOCK_N).trans(0, 2, 1))
        acc = hi + lo
    return acc
