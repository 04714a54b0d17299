"""The check before serving: what it lets pass, what it refuses, and what takes its place."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import plant_preparation
import pytest
import torch

from vllm_mxfp4_gfx950 import backends, self_check
from vllm_mxfp4_gfx950.arch import GFX950
from vllm_mxfp4_gfx950.backends import reference
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights
from vllm_mxfp4_gfx950.mxfp4 import dequantize
from vllm_mxfp4_gfx950.random_layer import make_shape, random_weights
from vllm_mxfp4_gfx950.settings import Settings
from vllm_mxfp4_gfx950.tiles import Ladder, Plan

SHAPE = make_shape(8, 2, 96, 64)
BY_TABLE: Ladder[Plan] = Ladder((64, 65), ("own", "table"))
Run = Callable[[reference.Prepared, torch.Tensor, torch.Tensor], torch.Tensor]
run_reference = reference.Prepared.run


@dataclass
class Layer:
    """The reference's, with a fault in it."""

    sound: reference.Prepared
    fault: Run

    def run(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """What the fault makes of it."""
        return self.fault(self.sound, x, logits)

    def tensors(self) -> list[torch.Tensor]:
        """The sound layer's."""
        return self.sound.tensors()


def layer_of(weights: MoeWeights, run: Run = run_reference) -> Layer:
    """A prepared layer."""
    return Layer(reference.prepare(weights, SHAPE), run)


def backend(name: str, run: Run = run_reference, prepare: Any = None) -> Any:
    """The reference under another name, with a fault in it."""
    return SimpleNamespace(
        NAME=name,
        prepare=prepare or (lambda weights, *_: layer_of(weights, run)),
        source=lambda: "a test",
    )


def raises(*_: Any) -> Any:
    """What a compiler does on a tile that does not fit."""
    raise RuntimeError("out of resource: shared memory\nand more of that")


def one_wrong_row(prepared: Any, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """A layer that is right but for a row of its largest batch."""
    out = run_reference(prepared, x, logits)
    if len(out) == max(self_check.TOKENS):
        out[-1] *= 1.05
    return out


def nan(prepared: Any, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """One element of one row."""
    out = run_reference(prepared, x, logits)
    out[0, 3] = float("nan")
    return out


BROKEN = {
    "row": (backend("bad", one_wrong_row), "2048 tokens: row 2047 errs by 4.87e-02"),
    "nan": (backend("bad", nan), "1 tokens: 1 elements are not finite"),
    "launch": (backend("bad", raises), "1 tokens: RuntimeError: out of resource: shared memory"),
    "prepare": (
        backend("bad", prepare=raises),
        "while preparing, RuntimeError: out of resource: shared memory",
    ),
    "swapped": (
        backend("bad", lambda p, x, logits: run_reference(p, x, logits.flip(1))),
        "1 tokens: row 0 errs by ",
    ),
}


@pytest.fixture(name="weights")
def fixture_weights() -> MoeWeights:
    """A layer."""
    return random_weights(SHAPE, seed=0)


def choose_from(monkeypatch: pytest.MonkeyPatch, *some: Any) -> backends.Selection:
    """Let these be the backends of a GPU, each a family of its own."""
    families = {
        each.NAME: (backends.Entry(each.NAME, lambda *_: None, lambda each=each: each),)  # type: ignore[misc]
        for each in some
    }
    monkeypatch.setattr(backends, "FAMILIES", families)
    gfx950 = dataclasses.replace(GFX950, families=tuple(families))
    monkeypatch.setattr(backends, "arch_named", {"gfx950": gfx950}.__getitem__)
    return backends.select(SHAPE, "gfx950", Settings())


def test_fault_of_the_check(monkeypatch: pytest.MonkeyPatch, weights: MoeWeights) -> None:
    """What the check itself raises is blamed on no backend, and no other one is taken for it."""
    selection = choose_from(monkeypatch, backend("good"), backend("other"))
    monkeypatch.setattr(self_check.reference, "truth_and_plain", raises)
    with pytest.raises(RuntimeError, match="out of resource"):
        self_check.prepare(selection, weights, SHAPE, Settings(), lambda *_: None)


def test_right(weights: MoeWeights) -> None:
    """A right layer passes, its weights stay, and the line says how far from wrong it was."""
    before = weights.w13.clone()
    outcome = self_check.check(layer_of(weights), weights, SHAPE)
    assert outcome.miss == ""
    assert 0 < outcome.row < 1
    batches = "1, 8, 32, 64, 256, 1024, 2048 tokens against float64: "
    line = batches + r"worst row at 0\.\d\d of what is allowed \(\d+\.\d\d s\)"
    assert re.fullmatch(line, str(outcome))
    assert torch.equal(weights.w13, before)


def test_absent_experts() -> None:
    """With experts on other ranks, tokens choose among those that are here."""
    expert_map = torch.tensor([-1, 0, -1, 1, 2, -1, 3, -1], dtype=torch.int32)
    shape = MoeShape(4, 8, 2, 96, 64, 1.702, 7.0)
    layer = random_weights(shape, seed=0)
    weights = MoeWeights(**{**vars(layer), "expert_map": expert_map})
    _, logits = self_check.batch(weights, shape, 64)
    ids, _ = reference.route(logits, shape.topk)
    assert set(ids.flatten().tolist()) == {1, 3, 4, 6}
    prepared = reference.prepare(weights, shape)
    assert self_check.check(prepared, weights, shape).miss == ""


@pytest.mark.parametrize("fault", BROKEN)
def test_fault(monkeypatch: pytest.MonkeyPatch, weights: MoeWeights, fault: str) -> None:
    """A wrong backend is refused with what was found, and the next one serves."""
    bad, text = BROKEN[fault]
    selection = choose_from(monkeypatch, bad, backend("good"))
    assert selection.backend is bad
    outcomes: dict[str, self_check.Outcome] = {}
    chosen, prepared = self_check.prepare(selection, weights, SHAPE, Settings(), outcomes.__setitem__)
    assert chosen.backend.NAME == "good"
    assert text in outcomes["bad"].miss
    assert text in str(outcomes["bad"])
    assert outcomes["good"].miss == ""
    assert f"not bad: the self-check: {outcomes['bad'].miss}" in str(chosen)
    x, logits = self_check.batch(weights, SHAPE, 3)
    assert torch.equal(prepared.run(x, logits), reference.prepare(weights, SHAPE).run(x, logits))


@pytest.mark.parametrize(
    "settings", [Settings(strict=True), Settings(backend="bad")], ids=["strict", "named"]
)
def test_no_second_layers(monkeypatch: pytest.MonkeyPatch, weights: MoeWeights, settings: Settings) -> None:
    """Where the user forbids another backend, loading stops with what was found."""
    selection = choose_from(monkeypatch, BROKEN["row"][0], backend("good"))
    with pytest.raises(Mxfp4Error, match="bad: the self-check: 2048 tokens: row 2047 errs by"):
        self_check.prepare(selection, weights, SHAPE, settings, print)


def test_none_left(monkeypatch: pytest.MonkeyPatch, weights: MoeWeights) -> None:
    """Every backend is named with its own fault."""
    selection = choose_from(monkeypatch, BROKEN["nan"][0], backend("worse", raises))
    with pytest.raises(
        Mxfp4Error, match=r"bad: the self-check: .*not finite; worse: the self-check: .*out of res"
    ):
        self_check.prepare(selection, weights, SHAPE, Settings(), print)


def test_last_expert() -> None:
    """A fault in the last of many experts is met."""
    shape = make_shape(32, 2, 96, 64)
    weights = random_weights(shape, seed=0)
    broken = weights.clone()
    broken.w2[-1] = 0x11
    outcome = self_check.check(reference.prepare(broken, shape), weights, shape)
    assert "errs by" in outcome.miss


class SeveralPlans:
    """Our own matmuls up to 64 tokens, a table's tiles above, and the package's: some are wrong."""

    SCATTERS = pinned = False

    def __init__(self, weights: MoeWeights, wrong: tuple[Plan, ...], plans: Ladder[Plan] = BY_TABLE) -> None:
        self.weights, self.wrong, self.plans = weights, wrong, plans

    def run(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Ten percent too much from what is wrong."""
        return layer_of(self.weights).run(x, logits) * (1.1 if self.plans.at(len(x)) in self.wrong else 1)

    def offered(self, tokens: int) -> tuple[Plan, ...]:
        """As in TiledLayer."""
        return ("own", "table", "package") if tokens <= 64 else ("table", "package")

    def tensors(self) -> list[torch.Tensor]:
        """As in Layer."""
        return layer_of(self.weights).tensors()

    def with_plans(self, plans: Ladder[Plan]) -> SeveralPlans:
        """As in TiledLayer."""
        return SeveralPlans(self.weights, self.wrong, plans)

    def without(self, *plans: Plan) -> SeveralPlans | None:
        """As in TiledLayer."""
        rest: list[Plan] = [plan for plan in ("table", "package") if plan not in plans]
        others = self.plans.map(lambda plan: rest[0] if plan in plans else plan) if rest else None
        return others and self.with_plans(others)

    def first_batches(self) -> set[int]:
        """As in TiledLayer."""
        return {65}

    def keeps_nan(self, tokens: int) -> bool:
        """As in TiledLayer."""
        return False

    route = tiles_at = with_tiles = with_own_tiles = raises


@pytest.mark.parametrize(
    ("wrong", "rungs", "told"),
    [
        ((), ("own", "table"), []),
        (("own",), ("table", "table"), ["our own matmuls"]),
        (("table",), ("own", "package"), ["a table's tiles"]),
        (("own", "table"), ("package", "package"), ["our own matmuls", "a table's tiles"]),
    ],
)
def test_wrong_plan(
    monkeypatch: pytest.MonkeyPatch,
    weights: MoeWeights,
    wrong: tuple[Plan, ...],
    rungs: tuple[Plan, ...],
    told: list[str],
) -> None:
    """What is wrong serves nowhere, and the backend's other plans do."""
    some = backend("some", prepare=lambda weights, *_: SeveralPlans(weights, wrong))
    names: list[str] = []
    chosen, prepared = self_check.prepare(
        choose_from(monkeypatch, some), weights, SHAPE, Settings(), lambda name, outcome: names.append(name)
    )
    assert isinstance(prepared, SeveralPlans)
    assert (chosen.backend, prepared.plans.rungs) == (some, rungs)
    assert [name for name, _ in chosen.refused] == told
    assert all(reason.startswith("the self-check: ") for _, reason in chosen.refused)
    steps = [f"some without {' and '.join(told[: i + 1])}" for i in range(len(told))]
    assert names == ["some", *steps]


class NanRaises(SeveralPlans):
    """Its first plan should keep a NaN, and raises."""

    def keeps_nan(self, tokens: int) -> bool:
        """As in TiledLayer."""
        return True

    def run(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Right, but for a NaN."""
        if x.isnan().any():
            raise RuntimeError("an illegal instruction")
        return super().run(x, logits)


def test_nan_that_raises(monkeypatch: pytest.MonkeyPatch, weights: MoeWeights) -> None:
    """What the run with a NaN raises costs the plan, not the server."""
    some = backend("some", prepare=lambda weights, *_: NanRaises(weights, ()))
    chosen, prepared = self_check.prepare(
        choose_from(monkeypatch, some), weights, SHAPE, Settings(), lambda *_: None
    )
    assert isinstance(prepared, SeveralPlans)
    assert prepared.plans.rungs == ("table", "table")
    reason = "the self-check: 8 tokens: RuntimeError: an illegal instruction"
    assert chosen.refused == (("our own matmuls", reason),)


def test_no_right_plan(monkeypatch: pytest.MonkeyPatch, weights: MoeWeights) -> None:
    """The next backend serves."""
    bad = backend("bad", prepare=lambda weights, *_: SeveralPlans(weights, ("own", "table", "package")))
    chosen, _ = self_check.prepare(
        choose_from(monkeypatch, bad, backend("good")), weights, SHAPE, Settings(), lambda *_: None
    )
    assert chosen.backend.NAME == "good"


@pytest.mark.parametrize(("when", "times"), [("first", 1), ("all", 3), ("off", 0)])
def test_which_layers(monkeypatch: pytest.MonkeyPatch, weights: MoeWeights, when: str, times: int) -> None:
    """The first layer, each one or none; what replaced a wrong backend stays for the layers behind."""
    serving = pytest.importorskip("vllm_mxfp4_gfx950.serving")
    choose_from(monkeypatch, BROKEN["swapped"][0], backend("good"))
    checks: list[str] = []
    check = self_check.check

    def counted(layer: Layer, *arguments: Any) -> self_check.Outcome:
        checks.append(faults[layer.fault])
        return check(layer, *arguments)

    monkeypatch.setattr(self_check, "check", counted)
    layers = serving.ModelLayers(SHAPE, "gfx950", Settings(self_check=when), 2048)
    faults = {run_reference: "good", BROKEN["swapped"][0].prepare(weights).fault: "bad"}
    served = [faults[layers.prepare(weights, f"layers.{i}").fault] for i in range(3)]
    assert served == (["bad"] * 3 if when == "off" else ["good"] * 3)
    assert checks == (["bad"] if times else []) + ["good"] * times


def test_plans_of_the_first_layer_serve_the_others(
    monkeypatch: pytest.MonkeyPatch, weights: MoeWeights
) -> None:
    """Those that came out wrong in the first one, which alone is checked, serve no other."""
    serving = pytest.importorskip("vllm_mxfp4_gfx950.serving")
    choose_from(monkeypatch, backend("some", prepare=lambda weights, *_: SeveralPlans(weights, ("own",))))
    layers = serving.ModelLayers(SHAPE, "gfx950", Settings(), 2048)
    served = [layers.prepare(weights, f"layers.{i}").plans.rungs for i in range(3)]
    assert served == [("table", "table")] * 3


@pytest.mark.parametrize(("when", "times"), [("first", 1), ("all", 3), ("off", 0)])
def test_refill(monkeypatch: pytest.MonkeyPatch, weights: MoeWeights, when: str, times: int) -> None:
    """Other weights go where those before lie; layers are checked with them as they were before."""
    serving = pytest.importorskip("vllm_mxfp4_gfx950.serving")
    choose_from(monkeypatch, backend("good"))
    layers = serving.ModelLayers(SHAPE, "gfx950", Settings(self_check=when), 2048)
    served = {f"layers.{i}": layers.prepare(weights.clone(), f"layers.{i}") for i in range(3)}
    before = [tensor.data_ptr() for layer in served.values() for tensor in layer.tensors()]
    checks: list[Layer] = []
    check = self_check.check
    monkeypatch.setattr(self_check, "check", lambda *given: checks.append(given[0]) or check(*given))
    other = random_weights(SHAPE, seed=1)
    x, logits = self_check.batch(other, SHAPE, 64)
    expected = layer_of(other.clone()).run(x, logits)
    for name, layer in served.items():
        assert not torch.equal(layer.run(x, logits), expected)
        layers.refill(layer, other.clone(), name)
        assert torch.equal(layer.run(x, logits), expected)
    assert [tensor.data_ptr() for layer in served.values() for tensor in layer.tensors()] == before
    assert checks == list(served.values())[:times]


class WithoutOwn(SeveralPlans):
    """A layer whose weights our own matmuls cannot read."""

    def offered(self, tokens: int) -> tuple[Plan, ...]:
        """As in TiledLayer."""
        return "table", "package"


def test_refill_goes_wrong(monkeypatch: pytest.MonkeyPatch, weights: MoeWeights) -> None:
    """No other kernels can take over, as captured graphs run through those of before."""
    serving = pytest.importorskip("vllm_mxfp4_gfx950.serving")
    kinds = [SeveralPlans, WithoutOwn]
    choose_from(monkeypatch, backend("some", prepare=lambda weights, *_: kinds.pop(0)(weights, ())))
    layers = serving.ModelLayers(SHAPE, "gfx950", Settings(self_check="off"), 2048)
    layer = layers.prepare(weights.clone(), "layers.0")
    text = r"layers\.0 must be weights for the kernels of those before; got none for our own matmuls"
    with pytest.raises(Mxfp4Error, match=text):
        layers.refill(layer, weights.clone(), "layers.0")

    choose_from(monkeypatch, backend("good"))
    layers = serving.ModelLayers(SHAPE, "gfx950", Settings(), 2048)
    layer = layers.prepare(weights.clone(), "layers.0")
    layer.fault = one_wrong_row
    with pytest.raises(Mxfp4Error, match=r"layers\.0 must be computed right .*; got 2048 tokens: row 2047"):
        layers.refill(layer, weights.clone(), "layers.0")


class Tiled(SeveralPlans):
    """A layer as `sizes` sees it."""

    def __init__(self, tiles: Any, plans: Any, own: Any = None) -> None:
        self.tiles, self.plans, self.own, self.two_fp8 = tiles, plans, own, None
        self.prepared = pytest.importorskip("vllm_mxfp4_gfx950.backends.triton.layer").Prepared

    def tiles_at(self, tokens: int) -> Any:  # type: ignore[override]
        """Those of the real layer."""
        return self.prepared.tiles_at(self, tokens)

    def _served_by(self, tokens: int) -> Any:
        return self.prepared._served_by(self, tokens)

    def _own_kernels(self, plan: Any) -> Any:
        return self.prepared._own_kernels(self, plan)

    def first_batches(self) -> set[int]:
        """Those of the real layer."""
        found: set[int] = self.prepared.first_batches(self)
        return found


def test_every_rung(weights: MoeWeights) -> None:
    """A batch for each of the kernels that a layer has tiles for."""
    flags, same = Ladder((64, 512, 4096, 8192), "abcd"), Ladder((1,), "x")
    tiles = Ladder((1, 2, 256), "xyz")
    assert self_check.sizes(layer_of(weights)) == self_check.TOKENS
    by_table = Ladder((1,), ("table",))
    assert self_check.sizes(Tiled((flags, same), by_table)) == (
        1, 8, 32, 64, 65, 256, 513, 1024, 2048, 4097,
    )  # fmt: skip
    both = Tiled((flags, flags), Ladder((256, 8192), ("own", "table")), SimpleNamespace(tiles=(tiles, tiles)))
    # 257, as the rung of 65 to 512 tokens begins where our own matmuls serve, and ends behind them; 65 is
    # theirs.
    assert self_check.sizes(both) == (1, 2, 3, 8, 32, 64, 256, 257, 513, 1024, 2048, 4097)
    by_package = Tiled((flags, flags), Ladder((600, 700, 800), ("table", "package", "table")))
    assert self_check.sizes(by_package) == (1, 8, 32, 64, 65, 256, 513, 601, 701, 1024, 2048, 4097)


def test_rung_of_its_own(weights: MoeWeights) -> None:
    """A kernel that is wrong for some batches only is met."""
    tiles = (Ladder((64, 96, 8192), ("good", "bad", "good")),)

    def run(prepared: Any, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return run_reference(prepared, x, logits) * (1.1 if tiles[0].at(len(x)) == "bad" else 1)

    tiled = Tiled((*tiles, *tiles), Ladder((1,), ("table",)))
    tiled.run = layer_of(weights, run).run  # type: ignore[method-assign]
    assert self_check.check(tiled, weights, SHAPE).miss.startswith("65 tokens: row ")
    assert self_check.check(layer_of(weights, run), weights, SHAPE).miss == ""


@pytest.mark.parametrize(("least", "most"), [(1, 4), (5, 8), (17, 32), (33, 64)])
def test_every_kernel_of_the_routing(weights: MoeWeights, least: int, most: int) -> None:
    """Our routing is compiled anew for so many tokens: what is wrong for them only is met."""

    def run(prepared: Any, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return run_reference(prepared, x, logits) * (1.1 if least <= len(x) <= most else 1)

    miss = self_check.check(layer_of(weights, run), weights, SHAPE).miss
    tried, found = miss.split(" tokens: row ")
    assert least <= int(tried) <= most
    assert "errs by" in found


def test_quiet_layer(weights: MoeWeights) -> None:
    """The limit shows although no ordinary token comes near it."""
    scale = weights.w13_scale.clamp(min=1) - 1
    quiet = dataclasses.replace(weights, w13_scale=scale, w13_bias=weights.w13_bias * 0)
    x, _ = self_check.batch(quiet, SHAPE, 64)
    w13 = dequantize(quiet.w13, scale, torch.float32)
    assert (x[::2].float() @ w13.mT).abs().max() < SHAPE.limit
    unlimited = reference.prepare(quiet, dataclasses.replace(SHAPE, limit=plant_preparation.UNLIMITED))
    assert "8 tokens: row " in self_check.check(unlimited, quiet, SHAPE).miss


def test_later_layer(monkeypatch: pytest.MonkeyPatch, weights: MoeWeights) -> None:
    """Where one cannot be prepared, loading ends: it is not skipped, nor given to another backend."""
    serving = pytest.importorskip("vllm_mxfp4_gfx950.serving")
    prepared: list[MoeWeights] = []

    def prepare(weights: MoeWeights, shape: MoeShape, *_: Any) -> Any:
        prepared.append(weights)
        return raises() if len(prepared) == 3 else reference.prepare(weights, shape)

    choose_from(monkeypatch, backend("some", prepare=prepare), backend("good"))
    layers = serving.ModelLayers(SHAPE, "gfx950", Settings(), 2048)
    for layer in range(2):
        layers.prepare(weights, f"layers.{layer}")
        assert layers.selection.backend.NAME == "some"
    with pytest.raises(RuntimeError, match="out of resource"):
        layers.prepare(weights, "layers.2")
    assert layers.selection.backend.NAME == "some"


def test_no_memory(monkeypatch: pytest.MonkeyPatch, weights: MoeWeights) -> None:
    """It ends loading with what to do, checked or not, and no slower backend serves for it."""
    serving = pytest.importorskip("vllm_mxfp4_gfx950.serving")

    def exhausted(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.58 GiB.\nMore of that.")

    text = (
        "the GPU's free memory must be enough to prepare layers.0; got OutOfMemoryError: CUDA out of memory. "
        "Tried to allocate 1.58 GiB. ... More of that. Stop what else uses this GPU, or serve with a larger "
        "--tensor-parallel-size."
    )
    for when, bad in (
        ("first", backend("bad", prepare=exhausted)),
        ("first", backend("bad", exhausted)),
        ("off", backend("bad", prepare=exhausted)),
    ):
        choose_from(monkeypatch, bad, backend("good"))
        layers = serving.ModelLayers(SHAPE, "gfx950", Settings(self_check=when), 2048)
        with pytest.raises(Mxfp4Error, match=f"^{re.escape(text)}$"):
            layers.prepare(weights, "layers.0")
        assert layers.selection.backend is bad
