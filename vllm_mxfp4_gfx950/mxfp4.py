"""The MXFP4 number format: blocks of 32 E2M1 codes that share one E8M0 scale.

Source: OCP Microscaling Formats (MX) Specification v1.0, sections 5.3 and 6; the packing order
(low nibble first) is that of openai/gpt-oss, gpt_oss/torch/weights.py.
"""

from __future__ import annotations

import torch

BLOCK = 32
"""Values that share one scale, along the last axis."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The value of each of the 16 codes."""

SCALE_BIAS = 127
SCALE_NAN = 0xFF


def dequantize(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Expand packed E2M1 codes and their E8M0 scales to numbers.

    Args:
        blocks: uint8[..., K/2], two codes a byte, the low nibble first.
        scales: uint8[..., K/32], the exponent plus 127; 0xFF is NaN.
        dtype: floating-point type of the result. bf16, fp32 and fp64 hold every finite product
            exactly, except that scales near the ends of E8M0 leave the range of bf16 and fp32.

    Returns:
        dtype[..., K]
    """
    values = torch.tensor(E2M1, dtype=dtype, device=blocks.device)
    codes = torch.stack((blocks & 0xF, blocks >> 4), dim=-1).flatten(-2)
    numbers = values[codes.int()].view(*scales.shape, BLOCK)
    exponents = scales.int() - SCALE_BIAS
    numbers = torch.ldexp(numbers, exponents.unsqueeze(-1)).to(dtype)
    numbers = numbers.masked_fill((scales == SCALE_NAN).unsqueeze(-1), float("nan"))
    return numbers.flatten(-2)
