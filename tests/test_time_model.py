"""The time model, against times worked out by hand; and its trial."""

import argparse
import json
from pathlib import Path

import gcn
import pytest
from run_python import ROOT, run_python
from test_verification import paths_of

from vllm_mxfp4_gfx950 import options
from vllm_mxfp4_gfx950.commands import predict
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.gfx950 import peers, ranking, time_model, trial
from vllm_mxfp4_gfx950.gfx950.published import CURVES, Curve
from vllm_mxfp4_gfx950.gfx950.time_model import FAST, LAUNCH_US, SLOW, Profile, Work, along, launch, work
from vllm_mxfp4_gfx950.tiles import Gemm, TileConfig

END = 4
"""Cycles of s_endpgm."""

MATRIX = "v_mfma_f32_16x16x32_bf16 v[0:3], v[4:7], v[8:11], v[0:3]"
SCALED = (
    "v_mfma_scale_f32_16x16x128_f8f6f4 v[0:3], v[4:7], v[8:15], v[0:3], v16, v17 op_sel_hi:[0,0,0] cbsz:4"
)


def seen(code: str, trace: tuple[int, ...] = (0,), **changes: int) -> Profile:
    """A workgroup of four waves that went through a snippet."""
    code = "\n".join(line.strip() for line in code.strip().splitlines()) + "\ns_endpgm\n"
    gcn.assemble(code)
    known: dict[str, int] = {"waves": 4, "resident": 1, "lds_passes": 0, "bytes_read": 0, "scratch_bytes": 0}
    rest = known | changes | {"overflows": bool(changes.get("overflows"))}
    return Profile("snippet", code + gcn.METADATA + gcn.NOTES, trace=trace, **rest)


@pytest.mark.parametrize(
    ("code", "alone", "vector", "matrix"),
    [
        pytest.param("v_add_u32 v1, v0, v0\nv_add_u32 v2, v0, v0", 8, 8, 0, id="vector"),
        pytest.param("v_exp_f32 v1, v0\nv_mul_lo_u32 v1, v0, v0", 32, 32, 0, id="a-quarter-of-the-rate"),
        pytest.param("s_mov_b32 s1, 0\ns_nop 2", 4 + 12, 0, 0, id="scalar"),
        # The second waits for the matrix unit; the addition for the hold of 8 cycles after 16.
        pytest.param(f"{MATRIX}\n{MATRIX}\nv_add_u32 v20, v0, v0", 28, 8 + 8 + 4, 32, id="matrix"),
        pytest.param(SCALED, 32 - END, 8, 32, id="scaled"),
    ],
)
def test_work_of_instructions(code: str, alone: float, vector: float, matrix: float) -> None:
    """Each unit's cycles, and the wave's."""
    found = work(seen(code), FAST)
    assert (found.alone, found.vector, found.matrix) == (alone + END, vector, matrix)


MEMORY = 864
"""360 ns at 2.4 GHz."""

LOAD, WAIT = "global_load_dword v1, v0, s[2:3]", "s_waitcnt vmcnt(0)"


@pytest.mark.parametrize(
    ("code", "alone"),
    [
        pytest.param(f"{LOAD}\n{WAIT}", MEMORY, id="load"),
        pytest.param(f"{LOAD}\n{LOAD}\n{WAIT}", 4 + MEMORY, id="two-in-flight"),
        pytest.param(f"{LOAD}\n{WAIT}\n{LOAD}\n{WAIT}", 2 * MEMORY, id="chain"),
        pytest.param(f"{LOAD}\n{LOAD}\ns_waitcnt vmcnt(1)", MEMORY, id="the-older-one"),
        pytest.param(f"{LOAD}\n" + "v_exp_f32 v2, v0\n" * 99 + WAIT, 4 + 99 * 16 + 4, id="hidden"),
        pytest.param(f"{LOAD}\ns_waitcnt lgkmcnt(0)", 8, id="the-other-counter"),
        pytest.param("ds_read_b32 v1, v0\ns_waitcnt lgkmcnt(0)", 69, id="lds"),
        pytest.param("s_load_dword s8, s[2:3], 0x0\ns_waitcnt lgkmcnt(0)", 288, id="scalar-load"),
        pytest.param("scratch_load_dword v1, off, off\n" + WAIT, 288, id="spilled"),
    ],
)
def test_work_of_loads(code: str, alone: float) -> None:
    """A load comes back after its latency, wherever others are; a wait waits for what it names."""
    assert work(seen(code), FAST).alone == alone + END


