"""Where the emulator does otherwise than AMD's manual or hardware, or chose because the manual is silent.

The manual is AMD, "CDNA3" and "CDNA4" Instruction Set Architecture reference guides. docs/gfx950.md shows the
list; `tests/test_deviations.py` holds both to the tables of the instruction set.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Deviation:
    """One difference.

    Args:
        instructions: mnemonics without the suffix of the encoding.
        manual: what the manual says, or what is known of the hardware.
        emulator: what the emulator does.
        source: where the one or the other comes from.
    """

    instructions: tuple[str, ...]
    manual: str
    emulator: str
    source: str


BF16_MATRICES = ("v_mfma_f32_16x16x32_bf16", "v_mfma_f32_32x32x16_bf16")
SCALED_MATRICES = ("v_mfma_scale_f32_16x16x128_f8f6f4", "v_mfma_scale_f32_32x32x64_f8f6f4")

DEVIATIONS = (
    Deviation(
        ("v_exp_f32", "v_rcp_f32", "v_rcp_iflag_f32"),
        "may be off by one unit in the last place",
        "is correctly rounded",
        "the manual",
    ),
    Deviation(
        ("v_div_scale_f32",),
        "overflows where the denominator is huge and the quotient subnormal",
        "scales so that every quotient comes out correctly rounded",
        "AMD's emulation library: ROCm/rocm-systems, rocjitsu, division.h",
    ),
    Deviation(
        ("v_div_fixup_f32",),
        "contradicts itself in corners",
        "does what AMD's emulation library does",
        "ROCm/rocm-systems, rocjitsu, division.h",
    ),
    Deviation(
        ("v_bitop3_b16",),
        "does not say what the upper half of the register becomes",
        "writes zero there",
        "an assumption",
    ),
    Deviation(
        BF16_MATRICES,
        "does not say in which order a sum is added, nor how it is rounded inside",
        "adds in float32, in NumPy's order",
        "not published",
    ),
    Deviation(
        SCALED_MATRICES,
        "does not say in which order a sum is added, nor how it is rounded inside",
        "adds in float64, and rounds once, with C",
        "not published",
    ),
    Deviation(
        SCALED_MATRICES,
        "takes a scale in a scalar register or a constant from bits 30:23",
        "refuses such a scale",
        "LLVM, pull request 158117",
    ),
    Deviation(
        ("s_setreg_imm32_b32", "v_cvt_scalef32_pk_fp8_f32"),
        "lets the mode FP16_OVFL decide what a number beyond 448 becomes",
        "ignores the mode, and refuses to convert such a number",
        "the manual",
    ),
    Deviation(
        ("s_nop",),
        "waits for a number of cycles",
        "does nothing: it knows no time, and trusts LLVM to have put waits between dependent instructions",
        "the manual",
    ),
)
