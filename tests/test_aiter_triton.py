"""The aiter_triton backend: over a stand-in for aiter's kernel, and, with --aiter, over aiter's own source.

The stand-in takes what our routing and sum would give it on a GPU from their twins in torch. aiter's own
kernel is compiled for gfx950 and executed on the emulator.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import aiter_triton_stand_in
import plant_preparation
import pytest
import torch
from aiter_stand_in import Rejected
from aiter_triton_stand_in import GENERATIONS
from plant_preparation import BATCHES, SHAPES
from run_python import SUPPORT, once, run_python
from test_ck import rank_of
from test_faults import check_planted
from test_verification import EVERY, LayerCase, ids, triton_path

from vllm_mxfp4_gfx950 import backends
from vllm_mxfp4_gfx950.backends import aiter_triton, reference
from vllm_mxfp4_gfx950.backends.triton import routing, two_fp8_kernels
from vllm_mxfp4_gfx950.gfx950.verification import MAX_FROBENIUS
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights
from vllm_mxfp4_gfx950.random_layer import make_shape, random_tokens, random_weights
from vllm_mxfp4_gfx950.tolerance import assert_rows_close

KERNEL = "aiter.ops.triton.moe.moe_op_gemm_a16w4"
TYPES = "aiter.ops.triton.moe.moe_routing.routing"
SMALL = make_shape(8, 2, 320, 96)
LAYERS = [SMALL, make_shape(4, 4, 256, 288), make_shape(4, 3, 64, 32, alpha=1.5, limit=5.0)]
Use = Callable[[str], dict[str, ModuleType]]


def combine_in_torch(parts: torch.Tensor, scatter: torch.Tensor, topk: int, **_: Any) -> torch.Tensor:
    """What `routing.combine` gives."""
    some = torch.where((scatter < 0)[:, None], 0, parts.float().sum(0)[scatter.long()])
    return some.unflatten(0, (-1, topk)).sum(1).bfloat16()


@pytest.fixture(name="use")
def fixture_use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Make a generation of aiter importable, and our own part run without a GPU."""
    monkeypatch.setattr(routing, "route", routing.route_in_torch)
    monkeypatch.setattr(routing, "combine", combine_in_torch)

    def use(generation: str) -> dict[str, ModuleType]:
        modules = aiter_triton_stand_in.modules(generation)
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        return modules

    return use


@pytest.fixture(name="aiter")
def fixture_aiter(use: Use) -> dict[str, ModuleType]:
    """The latest release."""
    return use("0.1.20")


def check(layer: aiter_triton.Prepared, weights: MoeWeights, shape: MoeShape, tokens: int) -> None:
    """Run a layer, of which nobody chooses an expert, and hold it against float64."""
    x, logits = random_tokens(shape, tokens, seed=tokens, unchosen=shape.global_experts - 1)
    out = layer.run(x, logits)
    assert out.dtype == torch.bfloat16
    assert_rows_close(out, *reference.truth_and_plain(x, logits, weights, shape))


@pytest.mark.parametrize("tokens", [1, 37, 199])
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_run(aiter: object, shape: MoeShape, tokens: int) -> None:
    """The layer, whatever its SwiGLU."""
    weights = random_weights(shape, seed=1)
    check(aiter_triton.prepare(weights.clone(), shape), weights, shape, tokens)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_generations(use: Use, generation: str) -> None:
    """Each is taken, and called so that it computes the layer."""
    use(generation)
    assert aiter_triton.why_not(SMALL, "gfx950") is None
    weights = random_weights(SMALL, seed=2)
    check(aiter_triton.prepare(weights.clone(), SMALL), weights, SMALL, 37)


@pytest.mark.parametrize("tokens", [1, 37, 199])
def test_ranks_of_experts_add_up(aiter: object, tokens: int) -> None:
    """Experts on two ranks, on one of them not in the model's order."""
    weights = random_weights(SMALL, seed=3)
    x, logits = random_tokens(SMALL, tokens, seed=tokens)
    total = torch.zeros(x.shape, dtype=torch.float64)
    for mine in ([6, 1, 3], [0, 2, 4, 5, 7]):
        part, shape = rank_of(weights, SMALL, mine)
        out = aiter_triton.prepare(part.clone(), shape).run(x, logits)
        assert_rows_close(out, *reference.truth_and_plain(x, logits, part, shape))
        total += out.double()
    assert_rows_close(total, *reference.truth_and_plain(x, logits, weights, SMALL))


