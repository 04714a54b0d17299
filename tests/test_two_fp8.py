"""The experts by two FP8 addends: the split by itself, and layers as gfx950 would run them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from run_python import ROOT, SUPPORT, run_python
from test_triton_routing import launches
from test_verification import EVERY, SERVED, LayerCase, emulated, ids, paths_of

from vllm_mxfp4_gfx950.backends.triton import routing, two_fp8
from vllm_mxfp4_gfx950.gfx950.verification import MAX_FROBENIUS
from vllm_mxfp4_gfx950.moe import MoeShape
from vllm_mxfp4_gfx950.tiles import release_of

Tile = tuple[int, int, int, int, int, int, int]
PAIRED: Tile = (8, 64, 512, 1, 2, 2, 2)
WAVES: Tile = (8, 128, 512, 1, 4, 2, 0)
SPLIT: Tile = (8, 64, 512, 2, 2, 2, 2)
MIDDLE: Tile = (16, 128, 256, 1, 4, 2, 0)
WIDE: Tile = (32, 128, 256, 1, 4, 2, 0)
MANY: Tile = (32, 256, 256, 1, 4, 2, 0)
MORE_ROWS: Tile = (64, 256, 256, 1, 4, 2, 2)
MOST: Tile = (128, 256, 256, 1, 8, 2, 0)
SCALED = ["v_mfma_scale_f32_16x16x128_f8f6f4"]


@dataclass(frozen=True)
class Case(LayerCase):
    """With tiles.

    Args:
        tiles: of w13 and w2, as TileConfig.
        expert_map: as in MoeWeights.
        dtype: of the logits.
        against_package: whether the package's kernels compute the layer as well.
        few: the routing's FEW_BLOCKS.
    """

    tiles: tuple[Tile, Tile] = (PAIRED, SPLIT)
    expert_map: tuple[int, ...] | None = None
    dtype: str = "bfloat16"
    against_package: bool = True
    few: int = routing.FEW_BLOCKS

    def __str__(self) -> str:
        name = f"{super().__str__()}-{self.dtype}-{'x'.join(map(str, self.tiles[0][:3]))}"
        return name + ("-map" if self.expert_map else "")


CASES = [
    Case((4, 4, 2, 288, 320), 1, (WAVES, SPLIT)),
    Case((8, 8, 4, 320, 288), 9),
    Case((4, 8, 2, 320, 320), 37, (MIDDLE, MIDDLE), expert_map=(-1, 0, 1, -1, -1, 2, 3, -1)),
    Case((4, 4, 2, 576, 288), 70, (MANY, MANY), dtype="float32", few=4),
]
"""Tiles of every kind, and a depth that no step divides."""

MORE = [
    *CASES,
    Case((4, 4, 1, 256, 256), 3, (PAIRED, PAIRED)),
    Case((32, 32, 4, 320, 288), 64, (PAIRED, PAIRED)),
    Case((8, 8, 4, 288, 288), 199, (WIDE, WIDE)),
    Case((4, 4, 2, 320, 544), 100, (MORE_ROWS, MORE_ROWS)),
    Case((4, 4, 2, 320, 544), 300, (MOST, MOST)),
    Case((4, 4, 4, 2880, 2880), 1, (WAVES, SPLIT)),
    Case((128, 128, 4, 288, 288), 37),
]


def cases_of(triton: str, *, every: bool) -> list[Case]:
    """Those whose tiles this Triton can compile without a spill."""
    fits = release_of(triton) in two_fp8.LARGE
    return [case for case in (MORE if every else CASES) if fits or not {MORE_ROWS, MOST} & {*case.tiles}]


def found(pair: tuple[str, str], *, every: bool) -> Any:
    """What came out."""
    return emulated("emulate_two_fp8.py", *pair, tuple(cases_of(pair[0], every=every)))


def assert_right(pair: tuple[str, str], case: Case, *, every: bool = False) -> None:
    """Within the tolerance, no worse than the package, and by kernels that fit and convert no FP4."""
    got = found(pair, every=every)["layers"][cases_of(pair[0], every=every).index(case)]
    assert got["miss"] == ""
    assert got["layout"]
    assert 0 < got["frobenius"] < MAX_FROBENIUS
    assert got["frobenius"] <= 1.01 * got["package"]
    assert got["kept"]
    assert got["spoilt"] or case.tokens == 1 or case.expert_map is not None
    assert got["misfits"] == []
    assert (got["mfma"], got["conversions"]) == (SCALED, 0)
    *before, last = launches(case.tokens, case.shape[2], case.dtype, case.few)
    one = before if case.tokens > two_fp8.ONE_LAUNCH else []
    assert got["kernels"] == [*one, f"{last}_and_split", "two_fp8_matmul", "two_fp8_matmul", "combine"]


@pytest.mark.compile
@pytest.mark.parametrize("case", CASES, ids=ids)
@pytest.mark.parametrize("pair", SERVED, ids=ids)
def test_layer(pair: tuple[str, str], case: Case) -> None:
    """Compiled for gfx950 and executed."""
    assert_right(pair, case)


@pytest.mark.emulate
@pytest.mark.parametrize(
    ("pair", "case"),
    [(pair, case) for pair in EVERY for case in cases_of(pair[0], every=True)],
    ids=ids,
)
def test_every_triton(pair: tuple[str, str], case: Case) -> None:
    """The same with every Triton, and more."""
    assert_right(pair, case, every=True)


@pytest.mark.emulate
@pytest.mark.parametrize("pair", EVERY, ids=ids)
def test_tiles_fit(pair: tuple[str, str]) -> None:
    """GPT-OSS-20B's compile without a spill and within the LDS; those of LARGE with its Tritons alone."""
    result = run_python([str(SUPPORT / "compile_two_fp8.py")], path=paths_of(*pair))
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found["everywhere"]) == len(two_fp8.TILES)
    misfits = [matmul for both in found["everywhere"] for matmul in both if not matmul["fits"]]
    assert misfits == []
    for release, tiles in found["large"].items():
        for both in tiles:
            assert all(matmul["fits"] for matmul in both) == (release == release_of(pair[0])), both


