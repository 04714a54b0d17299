"""Our own matmuls: the table that says where they serve, and what Triton makes of its tiles for Hopper."""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass
from pathlib import Path

import pytest
import torch
from run_python import ROOT, SUPPORT, run_python
from test_verification import TRITONS

from vllm_mxfp4_gfx950.arch import HOPPER_SCALE_WARPS, OWN_MAX_SCALE
from vllm_mxfp4_gfx950.backends.triton import own
from vllm_mxfp4_gfx950.backends.triton.package import Weight
from vllm_mxfp4_gfx950.models import TOKENS
from vllm_mxfp4_gfx950.moe import MoeShape
from vllm_mxfp4_gfx950.tables import ladder, store
from vllm_mxfp4_gfx950.tiles import Ladder, TileConfig, gemms
from vllm_mxfp4_gfx950.tuning.record import SIZES


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
    """gfx950's table has none for these kernels."""
    for gemm in gemms(MoeShape(32, 32, 4, 2880, 2880, 1.702, 7.0)):
        assert ladder("gfx950", "own", "3.6.0", gemm) is None
        assert ladder("sm90", "own", "3.6.0", gemm) is not None
        assert ladder("sm90", "matmul_ogs", "3.6.0", gemm) is not None
        assert ladder("sm90", "matmul_ogs", "3.8.0", gemm) is None


@pytest.mark.compile
def test_tiles_of_the_table() -> None:
    """For Hopper with the table's Triton: as meant, and without a spill.

    Those of fewer than 16 rows or 4 warps, which scale sums, get a warp's instructions. A warp group's
    read codes in registers, so none may still run where the next step writes them.
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
        assert bool(found["running"]) != small, tile
        assert not any(found["running"]), tile


@pytest.mark.parametrize("triton", ["3.5.1", "3.6.0", "3.8.0"])
def test_other_tritons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, triton: str) -> None:
    """Tiles serve with the release that they were timed with, and no other."""

    class HopperMXValueLayout:
        pass

    @dataclass
    class HopperMXScaleLayout:
        num_warps: int = HOPPER_SCALE_WARPS

    class CDNA4MXScaleLayout:
        pass

    shape = MoeShape(32, 32, 4, 2880, 2880, 1.702, 7.0)

    def own_for(
        arch: str, largest: int, tables: Path | None = None, scale_layout: object = HopperMXScaleLayout()
    ) -> own.Own | None:
        scales = torch.tensor([3, largest], dtype=torch.uint8)
        layouts = HopperMXValueLayout(), scale_layout
        values = torch.zeros(4, dtype=torch.uint8)
        w13, w2 = (Weight(None, None, torch.zeros(4), values, some, layouts) for some in (scales * 0, scales))
        return own.own_for(arch, shape, w13, w2, None, tables)

    monkeypatch.setattr(own.triton, "__version__", triton)
    found = own_for("sm90", 124)
    assert (found is not None) == (triton == "3.6.0")
    if found is not None:
        assert found.most == 2048
    assert own_for("gfx950", 124) is None
    assert own_for("sm90", OWN_MAX_SCALE + 1) is None
    assert own_for("sm90", 124, scale_layout=HopperMXScaleLayout(4)) is None
    # A user's table: for up to so many tokens, with the Triton that it was timed with.
    tile = TileConfig(8, 64, 256, 1, 4, 3, 6)
    tiles = {("own", "3.8", gemm): Ladder((16,), (tile,)) for gemm in gemms(shape)}
    for arch in ("sm90", "gfx950"):
        store.write(tmp_path / f"{arch}.json", arch, store.Content(tiles=tiles))
    found = own_for("sm90", 124, tmp_path)
    assert (found and found.tiles[0].bounds) == {
        "3.6.0": SIZES[: SIZES.index(2048) + 1],
        "3.8.0": (16,),
    }.get(triton)
    # An earlier version wrote such a table on gfx950, too.
    assert own_for("gfx950", 124, tmp_path, scale_layout=CDNA4MXScaleLayout()) is None
