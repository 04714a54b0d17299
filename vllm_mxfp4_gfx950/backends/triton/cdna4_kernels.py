"""Our own matmul on CDNA 4, whose matrix unit takes codes and scales as they are.

The values lie as in the checkpoint. The scales of 32 rows by 8 blocks of the depth are 256 bytes, one of each
lane's four dwords' bytes:

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


def scales_in_torch(scales):
    """The kernel's reading of the scales, in torch: uint8[E, N / 32, K] to uint8[E, N, K / 32]."""
    lines, depth = scales.shape[1:]
    row, block = torch.meshgrid(torch.arange(lines * 32), torch.arange(depth // 32), indexing="ij")
    byte = 64 * (4 * (block // 8) + block % 4) + 4 * (row % 16) + 2 * (block // 4 % 2) + row // 16 % 2
    return scales[:, row // 32, byte]


@triton.jit
def multiply(
    X, W, S, source, live, n0, K, N, stride_x, stride_w_n, stride_s_n,
    SPLIT_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """fp32[BLOCK_N, BLOCK_T]. The matrix unit takes codes and scales as they are."""
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    n = n0 + tl.arange(0, BLOCK_N)[:, None]
    s_at = S + (n0 // 32 + tl.arange(0, BLOCK_N // 32))[:, None] * stride_s_n + tl.arange(0, BLOCK_K)[None, :]
    for first in tl.range(tl.program_id(2) * BLOCK_K, K, BLOCK_K * SPLIT_K, num_stages=STAGES):
        k = first + tl.arange(0, BLOCK_K)[:, None]
        x = tl.load(X + source[None, :] * stride_x + k, mask=live[None, :] & (k < K), other=0.0)
        byte = first // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
        w = tl.load(W + n * stride_w_n + byte, mask=(n < N) & (byte < K // 2), other=0)
        s = tl.load(s_at + first).reshape(BLOCK_N // 32, BLOCK_K // 256, 4, 16, 2, 2).trans(0, 5, 3, 1, 4, 2)
        acc = tl.dot_scaled(w, s.reshape(BLOCK_N, BLOCK_K // 32), "e2m1", x, None, "bf16", acc)
    return acc
