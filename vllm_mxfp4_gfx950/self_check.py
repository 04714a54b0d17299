"""A prepared layer against float64 before it serves: the chosen backend, on this machine, on real weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from vllm_mxfp4_gfx950 import backends
from vllm_mxfp4_gfx950.backends import reference
from vllm_mxfp4_gfx950.errors import brief
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights
from vllm_mxfp4_gfx950.settings import Settings
from vllm_mxfp4_gfx950.tiles import Plan
from vllm_mxfp4_gfx950.tolerance import compare

TOKENS = (1, 8, 32, 64, 256, 1024, 2048)
"""Batches that are always tried: from one row of an expert to full tiles, and every kernel of the routing."""

NAN_TOKENS = 8
"""Tokens of the batch that is run again with a NaN in one of them."""

PLAN_NAMES: dict[Plan, str] = {
    "own": "our own matmuls",
    "two_fp8": "our matmuls with two FP8 addends",
    "table": "a table's tiles",
    "package": "the package's own tiles",
}

FAR = 30.0
"""By so much the logits of experts that are not to be chosen lie below the others."""

LOUD = 16.0
"""By so much every second token is louder, as the SwiGLU's limit and its alpha show in different tokens."""


@dataclass(frozen=True)
class Outcome:
    """What a check found.

    Args:
        miss: why the layer must not serve; "" when it may.
        row: the worst row's error over what `tolerance` allows.
        tokens: the batches that were tried.
        seconds: that it took, compilation included.
        missed: the batch that says why it must not; 0 when there is none.
    """

    miss: str
    row: float
    tokens: tuple[int, ...]
    seconds: float
    missed: int = 0

    def __str__(self) -> str:
        if self.miss:
            return f"FAILED after {self.seconds:.2f} s: {self.miss}"
        batches = ", ".join(map(str, self.tokens))
        return (
            f"{batches} tokens against float64: worst row at {self.row:.2f} of what is allowed "
            f"({self.seconds:.2f} s)"
        )


def check(
    layer: backends.Layer,
    weights: MoeWeights,
    shape: MoeShape,
    tokens: tuple[int, ...] = (),
) -> Outcome:
    """Run batches through a prepared layer, and compare every row.

    Tokens choose among twice topk of this rank's experts, from the first to the last, so that few are
    dequantized. Each batch is the beginning of the largest, whose truth is computed once.

    Args:
        layer: as a backend has prepared it.
        weights: the same layer as it was loaded; stays as it is.
        shape: its sizes.
        tokens: sizes of the batches; none for those of `sizes`.

    Raises:
        torch.OutOfMemoryError: it says nothing of the backend.
    """
    began = time.perf_counter()
    tokens = tokens or sizes(layer)
    x, logits = batch(weights, shape, max(tokens))
    truth, plain = reference.truth_and_plain(x, logits, weights, shape)
    worst, miss = 0.0, ""
    for index, count in enumerate(tokens):
        try:
            out = layer.run(x[:count], logits[:count])
            found = compare(out, truth[:count], plain[:count])
            miss, worst = found.miss, max(worst, found.row)
            if not miss and count == NAN_TOKENS:
                miss = nan_lost(layer, x[:count], logits[:count])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # A compiler or a driver may raise anything.
            miss = brief(error)
        if miss:
            seconds = time.perf_counter() - began
            return Outcome(f"{count} tokens: {miss}", worst, tokens[: index + 1], seconds, count)
    return Outcome("", worst, tokens, time.perf_counter() - began)


def nan_lost(layer: backends.Layer, x: torch.Tensor, logits: torch.Tensor) -> str:
    """What is wrong with a token that has one NaN, or with the others beside it.

    Returns:
        "" where it alone comes out as NaN, and for a layer of which that is not asked.
    """
    if not (isinstance(layer, backends.TiledLayer) and layer.keeps_nan(len(x))):
        return ""
    spoilt = x.clone()
    spoilt[0, -1] = torch.nan
    out = layer.run(spoilt, logits)
    if not out[0].isnan().all():
        return "a NaN is lost"
    return "" if out[1:].isfinite().all() else "a NaN spoils other tokens"


def sizes(layer: backends.Layer) -> tuple[int, ...]:
    """TOKENS, and the smallest batch of each kernel that the layer has, so that each runs."""
    more = layer.first_batches() if isinstance(layer, backends.SteppedLayer) else set()
    return tuple(sorted({*TOKENS, *more}))


def batch(weights: MoeWeights, shape: MoeShape, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16[T, H] activations, and bf16[T, global_experts] logits in favour of some of this rank's experts."""
    device = weights.w13.device
    generator = torch.Generator(device).manual_seed(tokens)
    x = torch.randn(tokens, shape.hidden, generator=generator, device=device).bfloat16()
    x[1::2] *= LOUD
    logits = torch.randn(tokens, shape.global_experts, generator=generator, device=device)
    here = torch.arange(shape.experts, device=device)
    if weights.expert_map is not None:
        here = torch.where(weights.expert_map >= 0)[0]
    far = torch.ones(shape.global_experts, dtype=torch.bool, device=device)
    some = torch.linspace(0, len(here) - 1, min(len(here), 2 * shape.topk)).long()
    far[here[some]] = False
    return x, (logits - FAR * far).bfloat16()


def prepare(
    selection: backends.Selection,
    weights: MoeWeights,
    shape: MoeShape,
    settings: Settings,
    report: Callable[[str, Outcome], None],
    arrange: Callable[[backends.Layer], backends.Layer] = lambda layer: layer,
) -> tuple[backends.Selection, backends.Layer]:
    """Prepare a layer with the first backend that computes it right, and without its plans that do not.

    A copy of the weights is kept meanwhile, as backends consume what they are given.

    Args:
        selection: the choice so far.
        weights: consumed.
        shape: the layer's sizes.
        settings: what the user asked for.
        report: called with a backend's name and what its check found.
        arrange: chooses what of a prepared layer serves, before it is checked.

    Returns:
        the choice, and the prepared layer.

    Raises:
        Mxfp4Error: no backend is left.
        torch.OutOfMemoryError: there was too little memory; another backend would need as much.
    """
    failed: dict[str, str] = {}
    while True:
        backend, layer = selection.backend, None
        name, wrong = backend.NAME, dict[Plan, str]()
        try:
            layer = arrange(backend.prepare(weights.clone(), shape, settings.tables))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            outcome = Outcome(f"while preparing, {brief(error)}", 0.0, (), 0.0)
        else:
            outcome = check(layer, weights, shape)
        report(name, outcome)
        while outcome.miss and isinstance(layer, backends.TiledLayer):
            wrong[layer.plans.at(outcome.missed)] = outcome.miss
            layer = layer.without(*wrong)
            if layer is not None:
                name = f"{backend.NAME} without {' and '.join(PLAN_NAMES[plan] for plan in wrong)}"
                outcome = check(layer, weights, shape)
                report(name, outcome)
        if layer is not None and not outcome.miss:
            without = tuple((PLAN_NAMES[plan], f"the self-check: {miss}") for plan, miss in wrong.items())
            return replace(selection, refused=(*selection.refused, *without)), layer
        failed[backend.NAME] = f"the self-check: {outcome.miss}"
        selection = backends.select(shape, selection.arch, settings, failed)
