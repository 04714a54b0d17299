"""What `vllm-mxfp4 eval` found, as text and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_mxfp4_gfx950.evaluation.compare import Difference, Divergence, Position

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CONTEXT = 20
"""Tokens of text that are shown before the worst one."""

HEADER = """\
| task | questions | tested | baseline | difference | interval | lost, won | McNemar p | verdict |
|---|---|---|---|---|---|---|---|---|"""


def accuracy_row(task: str, found: Difference, margin: float) -> str:
    """One task in the table of accuracies."""
    n = found.questions
    cells = (
        task,
        n,
        f"{found.tested / n:.4f}",
        f"{found.baseline / n:.4f}",
        f"{(found.tested - found.baseline) / n:+.4f}",
        f"{found.low:+.4f} to {found.high:+.4f}",
        f"{found.lost}, {found.won}",
        f"{found.p:.2g}",
        found.verdict(margin),
    )
    return f"| {' | '.join(map(str, cells))} |"


def divergence_lines(
    found: Divergence, tested: Sequence[Position], baseline: Sequence[Position], bound: float
) -> list[str]:
    """The comparison of the distributions, with the worst token in its context."""
    support = f"the baseline's {min(len(p.top) for p in baseline)} likeliest tokens and all others as one"
    test, base = tested[found.worst], baseline[found.worst]
    context = "|".join(p.text for p in baseline[max(0, found.worst - CONTEXT) : found.worst])
    within = "within" if found.mean_kl <= bound else "BEYOND"
    return [
        f"- mean KL(baseline, tested) {found.mean_kl:.3e} nats over {support}, {within} {bound:g}",
        f"- {found.positions} tokens; the same token likeliest at {found.same_best} "
        f"({found.same_best / found.positions:.4f})",
        f"- nats by which they surprised: tested {found.tested_nll:.4f}, baseline {found.baseline_nll:.4f}",
        f"- worst: KL {found.max_kl:.3e} at token {found.worst}, {base.text!r} after {context!r}: "
        f"tested expects {test.top_text!r} ({test.top[test.best]:.3f}), "
        f"baseline {base.top_text!r} ({base.top[base.best]:.3f})",
    ]


def plot(
    file: Path, differences: dict[str, Difference], margin: float, kls: Sequence[float], bound: float
) -> None:
    """The accuracies' differences with their intervals, and the divergence at each token.

    Args:
        file: to be written.
        differences: by task; may be empty.
        margin: that a difference is held against.
        kls: in nats, by position; may be empty.
        bound: that their mean is held against.
    """
    from matplotlib.figure import Figure

    drawings = [draw for draw, wanted in ((_differences, differences), (_kls, kls)) if wanted]
    figure = Figure(figsize=(7, 3 * len(drawings)), layout="constrained")
    for index, draw in enumerate(drawings):
        axes = figure.add_subplot(len(drawings), 1, index + 1)
        if draw is _differences:
            _differences(axes, differences, margin)
        else:
            _kls(axes, kls, bound)
    figure.savefig(file)


def _differences(axes: Axes, differences: dict[str, Difference], margin: float) -> None:
    for row, found in enumerate(differences.values()):
        middle = (found.tested - found.baseline) / found.questions
        axes.errorbar(
            middle, row, xerr=[[middle - found.low], [found.high - middle]], fmt="o", capsize=4, color="C0"
        )
    axes.axvline(-margin, color="C3", label=f"margin {margin:g}")
    axes.axvline(0, color="0.7")
    axes.set_yticks(range(len(differences)), list(differences))
    axes.set_ylim(len(differences) - 0.5, -0.5)
    axes.set_xlabel("accuracy, tested - baseline")
    axes.legend()


def _kls(axes: Axes, kls: Sequence[float], bound: float) -> None:
    axes.semilogy([max(value, 1e-9) for value in kls], ".", markersize=2)
    axes.axhline(bound, color="C3", label=f"bound of the mean {bound:g}")
    axes.set_xlabel("token of the text")
    axes.set_ylabel("KL, nats")
    axes.legend()
