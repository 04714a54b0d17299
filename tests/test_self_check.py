"""The check before serving: what it lets pass, what it refuses, and what takes its place."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiter_stand_in
import plant_preparation
import pytest
import torch
from plant_preparation import BATCHES, FAULTS, SHAPES
from run_python import ROOT, run_python

from vllm_mxfp4_gfx950 import backends, self_check
from vllm_mxfp4_gfx950.backends import ck, reference
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights, Mxfp4Error
from vllm_mxfp4_gfx950.mxfp4 import dequantize
from vllm_mxfp4_gfx950.random_layer import make_shape, random_weights
from vllm_mxfp4_gfx950.settings import Settings
from vllm_mxfp4_gfx950.tuning import Ladder

SHAPE = make_shape(8, 2, 96, 64)
Run = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]


def backend(name: str, run: Run = reference.run, prepare: Any = reference.prepare) -> Any:
    """The reference under another name, with a fault in it."""
    return SimpleNamespace(
        NAME=name, run=run, prepare=prepare, why_not=lambda shape, arch: None, source=lambda: "a test"
    )


def raises(*_: Any) -> Any:
    """What a compiler does on a tile that does not fit."""
    raise RuntimeError("out of resource: shared memory\nand more of that")


def one_wrong_row(prepared: Any, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """A layer that is right but for a row of its largest batch."""
    out = reference.run(prepared, x, logits)
    if len(out) == max(self_check.TOKENS):
        out[-1] *= 1.05
    return out


def nan(prepared: Any, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """One element of one row."""
    out = reference.run(prepared, x, logits)
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
        backend("bad", lambda p, x, logits: reference.run(p, x, logits.flip(1))),
        "1 tokens: row 0 errs by ",
    ),
}


@pytest.fixture(autouse=True)
def fixture_one_thread() -> Iterator[None]:
    """Layers this small gain nothing from several, which wait for each other where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(name="weights")
def fixture_weights() -> MoeWeights:
    """A layer."""
    return random_weights(SHAPE, seed=0)


def choose_from(monkeypatch: pytest.MonkeyPatch, *some: Any) -> backends.Selection:
    """Let these be the backends of a GPU, each a family of its own."""
    families = {each.NAME: (each,) for each in some}
    monkeypatch.setattr(backends, "FAMILIES", families)
    monkeypatch.setattr(backends, "ORDER", {"gfx950": tuple(families)})
    return backends.select(SHAPE, "gfx950", Settings())


def test_right(weights: MoeWeights) -> None:
    """A right layer passes, its weights stay, and the line says how far from wrong it was."""
    before = weights.w13.clone()
    prepared = reference.prepare(weights, SHAPE)
    outcome = self_check.check(backend("good"), prepared, weights, SHAPE)
    assert outcome.miss == ""
    assert 0 < outcome.row < 1
    batches = "1, 64, 256, 1024, 2048 tokens against float64: "
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
    assert self_check.check(backend("good"), prepared, weights, shape).miss == ""


@pytest.mark.parametrize("fault", BROKEN)
def test_fault(monkeypatch: pytest.MonkeyPatch, weights: MoeWeights, fault: str) -> None:
    """A wrong backend is refused with what was found, and the next one serves."""
    bad, text = BROKEN[fault]
    selection = choose_from(monkeypatch, bad, backend("good"))
    assert selection.backend is bad
    outcomes: dict[str, self_check.Outcome] = {}
    chosen, prepared, narrow = self_check.prepare(selection, weights, SHAPE, Settings(), outcomes.__setitem__)
    assert chosen.backend.NAME == "good"
    assert not narrow
    assert text in outcomes["bad"].miss
    assert text in str(outcomes["bad"])
    assert outcomes["good"].miss == ""
    assert f"not bad: the self-check: {outcomes['bad'].miss}" in str(chosen)
    x, logits = self_check.batch(weights, SHAPE, 3)
    assert torch.equal(chosen.backend.run(prepared, x, logits), reference.run((weights, SHAPE), x, logits))


@pytest.mark.parametrize(
    "settings", [Settings(strict=True), Settings(backend="bad")], ids=["strict", "named"]
)
def test_no_second_choice(monkeypatch: pytest.MonkeyPatch, weights: MoeWeights, settings: Settings) -> None:
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
    outcome = self_check.check(backend("bad"), reference.prepare(broken, shape), weights, shape)
    assert "errs by" in outcome.miss


