"""What `vllm-mxfp4 eval` found, as text and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_mxfp4_gfx950.evaluation.compare import MANY, Difference, Divergence, Position

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


def decision_lines(differences: dict[str, Difference], margin: float) -> list[str]:
    """For each task without a verdict, about how many questions would bring one."""
    lines = []
    for task, found in differences.items():
        needed = found.decided_by(margin)
        if needed > found.questions:
            number = f"more than {needed}" if needed == MANY else f"about {needed}"
            lines.append(f"- {task}: {number} questions would decide, with such shares lost and won")
    return lines


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
    file: Path,
    intervals: dict[str, tuple[float, float, float]],
    nats: Sequence[float],
    labels: tuple[str, str],
    margin: float | None = None,
    bound: float | None = None,
) -> None:
    """Figures of the tasks with their intervals, and one for each token of a text.

    Args:
        file: to be written.
        intervals: by task the figure, its lower and its upper end; may be empty.
        nats: by position; may be empty.
        labels: what the two kinds of figures are.
        margin: that a difference is held against; None without one.
        bound: that the mean of `nats` is held against; None without one.
    """
    from matplotlib.figure import Figure

    count = bool(intervals) + bool(nats)
    figure = Figure(figsize=(7, 3 * count), layout="constrained")
    if intervals:
        _intervals(figure.add_subplot(count, 1, 1), intervals, labels[0], margin)
    if nats:
        _nats(figure.add_subplot(count, 1, count), nats, labels[1], bound)
    figure.savefig(file)


def _intervals(
    axes: Axes, intervals: dict[str, tuple[float, float, float]], label: str, margin: float | None
) -> None:
    for row, (middle, low, high) in enumerate(intervals.values()):
        axes.errorbar(middle, row, xerr=[[middle - low], [high - middle]], fmt="o", capsize=4, color="C0")
    if margin is not None:
        axes.axvline(-margin, color="C3", label=f"margin {margin:g}")
        axes.axvline(0, color="0.7")
        axes.legend()
    axes.set_yticks(range(len(intervals)), list(intervals))
    axes.set_ylim(len(intervals) - 0.5, -0.5)
    axes.set_xlabel(label)


def _nats(axes: Axes, nats: Sequence[float], label: str, bound: float | None) -> None:
    axes.semilogy([max(value, 1e-9) for value in nats], ".", markersize=2)
    if bound is not None:
        axes.axhline(bound, color="C3", label=f"bound of the mean {bound:g}")
        axes.legend()
    axes.set_xlabel("token of the text")
    axes.set_ylabel(label)
