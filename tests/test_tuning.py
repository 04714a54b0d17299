"""The tile table: how it is looked up, and what every row of it keeps to."""

import json
import logging
import math

import pytest
from run_python import ROOT

from vllm_mxfp4_gfx950 import tuning
from vllm_mxfp4_gfx950.commands.tune import MAX_OVERREAD, WEIGHT_BOUND_TOKENS, expected_tiles
from vllm_mxfp4_gfx950.models import DIVISIONS, GPT_OSS, layer_shape
from vllm_mxfp4_gfx950.tuning import Gemm, Ladder, TileConfig, decode, encode, gemms, ladder

TABLE = json.loads((ROOT / "vllm_mxfp4_gfx950/tables/gfx950.json").read_text())
RELEASES = {
    ("matmul_ogs", "3.5"),
    ("matmul_ogs", "3.6"),
    ("matmul_ogs", "3.7"),
    ("matmul_ogs", "3.8"),
    ("matmul_ogs", "3.9"),
    ("matmul", "3.8"),
    ("matmul", "3.9"),
}
TILE = TileConfig(16, 64, 256, 1, 4, 2, 0)
W13 = gemms(layer_shape("gpt-oss-20b"))[0]


def test_ladder_at() -> None:
    """A rung serves up to and with its bound; the last one all above."""
    rungs = Ladder((1, 8, 64), ("a", "b", "c"))
    assert [rungs.at(n) for n in (1, 2, 8, 9, 64, 65, 10_000)] == ["a", "b", "b", "c", "c", "c", "c"]
    assert rungs.map(str.upper).at(9) == "C"


def test_ladder_exact(caplog: pytest.LogCaptureFixture) -> None:
    """A matmul of GPT-OSS is found without a word, whatever Triton's last number is."""
    found = ladder("gfx950", "matmul_ogs", "3.6.1+rocm", W13)
    assert found is not None
    assert found == decode(TABLE["rows"])["matmul_ogs", "3.6", W13]
    assert not caplog.records


def test_ladder_without_a_table() -> None:
    """Another arch is left to the package."""
    assert ladder("gfx942", "matmul_ogs", "3.6.0", W13) is None


def test_ladder_nearest(caplog: pytest.LogCaptureFixture) -> None:
    """An unknown shape and an unknown Triton take the nearest there is, and say so once."""
    odd = Gemm("w13", 2880, 5728, 32, 32)
    with caplog.at_level(logging.WARNING):
        found = [ladder("gfx950", "matmul", "3.12.0", odd) for _ in range(2)]
    assert found[0] == found[1] == decode(TABLE["rows"])["matmul", "3.9", W13]
    assert len(caplog.records) == 1
    text = caplog.records[0].getMessage()
    assert "n=5728" in text
    assert "triton 3.12.0" in text
    assert "n=5760" in text


def test_encode_is_read_back() -> None:
    """In the order of `columns`, ladders in the order of their bounds."""
    rungs = Ladder((4, 64), (TILE, TileConfig(64, 128, 256, 1, 8, 2, 2)))
    rows = encode("matmul", "3.8.0", W13, rungs)
    assert all(len(row) == len(tuning.columns()) for row in rows)
    assert decode(rows[::-1]) == {("matmul", "3.8", W13): rungs}


def test_table_is_whole() -> None:
    """Each Triton has every matmul of GPT-OSS in every division, and says where its rows come from."""
    found = decode(TABLE["rows"])
    wanted = {gemm for model in GPT_OSS for d in DIVISIONS for gemm in gemms(layer_shape(model, *d))}
    assert set(found) == {(*release, gemm) for release in RELEASES for gemm in wanted}
    assert set(TABLE["provenance"]) == {" ".join(release) for release in RELEASES}
    assert TABLE["columns"] == tuning.columns()
    for provenance in TABLE["provenance"].values():
        assert (
            provenance["evidence"]
            == "compiled for gfx950, executed on the emulator and counted; not run on a gfx950"
        )


def test_table_reads_no_more_weights_than_there_are() -> None:
    """Where reading the weights is the work, at most 2% more than the checkpoint's bytes are read."""
    for (_, _, gemm), rungs in decode(TABLE["rows"]).items():
        for tokens in (1, 2, 4, 8, 16, 32, WEIGHT_BOUND_TOKENS):
            tile = rungs.at(tokens)
            block_bytes = -(-gemm.n // tile.block_n) * tile.block_n * gemm.k // 2
            scale_bytes = -(-gemm.n // tile.block_n) * tile.block_n * -(-gemm.k // 256) * 8
            checkpoint_bytes = gemm.n * gemm.k // 2 + gemm.n * gemm.k // 32
            assert block_bytes + scale_bytes <= MAX_OVERREAD * checkpoint_bytes, (gemm, tokens, tile)


@pytest.mark.parametrize(("tokens", "block_m"), [(1, 16), (7, 4), (40, 16), (400, 16)])
def test_expected_tiles(tokens: int, block_m: int) -> None:
    """Against the binomial distribution, summed term by term."""
    chance = 1 / 8
    weights = [
        math.comb(tokens, rows) * chance**rows * (1 - chance) ** (tokens - rows) for rows in range(tokens + 1)
    ]
    tiles = sum(weight * math.ceil(rows / block_m) for rows, weight in enumerate(weights))
    found, active = expected_tiles(tokens, chance, block_m)
    assert found == pytest.approx(tiles, rel=0.02)
    assert active == pytest.approx(1 - weights[0], abs=0.02)