def test_work_at_both_ends() -> None:
    """What is not published: the conversion's rate, how long a longer matrix instruction holds, latencies."""
    convert = seen("v_cvt_scalef32_pk_bf16_fp4 v1, v0, v2")
    assert [work(convert, card).vector for card in (FAST, SLOW)] == [4, 16]
    assert [work(seen(SCALED), card).vector for card in (FAST, SLOW)] == [8, 16]
    assert work(seen(f"{LOAD}\n{WAIT}"), SLOW).alone == pytest.approx(720 * 2.1 + END)


def test_work_of_a_loop() -> None:
    """A block that was gone through three times counts three times; the ramp is what is not in between."""
    code = f"v_exp_f32 v1, v0\nagain:\n{MATRIX}\ns_cbranch_scc1 again\nv_exp_f32 v1, v0"
    found = work(seen(code, (0, 1, 1, 1, 2)), FAST)
    assert found.matrix == 48
    # 16 before; three of 16 cycles, the last of which the branch and the 8 cycles of its hold are within.
    assert found.alone == 16 + 32 + 8 + 16 + END
    assert found.ramp == 16 + (8 + 16 + END) - 16


def test_work_of_a_workgroup() -> None:
    """LDS at 128 bytes a cycle, the L1 at 64; what the L2 cannot hold of scratch memory goes further."""
    found = work(seen("s_nop 0", lds_passes=10, bytes_read=6400, scratch_bytes=640), FAST)
    assert (found.lds, found.l1, found.spilled) == (20, 110, 0)
    chain = "scratch_load_dword v1, off, off\n" + WAIT
    found = work(seen(chain, scratch_bytes=640, overflows=True), FAST)
    assert (found.alone, found.spilled) == (MEMORY + END, 640)


DONE = Work(waves=4, resident=2, alone=2400, ramp=240, vector=900, matrix=600, lds=1000, l1=100, spilled=0)


@pytest.mark.parametrize(
    ("workgroups", "memory_bytes", "us", "limit"),
    [
        pytest.param(256, 0, 1.0, "waiting", id="one-each"),
        pytest.param(257, 0, 1.0, "waiting", id="two-beside-each-other"),
        pytest.param(1024, 0, 2.0, "waiting", id="two-rounds"),
        pytest.param(1, 6.6e6 * 5, 5.1, "memory", id="memory-after-the-ramp"),
    ],
)
def test_launch(workgroups: float, memory_bytes: float, us: float, limit: str) -> None:
    """On the fast card, where others' waits hide all: 2,400 cycles are a microsecond."""
    found = launch(DONE, FAST, workgroups, memory_bytes)
    assert found.us == pytest.approx(LAUNCH_US + us)
    assert found.limit == limit


def test_launch_by_the_busiest_unit() -> None:
    """Where waves enough hide every wait, the LDS is left: 1,000 cycles a workgroup."""
    many = Work(4, 8, 2400, 240, 900, 600, 1000, 100, 0)
    found = launch(many, FAST, 256 * 8, 0)
    assert found.us == pytest.approx(LAUNCH_US + 8 * 1000 / 2400)
    assert found.limit == "lds"


def test_launch_on_the_slow_card() -> None:
    """Half of the waits stay; spilled registers take the bandwidth of memory."""
    found = launch(DONE, SLOW, 512, 0)
    assert found.us == pytest.approx(LAUNCH_US + (2400 + 3400) / 2 / 2100)
    spilling = Work(4, 2, 2400, 240, 900, 600, 1000, 100, 6e6)
    assert launch(spilling, SLOW, 100, 0).us == pytest.approx(LAUNCH_US + 100 + 240 / 2100)


def test_along() -> None:
    """Between two depths, and beyond them."""
    few = Work(4, 2, 100, 10, 20, 30, 40, 50, 60)
    many = Work(4, 2, 300, 10, 60, 90, 120, 150, 180)
    assert along(few, many, (2, 6), 4) == Work(4, 2, 200, 10, 40, 60, 80, 100, 120)
    assert along(few, many, (2, 6), 1).vector == 10


