"""The time model held to what was published: which of two was faster on a gfx950, and what took how long.

Of two launches each is compiled, and executed in the emulator. Times of kernels that cannot be compiled here
(CK-Tile, FlyDSL) are held to their bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from vllm_mxfp4_gfx950.gfx950 import peers, ranking
from vllm_mxfp4_gfx950.gfx950.emulator.memory import Fault
from vllm_mxfp4_gfx950.gfx950.published import (
    A8W4_TFLOPS,
    CURVES,
    TOPK,
    Case,
    Curve,
    gemms_120b,
    tile,
    verdicts,
)
from vllm_mxfp4_gfx950.gfx950.report import read
from vllm_mxfp4_gfx950.gfx950.time_model import CARDS, profile, work

SAME = 0.02
"""Two predictions that differ by less are the same."""


@dataclass
class Executed:
    """Compiles, executes and predicts launches of aiter's kernel, each once.

    Args:
        source: the directory that has `aiter/`.
    """

    source: Path

    def __post_init__(self) -> None:
        self.function = peers.kernel(self.source, "a8w4")
        self.seen: dict[tuple[Any, ...], dict[str, Any]] = {}

    def predict(self, case: Case) -> dict[str, Any]:
        """Microseconds by card, what limits them, and what the kernel takes; or why there are none."""
        gemm = case.gemm
        key = (case.tile, gemm.k, gemm.n, gemm.name, case.instruction, case.swizzled)
        if key not in self.seen:
            self.seen[key] = self._execute(case)
        found = self.seen[key]
        if "error" in found:
            return found
        some = [
            ranking.matmul(gemm, case.tile, each, card, case.tokens, TOPK, activation_bytes=1)
            for each, card in zip(found["work"], CARDS, strict=True)
        ]
        facts = {name: value for name, value in found.items() if name != "work"}
        return facts | {"us": [each.us for each in some], "limit": [each.limit for each in some]}

    def _execute(self, case: Case) -> dict[str, Any]:
        gemm = case.gemm
        try:
            launch = peers.compiled(
                self.function,
                case.tile,
                gemm.k,
                gemm.n,
                gemm.name == "w13",
                case.instruction,
                swizzled=case.swizzled,
            )
            seen = profile(launch)
        except (OutOfResources, CompilationError, Fault) as error:
            return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        report = read(launch)
        return {
            "work": [work(seen, card) for card in CARDS],
            "vgprs": report.vgprs,
            "spills": report.vgpr_spills,
            "workgroups": report.workgroups,
        }


def called(ratios: list[float]) -> str:
    """Whether a verdict was called: "yes", "no", "same" or, where the cards disagree, "open".

    Args:
        ratios: the published slower one's predicted time over the faster one's, by card.
    """
    if min(ratios) > 1 + SAME:
        return "yes"
    if max(ratios) < 1 - SAME:
        return "no"
    return "same" if max(map(abs, (ratio - 1 for ratio in ratios))) <= SAME else "open"


def judge(executed: Executed, progress: Callable[[int, int], None]) -> list[dict[str, Any]]:
    """What became of each verdict."""
    found = []
    every = verdicts()
    for done, verdict in enumerate(every):
        progress(done, len(every))
        sides = [executed.predict(case) for case in (verdict.faster, verdict.slower)]
        row: dict[str, Any] = {
            "subject": verdict.subject,
            "source": verdict.source,
            "faster": verdict.faster.text(),
            "slower": verdict.slower.text(),
            "published_ratio": verdict.ratio,
            "kernels": sides,
        }
        if any("error" in side for side in sides):
            row |= {"ratios": None, "called": "not executed"}
        else:
            ratios = [b / a for a, b in zip(sides[0]["us"], sides[1]["us"], strict=True)]
            row |= {"ratios": ratios, "called": called(ratios)}
        found.append(row)
    progress(len(every), len(every))
    return found


def absolute(executed: Executed) -> list[dict[str, Any]]:
    """Predicted and published microseconds of A8W4_TFLOPS."""
    found = []
    for tokens, tflops in A8W4_TFLOPS.items():
        rows = min(128, max(16, 1 << (tokens * TOPK // 128 - 1).bit_length()))
        columns, warps = (128, 4) if rows == 16 else (512, 8)
        w13_w2 = gemms_120b(2880)
        sides = [executed.predict(Case(gemm, tokens, tile(rows, columns, warps, 1))) for gemm in w13_w2]
        flops = sum(2 * tokens * TOPK * gemm.k * gemm.n for gemm in w13_w2)
        found.append(
            {
                "tokens": tokens,
                "block_m": rows,
                "published_us": flops / tflops / 1e6,
                "us": [sum(each) for each in zip(*(side["us"] for side in sides), strict=True)],
                "limit": [side["limit"] for side in sides],
            }
        )
    return found


def fit(curves: list[Curve]) -> tuple[float, float]:
    """The t0 (us) and bandwidth (bytes a us) of t = t0 + bytes / bandwidth with the least relative error."""
    points = [(us, curve.bytes(tokens)) for curve in curves for tokens, us in curve.weight_bound()]
    scaled = np.array([(1 / us, size / us) for us, size in points])
    t0, per_byte = np.linalg.lstsq(scaled, np.ones(len(points)))[0].tolist()
    return t0, 1 / per_byte


def by_bytes() -> list[dict[str, Any]]:
    """For each kernel, its own fit, and what the fit to all other kernels says of it."""
    found = []
    for kernel in dict.fromkeys(curve.kernel for curve in CURVES):
        own = [curve for curve in CURVES if curve.kernel == kernel]
        others = [curve for curve in CURVES if curve.kernel != kernel]
        row: dict[str, Any] = {"kernel": kernel}
        for name, curves in (("own", own), ("others", others)):
            t0, bandwidth = fit(curves)
            off = [
                (t0 + curve.bytes(tokens) / bandwidth) / us - 1
                for curve in own
                for tokens, us in curve.weight_bound()
            ]
            row[name] = {
                "t0_us": t0,
                "tb_per_s": bandwidth / 1e6,
                "error": math.sqrt(sum(each * each for each in off) / len(off)),
                "worst": max(off, key=abs),
            }
        found.append(row)
    return found
