"""The choice at load: the fastest plan serves, at batches that were not timed too, and none that is wrong."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import random
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_self_check import BY_TABLE, SHAPE, SeveralPlans, backend, choose_from

from vllm_mxfp4_gfx950 import backends, choice, self_check
from vllm_mxfp4_gfx950.backends import reference
from vllm_mxfp4_gfx950.moe import MoeWeights
from vllm_mxfp4_gfx950.random_layer import random_weights
from vllm_mxfp4_gfx950.settings import Settings
from vllm_mxfp4_gfx950.tiles import Ladder, Plan

serving = pytest.importorskip("vllm_mxfp4_gfx950.serving")

LARGEST = 8192
Times = Callable[[Plan, int], float]


def steps(tokens: int, rows: int, us: float) -> float:
    """A kernel that reads all weights once, and once more for every so many rows."""
    return 20 + us * math.ceil(tokens / rows)


CURVES: dict[str, Times] = {
    "own first": lambda plan, n: {"own": 10 + n, "table": 60 + n / 2, "package": 70 + n / 2}[plan],
    "package between": lambda plan, n: {
        "own": math.inf, "table": steps(n, 1024, 500), "package": steps(n, 256, 130),
    }[plan],
    "steps": lambda plan, n: {
        "own": steps(n, 128, 20), "table": steps(n, 512, 60), "package": steps(n, 384, 50),
    }[plan],
    "slow table": lambda plan, n: {"own": 1000 + n, "table": 3000 + n, "package": 50 + n}[plan],
}  # fmt: skip
"""Microseconds of each plan."""


def layer() -> SeveralPlans:
    """One that is not run."""
    return SeveralPlans(random_weights(SHAPE, seed=0), ())


def timed(curve: Times, asked: list[tuple[Plan, int]] | None = None) -> choice.Cost:
    """A clock that reads these times."""

    def cost(one: Any, tokens: int) -> float:
        plan = one.plans.at(tokens)
        assert one.plans.rungs == (plan,)
        if asked is not None:
            asked.append((plan, tokens))
        return curve(plan, tokens)

    return cost


def behind(plans: Ladder[Plan], curve: Times, but: set[int]) -> float:
    """By what factor such plans are slower than the best, on average over batches drawn at random."""
    draw = random.Random(0)
    ratios = []
    for tokens in {int(2 ** draw.uniform(0, 13)) for _ in range(400)} - but:
        times = {plan: curve(plan, tokens) for plan in layer().offered(tokens)}
        ratios.append(times[plans.at(tokens)] / min(times.values()))
    return statistics.mean(ratios)


@pytest.mark.parametrize("curve", CURVES)
def test_best_at_batches_that_were_not_timed(curve: str) -> None:
    """Within 2% of the best; what serves without a choice is not, but where it is the best."""
    found = choice.choose(layer(), LARGEST, timed(CURVES[curve]))
    assert behind(found.plans, CURVES[curve], {*found.us}) < 1.02
    assert (behind(layer().plans, CURVES[curve], {*found.us}) > 1.04) == (curve != "own first")


class Stepped(SeveralPlans):
    """A layer whose table has other tiles from some batches on."""

    STEPS = frozenset({897, 3073})

    def with_plans(self, plans: Ladder[Plan]) -> Stepped:
        """As in TiledLayer."""
        return Stepped(self.weights, self.wrong, plans)

    def first_batches(self) -> set[int]:
        """As in TiledLayer."""
        return {*self.STEPS} if "table" in self.plans.rungs else {65}


def jumps(plan: Plan, tokens: int) -> float:
    """A table's tile is slower than the package's up to a tenth of the way to the next one."""
    since = min((tokens / first for first in Stepped.STEPS if first <= tokens), default=2.0)
    return {"own": 50, "table": 112 if since < 1.1 else 99, "package": 100}[plan] * tokens**0.8


@pytest.mark.parametrize(("kind", "seen"), [(Stepped, True), (SeveralPlans, False)])
def test_tiles_that_change(kind: type[SeveralPlans], seen: bool) -> None:
    """Just above the last batch of a tile the next one may be slow: it is looked at there."""
    found = choice.choose(kind(random_weights(SHAPE, seed=0), ()), LARGEST, timed(jumps))
    ratios = [
        jumps(found.plans.at(tokens), tokens) / min(jumps("table", tokens), jumps("package", tokens))
        for first in Stepped.STEPS
        for tokens in (first, first + 10)
    ]
    assert (max(ratios) < 1.02) == seen


@pytest.mark.parametrize(("captured", "worst"), [(800, 1.0), (None, 50 / 47)])
def test_where_graphs_end(captured: int | None, worst: float) -> None:
    """Above 800 tokens the CPU decides, and below the GPU: both sides of it are looked at."""

    def curve(plan: Plan, tokens: int) -> float:
        launched = 2000 if plan != "own" and tokens > 800 else 0
        return max(tokens * {"own": 50, "table": 47, "package": 60}[plan] / 50, launched)

    found = choice.choose(OfAnySize(random_weights(SHAPE, seed=0), ()), 2000, timed(curve), captured)
    ratios = [
        curve(found.plans.at(n), n) / min(curve(plan, n) for plan in ("own", "table"))
        for n in range(300, 1900)
    ]
    assert max(ratios) == pytest.approx(worst)


class OfAnySize(SeveralPlans):
    """A layer whose plans all take batches of any size."""

    def with_plans(self, plans: Ladder[Plan]) -> OfAnySize:
        """As in TiledLayer."""
        return OfAnySize(self.weights, self.wrong, plans)

    def offered(self, tokens: int) -> tuple[Plan, ...]:
        """As in TiledLayer."""
        return "own", "table", "package"


ROWS = (16, 32, 64, 128)
WORKGROUP_US = {16: 4.2, 32: 5.4, 64: 8.0, 128: 12.5}
"""Of 32 experts' tiles of so many rows: about what one takes on an H200, shared by all workgroups."""