def test_without_decode(monkeypatch: pytest.MonkeyPatch, weights: MoeWeights) -> None:
    """Where only the backend's own decode kernels are wrong, it serves without them."""

    def run(prepared: Any, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        layer, decode = prepared
        return reference.run(layer, x, logits) * (1.1 if decode and len(x) <= 64 else 1)

    some = backend("some", run, lambda weights, shape, _: (reference.prepare(weights, shape), True))
    some.without_decode = lambda prepared: (prepared[0], False) if prepared[1] else None
    names: list[str] = []
    chosen, prepared, narrow = self_check.prepare(
        choose_from(monkeypatch, some), weights, SHAPE, Settings(), lambda name, outcome: names.append(name)
    )
    assert (chosen.backend, prepared[1], narrow) == (some, False, True)
    assert names == ["some", "some without its decode kernels"]


@pytest.mark.parametrize(("when", "times"), [("first", 1), ("all", 3), ("off", 0)])
def test_which_layers(monkeypatch: pytest.MonkeyPatch, weights: MoeWeights, when: str, times: int) -> None:
    """The first layer, each one or none; what replaced a wrong backend stays for the layers behind."""
    vllm_plugin = pytest.importorskip("vllm_mxfp4_gfx950.vllm_plugin")
    choose_from(monkeypatch, BROKEN["swapped"][0], backend("good"))
    checks: list[str] = []
    check = self_check.check

    def counted(some: Any, *arguments: Any) -> self_check.Outcome:
        checks.append(some.NAME)
        return check(some, *arguments)

    monkeypatch.setattr(self_check, "check", counted)
    choice = vllm_plugin.Choice(SHAPE, "gfx950", Settings(self_check=when))
    served = [choice.prepare(weights, f"layers.{i}")[0].NAME for i in range(3)]
    assert served == (["bad"] * 3 if when == "off" else ["good"] * 3)
    assert checks == (["bad"] if times else []) + ["good"] * times


def test_layer_without_decode_kernels(monkeypatch: pytest.MonkeyPatch, weights: MoeWeights) -> None:
    """Where a backend serves without them, a layer that never had any serves as it is."""
    vllm_plugin = pytest.importorskip("vllm_mxfp4_gfx950.vllm_plugin")
    some = backend("some")
    some.without_decode = lambda prepared: None
    choose_from(monkeypatch, some)
    choice = vllm_plugin.Choice(SHAPE, "gfx950", Settings(self_check="off"))
    choice.narrow = True
    assert choice.prepare(weights, "layers.0") == (some, (weights, SHAPE))


def test_every_rung() -> None:
    """A batch for each of the kernels that a layer has tiles for."""
    flags = Ladder((64, 512, 4096, 8192), "abcd")
    tiles = Ladder((1, 2, 256), "xyz")
    assert self_check.sizes(SimpleNamespace()) == self_check.TOKENS
    assert self_check.sizes(SimpleNamespace(flags=(flags,), decode=None)) == (
        1, 64, 65, 256, 513, 1024, 2048, 4097
    )  # fmt: skip
    both = SimpleNamespace(flags=(flags,), decode=SimpleNamespace(tiles=(tiles, tiles)))
    assert self_check.sizes(both) == (1, 2, 3, 64, 65, 256, 513, 1024, 2048, 4097)


def test_rung_of_its_own(weights: MoeWeights) -> None:
    """A kernel that is wrong for some batches only is met."""
    flags = (Ladder((64, 96, 8192), ("good", "bad", "good")),)

    def run(prepared: Any, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return reference.run((weights, SHAPE), x, logits) * (1.1 if flags[0].at(len(x)) == "bad" else 1)

    def check(prepared: Any) -> str:
        return self_check.check(backend("some", run), prepared, weights, SHAPE).miss

    assert check(SimpleNamespace(flags=flags)).startswith("65 tokens: row ")
    assert check(SimpleNamespace()) == ""


def test_quiet_layer(weights: MoeWeights) -> None:
    """The limit shows although no ordinary token comes near it."""
    scale = weights.w13_scale.clamp(min=1) - 1
    quiet = dataclasses.replace(weights, w13_scale=scale, w13_bias=weights.w13_bias * 0)
    x, _ = self_check.batch(quiet, SHAPE, 64)
    w13 = dequantize(quiet.w13, scale, torch.float32)
    assert (x[::2].float() @ w13.mT).abs().max() < SHAPE.limit
    unlimited = reference.prepare(quiet, dataclasses.replace(SHAPE, limit=plant_preparation.UNLIMITED))
    assert "64 tokens: row " in self_check.check(backend("bad"), unlimited, quiet, SHAPE).miss


def test_no_memory(monkeypatch: pytest.MonkeyPatch, weights: MoeWeights) -> None:
    """It ends loading with what to do, checked or not, and no slower backend serves for it."""
    vllm_plugin = pytest.importorskip("vllm_mxfp4_gfx950.vllm_plugin")

    def exhausted(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.58 GiB.\nMore of that.")

    text = (
        "the GPU's free memory must be enough to prepare layers.0; got OutOfMemoryError: CUDA out of memory. "
        "Tried to allocate 1.58 GiB. ... More of that.. Stop what else uses this GPU, or serve with a larger "
        "--tensor-parallel-size."
    )
    for when, bad in (
        ("first", backend("bad", prepare=exhausted)),
        ("first", backend("bad", exhausted)),
        ("off", backend("bad", prepare=exhausted)),
    ):
        choose_from(monkeypatch, bad, backend("good"))
        choice = vllm_plugin.Choice(SHAPE, "gfx950", Settings(self_check=when))
        with pytest.raises(Mxfp4Error, match=f"^{re.escape(text)}$"):
            choice.prepare(weights, "layers.0")
        assert choice.selection.backend is bad


# Faults in what `prepare` does, in each backend that can run here.

KERNELS = {
    "triton_ogs": ("3.6.0", "vllm-0.33.0/vllm/third_party"),
    "triton_matmul": ("", "tokenspeed-triton-kernels"),
}
LAYERS = 8
"""Sound layers of every commit; MANY with `-m emulate`."""

MANY = 200


@pytest.fixture(name="aiter")
def fixture_aiter(monkeypatch: pytest.MonkeyPatch) -> None:
    """aiter's Python over kernels that are stood in for."""
    if not (aiter_stand_in.TREE / "aiter").is_dir():
        pytest.skip(f"needs amd-aiter unpacked in {aiter_stand_in.TREE}")
    for name, module in aiter_stand_in.load().items():
        monkeypatch.setitem(sys.modules, name, module)


def plant(packages: Path, directory: Path, layers: int) -> dict[str, dict[str, Any]]:
    """What plant_preparation finds in each Triton backend."""

    def run(name: str) -> dict[str, Any]:
        triton, kernels = KERNELS[name]
        path = [packages / kernels]
        if triton:
            path.insert(0, ROOT / ".venv/triton" / triton)
        for each in path:
            if not each.is_dir():
                pytest.skip(f"needs {each}")
        out = directory / f"{name}.json"
        result = run_python([plant_preparation.__file__, str(layers), str(out)], path=path, timeout=580)
        assert result.returncode == 0, result.stderr
        found: dict[str, Any] = json.loads(out.read_text())
        assert found["backend"] == name
        return found

    with ThreadPoolExecutor() as pool:
        return dict(zip(KERNELS, pool.map(run, KERNELS), strict=True))


@pytest.fixture(scope="module", name="planted")
def fixture_planted(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The findings of every commit."""
    return plant(packages, tmp_path_factory.mktemp("planted"), LAYERS)


def check_planted(misses: dict[str, str]) -> None:
    """Every fault was caught, and the sound layer passed."""
    assert misses.pop("") == ""
    assert set(misses) == set(FAULTS)
    for fault, miss in misses.items():
        assert re.match(r"\d+ tokens: (row \d+ errs by|\d+ elements are not finite)", miss), fault


@pytest.mark.compile
@pytest.mark.parametrize("name", KERNELS)
def test_planted_fault(planted: dict[str, dict[str, Any]], name: str) -> None:
    """Each is caught, none where none is."""
    check_planted(planted[name]["misses"])
    assert planted[name]["alarms"] == []


def test_planted_fault_in_ck(aiter: None) -> None:
    """Likewise."""
    check_planted(plant_preparation.misses(ck, SHAPES[0], 0, BATCHES, "cpu"))
    assert plant_preparation.alarms(ck, SHAPES, LAYERS, BATCHES, "cpu") == []


@pytest.mark.compile
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (
            "overflow",
            r"OutOfResources: out of resource: shared memory, Required: \d+, Hardware limit: 163840",
        ),
        ("compiler", "CompilationError: at .* power of 2"),
    ],
)
def test_first_launch(planted: dict[str, dict[str, Any]], name: str, fault: str, text: str) -> None:
    """A table's tile that does not compile or fit, for few tokens or for more: another backend serves."""
    for place, tokens in (("first", 1), ("last", 65)):
        found = planted[name]["launches"][f"{fault}-{place}"]
        assert re.match(f"{tokens} tokens: {text}", found["miss"])
        assert (found["serves"], found["left"]) == ("reference", "")


@pytest.mark.emulate
def test_no_false_alarm(packages: Path, tmp_path: Path) -> None:
    """In many sound layers."""
    for name, found in plant(packages, tmp_path, MANY).items():
        assert found["alarms"] == [], name


@pytest.mark.emulate
def test_no_false_alarm_in_ck(aiter: None) -> None:
    """Likewise."""
    assert plant_preparation.alarms(ck, SHAPES, MANY, BATCHES, "cpu") == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_planted_fault_on_a_gpu() -> None:
    """Each is caught in the backend that serves here, decode kernels included, and sound layers pass."""
    arch = backends.arch_of(torch.device("cuda"))
    shapes = (make_shape(32, 4, 2880, 2880), make_shape(8, 2, 320, 288), make_shape(32, 4, 2880, 736))
    serving = backends.select(shapes[0], arch, Settings()).backend
    for shape in shapes:
        check_planted(plant_preparation.misses(serving, shape, 0, (), "cuda"))
    assert plant_preparation.alarms(serving, shapes, MANY, (), "cuda") == []