@pytest.mark.compile
def test_counted_work() -> None:
    """As docs/gfx950-time.md has it for one token, beside matmul_ogs."""
    script = str(ROOT / "environments/compare_two_fp8.py")
    result = run_python([script, "gpt-oss-120b", "1"], path=paths_of("3.6.0", "matmul_ogs"))
    assert result.returncode == 0, result.stderr
    row = result.stdout.splitlines()[-1]
    assert row.startswith("| 1 | 0.")
    assert row in (ROOT / "docs/gfx950-time.md").read_text().splitlines()


@pytest.mark.compile
@pytest.mark.parametrize("pair", SERVED, ids=ids)
def test_kernel_splits_as_its_twin(pair: tuple[str, str]) -> None:
    """All bf16, to the byte: beside their neighbours and in an order where numbers of any size meet."""
    got = found(pair, every=False)["split"]
    assert (got["codes"], got["scales"]) == (0, 0)
    assert got["nan"] == 4 * 256


@pytest.mark.compile
@pytest.mark.parametrize("place", ["tokens", "rows"])
@pytest.mark.parametrize("fault", ["", "swap", "drop", "shift", "neighbour", "lose_nan"])
@pytest.mark.parametrize("pair", SERVED, ids=ids)
def test_planted_fault(pair: tuple[str, str], fault: str, place: str) -> None:
    """The self-check finds each, and triton_kernels serves instead; it lets a sound layer pass."""
    got = found(pair, every=False)["faults"][place][fault]
    assert got["backend"].startswith("two_fp8_")
    assert ("our matmuls with two FP8 addends" in got["refused"]) == (fault != "")
    words = {"": "", "lose_nan": "a NaN is lost"}.get(fault, "errs by")
    assert words in got["misses"][0]
    assert got["misses"][1:] == [""] * (fault != "")
    assert (got["misses"][0] == "") == (fault == "")


@pytest.mark.compile
@pytest.mark.parametrize("fault", ["", "drop"])
@pytest.mark.parametrize("pair", SERVED, ids=ids)
def test_choice_at_load(pair: tuple[str, str], fault: str) -> None:
    """By times that a stand-in gives: the fastest serves, and where it comes out wrong, a table's tiles."""
    got = found(pair, every=False)["choices"][fault]
    assert {*got["us"]["1"]} == {*got["us"]["4"]} == {"two_fp8", "table", "package"}
    assert {*got["us"]["2"]} == {"two_fp8", "table"}  # The package's own tiles are far behind.
    assert got["chosen"] == ["two_fp8", "table"]
    assert got["served"] == (["table", "table"] if fault else ["two_fp8", "table"])
    assert ("; not our matmuls with two FP8 addends: the self-check: 1 tokens: " in got["line"]) == bool(
        fault
    )
    assert (
        "; by time, two_fp8 for 1 to 2 tokens (us at 2: two_fp8 20.0, table 27.0); table for 3 to 4 tokens"
        in got["line"]
    )


