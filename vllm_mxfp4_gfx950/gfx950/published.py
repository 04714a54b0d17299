"""What was published of kernels on a gfx950, with sources: which of two was faster, and what took how long.

`trial` holds the time model to it. Launches are of aiter's Triton kernel for FP8 activations (a8w4).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from vllm_mxfp4_gfx950.tiles import Gemm, TileConfig

TOPK = 4

FITTED_TOKENS = 256
"""Times for up to so many tokens are fitted to their bytes."""

FEW_ROWS = 9.3
"""Up to so many rows an expert, tiles of 16 rows were faster. Source: tokenspeed, pull request 1272."""


@dataclass(frozen=True)
class Case:
    """A launch of aiter's a8w4 kernel.

    Args:
        gemm: w13 or w2.
        tokens: T.
        tile: how it is cut up.
        instruction: rows and columns of a matrix instruction.
        swizzled: whether the scales are in CDNA 4's layout.
    """

    gemm: Gemm
    tokens: int
    tile: TileConfig
    instruction: int = 16
    swizzled: bool = False

    def text(self) -> str:
        """In a line."""
        t = self.tile
        split = f" split {t.split_k}" if t.split_k > 1 else ""
        return (
            f"{self.gemm.name} T={self.tokens} {t.block_m}x{t.block_n}x{t.block_k}{split} {t.num_warps}w "
            f"{t.num_stages}s" + (" 32x32" if self.instruction == 32 else "")
        )


@dataclass(frozen=True)
class Verdict:
    """What was faster on a card.

    Args:
        subject: what it is about; verdicts of one subject are counted together.
        source: who said so.
        faster, slower: the two.
        ratio: the slower's time over the faster's, where it was published.
    """

    subject: str
    source: str
    faster: Case
    slower: Case
    ratio: float | None = None


def tile(m: int, n: int, warps: int, stages: int, k: int = 256, split: int = 1, waves: int = 0) -> TileConfig:
    """A tile, in the order in which aiter's configurations vary."""
    return TileConfig(m, n, k, split, warps, stages, waves)


def gemms_120b(size: int) -> tuple[Gemm, Gemm]:
    """w13 and w2 of GPT-OSS-120B: 2880 as the checkpoint has it, or 3072 as vLLM pads it on ROCm."""
    return Gemm("w13", size, 2 * size, 128, 128), Gemm("w2", size, size, 128, 128)


SWEPT: dict[tuple[int, str], tuple[int, int, int, int, int]] = {
    (16, "w13"): (64, 512, 16, 4, 2),
    (16, "w2"): (64, 512, 16, 4, 2),
    (32, "w13"): (256, 512, 32, 4, 1),
    (32, "w2"): (64, 512, 16, 4, 2),
    (64, "w13"): (128, 512, 32, 8, 2),
    (64, "w2"): (128, 512, 32, 8, 2),
    (128, "w13"): (128, 256, 32, 4, 2),
    (128, "w2"): (128, 256, 32, 4, 2),
}
"""What a sweep on the card chose for a block_m and a matmul at 2880: block_n, block_k, matrix instruction,
warps and stages.

Source: ROCm/aiter e404860, aiter/ops/triton/configs/moe/gfx950-A8W4.json.
"""

SWEPT_TOKENS = {16: 256, 32: 1024, 64: 2048, 128: 8192}
"""Tokens for which aiter's routing takes that block_m, the power of two at the rows an expert gets."""


AITER = "ROCm/aiter pull request"
TOKENSPEED = "lightseekorg/tokenspeed pull request"


def verdicts() -> list[Verdict]:
    """All of them."""
    return [*on_warps(), *on_stages(), *on_rows(), *on_workgroups(), *swept()]


def on_warps() -> Iterator[Verdict]:
    """4 or 8 warps, with 512 columns and one stage, as aiter's kernel was in May 2026."""
    w13, w2 = gemms_120b(2880)
    for gemm, tokens in itertools.product((w13, w2), (4096, 8192)):
        four, eight = (Case(gemm, tokens, tile(128, 512, warps, 1)) for warps in (4, 8))
        yield Verdict("4 warps, not 8, at block_m 128", f"{AITER} 3116", four, eight, 2.0)
    for gemm in (w13, w2):
        four, eight = (Case(gemm, 2048, tile(64, 512, warps, 1)) for warps in (4, 8))
        yield Verdict("8 warps, not 4, at block_m 64", f"{AITER} 3116", eight, four, 1.07)
    for gemm, columns, ratio in ((w13, 512, 1.03), (w2, 256, 1.083)):
        four, eight = (Case(gemm, 1024, tile(32, columns, warps, 1)) for warps in (4, 8))
        yield Verdict("4 warps, not 8, at block_m 32", f"{AITER} 3116", four, eight, ratio)


def on_stages() -> Iterator[Verdict]:
    """One stage or two."""
    for (rows, tokens, warps), gemm in itertools.product(((64, 2048, 8), (128, 8192, 4)), gemms_120b(3072)):
        narrow = Case(gemm, tokens, tile(rows, 128, 4, 2), swizzled=True)
        wide = Case(gemm, tokens, tile(rows, 512, warps, 1), swizzled=True)
        yield Verdict("128 columns in 2 stages, not 512 in 1", f"{AITER} 3428", narrow, wide, 3.7)
    for (rows, tokens), gemm in itertools.product(((16, 128), (64, 2048), (128, 8192)), gemms_120b(3072)):
        two, one = (Case(gemm, tokens, tile(rows, 128, 4, stages), swizzled=True) for stages in (2, 1))
        yield Verdict("2 stages, not 1", f"{AITER} 3372", two, one)


