"""Triton kernels of `own`: the matmuls, and the sum over a token's experts.

A "row" is a token's choice of an expert, in the order of `routing.Routing`. A tile is some rows of one
expert. OVERLAP: see `routing_kernels.await_previous`. How the weights lie: see `hopper_kernels`.
"""

import triton
import triton.language as tl

from vllm_mxfp4_gfx950.backends.triton import hopper_kernels
from vllm_mxfp4_gfx950.backends.triton.routing_kernels import await_previous


@triton.jit
def mxfp4_matmul(
    X, W, S, B, Y, Gather, Weights, Starts, Schedule,
    K, N, stride_x, stride_w_e, stride_w_n, stride_s_e, stride_s_n, stride_y, stride_y_split, alpha, limit,
    TOPK: tl.constexpr, GATED: tl.constexpr, CODES: tl.constexpr, OVERLAP: tl.constexpr,
    SPLIT_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """One tile of an expert's rows times BLOCK_N rows of its weights.

    GATED reads the rows' tokens, adds the SwiGLU and writes the rows; otherwise they are read, and what each
    adds to its token is written. CODES scales codes, and S are int16; otherwise sums are scaled.
    """
    await_previous(OVERLAP)
    tile = tl.load(Schedule + tl.program_id(1))
    if tile < 0:
        return
    expert = (tile & 0xFFFF).to(tl.int64)
    row = tl.load(Starts + expert) + (tile >> 16) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = row < tl.load(Starts + expert + 1)
    n0 = tl.program_id(0) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    bias = tl.load(B + expert * N + n, mask=(n < N) & (tl.program_id(2) == 0), other=0.0)
    source = tl.load(Gather + row, mask=live, other=0) // TOPK if GATED else row
    W += expert * stride_w_e
    S += expert * stride_s_e
    if CODES:
        acc = hopper_kernels.scale_codes(
            X, W, S, source, live, n0, K, N, stride_x, stride_w_n, stride_s_n,
            SPLIT_K, BLOCK_T, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
    else:
        acc = hopper_kernels.scale_sums(
            X, W, S, source, live, n0, K, N, stride_x, stride_w_n, stride_s_n,
            SPLIT_K, BLOCK_T, BLOCK_N, BLOCK_K, STAGES, WARPS,
        )  # fmt: skip
    acc += bias[:, None]
    if GATED:
        gate, up = tl.split(acc.reshape(BLOCK_N // 2, 2, BLOCK_T).trans(0, 2, 1))
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        out = gate / (1 + tl.exp(-alpha * gate)) * (up + 1)
        i = n0 // 2 + tl.arange(0, BLOCK_N // 2)
        y_at = Y + row[None, :] * stride_y + i[:, None]
        tl.store(y_at, out.to(tl.bfloat16), mask=live[None, :] & (i < N // 2)[:, None])
    else:
        weight = tl.load(Weights + row, mask=live, other=0.0).to(tl.float32)
        y_at = Y + tl.program_id(2) * stride_y_split + row[None, :] * stride_y + n[:, None]
        tl.store(y_at, acc * weight[None, :], mask=live[None, :] & (n < N)[:, None])


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
