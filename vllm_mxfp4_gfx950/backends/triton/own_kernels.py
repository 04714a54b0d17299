"""Triton kernel of `own`, on Hopper, which has no FP4: codes become bf16 in registers.

A "row" is a token's choice of an expert, in the order of `routing.Routing`. A tile is some rows of one
expert. OVERLAP: see `routing_kernels.await_previous`.

The values. 16 rows by 64 columns of codes are 4 lines of 32 words of 32 bits. The word `16 a + 4 b + 2 c + d`
of a line holds eight codes, of two rows and four columns:

    row    = 16 * strip + 8 * far + 2 * line + a
    column = 64 * block + 32 * c + 16 * d + 8 * second + 2 * b + half

    bit  15  14  13  12  11  10   9   8   7   6   5   4   3   2   1   0     of either half of the word
    code  A   D   d   B   D   D   C   A   A   a   B   B   b   C   C   c

A is the code of (far 0, second 0), B of (1, 0), C of (0, 1), D of (1, 1). Of each the first letter, from the
left, is the sign, the next two are the exponent, the small one is the mantissa: moved to bits 15, 8, 7 and 6
they are the bf16 of the code times 2^-126.

The scales. 16 rows by 64 columns have 32 bytes, with the same letters. Two strips that are 8 strips apart
stand side by side, so that 256 rows are 8 lines:

    line of the scales = 8 * (strip // 16) + strip % 8
    byte               = 64 * block + 32 * (strip // 8 % 2) + 8 line + 4 a + 2 c + far

Source: triton_kernels in vLLM 0.26, tensor_details/layout_details/hopper_value.py, hopper_scale.py.
"""

import torch
import triton
import triton.language as tl

from vllm_mxfp4_gfx950.backends.triton.routing_kernels import await_previous

CODE_BITS = {
    (0, 0): (15, 8, 7, 6),
    (1, 0): (12, 5, 4, 3),
    (0, 1): (9, 2, 1, 0),
    (1, 1): (14, 11, 10, 13),
}
"""Of (far, second): where sign, exponent and mantissa of a code stand in half a word."""


def codes_in_torch(values):
    """The kernel's reading of the values, in torch: uint8[E, N / 4, 2 * K] to E2M1 codes, uint8[E, N, K]."""
    experts, lines, width = values.shape
    # Half of a word: strip, line, block, a, b, c, d, half.
    halves = values.contiguous().view(torch.int16).int()
    words = halves.view(experts, lines // 4, 4, width // 128, 2, 4, 2, 2, 2)
    codes = [
        sum(((words >> bit) & 1) << (3 - place) for place, bit in enumerate(CODE_BITS[far, second]))
        for far in (0, 1)
        for second in (0, 1)
    ]
    codes = torch.stack(codes, dim=-1).unflatten(-1, (2, 2))
    # strip, far, line, a | block, c, d, second, b, half
    codes = codes.permute(0, 1, 9, 2, 4, 3, 6, 7, 10, 5, 8)
    return codes.reshape(experts, lines * 4, width // 2).to(torch.uint8)


def scales_in_torch(scales):
    """The kernel's reading of the scales, in torch: uint8[E, N / 32, K] to uint8[E, N, K / 32]."""
    lines, depth = scales.shape[1:]
    row, block = torch.meshgrid(torch.arange(lines * 32), torch.arange(depth // 32), indexing="ij")
    strip, line = row // 16, row % 8 // 2
    at = 64 * (block // 2) + 32 * (strip // 8 % 2) + 8 * line + 4 * (row % 2) + 2 * (block % 2) + row // 8 % 2
    return scales[:, strip // 16 * 8 + strip % 8, at]


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
        acc = _scale_codes(
            X, W, S, source, live, n0, K, N, stride_x, stride_w_n, stride_s_n,
            SPLIT_K, BLOCK_T, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
    else:
        acc = _scale_sums(
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
def _scale_sums(
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
def _scale_codes(
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
        acc = _settled(tl.dot(v.reshape(BLOCK_N, BLOCK_K), x, acc))
    return acc


@triton.jit
def _settled(acc):
    """The same, once it is computed: no instruction, but a use of it, for which Triton waits.

    Else wgmma would still read codes in registers that the next step already writes: ptxas before CUDA 13.3
    gives them away too early.

    Source: triton-lang/triton issue 9433, pull requests 9514 (Triton 3.7) and 11781.
    """
    return tl.inline_asm_elementwise(
        "", constraints="=f,0", args=[acc], dtype=tl.float32, is_pure=True, pack=1
    )


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
