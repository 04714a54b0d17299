"""The backends on triton_kernels: its kernels, run in Triton's interpreter as if on a gfx950."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpreter import BROKEN, LAYERS, RANKS, TILED, UNPADDED, Case, check_layout, outcomes

from vllm_mxfp4_gfx950.arch import GFX950
from vllm_mxfp4_gfx950.backends import reference
from vllm_mxfp4_gfx950.backends.triton import package as triton_package
from vllm_mxfp4_gfx950.backends.triton import routing as triton_routing
from vllm_mxfp4_gfx950.backends.triton.layer import Prepared
from vllm_mxfp4_gfx950.moe import MoeShape
from vllm_mxfp4_gfx950.random_layer import make_shape
from vllm_mxfp4_gfx950.tolerance import assert_rows_close

pytestmark = pytest.mark.compile

INSTALLED = {
    "matmul_ogs": ("triton_ogs", "vllm-0.33.0"),
    "matmul": ("triton_matmul", "tokenspeed-triton-kernels"),
}
"""The backend of each generation, and the package that has it."""


@pytest.fixture(scope="module", params=INSTALLED)
def kernels(request: pytest.FixtureRequest) -> str:
    """A generation of triton_kernels."""
    return str(request.param)


@pytest.fixture(scope="module")
def results(packages: Path, kernels: str) -> dict[str, Any]:
    """All that the kernels computed."""
    backend, package = INSTALLED[kernels]
    return outcomes(backend, packages / package)


Outcome = Callable[[Case], dict[str, Any]]
WhyNot = Callable[[MoeShape, str], str | None]


@pytest.fixture
def outcome(results: dict[str, Any]) -> Outcome:
    """What they computed for a case; their traceback fails the test."""

    def get(case: Case) -> dict[str, Any]:
        result = results[str(case)]
        assert not isinstance(result, str), result
        return result

    return get


@pytest.mark.parametrize("case", LAYERS + RANKS, ids=str)
def test_run(outcome: Outcome, case: Case) -> None:
    """The layer against float64."""
    weights, shape, x, logits = case.inputs()
    assert_rows_close(outcome(case)["out"], *reference.truth_and_plain(x, logits, weights, shape))


@pytest.mark.parametrize("case", LAYERS[:1], ids=str)
def test_prepare(outcome: Outcome, case: Case) -> None:
    """The layouts, bit for bit, and no second copy of the blocks."""
    check_layout(outcome(case), case)


@pytest.mark.parametrize("case", TILED, ids=str)
def test_tiles_of_the_table(outcome: Outcome, case: Case) -> None:
    """Each reaches the kernels, and computes the layer."""
    weights, shape, x, logits = case.inputs()
    assert case.tile is not None
    assert outcome(case)["tiles"] == [(*case.tile, 256)] * 2
    assert_rows_close(outcome(case)["out"], *reference.truth_and_plain(x, logits, weights, shape))


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_a_broken_layer_is_seen(outcome: Outcome, case: Case) -> None:
    """The tolerance catches each of these."""
    weights, shape, x, logits = case.inputs()
    with pytest.raises(AssertionError, match="errs by"):
        assert_rows_close(outcome(case)["out"], *reference.truth_and_plain(x, logits, weights, shape))


def test_an_address_out_of_bounds_is_seen(results: dict[str, Any]) -> None:
    """The kernels read past scales that are not padded to whole tiles."""
    assert "outside of every tensor" in results[str(UNPADDED)]


SHAPE = make_shape(8, 4, 320, 288)


@pytest.fixture
def why_not(kernels: str) -> WhyNot:
    """The reason why a layer cannot run through them."""
    return partial(triton_package.why_not_layer, kernels)


def test_why_not_on_another_arch(why_not: WhyNot) -> None:
    """Only where the kernels have been looked at."""
    reason = why_not(SHAPE, "gfx90a")
    assert reason == "it runs on gfx950, gfx942, sm90, not on gfx90a"


def test_why_not_on_hopper(why_not: WhyNot) -> None:
    """Its layout of values cannot end anywhere."""
    reason = why_not(make_shape(8, 4, 288, 288), "sm90")
    assert reason == (
        "on sm90 it takes a hidden size above 128 in steps of 64 and an intermediate size above 64, "
        "not 288 and 288"
    )


def test_why_not_is_the_package_s_reason(
    monkeypatch: pytest.MonkeyPatch, why_not: WhyNot, kernels: str
) -> None:
    """Passed on as it is."""
    monkeypatch.setattr(triton_package, "why_not", lambda generation: f"no {generation}")
    assert why_not(SHAPE, "gfx950") == f"no {kernels}"


@pytest.mark.parametrize("name", GFX950.needs_layout)
def test_why_not_without_the_scale_layout(
    monkeypatch: pytest.MonkeyPatch, why_not: WhyNot, name: str
) -> None:
    """Refused by name on gfx950 only; either name will do."""
    monkeypatch.setattr(triton_package, "why_not", lambda generation: None)
    monkeypatch.setattr(triton_package, "locate", lambda: Path("/there"))
    ours = SimpleNamespace(to_opt_flags=lambda tile, arch: None)
    monkeypatch.setattr(triton_package, "backend", lambda kernels: ours)
    monkeypatch.setattr(triton_package, "load", lambda module: SimpleNamespace())
    reason = why_not(SHAPE, "gfx950")
    assert reason == "triton_kernels in /there has no CDNA4MXScaleLayout or GFX950MXScaleLayout"
    assert why_not(SHAPE, "gfx942") is None
    monkeypatch.setattr(triton_package, "load", lambda module: SimpleNamespace(**{name: object}))
    assert why_not(SHAPE, "gfx950") is None


def test_routing_asks_for_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many sizes of tiles there are is known from `prepare`: the package asks the driver each time."""
    monkeypatch.setitem(sys.modules, "triton_kernels", None)
    monkeypatch.setattr(triton_routing, "route", lambda *arguments: arguments[1:])
    prepared: Any = SimpleNamespace(shape=make_shape(8, 2, 64, 64), order=None, sizes=5)
    assert Prepared.route(prepared, torch.empty(3, 8)) == (2, 8, None, 5)


def test_why_not_with_other_opt_flags(monkeypatch: pytest.MonkeyPatch, why_not: WhyNot) -> None:
    """A package whose OptFlags has other fields is refused before it is handed a layer."""

    def to_opt_flags(tile: object, arch: str) -> None:
        raise TypeError("unexpected keyword argument 'xcd_swizzle'")

    monkeypatch.setattr(triton_package, "why_not", lambda generation: None)
    monkeypatch.setattr(triton_package, "locate", lambda: Path("/there"))
    monkeypatch.setattr(triton_package, "load", lambda module: SimpleNamespace(CDNA4MXScaleLayout=object))
    ours = SimpleNamespace(to_opt_flags=to_opt_flags)
    monkeypatch.setattr(triton_package, "backend", lambda kernels: ours)
    reason = "triton_kernels in /there does not take our tiles: unexpected keyword argument 'xcd_swizzle'"
    assert why_not(SHAPE, "gfx950") == reason
    assert why_not(SHAPE, "gfx942") is None
