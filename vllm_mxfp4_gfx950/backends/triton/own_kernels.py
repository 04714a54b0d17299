"""Triton kernels of `own`: the matmuls, and the sum over a token's experts.

A "row" is a token's choice of an expert, in the order of `routing.Routing`. A tile is some rows of one
expert. OVERLAP: see `routing_kernels.await_previous`.

Hopper's layout of the values is read as words: 16 rows by 64 columns are 4 lines of 32 words, and the eight
codes of a word belong to two rows, 8 apart, and to four columns.
"""

import triton
import triton.language as tl

from vllm_mxfp4_gfx950.backends.triton.routing_kernels import await_previous


@triton.jit
def mxfp4_matmul(
    X, W, S, B, Y, Gather, Weights, Starts, Schedule,
    K, N, stride_x, stride_w_e, stride_w_n, stride_s_e, stride_s_n, stride_y, stride_y_split, alpha, limit,
    TOPK: tl.constexpr, GATED: tl.constexpr, LAYOUT: tl.constexpr, OVERLAP: tl.constexpr,
    SPLIT_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """One tile of an expert's rows times BLOCK_N rows of its weights.

    GATED reads the rows' tokens, adds the SwiGLU and writes the rows; otherwise they are read, and what each
    adds to its token is written.
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
    if LAYOUT == "cdna4":
        acc = _cdna4(
            X, W, S, source, live, n0, K, N, stride_x, stride_w_n, stride_s_n,
            SPLIT_K, BLOCK_T, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
    elif S.dtype.element_ty == tl.uint8:
        acc = _hopper_few(
            X, W, S, source, live, n0, K, N, stride_x, stride_w_n, stride_s_n,
            SPLIT_K, BLOCK_T, BLOCK_N, BLOCK_K, STAGES, WARPS,
        )  # fmt: skip
    else:
        acc = _hopper_many(
            X, W, S, source, live, n0, K, N, stride_x, stride_w_n, stride_s_n,
            SPLIT_K, BLOCK_T, BLOCK_N, BLOCK_K, STAGES,
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
def _cdna4(
    X, W, S, source, live, n0, K, N, stride_x, stride_w_n, stride_s_n,
    SPLIT_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """fp32[BLOCK_N, BLOCK_T]. The matrix unit takes codes and scales as they are."""
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    n = n0 + tl.arange(0, BLOCK_N)[:, None]
    # 32 rows by 8 scales are 256 bytes.
    s_at = S + (n0 // 32 + tl.arange(0, BLOCK_N // 32))[:, None] * stride_s_n + tl.arange(0, BLOCK_K)[None, :]
    for first in tl.range(tl.program_id(2) * BLOCK_K, K, BLOCK_K * SPLIT_K, num_stages=STAGES):
        k = first + tl.arange(0, BLOCK_K)[:, None]
        x = tl.load(X + source[None, :] * stride_x + k, mask=live[None, :] & (k < K), other=0.0)
        byte = first // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
        w = tl.load(W + n * stride_w_n + byte, mask=(n < N) & (byte < K // 2), other=0)
        s = tl.load(s_at + first).reshape(BLOCK_N // 32, BLOCK_K // 256, 4, 16, 2, 2).trans(0, 5, 3, 1, 4, 2)
        acc = tl.dot_scaled(w, s.reshape(BLOCK_N, BLOCK_K // 32), "e2m1", x, None, "bf16", acc)
    return acc


@triton.jit
def _hopper_few(
    X, W, S, source, live, n0, K, N, stride_x, stride_w_n, stride_s_n,
    SPLIT_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """fp32[BLOCK_N, BLOCK_T], for few columns: sums are scaled, 32 columns of the depth at a time.

    The matrix unit takes a code as a bf16 of itself times 2^-126, which costs least, and a token times 2^80,
    so that the products are no denormals; an activation of 2^48 or more becomes infinite by it, and a scale
    of 2^-127 counts as 0. The warps share the depth. Each code stays in the register where it arrives: the
    columns of a token are put in the codes' order instead.
    """
    U: tl.constexpr = BLOCK_K // 64
    STRIPS: tl.constexpr = BLOCK_N // 16
    # A thread loads four bytes ahead, or none: where there are fewer scales than that, each is loaded again.
    COPIES: tl.constexpr = min(max(1, 4 * WARPS // (U * STRIPS)), 4)
    acc = tl.zeros((U, BLOCK_N, BLOCK_T), tl.float32)
    line = n0 // 4 + tl.arange(0, 4)[:, None, None, None] + tl.arange(0, STRIPS)[None, None, :, None] * 4
    w_at = W + tl.minimum(line, N // 4 - 1) * stride_w_n
    w_at += tl.arange(0, U)[None, :, None, None] * 32 + tl.arange(0, 32)[None, None, None, :]
    # 16 rows by 2 scales are 32 bytes, and 8 such strips lie between two that follow one another.
    strip = n0 // 16 + tl.arange(0, STRIPS)[None, None, None, :, None]
    s_at = S + (strip // 16 * 8 + strip % 8) * stride_s_n + strip // 8 % 2 * 32
    s_at += tl.arange(0, U)[None, None, :, None, None] * 64 + tl.arange(0, 8)[None, :, None, None, None] * 4
    s_at += tl.arange(0, 4)[None, None, None, None, :] + tl.arange(0, COPIES)[:, None, None, None, None] * 0
    half = tl.arange(0, 2 * U)[:, None, None]
    k = half % U * 64 + half // U * 32 + tl.arange(0, 32)[None, :, None]
    x_at = X + source[None, None, :] * stride_x + k
    for first in tl.range(tl.program_id(2) * BLOCK_K, K, BLOCK_K * SPLIT_K, num_stages=STAGES):
        # The last step begins where it ends at K, and leaves out what is done.
        k0 = tl.minimum(first, K - BLOCK_K)
        w = tl.load(w_at + k0 // 2)
        s = tl.load(s_at + k0)
        x = tl.load(x_at + k0, mask=live[None, None, :] & (k >= first - k0), other=0.0)
        x = x.reshape(2 * U, 2, 2, 4, 2, BLOCK_T).trans(0, 2, 3, 1, 4, 5).reshape(2 * U, 32, BLOCK_T)
        a, b, c, d = _raise(tl.join(w, w))
        v = tl.join(tl.join(a, b), tl.join(c, d))
        # Line, 64 columns, strip, the word among its 32 in four parts, half of a pair, the row, the pair.
        v = v.reshape(4, U, STRIPS, 2, 4, 2, 2, 2, 2, 2).trans(5, 1, 2, 8, 0, 3, 9, 4, 6, 7)
        sums = tl.dot(v.reshape(2 * U, BLOCK_N, 32), _louder(x)).reshape(2, U, BLOCK_N, BLOCK_T)
        scale = (s.to(tl.int32) << 23).to(tl.float32, bitcast=True).reshape(COPIES, 8, U, STRIPS, 2, 2)
        scale = scale.trans(4, 2, 3, 5, 1, 0).reshape(2, U, BLOCK_N, 1, COPIES, 1)
        scale = tl.broadcast_to(scale, 2, U, BLOCK_N, BLOCK_T // 2 // COPIES, COPIES, 2)
        left, right = tl.split(sums.trans(1, 2, 3, 0))
        scale, right_scale = tl.split(scale.reshape(2, U, BLOCK_N, BLOCK_T).trans(1, 2, 3, 0))
        acc = (acc + left * scale) + right * right_scale
    return tl.sum(acc, 0) * 2.0**46


@triton.jit
def _hopper_many(
    X, W, S, source, live, n0, K, N, stride_x, stride_w_n, stride_s_n,
    SPLIT_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """fp32[BLOCK_N, BLOCK_T], for many columns: codes are scaled, where the matrix unit takes them."""
    U: tl.constexpr = BLOCK_K // 64
    STRIPS: tl.constexpr = BLOCK_N // 16
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    line = tl.minimum(n0 // 4 + tl.arange(0, BLOCK_N // 4)[None, :, None], N // 4 - 1)
    block = tl.arange(0, U)[:, None, None] * 32
    w_at = W + line * stride_w_n + block + tl.arange(0, 32)[None, None, :]
    strip = n0 // 16 + tl.arange(0, STRIPS)[None, :, None]
    s_at = S + (strip // 16 * 8 + strip % 8) * stride_s_n + block + strip // 8 % 2 * 16
    s_at += tl.arange(0, 16)[None, None, :]
    k = tl.arange(0, BLOCK_K)[:, None]
    x_at = X + source[None, :] * stride_x + k
    for first in tl.range(tl.program_id(2) * BLOCK_K, K, BLOCK_K * SPLIT_K, num_stages=STAGES):
        k0 = tl.minimum(first, K - BLOCK_K)
        x = tl.load(x_at + k0, mask=live[None, :] & (k >= first - k0), other=0.0)
        w = tl.load(w_at + k0 // 2)
        # Two rows' scales stand side by side: each is made the bf16 of itself times 2^126, twice.
        s = tl.load(s_at + k0 // 2).to(tl.int32).reshape(U, STRIPS, 4, 2, 1, 2, 1)
        s = s.broadcast_to(U, STRIPS, 4, 2, 4, 2, 2).reshape(U, BLOCK_N // 4, 32)
        near = (s & 0xFF) * 0x00800080 + 0x3F003F00
        far = ((s >> 8) & 0xFF) * 0x00800080 + 0x3F003F00
        a, b, c, d = _widen(tl.join(w, w), tl.join(near, near), tl.join(far, far))
        v = tl.join(tl.join(a, b), tl.join(c, d))
        v = v.reshape(U, STRIPS, 4, 2, 4, 2, 2, 2, 2, 2).trans(1, 8, 2, 3, 0, 5, 6, 9, 4, 7)
        acc = tl.dot(v.reshape(BLOCK_N, BLOCK_K), x, acc)
    return acc


@triton.jit
def _raise(codes):
    """A word's codes as Hopper's layout twists their bits, each the bf16 of itself times 2^-126.

    That is what shifting its bits to their places makes it. A word comes twice, as a register holds two bf16:
    those of one row and of columns side by side. The four results are the first two columns of either row,
    then the others.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 p, q, r;
        and.b32 $0, $4, 0x81C081C0;
        shl.b32 q, $4, 3;
        and.b32 $1, q, 0x81C081C0;
        shl.b32 r, $4, 6;
        and.b32 $2, r, 0x81C081C0;
        shl.b32 p, $4, 1;
        shr.u32 q, $4, 3;
        shr.u32 r, $4, 7;
        and.b32 p, p, 0x80008000;
        lop3.b32 p, q, 0x01800180, p, 0xEA;
        lop3.b32 $3, r, 0x00400040, p, 0xEA;
        }
        """,
        constraints="=&r,=&r,=&r,=&r,r,r",
        args=[codes],
        dtype=(tl.bfloat16,) * 4,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _widen(codes, near, far):
    """As `_raise`, but scaled: near and far are the scales of the word's two rows times 2^126, each twice."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 p, q, r;
        and.b32 p, $4, 0x81C081C0;
        mul.bf16x2 $0, p, $6;
        shl.b32 q, $4, 3;
        and.b32 q, q, 0x81C081C0;
        mul.bf16x2 $1, q, $8;
        shl.b32 r, $4, 6;
        and.b32 r, r, 0x81C081C0;
        mul.bf16x2 $2, r, $6;
        shl.b32 p, $4, 1;
        shr.u32 q, $4, 3;
        shr.u32 r, $4, 7;
        and.b32 p, p, 0x80008000;
        lop3.b32 p, q, 0x01800180, p, 0xEA;
        lop3.b32 p, r, 0x00400040, p, 0xEA;
        mul.bf16x2 $3, p, $8;
        }
        """,
        constraints="=&r,=&r,=&r,=&r,r,r,r,r,r,r",
        args=[codes, near, far],
        dtype=(tl.bfloat16,) * 4,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _louder(x):
    """bf16 times 2^80."""
    return tl.inline_asm_elementwise(
        "mul.bf16x2 $0, $1, $2;",
        constraints="=r,r,r",
        args=[x, tl.full(x.shape, 2.0**80, tl.bfloat16)],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=2,
    )


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
