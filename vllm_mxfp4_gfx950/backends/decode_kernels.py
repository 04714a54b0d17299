"""Triton kernels of `triton_decode`: the matmuls, and the sum over a token's experts.

A "row" is a token's choice of an expert, in the order of `triton_routing.Routing`. A tile is some rows of one
expert. OVERLAP: see `routing_kernels`.
"""

import triton
import triton.language as tl

from vllm_mxfp4_gfx950.backends.routing_kernels import twist


@triton.jit
def mxfp4_matmul(
    X, W, S, B, Y, Gather, Weights, Starts, Schedule,
    K, N, stride_x, stride_w_e, stride_w_n, stride_s_e, stride_s_n, stride_y, stride_y_split, alpha, limit,
    TOPK: tl.constexpr, GATED: tl.constexpr, LAYOUT: tl.constexpr, TWISTED_X: tl.constexpr,
    TWISTED_Y: tl.constexpr, OVERLAP: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of an expert's rows times BLOCK_N rows of its weights.

    GATED reads the rows' tokens, adds the SwiGLU and writes the rows; otherwise they are read, and what each
    adds to its token is written.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
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
    x_at = X + source[None, :] * stride_x
    W += expert * stride_w_e
    S += expert * stride_s_e
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    first = tl.program_id(2) * BLOCK_K
    whole = K // BLOCK_K * BLOCK_K
    for k in range(first, whole, BLOCK_K * SPLIT_K):
        acc = _step(
            acc, x_at, W, S, n0, k, K, N, stride_w_n, stride_s_n, live,
            LAYOUT, TWISTED_X, BLOCK_N, BLOCK_K, False,
        )  # fmt: skip
    if (whole < K) & (whole // BLOCK_K % SPLIT_K == tl.program_id(2)):
        acc = _step(
            acc, x_at, W, S, n0, whole, K, N, stride_w_n, stride_s_n, live,
            LAYOUT, TWISTED_X, BLOCK_N, BLOCK_K, True,
        )  # fmt: skip
    acc += bias[:, None]
    if GATED:
        gate, up = tl.split(acc.reshape(BLOCK_N // 2, 2, BLOCK_T).trans(0, 2, 1))
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        out = gate / (1 + tl.exp(-alpha * gate)) * (up + 1)
        i = n0 // 2 + tl.arange(0, BLOCK_N // 2)
        y_at = Y + row[None, :] * stride_y + (twist(i) if TWISTED_Y else i)[:, None]
        tl.store(y_at, out.to(tl.bfloat16), mask=live[None, :] & (i < N // 2)[:, None])
    else:
        weight = tl.load(Weights + row, mask=live, other=0.0).to(tl.float32)
        y_at = Y + tl.program_id(2) * stride_y_split + row[None, :] * stride_y + n[:, None]
        tl.store(y_at, acc * weight[None, :], mask=live[None, :] & (n < N)[:, None])


@triton.jit
def _step(
    acc, x_at, W, S, n0, k0, K, N, stride_w_n, stride_s_n, live,
    LAYOUT: tl.constexpr, TWISTED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Add BLOCK_K of the depth, from k0; the TAIL ends at K."""
    k = k0 + tl.arange(0, BLOCK_K)[:, None]
    x = tl.load(x_at + k, mask=live[None, :] & (k < K) if TAIL else live[None, :], other=0.0)
    if LAYOUT == "hopper":
        w = _hopper_weights(W, S, n0, k0, K, N, stride_w_n, stride_s_n, TWISTED, BLOCK_N, BLOCK_K, TAIL)
        acc = tl.dot(w, x, acc)
    else:
        n = n0 + tl.arange(0, BLOCK_N)[:, None]
        byte = k0 // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
        w_at = W + n * stride_w_n + byte
        w = tl.load(w_at, mask=(n < N) & (byte < K // 2) if TAIL else n < N, other=0)
        # 32 rows by 8 scales are 256 bytes.
        strip = n0 // 32 + tl.arange(0, BLOCK_N // 32)[:, None]
        s = tl.load(S + strip * stride_s_n + k0 + tl.arange(0, BLOCK_K)[None, :])
        s = s.reshape(BLOCK_N // 32, BLOCK_K // 256, 4, 16, 2, 2).trans(0, 5, 3, 1, 4, 2)
        acc = tl.dot_scaled(w, s.reshape(BLOCK_N, BLOCK_K // 32), "e2m1", x, None, "bf16", acc)
    return acc


@triton.jit
def _hopper_weights(
    W, S, n0, k0, K, N, stride_w_n, stride_s_n,
    TWISTED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """bf16[BLOCK_N, BLOCK_K], in the registers where the matrix unit takes them."""
    # 16 rows by 64 columns are 4 lines of 32 words; a word's codes belong to two rows and four columns.
    U: tl.constexpr = BLOCK_K // 64
    ROWS: tl.constexpr = BLOCK_N // 16
    block = k0 // 64 + tl.arange(0, U)[:, None, None]
    line = n0 // 4 + tl.arange(0, BLOCK_N // 4)[None, :, None]
    w_at = W + line * stride_w_n + block * 32 + tl.arange(0, 32)[None, None, :]
    w = tl.load(w_at, mask=(line < N // 4) & (block * 64 < K) if TAIL else line < N // 4, other=0)
    # 16 rows by 2 scales are 32 bytes, and 8 such strips lie between two that follow one another. Two rows'
    # scales stand side by side: each is made the bf16 of itself times 2^126, twice.
    strip = n0 // 16 + tl.arange(0, ROWS)[None, :, None]
    s_at = S + (strip // 16 * 8 + strip % 8) * stride_s_n + block * 32 + strip // 8 % 2 * 16
    s_at += tl.arange(0, 16)[None, None, :]
    s = (tl.load(s_at, mask=block * 64 < K, other=0) if TAIL else tl.load(s_at)).to(tl.int32)
    s = s.reshape(U, ROWS, 4, 2, 1, 2, 1).broadcast_to(U, ROWS, 4, 2, 4, 2, 2).reshape(U, BLOCK_N // 4, 32)
    near = (s & 0xFF) * 0x00800080 + 0x3F003F00
    far = ((s >> 8) & 0xFF) * 0x00800080 + 0x3F003F00
    a, b, c, d, e, f, g, h = _widen(w, near, far)
    v = tl.join(tl.join(tl.join(a, b), tl.join(c, d)), tl.join(tl.join(e, f), tl.join(g, h)))
    v = v.reshape(U, ROWS, 4, 2, 4, 2, 2, 2, 2, 2)  # half of the columns' four, the other row, half of two
    v = v.trans(1, 8, 2, 3, 0, 5, 4, 6, 9, 7) if TWISTED else v.trans(1, 8, 2, 3, 0, 5, 6, 9, 4, 7)
    return v.reshape(BLOCK_N, BLOCK_K)


@triton.jit
def _widen(codes, near, far):
    """Eight codes of a word, as Hopper's layout twists their bits, to bf16.

    Shifting a code's bits to their places makes it a bf16 of itself times 2^-126. Near and far are the scales
    of the word's two rows times 2^126, each twice.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 p, q, r, t;
        and.b32 p, $8, 0x81C081C0;
        mul.bf16x2 p, p, $9;
        mov.b32 {$0, $1}, p;
        shl.b32 q, $8, 3;
        and.b32 q, q, 0x81C081C0;
        mul.bf16x2 q, q, $10;
        mov.b32 {$2, $3}, q;
        shl.b32 r, $8, 6;
        and.b32 r, r, 0x81C081C0;
        mul.bf16x2 r, r, $9;
        mov.b32 {$4, $5}, r;
        shl.b32 p, $8, 1;
        shr.u32 q, $8, 3;
        shr.u32 r, $8, 7;
        and.b32 p, p, 0x80008000;
        lop3.b32 p, q, 0x01800180, p, 0xEA;
        lop3.b32 p, r, 0x00400040, p, 0xEA;
        mul.bf16x2 p, p, $10;
        mov.b32 {$6, $7}, p;
        }
        """,
        constraints="=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r,r,r",
        args=[codes, near, far],
        dtype=(tl.bfloat16,) * 8,
        is_pure=True,
        pack=1,
    )


@triton.jit
def combine(
    Parts, Scatter, Out, stride_split, hidden, TOPK: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Add up the parts of a token's experts, in the order of its slots."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(TOPK):
        row = tl.load(Scatter + token * TOPK + slot)
        for split in tl.static_range(SPLITS):
            at = Parts + split * stride_split + row * hidden + h
            total += tl.load(at, mask=(h < hidden) & (row >= 0), other=0.0)
    tl.store(Out + token * hidden + h, total.to(tl.bfloat16), mask=h < hidden)
