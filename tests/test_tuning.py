"""Tuning on a GPU: on the emulated gfx950 as far as that goes, on a true GPU where there is one."""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import re
import threading
from dataclasses import astuple, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from run_python import ROOT, SUPPORT, run_python
from test_verification import EVERY, PACKAGES, TRITONS, ids, paths_of

from vllm_mxfp4_gfx950 import backends, choice, cli, tables
from vllm_mxfp4_gfx950.arch import ARCHES
from vllm_mxfp4_gfx950.backends import reference
from vllm_mxfp4_gfx950.commands import tune as tune_command
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.models import DIVISIONS, GPT_OSS, layer_shape
from vllm_mxfp4_gfx950.random_layer import make_shape, random_tokens
from vllm_mxfp4_gfx950.tables import ladder, store
from vllm_mxfp4_gfx950.tiles import Gemm, Ladder, TileConfig, gemms
from vllm_mxfp4_gfx950.tolerance import assert_rows_close
from vllm_mxfp4_gfx950.tuning import record
from vllm_mxfp4_gfx950.tuning import search as tune

SHAPE = layer_shape("gpt-oss-20b")
A, B = TileConfig(16, 256, 128, 1, 8, 4, 0), TileConfig(32, 256, 128, 1, 8, 4, 0)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def emulated(directory: Path, triton: str, kernels: str) -> dict[str, Any]:
    """What emulate_tune.py found with a Triton and its kernels."""
    script = str(SUPPORT / "emulate_tune.py")
    result = run_python([script, str(directory)], path=paths_of(triton, kernels))
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def assert_tuned(found: dict[str, Any], kernels: str) -> None:
    """Measured once, resumed, written when whole, and served from."""
    assert found["kernels"] == [kernels]
    # Half of it does not serve yet; the rest takes no second look at what was measured, nor a third run any.
    assert found["interrupted"]["rows"] == []
    assert {row["tokens"] for row in found["interrupted"]["measured"]} == {1}
    assert found["whole"]["measured"][0] in found["interrupted"]["measured"]
    assert len(found["lines"]) == 1
    assert found["again"] == []
    assert 0 < found["asked"][1] <= 2 * found["asked"][0]
    release = found["whole"]["rows"][-1]["triton"]
    assert found["whole"]["provenance"][f"{kernels} {release}"]["evidence"] == "emulated"
    # What serves is what was measured as the best, and right.
    best = {
        (row["kernels"], row["triton"], row["name"], row["tokens"]): row["tile"][1]
        for row in found["whole"]["measured"]
    }
    for served, name in zip(found["served"], ("w13", "w2"), strict=True):
        assert served == [best[kernels, release, name, tokens] for tokens in (1, 3)]
    assert found["miss"] == ""
    # The log says whose tiles these are, and speaks of no kernels that the arch does not have.
    assert {text.split()[0] for text in found["told"]} == {kernels}
    # The plans are chosen among all that there are, with these tiles, and written down.
    assert found["pinned"] == [False, False, True, True]
    for us in found["plans"]:
        serves = us.pop("serves")
        assert {"table", "package", "two_fp8"} <= us.keys()
        assert us[serves] == min(us.values())


@pytest.mark.compile
def test_tune_emulated(tmp_path_factory: pytest.TempPathFactory) -> None:
    """And a tile that computes wrongly is not taken."""
    found = emulated(tmp_path_factory.mktemp("tune"), "3.6.0", "matmul_ogs")
    assert_tuned(found, "matmul_ogs")
    # Negative control: the best tile of w13 computes wrongly. It is named, and is in no row.
    (line,) = found["spoilt_lines"]
    assert f"refused; matmul_ogs {tuple(found['wrong'])}" in line
    assert "row 0 errs by" in line
    tiles = [row["tile"] for row in found["spoilt"]["measured"] if row["name"] == "w13"]
    assert tiles
    assert found["wrong"] not in tiles