def blocks_of(values: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """bf16[n, 32], each value in a block whose first has the given size."""
    blocks = torch.zeros(len(values), 32, dtype=torch.bfloat16)
    blocks[:, 7], blocks[:, 0] = values, largest
    return blocks


def test_every_bf16_is_exact_alone() -> None:
    """Where it is the largest of its block: denormals, zeros of either sign and the largest number too."""
    x = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16)
    got = two_fp8.join(two_fp8.split_in_torch(blocks_of(x, torch.zeros_like(x))))[:, 7]
    finite = x.isfinite()
    assert torch.equal(got[finite], x[finite].double())
    assert got[~finite].isnan().all()
    # A NaN is one in either addend, and no block but its own has any.
    codes = two_fp8.split_in_torch(x.view(-1, 32)).codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(codes[:, 0, :32].isnan(), ~x.view(-1, 32).isfinite())
    assert torch.equal(codes[:, 1, :32].isnan(), ~x.view(-1, 32).isfinite())


@pytest.mark.parametrize("exponent", [-126, -120, -60, 0, 60, 120, 127])
def test_within_a_block(exponent: int) -> None:
    """All 8 bits over 60 binades below a block's largest: exact for 13, then within 2^-21 of the largest."""
    mantissa = torch.arange(128, 256) / 128
    largest = 2.0**exponent
    down = torch.arange(60)
    x = (mantissa[None, :].double() * largest * torch.exp2(-down[:, None].double())).bfloat16()
    got = two_fp8.join(
        two_fp8.split_in_torch(blocks_of(x.flatten(), torch.full((x.numel(),), largest).bfloat16()))
    )
    off = (got[:, 7].view_as(x) - x.double()).abs()
    assert (off[:14] == 0).all()
    assert (off <= largest * 2.0**-21).all()
    assert (off > 0).any() or exponent < -100


def test_limits() -> None:
    """Codes stay within e4m3's numbers, scales within E8M0's, and what follows the last value is zero."""
    x = torch.randn(3, 288, generator=torch.Generator().manual_seed(0)) * torch.logspace(-38, 38, 288)
    made = two_fp8.split_in_torch(x.bfloat16())
    assert made.codes.shape == (3, 2, two_fp8.STEP)
    codes = made.codes.view(torch.float8_e4m3fn).float()
    assert codes[:, 0].abs().max() == 256
    assert codes[:, 1].abs().max() <= 256
    assert (codes[..., 288:] == 0).all()
    assert int(made.scales.max()) <= 254
    assert (made.scales[:, 0] - made.scales[:, 1] == 4).all()


def test_a_token_alone() -> None:
    """A row's bytes do not depend on the others, nor on what else is in the tensor."""
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    x[1, 3], x[3, 40] = float("nan"), float("inf")
    whole = two_fp8.split_in_torch(x)
    for row in range(5):
        alone = two_fp8.split_in_torch(x[row : row + 1])
        assert torch.equal(whole.codes[row], alone.codes[0])
        assert torch.equal(whole.scales[row], alone.scales[0])


def test_one_addend_is_not_enough() -> None:
    """Negative control: hi alone errs by more than a bf16 does."""
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(2)).bfloat16()
    made = two_fp8.split_in_torch(x)
    made.codes[:, 1] = 0
    off = (two_fp8.join(made)[:, :96] - x.double()).norm() / x.double().norm()
    assert off > 2.0**-7


@pytest.mark.parametrize(("release", "rows"), [("3.5", 32), ("3.6", 128), ("3.9", 32)])
def test_tiles(release: str, rows: int) -> None:
    """Each model: 8 rows and 256 workgroups at least for one token, and the same rows in both matmuls."""
    for experts in (32, 128):
        shape = MoeShape(experts, experts, 4, 2880, 2880, 1.702, 7.0)
        w13, w2 = two_fp8.tiles_for(shape, release)
        for tokens in {*w13.bounds, *w2.bounds}:
            assert w13.at(tokens).block_m == w2.at(tokens).block_m
        assert (w13.at(1).block_m, w13.at(8192).block_m) == (8, rows)
        for tile, columns in ((w13.at(1), 5760), (w2.at(1), 2880)):
            assert 4 * -(-columns // tile.block_n) * tile.split_k >= 256
        for tile in (*w13.rungs, *w2.rungs):
            assert two_fp8.STEP % tile.block_k == 0
        assert all(tile.split_k == 1 and tile.block_n >= 64 for tile in w13.rungs)


@pytest.mark.parametrize(("experts", "rows"), [(128, 64), (32, 64), (16, 32)])
def test_tiles_fill_the_card(experts: int, rows: int) -> None:
    """64 rows an expert: a tile has them all where that leaves two for each compute unit."""
    w13, w2 = two_fp8.tiles_for(MoeShape(experts, 128, 4, 2880, 2880, 1.702, 7.0), "3.6")
    assert (w13.at(2048).block_m, w2.at(2048).block_m) == (rows, rows)
