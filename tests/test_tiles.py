"""The tile table: how it is looked up, and what every row of it keeps to."""

import json
import logging
import math
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from run_python import ROOT

from vllm_mxfp4_gfx950 import backends
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.gfx950 import ranking
from vllm_mxfp4_gfx950.gfx950.ranking import MAX_OVERREAD, OVERREAD_TOKENS, expected_tiles
from vllm_mxfp4_gfx950.models import DIVISIONS, GPT_OSS, layer_shape
from vllm_mxfp4_gfx950.settings import Settings
from vllm_mxfp4_gfx950.tables import content, ladder, store
from vllm_mxfp4_gfx950.tiles import Gemm, Ladder, TileConfig, gemms

TABLE = store.read(ROOT / "vllm_mxfp4_gfx950/tables/gfx950.json", "gfx950")
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
    assert found == TABLE.tiles["matmul_ogs", "3.6", W13]
    assert not caplog.records


def test_ladder_merged() -> None:
    """A rung serves up to its bound, so equal neighbours are one."""
    whole = Ladder((1, 2, 4, 8, 16), ("a", "a", "b", "a", "a"))
    assert whole.merged() == Ladder((2, 4, 16), ("a", "b", "a"))
    assert [whole.merged().at(n) for n in range(1, 40)] == [whole.at(n) for n in range(1, 40)]


def test_ladder_without_a_table() -> None:
    """Another arch is left to the package."""
    assert ladder("gfx942", "matmul_ogs", "3.6.0", W13) is None


def test_ladder_nearest(caplog: pytest.LogCaptureFixture) -> None:
    """An unknown shape and an unknown Triton take the nearest there is, and say so once."""
    odd = Gemm("w13", 2880, 5728, 32, 32)
    with caplog.at_level(logging.WARNING):
        found = [ladder("gfx950", "matmul", "3.12.0", odd) for _ in range(2)]
    assert found[0] == found[1] == TABLE.tiles["matmul", "3.9", W13]
    assert len(caplog.records) == 1
    text = caplog.records[0].getMessage()
    assert "n=5728" in text
    assert "triton 3.12.0" in text
    assert "n=5760" in text


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    """In the order of the columns; ladders in the order of their bounds, whatever that of the rows is."""
    file = tmp_path / "gfx950.json"
    written = store.Content(tiles={("matmul", "3.8", W13): Ladder((4, 64), (TILE, OTHER))})
    store.write(file, "gfx950", written)
    table = json.loads(file.read_text())
    assert all(len(row) == len(table["columns"]) for row in table["rows"])
    table["rows"].reverse()
    file.write_text(json.dumps(table))
    assert store.read(file, "gfx950") == written


def test_table_is_whole() -> None:
    """Each Triton has every matmul of GPT-OSS in every division, and says where its rows come from."""
    found = TABLE.tiles
    wanted = {gemm for model in GPT_OSS for d in DIVISIONS for gemm in gemms(layer_shape(model, *d))}
    assert set(found) == {(*release, gemm) for release in RELEASES for gemm in wanted}
    assert set(TABLE.provenance) == {" ".join(release) for release in RELEASES}
    for provenance in TABLE.provenance.values():
        assert (
            provenance["evidence"]
            == "compiled for gfx950, executed on the emulator and counted; not run on a gfx950"
        )