def test_matmul_counts_bytes_and_workgroups() -> None:
    """One token of GPT-OSS-120B: the blocks and scales of 4 experts, and 180 workgroups of w13."""
    w13 = Gemm("w13", 2880, 5760, 128, 128)
    tile = TileConfig(16, 128, 256, 1, 4, 2, 0)
    found = ranking.matmul(w13, tile, DONE, FAST, 1, 4)
    weights = 4 * 5760 * 2880 * 17 / 32 * ranking.overread(w13, tile)
    activations = 2880 * 2 + 4 * 2880 * 2
    assert found.limits["memory"] == pytest.approx((weights + activations) / 6.6e6, rel=1e-6)
    assert found.limits["vector"] == pytest.approx(900 / 2400, rel=1e-6)


def test_regrets() -> None:
    """The worse of both cards, over the best there."""
    a, b, c = (TileConfig(16, n, 256, 1, 4, 1, 0) for n in (32, 64, 128))
    assert ranking.regrets({a: (1.0, 4.0), b: (2.0, 2.0), c: (1.5, 2.2)}) == pytest.approx(
        {a: 2.0, b: 2.0, c: 1.5}
    )


def test_best_of_a_search() -> None:
    """The split that a few tokens gain from, and no tile that reads columns twice where they are the work."""
    w2 = Gemm("w2", 2880, 2880, 128, 128)
    narrow, wide = (TileConfig(16, columns, 256, 1, 4, 2, 0) for columns in (64, 512))
    few, many = (Work(4, 4, 1000 + 3000 * n, 1000, 100, 100, 100, 100, 0) for n in (4, 12))
    measured = {("w2", tile): ranking.Measured((few, few), (many, many)) for tile in (narrow, wide)}
    tile, found = ranking.best(w2, measured, 1, 4)
    # 3 steps of 720 workgroups, 10,000 cycles; split 8 ways it would be 2 of 1,440, six for four places.
    assert (tile.block_n, tile.split_k) == (64, 4)
    assert found == ranking.predicted(w2, tile, measured["w2", narrow].at(tile, 2880), 1, 4)
    assert ranking.best(w2, measured, 64, 4)[0] == narrow
    assert ranking.best(w2, measured, 8192, 4)[0] == wide
    with pytest.raises(Mxfp4Error, match=r"^the tiles must be able .*; got none without a spill\. "):
        ranking.best(Gemm("w13", 2880, 5760, 128, 128), measured, 1, 4)


@pytest.mark.parametrize(
    ("ratios", "answer"),
    [((1.1, 1.5), "yes"), ((0.9, 0.5), "no"), ((1.01, 0.99), "same"), ((0.9, 1.2), "open")],
)
def test_called(ratios: tuple[float, ...], answer: str) -> None:
    """A verdict is called where both cards agree with it."""
    assert trial.called(list(ratios)) == answer


def test_fit_finds_what_made_the_times() -> None:
    """Curves of 20 us and 5 TB/s; and a kernel is not among those that it is held to."""
    made = []
    for experts in (32, 128):
        curve = Curve("made", 3072, 3072, experts, 4, dict.fromkeys((1, 8, 64), 0.0))
        us = {tokens: 20 + curve.bytes(tokens) / 5e6 for tokens in curve.us}
        made.append(Curve("made", 3072, 3072, experts, 4, us))
    assert trial.fit(made) == pytest.approx((20, 5e6))
    rows = {row["kernel"]: row for row in trial.by_bytes()}
    flydsl = trial.fit([curve for curve in CURVES if curve.kernel == "FlyDSL a8w4"])
    assert rows["FlyDSL a8w4"]["own"]["t0_us"] == pytest.approx(flydsl[0])
    assert rows["FlyDSL a8w4"]["others"]["t0_us"] > 1.2 * flydsl[0]


def test_kernel_needs_aiter(tmp_path: Path) -> None:
    """A directory without it is refused."""
    with pytest.raises(Mxfp4Error, match=r"--aiter must be a directory with aiter's moe_op_gemm_a8w4\.py"):
        peers.kernel(tmp_path, "a8w4")


