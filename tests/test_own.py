"""Our own kernels for few tokens, as gfx950 would run them, and the table that says where they serve."""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass
from pathlib import Path

import pytest
import torch
from run_python import ROOT, SUPPORT, run_python
from test_triton_routing import launches
from test_verification import EVERY, TRITONS, LayerCase, emulated, ids

from vllm_mxfp4_gfx950.arch import SM90
from vllm_mxfp4_gfx950.backends.triton import own
from vllm_mxfp4_gfx950.backends.triton.package import Weight
from vllm_mxfp4_gfx950.gfx950.verification import MAX_FROBENIUS
from vllm_mxfp4_gfx950.models import TOKENS
from vllm_mxfp4_gfx950.moe import MoeShape
from vllm_mxfp4_gfx950.tables import ladder, store
from vllm_mxfp4_gfx950.tiles import Ladder, TileConfig, gemms
from vllm_mxfp4_gfx950.tuning.record import SIZES

Tile = tuple[int, int, int, int, int, int, int]
PLAIN: Tile = (16, 64, 256, 1, 4, 1, 0)
SPLIT: Tile = (16, 64, 256, 3, 4, 2, 0)


@dataclass(frozen=True)
class Case(LayerCase):
    """With tiles.

    Args:
        tiles: of w13 and w2, as TileConfig.
        expert_map: as in MoeWeights.
        dtype: of the logits.
        spoil: whether the scales of w13 are moved by one step.
    """

    tiles: tuple[Tile, Tile] = (PLAIN, PLAIN)
    expert_map: tuple[int, ...] | None = None
    dtype: str = "bfloat16"
    spoil: bool = False

    def __str__(self) -> str:
        name = f"{super().__str__()}-split{self.tiles[1][3]}-{self.dtype}"
        return name + ("-map" if self.expert_map else "") + ("-spoilt" if self.spoil else "")


CASES = [
    Case((4, 4, 1, 256, 320), 1),
    Case((8, 8, 2, 320, 256), 3, (PLAIN, SPLIT)),
    Case((32, 32, 4, 320, 288), 64, (PLAIN, SPLIT)),
    Case((8, 8, 4, 320, 288), 65),
    Case((8, 8, 4, 320, 288), 9, dtype="float32"),
    Case((128, 128, 4, 256, 256), 37),
    Case((4, 8, 2, 320, 320), 130, expert_map=(-1, 0, 1, -1, -1, 2, 3, -1)),
    Case((8, 8, 3, 256, 256), 5, (PLAIN, SPLIT)),
    Case((4, 8, 6, 256, 256), 20, expert_map=(-1, 0, 1, -1, -1, 2, 3, -1)),
    Case((4, 4, 2, 2880, 2880), 2, (PLAIN, SPLIT)),
    Case((4, 4, 2, 320, 288), 3, spoil=True),
]


def assert_right(pair: tuple[str, str], case: Case) -> None:
    """The layer within the tolerance, by kernels that fit, and a spoilt one noticed."""
    found = emulated("emulate_own.py", *pair, tuple(CASES))[CASES.index(case)]
    routing = launches(case.tokens, case.shape[2], case.dtype)
    assert found["kernels"] == [*routing, "mxfp4_matmul", "mxfp4_matmul", "combine"]
    assert found["misfits"] == []
    assert all(error < MAX_FROBENIUS for error in found["twins"])
    assert found["layouts"] == [not case.spoil, True]
    if case.spoil:
        assert "errs by" in found["miss"]
        return
    assert found["miss"] == ""
    assert 0 < found["frobenius"] < MAX_FROBENIUS


@pytest.mark.emulate
@pytest.mark.parametrize("case", CASES, ids=ids)
@pytest.mark.parametrize("pair", EVERY, ids=ids)
def test_layer(pair: tuple[str, str], case: Case) -> None:
    """Compiled for gfx950 and executed, with every Triton."""
    assert_right(pair, case)


def test_table() -> None:
    """Hopper's has both matmuls of each shape, and says where it comes from.

    Ours have the same rows to a tile in both, up to where matmul_ogs is as fast without a graph.
    """
    table = store.read(ROOT / "vllm_mxfp4_gfx950/tables/sm90.json", "sm90")
    kinds = ("matmul_ogs", "own")
    assert [name.split() for name in sorted(table.provenance)] == [[kind, "3.6"] for kind in kinds]
    for provenance in table.provenance.values():
        assert "timed on one NVIDIA H200" in provenance["evidence"]
    assert {(kernels, gemm.name, gemm.experts) for kernels, _, gemm in table.tiles} == {
        (kind, name, experts) for kind in kinds for name in ("w13", "w2") for experts in (32, 128)
    }
    for (kernels, triton, gemm), rungs in table.tiles.items():
        if kernels != "own":
            assert rungs.bounds[-1] == TOKENS[-1]
            continue
        (other,) = (
            each
            for (kind, _, g), each in table.tiles.items()
            if kind == kernels and g.experts == gemm.experts and g.name != gemm.name
        )
        assert rungs.bounds == other.bounds == SIZES[: SIZES.index(2048) + 1]
        assert [tile.block_m for tile in rungs.rungs] == [tile.block_m for tile in other.rungs], (
            kernels,
            triton,
        )
        assert gemm.name == "w2" or all(tile.split_k == 1 for tile in rungs.rungs)


