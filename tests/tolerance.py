"""The one rule by which kernels are compared with float64."""

import torch

FACTOR = 2.0
"""A row may err this many times as much as plain bf16 torch does on it."""

BACKSTOP = 2.0**-4
"""No element may err by more than this fraction of its row's largest."""


def assert_rows_close(got: torch.Tensor, truth: torch.Tensor, plain: torch.Tensor) -> None:
    """Every row's relative RMS error is at most twice plain bf16's, and no element is far off.

    Args:
        got: [T, H], what the backend under test computed.
        truth: fp64[T, H], on the same dequantized weights.
        plain: bf16[T, H], the same computation with every step in bf16 torch.
    """
    assert truth.dtype == torch.float64
    got, plain = got.to(truth), plain.to(truth)
    assert got.isfinite().all(), f"{int((~got.isfinite()).sum())} elements are not finite"
    size = truth.square().mean(dim=1).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    error = (got - truth).square().mean(dim=1).sqrt() / size
    allowed = FACTOR * (plain - truth).square().mean(dim=1).sqrt() / size
    worst = int((error - allowed).argmax())
    assert (error <= allowed).all(), (
        f"row {worst} errs by {error[worst]:.2e} (relative RMS), {allowed[worst]:.2e} is allowed; "
        f"{int((error > allowed).sum())} of {len(error)} rows are out"
    )
    element = (got - truth).abs().amax(dim=1) / truth.abs().amax(dim=1).clamp(
        min=torch.finfo(truth.dtype).tiny
    )
    assert (element <= BACKSTOP).all(), (
        f"row {int(element.argmax())} has an element off by {element.max():.2e} of its row's largest"
    )