@functools.cache
def workgroups(tokens: int, rows: int) -> float:
    """Those that so many tokens fill on average, each with four of 32 experts, in tiles of so many rows."""
    mean = tokens * 4 / 32
    spread = math.sqrt(2 * mean * (1 - 1 / 32))
    full = (math.erfc((tile * rows + 0.5 - mean) / spread) / 2 for tile in range(int(mean / rows) + 9))
    return 32 * sum(full)


class Drawn(OfAnySize):
    """A layer whose plans have drawn tiles; where the package changes its own is not known."""

    def __init__(self, seed: int, plans: Ladder[Plan] = BY_TABLE) -> None:
        super().__init__(random_weights(SHAPE, seed=0), (), plans)
        self.seed, draw = seed, random.Random(seed)
        self.tiles: dict[Plan, Ladder[tuple[int, float]]] = {}
        for plan, sooner, slower in (("own", 0.6, 1.12), ("table", 0.6, 1.12), ("package", 1.0, 1.3)):
            bounds = [int(8 * rows * draw.uniform(sooner, 2 - sooner)) for rows in ROWS[:-1]]
            rungs = tuple((rows, draw.uniform(1, slower)) for rows in ROWS)
            self.tiles[plan] = Ladder((*sorted(bounds), LARGEST), rungs)  # type: ignore[index]

    def with_plans(self, plans: Ladder[Plan]) -> Drawn:
        """As in TiledLayer."""
        return Drawn(self.seed, plans)

    def first_batches(self) -> set[int]:
        """As in TiledLayer."""
        known = [self.tiles[plan] for plan in self.plans.rungs if plan != "package"]
        return {bound + 1 for ladder in known for bound in ladder.bounds[:-1]}

    def us(self, plan: Plan, tokens: int) -> float:
        """Its weights are read, or its workgroups are worked off, whatever takes longer."""
        rows, factor = self.tiles[plan].at(tokens)
        read = 100 * (1 - (1 - 1 / 32) ** (4 * tokens))
        return 30 + max(read, factor * workgroups(tokens, rows) * WORKGROUP_US[rows])