@pytest.mark.emulate
@pytest.mark.parametrize("pair", EVERY, ids=ids)
def test_every_triton(tmp_path: Path, pair: tuple[str, str]) -> None:
    """The same with every Triton, and with the other generations of triton_kernels."""
    assert_tuned(emulated(tmp_path, *pair), "matmul" if pair[1] == "matmul" else "matmul_ogs")


@pytest.mark.parametrize(
    ("arch", "kernels"),
    [("sm90", "matmul_ogs"), ("sm90", "own"), ("gfx950", "matmul_ogs"), ("gfx950", "matmul")],
)
def test_candidates_keep_to_the_bounds(tmp_path: Path, arch: str, kernels: str) -> None:
    """Every candidate of every division may stand in a table, and every batch has some."""
    every: set[TileConfig] = set()
    for model in GPT_OSS:
        for division in DIVISIONS:
            shape = layer_shape(model, *division)
            for tokens in record.SIZES:
                some = tune.groups(arch, kernels, shape, tokens)
                rows = tokens * 4 / shape.global_experts
                assert some or (kernels == "own" and rows > 128)
                pairs = {pair for ups, downs in some for pair in [(up, downs[0]) for up in ups]}
                pairs |= {(ups[0], down) for ups, downs in some for down in downs}
                every |= {tile for pair in pairs for tile in pair}
                assert len(pairs) < 130  # A tenth of a second each: minutes in all.
                for at, pair in enumerate(pairs):
                    assert pair[0].block_m == pair[1].block_m or kernels != "own", at
    assert {replace(tile, split_k=1) for tile in every} == set(ARCHES[arch].candidates[kernels])
    assert {tile.split_k for tile in every} == ({*tune.OWN_SPLITS} if kernels == "own" else {1})
    w13, w2 = gemms(shape)
    downs = Ladder.of(dict(enumerate(sorted(every, key=astuple), start=1)))
    ups = downs.map(lambda tile: replace(tile, split_k=1))  # As in a pair.
    table = store.Content(tiles={(kernels, "3.6", w13): ups, (kernels, "3.6", w2): downs})
    store.write(tmp_path / f"{arch}.json", arch, table)
    assert store.read(tmp_path / f"{arch}.json", arch) == table


def compiled_for_hopper(tiles: list[TileConfig]) -> dict[str, Any]:
    """What triton_kernels in vLLM 0.26 and Triton 3.6 make of matmul_ogs with some tiles."""
    paths = [TRITONS / "3.6.0", PACKAGES / "vllm-0.26.0/vllm/third_party"]
    for path in paths:
        if not path.is_dir():
            pytest.skip(f"needs {path.relative_to(ROOT)}: make test-emulated")
    script = str(SUPPORT / "compile_hopper_matmul.py")
    stdin = json.dumps([astuple(tile) for tile in tiles])
    result = run_python([script], path=paths, stdin=stdin)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.compile
def test_hopper_flags() -> None:
    """What the package chooses is what we hand it for that tile; a tile that it never chooses compiles."""
    found = compiled_for_hopper([TileConfig(64, 256, 128, 1, 8, 2, 4)])
    assert len(found["pairs"]) == 4
    for theirs, ours in found["pairs"]:
        assert ours == theirs
    assert found["spills"] == [[0, 0]]
    # Our own matmuls read that layout as it is drawn.
    assert found["layouts"] == [True, True]


@pytest.mark.emulate
def test_hopper_candidates() -> None:
    """All compile; with 128 rows some spill, which only time can judge."""
    tiles = ARCHES["sm90"].candidates["matmul_ogs"]
    for tile, spills in zip(tiles, compiled_for_hopper(tiles)["spills"], strict=True):
        assert len(spills) == 2
        assert spills == [0, 0] or tile.block_m == 128, tile


