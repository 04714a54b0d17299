"""The choice at load: which of a layer's plans is the fastest for how many tokens, timed on this GPU.

And, where the user wants that, which backend.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from vllm_mxfp4_gfx950.backends import Layer, TiledLayer
from vllm_mxfp4_gfx950.moe import MoeShape
from vllm_mxfp4_gfx950.random_layer import random_tokens
from vllm_mxfp4_gfx950.tiles import Ladder, Plan
from vllm_mxfp4_gfx950.timing import Calls

TIE = 1.02
"""What serves where nothing is timed is given up for a plan that is faster by more than this factor."""

CLOSE, SUSPECTED = 1.1, 0.01
"""Where the best plan leads by less than this factor, another may lead at a batch nearby: so much of the time
is thought to be lost there."""

SLOW = 1.25
"""A plan that takes longer than so many times the fastest, at both neighbours, is not timed between them."""

WORTH = 0.002
"""What is lost between two neighbours, times the logarithm of how far they are apart, is looked into above
this: 1% up to a batch that is larger by a fifth, or a tenth up to one that is larger by 2%."""

BATCHES = 40
"""The most numbers of tokens that are timed."""

CALLS = Ladder((8, 1024, 2**30), (8, 2, 1))
"""Calls in a graph, by number of tokens. Each has tokens of its own: where these are few, they read other
experts, so that a whole layer's weights are in no cache when a call begins. A rank's share may be in one."""

REPLAYS = 2

LAUNCHES = 8
"""Calls of each plan that are timed while the CPU launches them."""

Cost = Callable[[Layer, int], float]
"""Microseconds that a layer takes for so many tokens; infinite where it does not run."""


@dataclass(frozen=True)
class Choice:
    """What was timed, and what serves.

    Args:
        plans: which plan serves how many tokens.
        us: microseconds of each plan, by number of tokens.
        seconds: that it took.
    """

    plans: Ladder[Plan]
    us: dict[int, dict[Plan, float]]
    seconds: float

    def __str__(self) -> str:
        spans = []
        first = 1
        for last, plan in self.plans.pairs():
            times = ", ".join(f"{other} {us:.1f}" for other, us in self.us[last].items())
            spans.append(f"{plan} for {first} to {last} tokens (us at {last}: {times})")
            first = last + 1
        return f"{'; '.join(spans)}; {len(self.us)} batches were timed in {self.seconds:.2f} s"


def choose(layer: TiledLayer, largest: int, cost: Cost, captured: int | None = None) -> Choice:
    """Time a layer's plans: at powers of four and the largest batch, then where most is lost between two.

    There it looks where a plan's tiles change, as what serves just above may be much slower.

    Args:
        layer: as a backend has prepared it.
        largest: the largest batch that will be served.
        cost: times it.
        captured: as in `clock`; on both sides of it other plans may be the fastest.

    Returns:
        the choice; a batch that was not timed is served as the next larger one that was.
    """
    began = time.perf_counter()
    us: dict[int, dict[Plan, float]] = {}
    best: dict[int, Plan] = {}

    def timed(tokens: int, plans: Iterable[Plan]) -> None:
        us[tokens] = {plan: cost(layer.with_plans(Ladder((1,), (plan,))), tokens) for plan in plans}
        served, fastest = layer.plans.at(tokens), min(us[tokens], key=us[tokens].__getitem__)
        tied = us[tokens].get(served, math.inf) <= TIE * us[tokens][fastest]
        best[tokens] = served if tied else fastest

    borders = set() if captured is None else {captured, captured + 1} & {*range(1, largest)}
    for tokens in sorted(borders.union(coarse_batches(largest))):
        timed(tokens, layer.offered(tokens))
    alone = [layer.with_plans(Ladder((1,), (plan,))) for plan in layer.offered(1)]
    firsts = {tokens for each in alone for tokens in each.first_batches()}
    while len(us) < BATCHES:
        pair = max(itertools.pairwise(sorted(us)), key=lambda pair: lost(us, best, *pair), default=None)
        if pair is None or lost(us, best, *pair) <= WORTH:
            break
        tokens = between(pair, firsts)
        timed(tokens, [plan for plan in layer.offered(tokens) if any(near(us[n], plan) for n in pair)])
    return Choice(Ladder.of(best).merged(), us, time.perf_counter() - began)


def lost(us: dict[int, dict[Plan, float]], best: dict[int, Plan], low: int, high: int) -> float:
    """What serving all between two neighbours as the larger one may lose, times how far they are apart.

    Args:
        us: microseconds of each plan, by number of tokens.
        best: the plan that serves them.
        low, high: the neighbours.

    Returns:
        a share of the time, times the logarithm of the batches' ratio; 0 where none is between them.
    """
    if high == low + 1:
        return 0
    above_low = min(us[low].get(best[high], math.inf) / min(us[low].values()), 2)
    share = above_low - 1 if above_low > TIE else 0
    if min(lead(us[low]), lead(us[high])) < CLOSE:
        share = max(share, SUSPECTED)
    return share * math.log(high / low)


def between(pair: tuple[int, int], firsts: set[int]) -> int:
    """The batch to look at between two: the first of a tile, else the last before one, else their mean.

    Args:
        pair: the two.
        firsts: of all plans; of several the one nearest to the geometric mean is taken.
    """
    low, high = pair
    mean = math.isqrt(low * high - 1) + 1
    inside = [tokens for tokens in firsts if low < tokens < high]
    inside = inside or [tokens - 1 for tokens in firsts if low < tokens - 1 < high]
    return min(inside, key=lambda tokens: (abs(math.log(tokens / mean)), tokens), default=mean)


def near(us: dict[Plan, float], plan: Plan) -> bool:
    """Whether a plan is not far behind the fastest."""
    return us.get(plan, math.inf) <= SLOW * min(us.values())


def times(layer: Layer, largest: int, cost: Cost) -> dict[int, float]:
    """Microseconds of a layer as it serves, at the batches that are timed first."""
    return {tokens: cost(layer, tokens) for tokens in coarse_batches(largest)}


def ratio(us: dict[int, float], others: dict[int, float]) -> float:
    """By what factor a layer is slower than another, on average over the same batches."""
    return math.exp(statistics.mean(math.log(us[tokens] / others[tokens]) for tokens in us))


def coarse_batches(largest: int) -> list[int]:
    """Powers of four, and the largest batch."""
    powers = [4**power for power in range(largest.bit_length()) if 4**power < largest]
    return [*powers, largest]


def lead(us: dict[Plan, float]) -> float:
    """By what factor the fastest plan is faster than the next."""
    fastest, *others = sorted(us.values())
    return others[0] / fastest if others else math.inf


def clock(shape: MoeShape, device: torch.device, captured: int | None = None) -> Cost:
    """Times a layer on a GPU, in graphs. Without one a batch also waits for the CPU, if that takes longer.

    Args:
        shape: the layer.
        device: where it is.
        captured: the most tokens of a batch that has a graph; None where all have one.
    """
    launch_us: dict[tuple[type, Plan | None], float] = {}
    """Of each plan: the CPU takes as long for any number of tokens."""

    @functools.lru_cache(maxsize=1)
    def inputs(tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [random_tokens(shape, tokens, seed, str(device)) for seed in range(CALLS.at(tokens))]

    def cost(layer: Layer, tokens: int) -> float:
        given, count = inputs(tokens), CALLS.at(tokens)
        try:
            calls = Calls(lambda i: layer.run(*given[i]), count, device, alike=True)
            gpu_us = min(calls.seconds() for _ in range(REPLAYS)) * 1e6 / count
            if captured is None or tokens <= captured:
                return gpu_us
            kind = type(layer), layer.plans.at(tokens) if isinstance(layer, TiledLayer) else None
            if kind not in launch_us:
                launch_us[kind] = calls.launch_us(LAUNCHES)
            return max(gpu_us, launch_us[kind])
        except torch.OutOfMemoryError:
            raise
        except Exception:  # A compiler or a driver may raise anything: that plan does not serve.
            return math.inf

    return cost
