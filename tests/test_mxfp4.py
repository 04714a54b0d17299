"""The number format, against the standard's formulas and against transformers."""

import math

import pytest
import torch

from vllm_mxfp4_gfx950.mxfp4 import dequantize

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
FIRST_INFINITE = 2.0**128
"""Products from here on leave the range of fp32 and bf16. All others are exact there too."""


def element(code: int) -> float:
    """E2M1 by its bits: a sign, two of exponent with bias 1, one of mantissa; exponent 0 is subnormal."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    magnitude = mantissa * 0.5 if exponent == 0 else (1 + mantissa * 0.5) * 2.0 ** (exponent - 1)
    return math.copysign(magnitude, -1.0 if sign else 1.0)


def product(code: int, scale: int, dtype: torch.dtype) -> float:
    """A code times its E8M0 scale, in a dtype."""
    if scale == 255:
        return math.nan
    value = element(code) * 2.0 ** (scale - 127)
    if dtype != torch.float64 and abs(value) >= FIRST_INFINITE:
        return math.copysign(math.inf, value)
    return value


def exactly(values: list[float]) -> list[str]:
    """Hexadecimal text: tells -0.0 from 0.0, and NaN equals itself."""
    return [value.hex() for value in values]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_all_codes_and_scales(dtype: torch.dtype) -> None:
    """Every code with every scale, bit for bit."""
    codes = [*range(16), *reversed(range(16))]
    row = torch.tensor([low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)])
    scales = torch.arange(256)
    got = dequantize(row.repeat(256, 1).byte(), scales[:, None].byte(), dtype)
    assert got.dtype == dtype
    assert got.shape == (256, 32)
    for scale in range(256):
        expected = [product(code, scale, dtype) for code in codes]
        assert exactly(got[scale].tolist()) == exactly(expected), f"scale {scale}"


def test_dequantize_low_nibble_comes_first() -> None:
    """0x21 is code 1 and then code 2, at its place in its block."""
    blocks = torch.zeros(1, 32, dtype=torch.uint8)
    blocks[0, 18] = 0x21
    got = dequantize(blocks, torch.tensor([[127, 128]], dtype=torch.uint8), torch.float64)
    assert got.nonzero().tolist() == [[0, 36], [0, 37]]
    assert got[0, 36:38].tolist() == [1.0, 2.0]


def test_dequantize_equals_transformers() -> None:
    """Three axes of random bytes, against transformers' dequantization of GPT-OSS checkpoints."""
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4", reason="needs transformers")
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (3, 10, 4, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(255, (3, 10, 4), generator=generator, dtype=torch.uint8)
    expected = mxfp4.convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=torch.float32)
    got = dequantize(blocks.flatten(-2), scales, torch.float32)
    assert torch.equal(got.mT, expected)
