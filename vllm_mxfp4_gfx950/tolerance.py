"""The one rule by which kernels are compared with float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

FACTOR = 2.0
"""A row may err this many times as much as plain bf16 torch does on it."""

BACKSTOP = 2.0**-4
"""No element may err by more than this fraction of its row's largest."""


@dataclass(frozen=True)
class Comparison:
    """How far rows are from the truth.

    Args:
        frobenius: the error's Frobenius norm over the truth's.
        row: the worst row's error over what it may be; up to 1 is within the rule.
        miss: what breaks the rule; "" when nothing does.
    """

    frobenius: float
    row: float
    miss: str


def compare(
    got: torch.Tensor, truth: torch.Tensor, plain: torch.Tensor, where: torch.Tensor | None = None
) -> Comparison:
    """Every row's relative RMS error is at most twice plain bf16's, and no element is far off.

    Args:
        got: [T, H], what the backend under test computed.
        truth: fp64[T, H], on the same dequantized weights.
        plain: bf16[T, H], the same computation with every step in bf16 torch.
        where: bool[T, H], the elements to compare; None for all.
    """
    assert truth.dtype == torch.float64
    got, plain = got.to(truth), plain.to(truth)
    if where is not None:
        got, truth, plain = (each.masked_fill(~where, 0) for each in (got, truth, plain))
    for name, values in (("", got), ("of the truth ", truth), ("of plain bf16 ", plain)):
        if not values.isfinite().all():
            wrong = int((~values.isfinite()).sum())
            return Comparison(math.inf, math.inf, f"{wrong} elements {name}are not finite")
    tiny = torch.finfo(torch.float64).tiny
    size = truth.square().mean(dim=1).sqrt().clamp(min=tiny)
    error = (got - truth).square().mean(dim=1).sqrt() / size
    allowed = FACTOR * (plain - truth).square().mean(dim=1).sqrt() / size
    element = (got - truth).abs().amax(dim=1) / truth.abs().amax(dim=1).clamp(min=tiny)
    ratio = error / allowed.clamp(min=tiny)
    miss = ""
    if (error > allowed).any():
        worst = int((error - allowed).argmax())
        miss = (
            f"row {worst} errs by {error[worst]:.2e} (relative RMS), {allowed[worst]:.2e} is allowed; "
            f"{int((error > allowed).sum())} of {len(error)} rows are out"
        )
    elif (element > BACKSTOP).any():
        miss = f"row {int(element.argmax())} has an element off by {element.max():.2e} of its row's largest"
    frobenius = float((got - truth).norm() / truth.norm().clamp(min=tiny))
    return Comparison(frobenius, float(ratio.max()), miss)


def assert_rows_close(got: torch.Tensor, truth: torch.Tensor, plain: torch.Tensor) -> None:
    """Raise AssertionError where `compare` finds a miss."""
    miss = compare(got, truth, plain).miss
    if miss:
        raise AssertionError(miss)