def test_table_reads_no_more_weights_than_there_are() -> None:
    """Where reading the weights is the work, at most 2% more than the checkpoint's bytes are read."""
    for (_, _, gemm), rungs in TABLE.tiles.items():
        for tokens in (1, 2, 4, 8, 16, 32, OVERREAD_TOKENS):
            tile = rungs.at(tokens)
            block_bytes = -(-gemm.n // tile.block_n) * tile.block_n * gemm.k // 2
            scale_bytes = -(-gemm.n // tile.block_n) * tile.block_n * -(-gemm.k // 256) * 8
            checkpoint_bytes = gemm.n * gemm.k // 2 + gemm.n * gemm.k // 32
            assert block_bytes + scale_bytes <= MAX_OVERREAD * checkpoint_bytes, (gemm, tokens, tile)


def test_ranking_keeps_what_was_measured(tmp_path: Path) -> None:
    """A user's table that is brought up to date by compiling keeps its times and rows of other kernels."""
    file = own_table(tmp_path) / "gfx950.json"
    before = store.read(file, "gfx950")
    own = {key: rungs for key, rungs in before.tiles.items() if key[0] == "own"}
    before.measured = {
        key: {n: (tile, 9.5) for n, tile in rungs.pairs()} for key, rungs in before.tiles.items()
    }
    before.plans = {("3.6", Gemm("w13", 32, 64, 1, 1)): Ladder((8,), ("table",))}
    store.write(file, "gfx950", before)
    ranked = Ladder((64,), (TILE,))
    ranking.update(file, store.read(file, "gfx950"), "matmul_ogs", {W2: ranked}, "3.6.0", 1, 1)
    found = store.read(file, "gfx950")
    assert found.measured == before.measured
    assert found.plans == before.plans
    assert found.tiles == own | {("matmul_ogs", "3.6", W2): ranked}
    assert len(own) == 2


def test_ranking_reads_its_table_first(tmp_path: Path) -> None:
    """A file that is no table is told before hours of compiling, for which there is nothing here."""
    file = tmp_path / "new" / "gfx950.json"
    with pytest.raises(Mxfp4Error, match="triton_kernels is not installed"):
        ranking.rank(file, print)
    assert file.parent.is_dir()
    file.write_text("[]")
    with pytest.raises(Mxfp4Error, match=r"gfx950\.json must be "):
        ranking.rank(file, print)


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


OTHER = TileConfig(32, 64, 256, 1, 4, 1, 0)
SMALL = TileConfig(16, 64, 256, 1, 4, 1, 0)
W2 = gemms(layer_shape("gpt-oss-20b"))[1]


def own_table(directory: Path) -> Path:
    """A user's table for GPT-OSS-20B."""
    tiles = {("matmul_ogs", "3.6", W13): Ladder((64, 8192), (TILE, OTHER))}
    tiles |= {("own", "3.6", gemm): Ladder((8,), (SMALL,)) for gemm in (W13, W2)}
    provenance = {"matmul_ogs 3.6": {"evidence": "here"}}
    store.write(directory / "gfx950.json", "gfx950", store.Content(provenance, tiles))
    return directory


def test_own_table_serves_what_it_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The user's rows for their matmul and their Triton; ours for every other; the log says whose, once."""
    own = own_table(tmp_path)
    ours = TABLE.tiles
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            found = ladder("gfx950", "matmul_ogs", "3.6.1", W13, own)
            assert found == Ladder((64, 8192), (TILE, OTHER))
            assert ladder("gfx950", "matmul_ogs", "3.6.1", W2, own) == ours["matmul_ogs", "3.6", W2]
    assert [record.getMessage() for record in caplog.records] == [
        f"matmul_ogs tiles for triton 3.6 are those of {own}/gfx950.json",
        "matmul_ogs tiles for triton 3.6 are those of this package "
        f"({own}/gfx950.json has none for this layer)",
    ]
    big = gemms(layer_shape("gpt-oss-120b"))[0]
    assert ladder("gfx950", "matmul_ogs", "3.6.1", big, own) == ours["matmul_ogs", "3.6", big]
    assert ladder("gfx950", "matmul", "3.8.0", W13, own) == ours["matmul", "3.8", W13]
    # What was timed with another Triton does not serve, be it the nearest.
    assert ladder("gfx950", "matmul_ogs", "3.7.1", W13, own) == ours["matmul_ogs", "3.7", W13]
    assert ladder("gfx950", "own", "3.6.1", W13, own) == Ladder((8,), (SMALL,))
    assert ladder("gfx950", "own", "3.7.1", W13, own) is None
    assert ladder("gfx950", "own", "3.6.1", big, own) is None
    # Nor on another arch, nor where there is no file.
    for kernels in ("matmul_ogs", "own"):
        assert ladder("sm90", kernels, "3.6.1", W13, own) == ladder("sm90", kernels, "3.6.1", W13)
    assert ladder("sm90", "matmul", "3.6.1", W13, own) is None


def test_timed_tiles_of_ours_serve_with_their_triton_only() -> None:
    """Ranked ones are lent to the nearest Triton."""
    assert ladder("sm90", "own", "3.6.0", W13) is not None
    assert ladder("sm90", "own", "3.7.0", W13) is None
    assert ladder("gfx950", "matmul_ogs", "3.12.0", W13) is not None


def test_select_refuses_a_bad_table(tmp_path: Path) -> None:
    """At once: when a layer is prepared it would look like the backend's fault, and another would serve."""
    (tmp_path / "cpu.json").write_text("[")
    with pytest.raises(Mxfp4Error, match=r"cpu\.json must be JSON; got "):
        backends.select(layer_shape("gpt-oss-20b"), "cpu", Settings(tables=tmp_path))
    (tmp_path / "cpu.json").rename(tmp_path / "gfx950.json")
    assert backends.select(layer_shape("gpt-oss-20b"), "cpu", Settings(tables=tmp_path)).arch == "cpu"


def put(*path: Any) -> Callable[[Any], None]:
    """Set what lies at a path of a table's content, whose last item is the value."""
    *way, last, value = path

    def edit(content: Any) -> None:
        for key in way:
            content = content[key]
        content[last] = value

    return edit


def tile(row: int, column: int, value: Any) -> Callable[[Any], None]:
    """Set a value of a row's tile."""

    def edit(content: Any) -> None:
        content["tiles"][content["rows"][row][-1]][column] = value

    return edit


TIMED = ["own", "3.6", "w2", 32, 32, 1, 1, 1, 0]
PLAN = ["3.6", 32, 64, 1, 1, 1, "table"]
POWERS = "one of 8, 16, 32, 64, 128, 256"
BAD = {
    "arch": (put("arch", "sm90"), ": arch must be gfx950; got 'sm90'"),
    "no rows": (lambda c: c.pop("rows"), " must be of arch, columns, provenance, rows, tile, tiles; got ['"),
    "more": (put("code", "import os"), " must be of arch, columns, provenance, rows, tile, tiles; got ['"),
    "columns": (lambda c: c["columns"].append("stages"), ": columns must be kernels, triton, name, k, n, "),
    "rows": (put("rows", {"0": []}), ": rows must be a list; got {'0': []}"),
    "provenance": (put("provenance", []), ": provenance must be an object; got []"),
    "entry": (put("provenance", "x", "y"), ": provenance['x'] must be an object; got 'y'"),
    "long entry": (put("provenance", "x" * 9999, "y"), ": provenance['xxxxxxxxxxxx...xxxxxxxxxxxxx'] must"),
    "commands": (put("provenance", "x", {"commands": 5}), ": provenance['x'].commands must be a list; got 5"),
    "nested": (put("rows", 0, [[1]]), ": rows[0] must be 9 values; got [[1]]"),
    "short": (lambda c: c["rows"][0].pop(), ": rows[0] must be 9 values; got ['"),
    "kernels": (put("rows", 0, 0, "cuda"), ": rows[0].kernels must be one of matmul_ogs, matmul, own; "),
    "kernels list": (put("rows", 0, 0, ["own"]), ": rows[0].kernels must be one of matmul_ogs, matmul, "),
    "triton": (put("rows", 0, 1, "3.6.0"), ": rows[0].triton must be the first two numbers of a release, "),
    "triton float": (put("rows", 0, 1, 3.6), ": rows[0].triton must be the first two numbers of a release"),
    "name": (put("rows", 0, 2, "w1"), ": rows[0].name must be one of w13, w2; got 'w1'"),
    "k": (put("rows", 0, 3, 33), ": rows[0].k must be an integer from 32 to 65536 in steps of 32; got 33"),
    "experts": (put("rows", 0, 5, 0), ": rows[0].experts must be an integer from 1 to 4096; got 0"),
    "tokens": (put("rows", 2, 7, 0), ": rows[2].tokens must be an integer from 1 to 16384; got 0"),
    "many tokens": (put("rows", 2, 7, 16385), ": rows[2].tokens must be an integer from 1 to 16384; got 163"),
    "negative": (put("rows", 0, 7, -1), ": rows[0].tokens must be an integer from 1 to 16384; got -1"),
    "float": (tile(0, 0, 16.0), f": rows[0].block_m must be {POWERS}; got 16.0"),
    "bool": (tile(0, 6, True), ": rows[0].waves_per_eu must be an integer from 0 to 8; got T"),
    "null": (tile(0, 0, None), f": rows[0].block_m must be {POWERS}; got None"),
    "text": (tile(0, 0, "16"), f": rows[0].block_m must be {POWERS}; got '16'"),
    "no power": (tile(0, 0, 24), f": rows[0].block_m must be {POWERS}; got 24"),
    "list": (tile(0, 0, [16]), f": rows[0].block_m must be {POWERS}; got [16]"),
    "nan": (tile(0, 0, math.nan), f": rows[0].block_m must be {POWERS}; got nan"),
    "infinite": (tile(0, 0, math.inf), f": rows[0].block_m must be {POWERS}; got inf"),
    "huge": (tile(0, 0, 10**4000), f": rows[0].block_m must be {POWERS}; got 1000000000000"),
    "rows of own": (tile(2, 0, 8), f": rows[2].block_m must be {POWERS.replace(' 8,', '')}; "),
    "past the scales": (tile(2, 2, 512), ": rows[2].block_k must be one of 32, 64, 128, 256; "),
    "split": (tile(1, 3, 2), ": rows[1].split_k must be 1; got 2"),
    "tile": (put("tile", ["rows"]), ": tile must be block_m, block_n, block_k, split_k, num_warps, "),
    "tiles": (put("tiles", {"0": []}), ": tiles must be a list; got {'0': []}"),
    "short tile": (lambda c: c["tiles"][1].pop(), ": tiles[1] must be 7 values; got [16, 64, 256, 1, 4, 2]"),
    "no tile": (put("rows", 1, 8, 3), ": rows[1].tile must be a place in tiles; got 3"),
    "tile behind": (put("rows", 1, 8, -1), ": rows[1].tile must be a place in tiles; got -1"),
    "tile bool": (put("rows", 1, 8, True), ": rows[1].tile must be a place in tiles; got True"),
    "twice": (lambda c: c["rows"].append(c["rows"][2]), ": rows[4] must be the only one for its tokens"),
    "block_m differs": (put("rows", 0, 8, 2), ": the rows of own must be of w13 and w2 alike in "),
    "half of own": (lambda c: c["rows"].pop(0), ": the rows of own must be of w13 and w2 alike in "),
    "us": (put("measured", [[*TIMED, math.nan]]), ": measured[0].us must be a time above 0.0; got nan"),
    "timed twice": (put("measured", [[*TIMED, 1.5]] * 2), ": measured[1] must be the only one for its to"),
    "plans": (put("plans", {}), ": plans must be a list; got {}"),
    "short plan": (put("plans", [PLAN[:-1]]), ": plans[0] must be of triton, k, n, experts, global_exper"),
    "plan": (put("plans", [[*PLAN[:-1], "ours"]]), ": plans[0].plan must be one of own, two_fp8, table, pac"),
    "plan's release": (put("plans", [[3.6, *PLAN[1:]]]), ": plans[0].triton must be the first two numbers"),
    "plan's tokens": (put("plans", [[*PLAN[:-2], 0, "own"]]), ": plans[0].tokens must be an integer from 1 "),
    "plan's k": (put("plans", [["3.6", 33, *PLAN[2:]]]), ": plans[0].k must be an integer from 32 to 65536 "),
    "plan twice": (put("plans", [PLAN, [*PLAN[:-1], "own"]]), ": plans[1] must be the only one for its tok"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_read_refuses(tmp_path: Path, fault: str) -> None:
    """Each rule of a table, broken alone."""
    file = own_table(tmp_path) / "gfx950.json"
    content = json.loads(file.read_text())
    assert [row[:3] for row in content["rows"][:3]] == [
        ["own", "3.6", "w2"], ["own", "3.6", "w13"], ["matmul_ogs", "3.6", "w13"]
    ]  # fmt: skip
    edit, text = BAD[fault]
    edit(content)
    file.write_text(json.dumps(content))
    with pytest.raises(Mxfp4Error, match=f"^{re.escape(f'{file}{text}')}") as raised:
        store.read(file, "gfx950")
    assert str(raised.value).endswith(". Correct it, or delete it and let `vllm-mxfp4 tune` write it anew.")
    assert len(str(raised.value)) < 600


HOSTILE = {
    "empty": "",
    "cut off": '{"arch": "gfx950", "rows": [',
    "deep": "[" * 500_000,
    "many digits": '{"arch": 1' + "0" * 500_000 + "}",
    "not text": "\udcff",
    "python": "__import__('os').system('true')",
    "large": '{"arch": "' + "x" * (10 << 20) + '"}',
    "list": '["arch", "columns", "provenance", "rows"]',
    "many keys": json.dumps({str(i): i for i in range(50_000)}),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_read_survives(tmp_path: Path, fault: str) -> None:
    """What is no table at all is refused in a moment, and in a line."""
    file = tmp_path / "gfx950.json"
    file.write_text(HOSTILE[fault], errors="surrogateescape")
    began = time.process_time()
    with pytest.raises(Mxfp4Error, match=f"^{re.escape(str(file))} must be ") as raised:
        store.read(file, "gfx950")
    assert time.process_time() - began < 2
    assert len(str(raised.value)) < 600


def test_read_refuses_a_large_table(tmp_path: Path) -> None:
    """Though it is right, and blank from the first mebibyte on."""
    file = own_table(tmp_path) / "gfx950.json"
    file.write_text(file.read_text() + " " * (10 << 20))
    with pytest.raises(Mxfp4Error, match=r"gfx950\.json must be at most 1048576 bytes; got 'more'\. "):
        store.read(file, "gfx950")


def test_read_refuses_what_cannot_be_read(tmp_path: Path) -> None:
    """In words: its first bytes are no memory of this process."""
    (tmp_path / "gfx950.json").symlink_to("/proc/self/mem")
    with pytest.raises(Mxfp4Error, match=r"gfx950\.json must be readable; got \[Errno 5\] .*\. Let "):
        content(tmp_path, "gfx950")


def test_read_refuses_a_directory(tmp_path: Path) -> None:
    """What has a table's name and is none."""
    (tmp_path / "gfx950.json").mkdir()
    with pytest.raises(Mxfp4Error, match=r"gfx950\.json must be a file; got 'something else'"):
        content(tmp_path, "gfx950")


@pytest.mark.parametrize(
    ("column", "value", "rule"),
    [
        ("num_warps", 4, "8"),
        ("block_n", 128, "256"),
        ("block_k", 32, "one of 64, 128, 256"),
        ("block_m", 256, "one of 16, 32, 64, 128"),
    ],
)
def test_read_knows_hopper(tmp_path: Path, column: str, value: int, rule: str) -> None:
    """With such tiles matmul_ogs would take each scale for another's, or not start."""
    file = tmp_path / "sm90.json"

    def table(tile: TileConfig) -> store.Content:
        return store.Content(tiles={("matmul_ogs", "3.6", W13): Ladder((64,), (tile,))})

    right = TileConfig(16, 256, 128, 1, 8, 4, 0)
    store.write(file, "sm90", table(right))
    assert store.read(file, "sm90") == table(right)
    store.write(file, "sm90", table(replace(right, **{column: value})))
    with pytest.raises(Mxfp4Error, match=re.escape(f"rows[0].{column} must be {rule}; got {value}. ")):
        store.read(file, "sm90")


@pytest.mark.parametrize(
    ("tile", "rule"),
    [
        (TileConfig(16, 128, 128, 1, 8, 4, 0), "num_warps must be one of 1, 2, 4; got 8. "),
        (TileConfig(16, 128, 32, 1, 4, 4, 0), "block_k must be one of 64, 128, 256; got 32. "),
        (
            TileConfig(16, 64, 64, 1, 2, 4, 0),
            "num_warps must be at most 1 with block_m 16 and block_k 64; ",
        ),
    ],
)
def test_read_knows_our_own_kernels(tmp_path: Path, tile: TileConfig, rule: str) -> None:
    """What does not run, or not right."""
    file = tmp_path / "sm90.json"

    def table(tile: TileConfig) -> store.Content:
        return store.Content(tiles={("own", "3.6", gemm): Ladder((64,), (tile,)) for gemm in (W13, W2)})

    right = TileConfig(16, 128, 128, 1, 4, 4, 0)
    store.write(file, "sm90", table(right))
    assert store.read(file, "sm90") == table(right)
    store.write(file, "sm90", table(tile))
    with pytest.raises(Mxfp4Error, match=re.escape(f"rows[0].{rule}")):
        store.read(file, "sm90")


@pytest.mark.parametrize("arch", ["gfx950", "sm90"])
def test_our_tables_keep_to_the_rules(tmp_path: Path, arch: str) -> None:
    """And are written as `write` writes them."""
    file = ROOT / f"vllm_mxfp4_gfx950/tables/{arch}.json"
    table = store.read(file, arch)
    store.write(tmp_path / "again.json", arch, table)
    assert (tmp_path / "again.json").read_text() == file.read_text()
    assert store.read(tmp_path / "again.json", arch) == table
    assert not (tmp_path / "again.part").exists()