def test_no_tiles_no_own() -> None:
    """gfx950's table has none for these kernels: there matmul_ogs serves every batch."""
    for gemm in gemms(MoeShape(32, 32, 4, 2880, 2880, 1.702, 7.0)):
        assert ladder("gfx950", "own", "3.6.0", gemm) is None
        assert ladder("sm90", "own", "3.6.0", gemm) is not None
        assert ladder("sm90", "matmul_ogs", "3.6.0", gemm) is not None
        assert ladder("sm90", "matmul_ogs", "3.8.0", gemm) is None


@pytest.mark.emulate
def test_tiles_of_the_table() -> None:
    """For Hopper with the table's Triton: as meant, and without a spill.

    Those of fewer than 16 rows or 4 warps, which scale sums, get a warp's instructions.
    """
    triton = TRITONS / "3.6.0"
    if not triton.is_dir():
        pytest.skip("needs .venv/triton/3.6.0: make .venv/triton/3.6.0")
    table = store.read(ROOT / "vllm_mxfp4_gfx950/tables/sm90.json", "sm90")
    tiles = sorted(
        {
            (astuple(tile), gemm.name == "w13")
            for (kernels, _, gemm), rungs in table.tiles.items()
            for tile in rungs.rungs
            if kernels == "own"
        }
    )
    result = run_python([str(SUPPORT / "compile_own.py")], path=[triton], stdin=json.dumps(tiles))
    assert result.returncode == 0, result.stderr
    made = json.loads(result.stdout)
    # Where it is told to begin early, each kernel waits before it touches memory or lets in another.
    names = ("few", "count", "add_up", "place", "mxfp4_matmul", "combine")
    assert made["waits"] == {name: [True, False] for name in names}
    for (tile, _), found in zip(tiles, made["tiles"], strict=True):
        small = tile[0] < 16 or tile[4] < 4
        assert found["spills"] == 0, tile
        assert (found["warp"] > 0, found["group"] > 0) == (small, not small), tile


@pytest.mark.parametrize("triton", ["3.5.1", "3.6.0", "3.8.0"])
def test_other_tritons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, triton: str) -> None:
    """Tiles serve with the release that they were timed with, and no other."""

    class HopperMXValueLayout:
        pass

    @dataclass
    class HopperMXScaleLayout:
        num_warps: int | None

    shape = MoeShape(32, 32, 4, 2880, 2880, 1.702, 7.0)

    def own_for(
        arch: str, largest: int, tables: Path | None = None, warps: int | None = SM90.scale_warps
    ) -> own.Own | None:
        scales = torch.tensor([3, largest], dtype=torch.uint8)
        layouts = HopperMXValueLayout(), HopperMXScaleLayout(warps)
        values = torch.zeros(4, dtype=torch.uint8)
        w13, w2 = (Weight(None, None, torch.zeros(4), values, some, layouts) for some in (scales * 0, scales))
        return own.own_for(arch, shape, w13, w2, None, tables)

    monkeypatch.setattr(own.triton, "__version__", triton)
    found = own_for("sm90", 124)
    assert (found is not None) == (triton == "3.6.0")
    if found is not None:
        assert found.most == 2048
    assert own_for("gfx950", 124) is None
    assert own_for("sm90", SM90.max_scale + 1) is None
    assert own_for("sm90", 124, warps=4) is None
    # A user's table: for up to so many tokens, with the Triton that it was timed with.
    tile = TileConfig(8, 64, 256, 1, 4, 3, 6)
    tiles = {("own", "3.8", gemm): Ladder((16,), (tile,)) for gemm in gemms(shape)}
    store.write(tmp_path / "sm90.json", "sm90", store.Content(tiles=tiles))
    found = own_for("sm90", 124, tmp_path)
    assert (found and found.tiles[0].bounds) == {
        "3.6.0": SIZES[: SIZES.index(2048) + 1],
        "3.8.0": (16,),
    }.get(triton)