def test_groups_follow_the_rows() -> None:
    """One token of 20B: the smallest tiles. 8192: 1024 rows an expert, the largest."""
    assert {tile.block_m for tile in tune.groups("sm90", "matmul_ogs", SHAPE, 1)[0][0]} == {16, 32}
    assert {tile.block_m for tile in tune.groups("sm90", "matmul_ogs", SHAPE, 512)[0][0]} == {32, 64, 128}
    assert {tile.block_m for tile in tune.groups("sm90", "matmul_ogs", SHAPE, 8192)[0][0]} == {64, 128}
    assert [ups[0].block_m for ups, _ in tune.groups("sm90", "own", SHAPE, 1)] == [8, 16]
    assert [ups[0].block_m for ups, _ in tune.groups("sm90", "own", SHAPE, 256)] == [8, 16, 32, 64]
    assert {down.split_k for _, downs in tune.groups("sm90", "own", SHAPE, 64) for down in downs} == {
        1,
        2,
        3,
    }
    assert {up.split_k for ups, _ in tune.groups("sm90", "own", SHAPE, 64) for up in ups} == {1}


def test_nan_in_new_memory() -> None:
    """What a candidate leaves unwritten is not what the one before it wrote there; and only while it runs."""
    torch.use_deterministic_algorithms(False)
    with tune.nan_in_new_memory():
        assert torch.empty(1000).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_fastest() -> None:
    """One side after the other, around what must not serve; None when nothing may."""
    cost = {(A, A): math.inf, (B, B): 9.0, (A, B): 7.0, (B, A): 1.0}
    assert tune.fastest([([A, B], [A, B])], cost.__getitem__) == (A, B)
    assert tune.fastest([([A], [A])], cost.__getitem__) is None
    assert tune.fastest([([A], [A]), ([B], [B])], cost.__getitem__) == (B, B)