COUNT = """
import json, sys
from pathlib import Path
from vllm_mxfp4_gfx950.gfx950 import peers, time_model
from vllm_mxfp4_gfx950.tiles import TileConfig
function = peers.kernel(Path(sys.argv[1]), "a8w4")
assert not [name for name in sys.modules if name.startswith("aiter")]
found = []
for swizzled in (True, False):
    launch = peers.compiled(function, TileConfig(16, 128, 256, 1, 4, 2, 0), 512, 128, True, swizzled=swizzled)
    profile = time_model.profile(launch)
    found.append([time_model.work(profile, card).matrix for card in time_model.CARDS] + [profile.bytes_read])
print(json.dumps(found))
"""


@pytest.mark.compile
def test_aiter_s_kernel_is_executed(packages: Path) -> None:
    """16 x 128 x 512 is 32 scaled matrix instructions, 8 for each wave; the weights are read."""
    path = (ROOT / ".venv/triton/3.6.0",)
    process = run_python(["-c", COUNT, str(packages / "amd-aiter")], path)
    assert process.returncode == 0, process.stderr
    for *matrix, bytes_read in json.loads(process.stdout):
        assert matrix == [8 * 32, 8 * 32]
        assert bytes_read >= 128 * 512 * 17 / 32


def run_predict(*arguments: str) -> int:
    """The command, in this process."""
    parser = argparse.ArgumentParser()
    options.of_predict(parser)
    return predict.run(parser.parse_args(arguments))


def test_predict_refuses(tmp_path: Path) -> None:
    """What cannot be predicted, or read."""
    with pytest.raises(Mxfp4Error, match="--tokens must be at least 1; got 0"):
        run_predict("--tokens", "0")
    with pytest.raises(Mxfp4Error, match="--search must be of 16, 32, 64, 128; got 16 8"):
        run_predict("--search", "16", "8")
    with pytest.raises(Mxfp4Error, match="--search must be of 8, 16, 32, 64, 128; got 256"):
        run_predict("--backend", "two_fp8", "--search", "256")
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(Mxfp4Error, match="--read must be a file of JSON"):
        run_predict("--read", str(tmp_path / "report.json"))


@pytest.mark.compile
def test_predict_two_fp8() -> None:
    """One token: 360 workgroups of 16 x 64, of 6 or 3 steps of 512, on 256 compute units.

    A step is 16 scaled matrix instructions of 32 cycles. Two workgroups of two waves are on a compute unit's
    four SIMDs.
    """
    arguments = ["-m", "vllm_mxfp4_gfx950.cli", "predict", "--backend=two_fp8", "--tokens=1", "--json"]
    process = run_python(arguments, paths_of("3.6.0", "matmul_ogs"))
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout)
    assert report["kernels"] == "two_fp8"
    for matmul, steps, split in zip(report["rows"][0]["matmuls"], (6, 3), (1, 2), strict=True):
        assert matmul["tile"] == [8, 64, 512, split, 2, 2, 2]
        cycles = 2 * steps * 16 * 32 / 4
        matrix = [limits["matrix"] for limits in matmul["limits"]]
        assert matrix == [round(cycles / card.ghz / 1000, 2) for card in (FAST, SLOW)]


DOCS = ROOT / "docs"


@pytest.mark.parametrize("name", [f"gfx950-time-{name}.json" for name in ("layers", "two-fp8", "trial")])
def test_docs_show_what_was_predicted(name: str) -> None:
    """The tables of the page are those of the reports beside it."""
    page = (DOCS / "gfx950-time.md").read_text()
    for table in predict.text(predict.read(DOCS / name)).split("\n\n")[1:]:
        assert table in page


def test_cards_enclose_what_is_published() -> None:
    """The clock's peak, the measured latency and the fits of the curves are ends of the ranges."""
    assert time_model.CARDS == (FAST, SLOW)
    bandwidths = [row["own"]["tb_per_s"] for row in trial.by_bytes()]
    assert SLOW.bytes_per_us / 1e6 - 0.3 < min(bandwidths) < max(bandwidths) < FAST.bytes_per_us / 1e6