@pytest.mark.parametrize(("batches", "good"), [(choice.BATCHES, True), (7, False)])
def test_drawn_layers(monkeypatch: pytest.MonkeyPatch, batches: int, good: bool) -> None:
    """Of their batches few are more than 3% behind the best: hardly any that was not worth a look."""
    monkeypatch.setattr(choice, "BATCHES", batches)
    ratios = []
    for seed in range(40):
        layer, draw = Drawn(seed), random.Random(seed)
        found = choice.choose(layer, LARGEST, timed(layer.us))
        for tokens in {round(LARGEST ** draw.random()) for _ in range(100)} - found.us.keys():
            us = {plan: layer.us(plan, tokens) for plan in layer.offered(tokens)}
            ratios.append(us[found.plans.at(tokens)] / min(us.values()))
    behind = sum(ratio > 1.03 for ratio in ratios) / len(ratios)
    print(f"{len(ratios)} batches: {statistics.mean(ratios):.4f} on average, {behind:.2%} behind")
    assert (behind < 0.02) == good


def test_table_that_is_slow_serves_nothing() -> None:
    """Nor do our own matmuls, where they are."""
    found = choice.choose(layer(), LARGEST, timed(CURVES["slow table"]))
    assert found.plans == Ladder((LARGEST,), ("package",))


def test_ties() -> None:
    """What serves anyway keeps a batch, unless another is faster by more than 2%."""
    for gain, rungs in ((1.019, ("own", "table")), (1.021, ("package",))):
        curve: Times = lambda plan, n, gain=gain: 100 / gain if plan == "package" else 100  # type: ignore[misc]  # noqa: E731
        assert choice.choose(layer(), LARGEST, timed(curve)).plans.rungs == rungs


@pytest.mark.parametrize("largest", [1, 2, 7, 64, 2048, 8192, 65536])
def test_what_is_timed(largest: int) -> None:
    """The largest batch, each plan that can serve, nothing larger and nothing twice, and not too many."""
    asked: list[tuple[Plan, int]] = []
    found = choice.choose(layer(), largest, timed(CURVES["steps"], asked))
    assert len({*asked}) == len(asked)
    assert {*asked} == {(plan, tokens) for tokens, us in found.us.items() for plan in us}
    assert all({*us} <= {*layer().offered(tokens)} for tokens, us in found.us.items())
    assert {*found.us[largest]} == {*layer().offered(largest)}
    assert max(found.us) == largest == found.plans.bounds[-1]
    assert min(found.us) == 1
    assert len(found.us) <= choice.BATCHES


def test_clear_lead_is_not_looked_into() -> None:
    """Where one plan is twice as fast everywhere, the first batches are all."""
    found = choice.choose(layer(), 4096, timed(lambda plan, n: 50 if plan == "package" else 100))
    assert sorted(found.us) == [1, 4, 16, 64, 256, 1024, 4096]


def test_line() -> None:
    """What serves, by which figures."""
    found = choice.choose(
        layer(), 1024, timed(lambda plan, n: {"own": n, "table": 64.5, "package": 80}[plan])
    )
    text = str(dataclasses.replace(found, seconds=0.5))
    assert text.startswith(
        "own for 1 to 64 tokens (us at 64: own 64.0, table 64.5, package 80.0); table for 65 to 1024 "
    )
    assert text.endswith(f"; {len(found.us)} batches were timed in 0.50 s")


@pytest.fixture(name="weights")
def fixture_weights() -> MoeWeights:
    """A layer."""
    return random_weights(SHAPE, seed=0)


