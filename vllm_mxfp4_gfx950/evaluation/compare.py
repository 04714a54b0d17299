"""What two sides that were asked the same differ by, and how sure that is."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.05
"""Chance that an interval misses, or a test rejects what is true, over all tasks of a comparison together."""

MANY = 10**7
"""More questions than anybody asks."""

REST = 1e-6
"""Probability below which what is left of a distribution is rounding: the servers compute in float32."""


@dataclass(frozen=True)
class Difference:
    """Two sides on the questions of one task.

    Args:
        questions: asked of both.
        tested, baseline: how many of them each answered right.
        lost: answered right by the baseline alone.
        won: answered right by the tested alone.
        p: of McNemar's exact test that losing and winning a question are equally likely.
        low, high: the interval for the difference of the accuracies, tested - baseline.
        alpha: the interval's and the test's share of LEVEL.
    """

    questions: int
    tested: int
    baseline: int
    lost: int
    won: int
    p: float
    low: float
    high: float
    alpha: float

    def verdict(self, margin: float) -> str:
        """Whether the tested side is less accurate by more than `margin`.

        Returns:
            "regression": the whole interval is beyond the margin; "as accurate": none of it is. Between them
            there were too few questions: "worse, perhaps within the margin" where the loss itself is no
            chance (`p` is below `alpha`), "undecided" where it may be.
        """
        if self.high < -margin:
            return "regression"
        if self.low >= -margin:
            return "as accurate"
        if self.lost > self.won and self.p < self.alpha:
            return "worse, perhaps within the margin"
        return "undecided"

    def decided_by(self, margin: float) -> int:
        """About how many questions would put the interval on one side of the margin.

        It is the least number at which it would, if as large a share is lost and won of all of them as was
        of these. Of that many, chance lets about half of the comparisons end so.

        Returns:
            `questions` where they do so already; MANY where that many do not.

        Source: the formula in `paired`, solved for the number. With many questions that is
        z^2 (changed - difference^2) / (difference + margin)^2, of the shares that changed and that differ.
        """

        def decided(questions: int) -> bool:
            lost, won = (count * questions / self.questions for count in (self.lost, self.won))
            low, high = interval(questions, lost, won, self.alpha)
            return high < -margin or low >= -margin

        return bisect.bisect_left(range(MANY), True, lo=self.questions, key=decided)


def interval(questions: int, lost: float, won: float, alpha: float) -> tuple[float, float]:
    """The interval of `paired`, from counts."""
    from scipy.stats import norm

    n = questions + 2
    middle = (won - lost) / n
    half = float(norm.isf(alpha / 2)) * math.sqrt(((won + lost + 2) / n - middle**2) / n)
    return max(-1.0, middle - half), min(1.0, middle + half)


def paired(tested: Sequence[bool], baseline: Sequence[bool], alpha: float = LEVEL) -> Difference:
    """Compare two sides question by question.

    The interval is Wald's with the adjustment of Bonett and Price, which has a width even where no
    question was answered differently.

    Args:
        tested, baseline: whether each question was answered right, in one order.
        alpha: one minus the confidence level.

    Source: McNemar 1947; Bonett and Price 2012; both as recommended by Fagerland, Lydersen and Laake,
    Statistics in Medicine 33 (2014) 2850.
    """
    from scipy.stats import binomtest

    pairs = list(zip(tested, baseline, strict=True))
    lost, won = pairs.count((False, True)), pairs.count((True, False))
    p = binomtest(won, won + lost).pvalue if won + lost else 1.0
    low, high = interval(len(pairs), lost, won, alpha)
    return Difference(len(pairs), sum(tested), sum(baseline), lost, won, float(p), low, high, alpha)


@dataclass(frozen=True)
class Position:
    """A token of the text, and what was expected in its place.

    Args:
        token: its id.
        text: it, decoded.
        logprob: its log-probability after the tokens before it.
        top: the likeliest tokens by id with their log-probabilities, the likeliest first.
        top_text: the likeliest, decoded.
    """

    token: int
    text: str
    logprob: float
    top: dict[int, float]
    top_text: str

    @property
    def best(self) -> int:
        """The likeliest token."""
        return next(iter(self.top))


@dataclass(frozen=True)
class Divergence:
    """Two sides' distributions over one text.

    Args:
        positions: tokens of the text that were compared.
        mean_kl, max_kl: nats, of `kl`.
        same_best: how many of them both sides found the same token the likeliest at.
        worst: the position with max_kl.
        tested_nll, baseline_nll: nats by which each side was surprised by a token of the text, on average.
    """

    positions: int
    mean_kl: float
    max_kl: float
    same_best: int
    worst: int
    tested_nll: float
    baseline_nll: float


def kl(baseline: dict[int, float], tested: dict[int, float]) -> float:
    """KL(baseline || tested), in nats, of two distributions whose likeliest tokens are known.

    The cells are the tokens that the baseline reports, and one for all others. Where the tested side does
    not report one of them, its lowest reported probability stands in, which is at least the true one. So
    the result never exceeds the divergence over the whole vocabulary, and is that one where both report
    the whole vocabulary.

    Args:
        baseline, tested: log-probabilities by token id.
    """
    floor = min(tested.values())
    total = sum(math.exp(p) * (p - tested.get(token, floor)) for token, p in baseline.items())
    p_rest = max(REST, 1 - sum(map(math.exp, baseline.values())))
    q_rest = max(REST, 1 - sum(math.exp(tested[token]) for token in baseline if token in tested))
    return max(total + p_rest * math.log(p_rest / q_rest), 0.0)  # In this order NaN stays NaN.


def divergence(tested: Sequence[Position], baseline: Sequence[Position]) -> tuple[Divergence, list[float]]:
    """Compare two sides over one text.

    Args:
        tested, baseline: the same positions.

    Returns:
        The comparison, and the divergence at each position.
    """
    pairs = list(zip(tested, baseline, strict=True))
    kls = [kl(base.top, test.top) for test, base in pairs]
    worst = max(range(len(kls)), key=lambda index: math.inf if math.isnan(kls[index]) else kls[index])
    result = Divergence(
        positions=len(pairs),
        mean_kl=math.fsum(kls) / len(kls),
        max_kl=kls[worst],
        same_best=sum(test.best == base.best for test, base in pairs),
        worst=worst,
        tested_nll=-math.fsum(test.logprob for test, _ in pairs) / len(pairs),
        baseline_nll=-math.fsum(base.logprob for _, base in pairs) / len(pairs),
    )
    return result, kls