def test_other_weights_in_place(aiter: object) -> None:
    """`tensors` lists all that differs between two layers: written over, one is the other."""
    held, fresh = (
        rank_of(random_weights(SMALL, seed), SMALL, mine) for seed, mine in ((5, [6, 1, 3]), (6, [3, 0, 5]))
    )
    layer, other = (aiter_triton.prepare(part.clone(), shape) for part, shape in (held, fresh))
    backends.overwrite(layer, other)
    check(layer, *fresh, 37)
    with pytest.raises(AssertionError):
        check(layer, *held, 37)


def test_no_tokens(aiter: object) -> None:
    """No launch, and no rows."""
    layer = aiter_triton.prepare(random_weights(SMALL, seed=4), SMALL)
    x, logits = random_tokens(SMALL, 1, seed=4)
    assert replace(layer, gemm=None).run(x[:0], logits[:0]).shape == (0, SMALL.hidden)


def test_memory(aiter: object) -> None:
    """Codes and biases stay where and as they are; scales are in the layout of CDNA 4, bit for bit."""
    weights = random_weights(make_shape(5, 2, 320, 544), seed=5)
    before = weights.clone()
    layer = aiter_triton.prepare(weights, make_shape(5, 2, 320, 544))
    for name, weight in (("w13", layer.w13), ("w2", layer.w2)):
        codes, scales, bias = (getattr(before, f"{name}{end}") for end in ("", "_scale", "_bias"))
        assert weight.values.data_ptr() == getattr(weights, name).data_ptr()
        assert torch.equal(weight.values.mT, codes)
        assert torch.equal(weight.bias, bias)
        read = two_fp8_kernels.scales_in_torch(weight.scales.mT)
        assert torch.equal(read[:, : scales.shape[1], : scales.shape[2]], scales)
        assert weight.scales.stride(1) == 1


@pytest.mark.parametrize(
    ("experts", "tokens", "rows"),
    [(32, 1, 16), (32, 135, 16), (32, 136, 32), (32, 263, 32), (32, 264, 64), (32, 520, 128), (32, 8192, 128),
     (128, 2048, 64), (128, 2079, 64), (128, 2080, 128)],
)  # fmt: skip
def test_tile_rows(experts: int, tokens: int, rows: int) -> None:
    """Those that aiter's routing takes for so many tokens and a topk of 4."""
    assert aiter_triton.tile_rows(make_shape(experts, 4, 64, 64), tokens) == rows


@pytest.mark.parametrize("shape", [make_shape(32, 4, 64, 64), make_shape(128, 4, 64, 64), SMALL], ids=str)
def test_first_batches(aiter: object, shape: MoeShape) -> None:
    """Each begins a size of tiles, and all sizes are there."""
    prepared = dataclasses.replace(aiter_triton.prepare(random_weights(SMALL, 0), SMALL), shape=shape)
    firsts = {
        tokens: aiter_triton.tile_rows(shape, tokens)
        for tokens in prepared.first_batches()
        if tokens not in aiter_triton.FEW
    }
    assert sorted(firsts.values()) == [32, 64, 128]
    for tokens, rows in firsts.items():
        assert aiter_triton.tile_rows(shape, tokens - 1) == rows // 2


def test_first_batches_are_few(aiter: object) -> None:
    """Where an expert gets few rows, tiles stop growing before the self-check's batches are too large."""
    shape = make_shape(512, 1, 64, 64)
    prepared = dataclasses.replace(aiter_triton.prepare(random_weights(SMALL, 0), SMALL), shape=shape)
    assert prepared.first_batches() == {17 * 512, *aiter_triton.FEW}
    assert [aiter_triton.tile_rows(shape, tokens) for tokens in (17 * 512 - 1, 17 * 512, 2**20)] == [
        16,
        32,
        32,
    ]


def test_planted_fault(aiter: object) -> None:
    """In what is prepared: the self-check catches each, and none where none is."""
    check_planted(plant_preparation.misses(aiter_triton, SHAPES[0], 0, BATCHES, "cpu"))
    assert plant_preparation.alarms(aiter_triton, SHAPES, 2, BATCHES, "cpu") == []


def test_poisoned_row(aiter: object) -> None:
    """A NaN stays one, and in its row."""
    layer = aiter_triton.prepare(random_weights(SHAPES[0], seed=0), SHAPES[0])
    assert set(plant_preparation.poisoned(layer.run, SHAPES[0], "cpu").values()) == {""}


# Negative controls: what prepare and run take care of, left undone.