def served(
    monkeypatch: pytest.MonkeyPatch,
    weights: MoeWeights,
    curve: Times,
    wrong: tuple[Plan, ...] = (),
    **settings: Any,
) -> Any:
    """Three layers of a model whose kernels take such times; what was timed, and what serves each."""
    choose_from(monkeypatch, backend("some", prepare=lambda weights, *_: SeveralPlans(weights, wrong)))
    asked: list[tuple[Plan, int]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(choice, "clock", lambda shape, device, captured: timed(curve, asked))
    layers = serving.ModelLayers(SHAPE, "gfx950", Settings(**settings), 2048)
    return len(asked), [layers.prepare(weights, f"layers.{i}").plans for i in range(3)], len(asked), layers


def test_first_layer_decides(
    monkeypatch: pytest.MonkeyPatch, weights: MoeWeights, caplog: pytest.LogCaptureFixture
) -> None:
    """It is timed once, the line is logged, and all layers serve so."""
    with caplog.at_level(logging.INFO, logger="vllm.mxfp4_triton"):
        before, plans, after, layers = served(monkeypatch, weights, CURVES["slow table"])
    assert (before, plans) == (0, [Ladder((2048,), ("package",))] * 3)
    assert after == sum(len(each) for each in layers.choice.us.values())
    assert [
        line for line in caplog.messages if line.startswith("Chosen by time: package for 1 to 2048 tokens")
    ]


def test_both_sides_of_the_largest_graph(monkeypatch: pytest.MonkeyPatch, weights: MoeWeights) -> None:
    """The first layer is timed there, by a clock that knows it."""
    choose_from(monkeypatch, backend("some", prepare=lambda weights, *_: SeveralPlans(weights, ())))
    known: list[int | None] = []

    def clock(_shape: Any, _device: Any, captured: int | None) -> choice.Cost:
        known.append(captured)
        return timed(CURVES["own first"])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(choice, "clock", clock)
    layers = serving.ModelLayers(SHAPE, "gfx950", Settings(), 2048, 100)
    layers.prepare(weights, "layers.0")
    assert known == [100]
    assert layers.choice is not None
    assert {100, 101} <= layers.choice.us.keys()


def test_fast_and_wrong_serves_nothing(monkeypatch: pytest.MonkeyPatch, weights: MoeWeights) -> None:
    """The check comes after the choice, and the next plan takes over."""
    _, plans, _, layers = served(monkeypatch, weights, CURVES["slow table"], wrong=("package",))
    assert {plan for ladder in plans for plan in ladder.rungs} == {"table"}
    assert "the package's own tiles: the self-check: 1 tokens: row 0 errs by " in str(layers)


@pytest.mark.parametrize("settings", [{"time_at_load": False}, {"self_check": "off"}])
def test_not_timed(monkeypatch: pytest.MonkeyPatch, weights: MoeWeights, settings: dict[str, Any]) -> None:
    """By a setting; or as nothing would check what was chosen."""
    before, plans, after, _ = served(monkeypatch, weights, CURVES["slow table"], **settings)
    assert (before, after) == (0, 0)
    assert [ladder.rungs for ladder in plans] == [("own", "table")] * 3


def test_pinned_by_the_users_table(monkeypatch: pytest.MonkeyPatch, weights: MoeWeights) -> None:
    """Nothing is timed."""
    monkeypatch.setattr(SeveralPlans, "pinned", True)
    before, plans, after, _ = served(monkeypatch, weights, CURVES["slow table"])
    assert (before, after, plans[0].rungs) == (0, 0, ("own", "table"))


def test_clock_on_a_cpu() -> None:
    """It times what runs, and what does not is never the fastest."""
    cost = choice.clock(SHAPE, torch.device("cpu"))
    assert 0 < cost(layer(), 3) < math.inf
    assert cost(backend("bad", lambda *_: 1 / 0).prepare(random_weights(SHAPE, seed=0)), 3) == math.inf
    assert self_check.PLAN_NAMES.keys() == {*choice.Plan.__args__}


@pytest.mark.parametrize(
    ("captured", "us"), [(None, [30, 50, 30]), (4, [30, 50, 40]), (3, [30, 50, 40]), (0, [40, 50, 40])]
)
def test_the_cpu_counts_where_no_graph_is(
    captured: int | None, us: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes 40 us to launch a layer, and the GPU 10 for each token; it is asked once."""
    asked: list[int] = []

    class Clock:
        def __init__(self, call: Callable[[int], Any], count: int, *_: Any, **__: Any) -> None:
            self.us = 10e-6 * count * len(call(0))

        def seconds(self) -> float:
            return self.us

        def launch_us(self, times: int) -> float:
            asked.append(times)
            return 40

    monkeypatch.setattr(choice, "Calls", Clock)
    cost = choice.clock(SHAPE, torch.device("cpu"), captured)
    one = layer().with_plans(Ladder((1,), ("table",)))
    assert [cost(one, tokens) for tokens in (3, 5, 3)] == pytest.approx([us[0], us[1], us[0]])
    assert len(asked) == (captured is not None)


@pytest.mark.parametrize(
    ("pair", "tokens"),
    [
        *(((1, 4), 2), ((64, 512), 182), ((512, 1024), 769), ((768, 1024), 769), ((769, 1024), 888)),
        *(((640, 769), 768), ((640, 768), 702)),
    ],
)
def test_between(pair: tuple[int, int], tokens: int) -> None:
    """Where something changes, if it does; and then just before."""
    assert choice.between(pair, {3 * 512, 769, 513, 640}) == tokens


class OneWay:
    """A layer of a backend with one plan for all batches, which takes so many times what `timed` says."""

    def __init__(self, weights: MoeWeights, us: float, factor: float = 1.0) -> None:
        self.layer, self.us, self.factor = reference.prepare(weights, SHAPE), us, factor

    def run(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The reference's, times a factor."""
        return self.layer.run(x, logits) * self.factor


@pytest.mark.parametrize(
    ("us", "factors", "served"),
    [
        ({"a": 100, "b": 90, "c": 95}, {}, "b"),
        ({"a": 100, "b": 99, "c": 120}, {}, "a"),  # Tied: the first one stays.
        ({"a": 100, "b": 50, "c": 95}, {"b": 1.1}, "c"),
        ({"a": 100, "b": 50, "c": 20}, {"b": 1.1, "c": 1.1}, "a"),
    ],
)
def test_fastest_backend(
    monkeypatch: pytest.MonkeyPatch,
    weights: MoeWeights,
    caplog: pytest.LogCaptureFixture,
    us: dict[str, float],
    factors: dict[str, float],
    served: str,
) -> None:
    """Of those that are right; the log has the times of each."""

    def prepare(name: str) -> Any:
        return lambda weights, *_: OneWay(weights, us[name], factors.get(name, 1.0))

    choose_from(monkeypatch, *(backend(name, prepare=prepare(name)) for name in us))
    monkeypatch.setattr(backends, "TIMED", tuple(us))
    monkeypatch.setattr(choice, "clock", lambda *_: lambda layer, tokens: layer.us)
    layers = serving.ModelLayers(SHAPE, "gfx950", Settings("fastest"), 64)
    with caplog.at_level(logging.INFO, logger="vllm.mxfp4_triton"):
        chosen = [layers.prepare(weights, f"layers.{i}").us for i in range(2)]
    assert chosen == [us[served]] * 2
    assert served == layers.selection.backend.NAME
    lines = [line.split()[1] for line in caplog.messages if line.startswith("Timed: ")]
    assert lines == [name for name in us if name not in factors]
    assert f"Timed: a takes (us by tokens) 1: {us['a']:.1f}, 4: {us['a']:.1f}, 16: " in caplog.text


def test_fastest_that_does_not_run(
    monkeypatch: pytest.MonkeyPatch, weights: MoeWeights, caplog: pytest.LogCaptureFixture
) -> None:
    """A backend that is right and fails in a graph at some batch is left out, whether first or later."""
    us = {"a": 10.0, "b": 50.0, "c": 20.0}
    choose_from(
        monkeypatch,
        *(backend(name, prepare=lambda w, *_, each=each: OneWay(w, each)) for name, each in us.items()),
    )
    monkeypatch.setattr(backends, "TIMED", tuple(us))
    monkeypatch.setattr(
        choice,
        "clock",
        lambda *_: lambda layer, tokens: math.inf if layer.us < 50 and tokens == 16 else layer.us,
    )
    layers = serving.ModelLayers(SHAPE, "gfx950", Settings("fastest"), 64)
    with caplog.at_level(logging.INFO, logger="vllm.mxfp4_triton"):
        layers.prepare(weights, "layers.0")
    assert layers.selection.backend.NAME == "b"
    assert "Not timed: a does not run batches of 16 tokens." in caplog.text


def test_fastest_without_any(monkeypatch: pytest.MonkeyPatch, weights: MoeWeights) -> None:
    """Where none can be timed, as on a CPU, it is what auto takes."""
    layers = serving.ModelLayers(SHAPE, "cpu", Settings("fastest"), 64)
    assert layers.selection.backend is reference
    assert layers.prepare(weights, "layers.0").run(*self_check.batch(weights, SHAPE, 3)).isfinite().all()