class Now:
    """Our own matmuls, of which one tile gives other bits in each fifth run."""

    def __init__(self) -> None:
        self.runs = 0
        self.prepared = [self]
        self.arch, self.shape = "sm90", SHAPE

    def with_tiles(self, _: Any, tiles: tune.Tiles) -> Any:
        """A layer with these tiles."""

        def run(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            self.runs += 1
            return x + (tiles[1][0] == A and self.runs % 5 == 0)

        return SimpleNamespace(run=run)


def test_search_refuses_what_varies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest tile is right when it is looked at once, and not always: the next one is taken."""
    batch = tune.Batch.__new__(tune.Batch)
    batch.layers, batch.tokens, batch.inputs = Now(), 8, [(torch.zeros(3), torch.zeros(3))]  # type: ignore[assignment]
    us = {A: 1.0, B: 2.0}
    monkeypatch.setattr(batch, "miss", lambda _: "")
    monkeypatch.setattr(batch, "time_us", lambda tiles: us[tiles[1][0]] + us[tiles[1][1]])
    monkeypatch.setattr(tune, "groups", lambda *_: [([A, B], [A, B])])
    refused: list[str] = []
    assert tune.search(batch, "own", refused) == ((B, B), 4.0)
    told = f"own {astuple(A)} {astuple(A)}: {tune.REPEATS // 5} of {tune.REPEATS} runs give other bits"
    assert refused == [told]
    # Negative control: looked at once, it is taken.
    monkeypatch.setattr(tune, "REPEATS", 1)
    batch.layers = Now()  # type: ignore[assignment]
    assert tune.search(batch, "own", []) == ((A, A), 2.0)


def table_in(
    directory: Path, evidence: str = "timed on one X, torch 2", release: str = "3.6.0"
) -> record.Table:
    """A table for GPT-OSS-20B."""
    return record.Table(directory / "sm90.json", "sm90", SHAPE, "matmul_ogs", release, evidence, "tune")


def fill(directory: Path, own_us: dict[int, float], *given: str) -> record.Table:
    """Measure all: matmul_ogs takes 100 us each, with A up to 64 tokens and B above."""
    table = table_in(directory, *given)
    for tokens in record.SIZES:
        tile = A if tokens <= 64 else B
        found = {"matmul_ogs": ((tile, tile), 100.0)}
        if tokens in own_us:
            small = TileConfig(8 if tokens < 4 else 16, 64, 256, 1, 4, 3, 6)
            found["own"] = (small, small), own_us[tokens]
        table.add(tokens, found)
    return table


def ladders(directory: Path, gemm: Gemm) -> tuple[Any, Any]:
    """What serves from such a table with Triton 3.6."""
    some = (ladder("sm90", kernels, "3.6.1", gemm, directory) for kernels in ("matmul_ogs", "own"))
    return tuple(some)


def test_table(tmp_path: Path) -> None:
    """Rows for our own matmuls as far as they have tiles; equal neighbours of matmul_ogs are one."""
    fill(tmp_path, {1: 50.0, 2: 60.0, 3: 160.0, 4: 170.0})
    for gemm in gemms(SHAPE):
        matmul, own = ladders(tmp_path, gemm)
        assert matmul == Ladder((64, 8192), (A, B))
        assert own.bounds == (1, 2, 3, 4)
        assert [tile.block_m for tile in own.rungs] == [8, 8, 8, 16]
    assert all(table_in(tmp_path).has(tokens) for tokens in record.SIZES)
    with pytest.raises(Mxfp4Error, match="must be timed on one Y, torch 2; got timed on one X, torch 2"):
        table_in(tmp_path, "timed on one Y, torch 2")


def test_pin(tmp_path: Path) -> None:
    """What was chosen is read back for its layer and release alone, until more is timed."""
    table = table_in(tmp_path)
    for few in ("own", "two_fp8"):
        table.pin(Ladder((64, 8192), (few, "package")))
        assert table.content.plans == {("3.6", gemms(SHAPE)[0]): Ladder((64, 8192), (few, "package"))}
    content = store.read(table.file, "sm90")
    assert content == table.content
    assert content.provenance["plans 3.6"]["commands"] == ["tune"]
    for release, shape in (("3.7.1", SHAPE), ("3.6.1", layer_shape("gpt-oss-120b"))):
        assert tables.plans("sm90", release, shape, tmp_path) is None
    assert tables.plans("sm90", "3.6.0", SHAPE, tmp_path) == Ladder((64, 8192), ("two_fp8", "package"))
    assert tables.plans("sm90", "3.6.0", SHAPE, None) is None
    assert table.pinned
    table.add(1, {"matmul_ogs": ((A, A), 100.0)})
    assert not table.pinned
    assert store.read(table.file, "sm90").plans == {}


def test_two_tune_at_once(tmp_path: Path) -> None:
    """Two layers into one file: both are in it; the same measured twice stands once."""
    first, again = table_in(tmp_path), table_in(tmp_path)
    other = record.Table(
        first.file, "sm90", layer_shape("gpt-oss-120b"), "matmul_ogs", "3.6.0", first.evidence, "other"
    )
    first.add(1, {"matmul_ogs": ((A, A), 100.0)})
    other.add(1, {"matmul_ogs": ((A, A), 90.0)})
    again.add(1, {"matmul_ogs": ((B, B), 80.0)})
    first.add(2, {"matmul_ogs": ((A, A), 70.0)})
    content = store.read(first.file, "sm90")
    found = sorted(
        (gemm.experts, tokens, tile.block_m, us)
        for (_, _, gemm), times in content.measured.items()
        for tokens, (tile, us) in times.items()
        if gemm.name == "w13"
    )
    assert found == [(32, 1, 32, 80.0), (32, 2, 16, 70.0), (128, 1, 16, 90.0)]
    assert content.provenance["matmul_ogs 3.6"]["commands"] == ["tune", "other"]
    assert content.tiles == {}
    # One that began before there was a file, on something else.
    late = table_in(tmp_path / "none", "timed on one Y, torch 2")
    late.file = first.file
    with pytest.raises(Mxfp4Error, match="must be timed on one Y, torch 2; got timed on one X, torch 2"):
        late.add(4, {"matmul_ogs": ((A, A), 70.0)})


def test_one_writes_at_a_time(tmp_path: Path) -> None:
    """Between reading the file and writing it, no other process writes."""
    table = table_in(tmp_path)
    adding = threading.Thread(target=table.add, args=(1, {"matmul_ogs": ((A, A), 100.0)}))
    with (tmp_path / "sm90.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        adding.start()
        adding.join(0.3)
        assert adding.is_alive()
        assert not table.file.exists()
    adding.join(60)
    assert table_in(tmp_path).has(1)


class Deadly:
    """Ends the process that it is sent to."""

    def __reduce__(self) -> Any:
        return os.abort, ()


def test_compiler_that_aborts() -> None:
    """What it was compiling is named, and nothing of what is behind it."""
    some: Any = [(Deadly(), (A, B)), (SHAPE, (B, B))]
    jobs: Any = [(shape, "sm90", 8, ("matmul_ogs", pair)) for shape, pair in some]
    culprit = f"matmul_ogs {astuple(A)} {astuple(B)} with 8 tokens"
    text = f"the compiler must be alive after every candidate; got dead from {culprit}. Free memory if "
    with pytest.raises(Mxfp4Error, match=f"^{re.escape(text)}"):
        tune.compile_all(jobs, workers=1)


def test_table_keeps_other_rows(tmp_path: Path) -> None:
    """Those of another layer, and of another Triton."""
    other = Gemm("w13", 2880, 5760, 128, 128)
    older = "matmul_ogs", "3.5", gemms(SHAPE)[0]
    one = Ladder((1,), (B,))
    # Of this one more was measured than serves, by an earlier rule.
    measured = {("matmul_ogs", "3.6", other): dict.fromkeys(record.SIZES, (A, 1.0))}
    rows = {("matmul_ogs", "3.6", other): one, older: one}
    store.write(tmp_path / "sm90.json", "sm90", store.Content(tiles=rows, measured=measured))
    fill(tmp_path, {})
    assert ladders(tmp_path, other)[0] == one
    assert ladders(tmp_path, gemms(SHAPE)[0])[0] == Ladder((64, 8192), (A, B))
    assert store.read(tmp_path / "sm90.json", "sm90").tiles[older] == one


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "--out must be given; got nothing. "),
        (["--arch", "gfx950"], "--table must be given; got nothing. "),
        (["--out", "tables", "--table", "x"], "--table must be left out without --arch; got x. Give --out "),
        (["--arch", "gfx950", "--table", "x", "--out", "y"], "--out must be left out with --arch; got y. "),
        (["--arch", "gfx950", "--table", "x", "--quick"], "--quick must be left out with --arch; got True. "),
        (["--arch", "gfx950", "--table", "x", "--ep", "2"], "--ep must be left out with --arch; got 2. "),
        (["--out", "tables", "--model", "gpt-oss"], "--model must be gpt-oss-20b, gpt-oss-120b, or the path"),
        (["--out", "tables"], "the machine must be one with a GPU; got none that torch sees. Run where"),
    ],
)
def test_run_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    """What cannot be done as asked, in words."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"vllm-mxfp4 tune: {text}")


@pytest.mark.parametrize(
    ("quick", "pinned", "chosen"), [(True, True, 1), (False, False, 1), (False, True, 0)]
)
def test_run_ends_in_a_choice(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    quick: bool,
    pinned: bool,
    chosen: int,
) -> None:
    """Among the tiles of the table that it is written to; not again where nothing is new."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "X")
    monkeypatch.setattr(backends, "arch_of", lambda _: "sm90")
    backend = SimpleNamespace(KERNELS="matmul_ogs", NAME="triton_ogs", source=lambda: "")
    monkeypatch.setattr(backends, "select_tiled", lambda *_: backend)
    given: list[Any] = []
    plans = Ladder((8192,), ("package",))

    def layers(*_: Any, copies: int, tables: Path) -> Any:
        assert copies == 1
        return SimpleNamespace(prepared=[tables])

    def choose(layer: Any, *_: Any) -> choice.Choice:
        given.append(layer)
        return choice.Choice(plans, {8192: {"package": 1.0}}, 0.0)

    monkeypatch.setattr(tune_command, "Layers", layers)
    monkeypatch.setattr(tune_command, "choose", choose)
    fill(tmp_path, {}, f"timed on one X, torch {torch.__version__}", triton.__version__)
    if pinned:
        table_in(tmp_path, f"timed on one X, torch {torch.__version__}", triton.__version__).pin(plans)
    options = {"model": "gpt-oss-20b", "tp": 1, "ep": 1, "arch": None, "table": None}
    assert tune_command.run(argparse.Namespace(out=tmp_path, quick=quick, **options)) == 0
    assert given == [tmp_path] * chosen
    assert tables.plans("sm90", triton.__version__, SHAPE, tmp_path) == plans
    assert ("package for 1 to 8192 tokens (us at 8192: package 1.0)" in capsys.readouterr().out) == (
        chosen == 1
    )


@pytest.mark.gpu
@on_gpu
def test_run_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A small model, three batches: a table that is whole, serves, and is right; and nothing to do again."""
    sizes = {"num_local_experts": 8, "num_experts_per_tok": 4, "hidden_size": 320, "intermediate_size": 320}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_oss"} | sizes))
    monkeypatch.setattr(tune_command, "SIZES", (1, 64, 1024))
    monkeypatch.setattr(record, "SIZES", (1, 64, 1024))
    args = argparse.Namespace(
        model=str(tmp_path / "config.json"), tp=1, ep=1, out=tmp_path / "tables", arch=None, table=None,
        quick=False,
    )  # fmt: skip
    assert tune_command.run(args) == 0
    arch = backends.arch_of(torch.device("cuda"))
    assert store.read(tmp_path / "tables" / f"{arch}.json", arch).tiles
    capsys.readouterr()
    assert tune_command.run(args) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    tables.content.cache_clear()
    shape = layer_shape(args.model)
    layers = tune.Layers(shape, arch, "cuda", copies=1)
    prepared = layers.backend.prepare(layers.weights(0), shape, tmp_path / "tables")
    assert prepared.pinned
    for tokens in (1, 7, 64, 999, 1024):
        x, logits = random_tokens(shape, tokens, tokens, "cuda")
        out = prepared.run(x, logits)
        assert_rows_close(out, *reference.truth_and_plain(x, logits, layers.weights(0), shape))
    args.quick, args.out = True, tmp_path / "quick"
    assert tune_command.run(args) == 0
    tables.content.cache_clear()
    pinned = layers.backend.prepare(layers.weights(0), shape, args.out)
    assert pinned.pinned
    assert pinned.plans == tables.plans(arch, triton.__version__, shape, args.out)


@pytest.mark.gpu
@on_gpu
def test_miss_on_a_gpu() -> None:
    """Negative control: on Hopper, 4 warps take each scale for another's, and the tile is refused."""
    arch = backends.arch_of(torch.device("cuda"))
    if arch != "sm90":
        pytest.skip("needs an NVIDIA Hopper GPU")
    batch = tune.Batch(tune.Layers(make_shape(8, 4, 2880, 2880), arch, "cuda", copies=1), 64)
    wrong = TileConfig(32, 256, 128, 1, 4, 3, 0)
    assert batch.miss(("matmul_ogs", (A, B))) == ""
    assert "errs by" in batch.miss(("matmul_ogs", (wrong, B)))
    assert "errs by" in batch.miss(("matmul_ogs", (A, wrong)))