def test_scales_left_as_they_are(aiter: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the right size, and wrong."""

    def unmoved(scales: torch.Tensor) -> torch.Tensor:
        return scales.mT.reshape(len(scales), scales.shape[2] // 32, -1).mT

    monkeypatch.setattr(aiter_triton, "_swizzle", unmoved)
    weights = random_weights(SMALL, seed=6)
    with pytest.raises(AssertionError, match="errs by"):
        check(aiter_triton.prepare(weights.clone(), SMALL), weights, SMALL, 37)


def test_scales_not_padded(aiter: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile would read past their end."""
    shape = make_shape(8, 2, 256, 256)
    weights = random_weights(shape, seed=6)
    check(aiter_triton.prepare(weights.clone(), shape), weights, shape, 37)
    monkeypatch.setattr(aiter_triton.package, "pad_scales", lambda scales: scales)
    layer = aiter_triton.prepare(weights.clone(), shape)
    with pytest.raises(Rejected, match=r"w_scales' columns must be at least 512; got 256"):
        check(layer, weights, shape, 37)


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("values", lambda values: values.mT.contiguous().mT.contiguous(), "w's stride along the depth must"),
        ("values", lambda values: values.view(torch.int8), "w's dtype must"),
        ("scales", lambda scales: scales[:, :256], "w_scales' depth must be at least 512; got 256"),
        ("bias", lambda bias: bias[:, :-1], "bias's shape must"),
        ("bias", lambda bias: bias.roll(1, 0), "errs by"),
    ],
)
def test_wrong_weights_are_noticed(aiter: object, name: str, change: Any, complaint: str) -> None:
    """Layouts, dtypes and sizes that the kernel does not read."""
    weights = random_weights(SMALL, seed=7)
    layer = aiter_triton.prepare(weights.clone(), SMALL)
    layer = replace(layer, w13=replace(layer.w13, **{name: change(getattr(layer.w13, name))}))
    with pytest.raises((Rejected, AssertionError), match=complaint):
        check(layer, weights, SMALL, 37)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"swizzle_mx_scale": None}, "swizzle_mx_scale must"),
        ({"backend": None}, "backend must"),
        ({"scatter_indx": torch.zeros(74)}, "scatter_indx must"),
    ],
    ids=str,
)
def test_wrong_options_are_noticed(use: Use, change: dict[str, Any], complaint: str) -> None:
    """Those that are the same in every call."""
    use("e404860")
    weights = random_weights(SMALL, seed=8)
    layer = aiter_triton.prepare(weights.clone(), SMALL)
    layer = replace(layer, options={**layer.options, **change})
    with pytest.raises(Rejected, match=complaint):
        check(layer, weights, SMALL, 37)


@pytest.mark.parametrize("wrong", ["order", "rows", "weights", "tiles"])
def test_wrong_routing_is_noticed(aiter: object, wrong: str) -> None:
    """Experts in the model's order, a tile done twice, other weights, more tiles than are launched."""
    part, shape = rank_of(random_weights(SMALL, seed=9), SMALL, [6, 1, 3])
    layer = aiter_triton.prepare(part.clone(), shape)
    check(layer, part, shape, 199)

    def route(*args: Any, **options: Any) -> routing.Routing:
        routed = routing.route_in_torch(*args, **options)
        if wrong == "rows":
            routed.schedule[0, 1] = routed.schedule[0, 0]
        if wrong == "weights":
            return replace(routed, weights=routed.weights.roll(1))
        if wrong == "tiles":
            return replace(routed, block_start=routed.block_start + 99)
        return routed

    layer = replace(layer, route=route, order=None if wrong == "order" else layer.order)
    with pytest.raises((Rejected, AssertionError), match=r"errs by|not finite|tiles must be at most"):
        check(layer, part, shape, 199)


# What is refused, and with which words.


@pytest.mark.parametrize("arch", ["gfx942", "gfx1250", "sm90", "cpu"])
def test_why_not_on_other_arches(aiter: object, arch: str) -> None:  # noqa: D103
    assert aiter_triton.why_not(SMALL, arch) == f"it runs on gfx950, not on {arch}"


def test_why_not_so_many_experts(aiter: object) -> None:
    """Our routing's limit."""
    refused = aiter_triton.why_not(make_shape(513, 4, 64, 64), "gfx950")
    assert refused == "routing takes up to 512 experts and a topk of up to 32, not 513 and 4"