def on_rows() -> Iterator[Verdict]:
    """block_m 16 or 32."""
    for tokens, gemm in itertools.product((32, 64, 128, 256, 640), gemms_120b(3072)):
        few, many = (Case(gemm, tokens, tile(rows, 128, 4, 2), swizzled=True) for rows in (16, 32))
        if tokens * TOPK / gemm.experts <= FEW_ROWS:
            source = f"{AITER} 5118; {TOKENSPEED} 1272"
            yield Verdict("block_m 16, not 32, up to 9 rows an expert", source, few, many, 1.18)
        else:
            yield Verdict("block_m 32, not 16, at 20 rows an expert", f"{TOKENSPEED} 1272", many, few)


def on_workgroups() -> Iterator[Verdict]:
    """More workgroups or fewer where there are few tokens."""
    w13, w2 = gemms_120b(3072)
    narrow, wide = (Case(w13, 1, tile(16, columns, 4, 1), swizzled=True) for columns in (64, 128))
    yield Verdict("64 columns, not 128, at 1 token", "ROCm/aiter moe_op_gemm_a16w4.py", narrow, wide)
    for tokens, best in ((1, 8), (2, 8), (4, 4)):
        split, whole = (Case(w2, tokens, tile(16, 64, 4, 2, split=each), swizzled=True) for each in (best, 1))
        subject = "w2 split 8 ways at 1 and 2 tokens, 4 ways at 4"
        yield Verdict(subject, f"{TOKENSPEED} 423", split, whole)


def swept() -> Iterator[Verdict]:
    """Each row of the swept table against its neighbours: one thing changed, one step."""
    for (rows, name), (columns, depth, instruction, warps, stages) in SWEPT.items():
        gemm = next(each for each in gemms_120b(2880) if each.name == name)
        best = Case(gemm, SWEPT_TOKENS[rows], tile(rows, columns, warps, stages, depth), instruction)
        near = [
            dataclasses.replace(best, tile=tile(rows, *change))
            for change in (
                (columns * 2, warps, stages, depth),
                (columns // 2, warps, stages, depth),
                (columns, warps, stages, depth // 2),
                (columns, warps, stages, 768 - depth),
                (columns, 12 - warps, stages, depth),
                (columns, warps, 3 - stages, depth),
            )
        ]
        if rows >= 32:
            near.append(dataclasses.replace(best, instruction=48 - instruction))
        for other in dict.fromkeys(near):
            subject = f"the swept table at block_m {rows}, {name}"
            yield Verdict(subject, "ROCm/aiter gfx950-A8W4.json", best, other)


A8W4_TFLOPS = {512: 164.0, 1536: 448.2, 2560: 181.4, 3584: 219.8, 4608: 177.2, 5632: 209.7, 6656: 246.3}
"""Both matmuls of GPT-OSS-120B by tokens, aiter's a8w4 kernel as it was then, each with one stage.

Source: ROCm/aiter pull request 2723, comment of 2026-04-14. That it adds up both matmuls is how we read its
script.
"""


@dataclass(frozen=True)
class Curve:
    """Published times of a kernel.

    Args:
        kernel: whose.
        hidden, intermediate, experts, topk: of the layer, as it was padded.
        us: of both matmuls, by tokens.
    """

    kernel: str
    hidden: int
    intermediate: int
    experts: int
    topk: int
    us: dict[int, float]

    def bytes(self, tokens: int) -> float:
        """Of the weights and scales of the experts that are chosen."""
        active = 1 - (1 - self.topk / self.experts) ** tokens
        return self.experts * active * 3 * self.hidden * self.intermediate * 17 / 32

    def weight_bound(self) -> Iterator[tuple[int, float]]:
        """The times where reading the weights is most of the work."""
        return ((tokens, us) for tokens, us in self.us.items() if tokens <= FITTED_TOKENS)


def powers(*us: float) -> dict[int, float]:
    """Times at powers of two, from one token on."""
    return {1 << index: each for index, each in enumerate(us)}


CURVES = (
    Curve("CK-Tile a16w4", 3072, 3072, 128, 4, powers(39.1, 48.9, 64.2, 97.8, 148.1, 234.6, 290.6, 319.4)),
    Curve("CK-Tile a16w4", 3072, 1536, 128, 4, powers(32.1, 34.6, 46.2, 61.4, 88.6, 124.1, 162.4, 182.5)),
    Curve("CK-Tile a16w4", 3072, 512, 128, 4, powers(26.3, 26.8, 29.4, 36.6, 49.2, 67.8, 71.8, 81.9)),
    Curve(
        "FlyDSL a8w4",
        3072,
        3072,
        128,
        4,
        powers(25.5, 33.3, 49.3, 84.2, 136.5, 216.6, 277.8, 294.5, 306.0, 326.0, 360.7, 484.7, 698.5, 1128.2),
    ),
    Curve(
        "FlyDSL a16w4", 3584, 512, 896, 16, powers(27.2, 35.7, 52.2, 74.8, 133.5, 224.6, 327.1, 428.2, 470.8)
    ),
    Curve(
        "FlyDSL a16w4", 3584, 384, 896, 16, powers(26.8, 33.3, 48.6, 67.5, 103.3, 176.6, 265.5, 338.3, 368.1)
    ),
)
"""Published times; FlyDSL a8w4 quantizes activations.

Source: ROCm/aiter e404860, gptoss_a16w4_tuned_fmoe.csv, gptoss_fp8fp4_tuned_fmoe.csv and
kimik3_fp4_tuned_fmoe.csv in aiter/configs/model_configs.
"""