@pytest.mark.parametrize("missing", ["aiter", KERNEL, TYPES])
def test_why_not_without(aiter: object, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """No aiter, or one from before the kernel or its routing."""
    if missing == "aiter":
        for name in list(sys.modules):
            if name.startswith("aiter."):
                monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    refused = str(aiter_triton.why_not(SMALL, "gfx950"))
    assert refused.startswith("aiter's moe_gemm_a16w4 does not import here: ")
    assert missing in refused
    assert refused.endswith("; install amd-aiter 0.1.14 or later")


@pytest.mark.parametrize(
    ("module", "name", "function", "complaint"),
    [
        (KERNEL, "moe_gemm_a16w4", lambda x, w, x_scales, w_scales: 0, "unexpected keyword argument 'bias'"),
        (KERNEL, "moe_gemm_a16w4", lambda layout, **_: None, "missing a required argument: 'layout'"),
        (TYPES, "RoutingData", lambda device, **_: None, "missing a required argument: 'device'"),
        (TYPES, "ExptData", lambda hist: None, "unexpected keyword argument 'token_offs_raw'"),
    ],
)  # fmt: skip
def test_why_not_another_signature(
    aiter: dict[str, ModuleType], module: str, name: str, function: Callable[..., Any], complaint: str
) -> None:
    """One that does not take our call is refused before it is called."""
    function.__name__ = name
    setattr(aiter[module], name, function)
    refused = str(aiter_triton.why_not(SMALL, "gfx950"))
    assert refused.startswith(f"{name} of aiter of unknown version in /aiter, triton ")
    assert " does not take our call: " in refused
    assert complaint in refused


# aiter's own source, of which pytest's --aiter says where it is.


@dataclass(frozen=True)
class Case(LayerCase):
    """One of them.

    Args:
        dtype: of the logits.
        expert_map: as in MoeWeights.
    """

    dtype: str = "bfloat16"
    expert_map: tuple[int, ...] | None = None


CASES = [
    Case((4, 4, 2, 288, 160), 1),
    Case((8, 8, 2, 320, 256), 16, dtype="float32"),
    Case((8, 8, 4, 256, 320), 64),
    Case((4, 8, 2, 320, 320), 16, expert_map=(-1, 0, 1, -1, -1, 2, 3, -1)),
    Case((2, 2, 1, 288, 96), 70),
    Case((2, 2, 1, 288, 96), 140),
]
"""Tiles of 16, 16, 32, 16, 64 and 128 rows."""

RELEASES = [triton for triton, kernels in EVERY if kernels == "matmul_ogs"]


@once
def emulated(triton: str, source: Path) -> dict[str, Any]:
    """What came out, in a process that has this Triton and this aiter."""
    result = run_python(
        [str(SUPPORT / "emulate_aiter.py")],
        path=[*triton_path(triton), source],
        stdin=json.dumps([asdict(case) for case in CASES]),
        AITER_TRITON_ONLY="1",
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.aiter
@pytest.mark.emulate
@pytest.mark.parametrize("case", CASES, ids=ids)
@pytest.mark.parametrize("triton", RELEASES)
def test_layer(aiter_source: Path, triton: str, case: Case) -> None:
    """Compiled for gfx950 and executed: within the tolerance, and lossless."""
    found = emulated(triton, aiter_source)
    assert found["selected"].startswith("aiter_triton on gfx950 (aiter ")
    assert found["selected"].endswith(f" in {aiter_source / 'aiter'}, triton {triton})")
    got = found["layers"][CASES.index(case)]
    assert got["miss"] == ""
    assert 0 < got["frobenius"] < MAX_FROBENIUS
    assert got["kernels"][-3:] == ["_moe_gemm_a16w4", "_moe_gemm_a16w4", "combine"]
    assert got["lossless"] == [True, True]


@pytest.mark.aiter
@pytest.mark.emulate
@pytest.mark.parametrize("triton", RELEASES)
def test_full_size(aiter_source: Path, triton: str) -> None:
    """GPT-OSS-20B compiles for every size of tiles, W4A16; what spills is aiter's choice of tiles."""
    found = emulated(triton, aiter_source)["full"]
    assert [row["tokens"] for row in found] == [n for n in (1, 256, 512, 2048) for _ in range(2)]
    for row in found:
        print(triton, row)
        assert row["lossless"]


@pytest.mark.aiter
@pytest.mark.emulate
@pytest.mark.parametrize("triton", RELEASES)
def test_wrong_instruction(aiter_source: Path, triton: str) -> None:
    """Negative control: one conversion of two FP4 from another byte; the self-check refuses the backend."""
    found = emulated(triton, aiter_source)
    assert "aiter_triton: the self-check: 1 tokens: row 0 errs by " in found["broken"]
    assert set(found["poisoned"].values()) == {""}
