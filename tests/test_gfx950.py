"""The kernels that serve, compiled for gfx950 with one Triton of each generation of triton_kernels."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from run_python import ROOT, run_python

from vllm_mxfp4_gfx950.gfx950.driver import Launch, presented
from vllm_mxfp4_gfx950.gfx950.layer import CompiledMatmul
from vllm_mxfp4_gfx950.gfx950.report import read
from vllm_mxfp4_gfx950.tables import store
from vllm_mxfp4_gfx950.tiles import Gemm, TileConfig

pytestmark = pytest.mark.compile

BF16_MFMA = {"v_mfma_f32_16x16x32_bf16", "v_mfma_f32_32x32x16_bf16"}
LDS_BYTES = 163_840
WIDER = pytest.param("--model=gpt-oss-120b --tp=4 --ep=4", marks=pytest.mark.emulate)
Compile = Callable[..., CompletedProcess[str]]


@pytest.fixture(scope="module")
def paths(packages: Path) -> dict[str, list[Path]]:
    """What comes first on sys.path, by generation: a Triton if not the installed one, and kernels."""
    triton = ROOT / ".venv/triton/3.6.0"
    if not triton.is_dir():
        pytest.skip("needs .venv/triton/3.6.0: make .venv/triton/3.6.0")
    vendored = packages / "vllm-0.33.0/vllm/third_party"
    return {
        "matmul_ogs": [triton, vendored],
        "matmul_ogs-3.8": [vendored],
        "matmul": [packages / "tokenspeed-triton-kernels"],
    }


@pytest.fixture(scope="module")
def compile_layer(paths: dict[str, list[Path]]) -> Compile:
    """Run `vllm-mxfp4 compile --json` with a generation's packages, and with a changed copy of ours."""

    def run(kernels: str, *arguments: str, ours: Path = ROOT) -> CompletedProcess[str]:
        command = ["-m", "vllm_mxfp4_gfx950.cli", "compile", "--json", *arguments]
        # Without PYTHONSAFEPATH, the working directory's package would come before the copy.
        return run_python(command, path=[ours, *paths[kernels]], PYTHONSAFEPATH="1")

    return run


def facts(result: CompletedProcess[str]) -> dict[str, Any]:
    """What the command printed."""
    assert result.stdout, result.stderr
    printed: dict[str, Any] = json.loads(result.stdout)
    return printed


@pytest.mark.parametrize("model", ["--model=gpt-oss-20b", WIDER])
@pytest.mark.parametrize("kernels", ["matmul_ogs", pytest.param("matmul", marks=pytest.mark.emulate)])
def test_ours_fit(compile_layer: Compile, kernels: str, model: str) -> None:
    """No kernel overflows, spills or touches scratch, and W4A16 stays W4A16: bf16 matrices, FP4 converted."""
    # Triton compiles other kernels for sizes that are 1, and for sizes that 16 does not divide.
    result = compile_layer(kernels, *model.split(), "--tokens", "1", "16", "37", "128", "777", "8192")
    found = facts(result)
    assert result.returncode == 0
    assert found["fits"]
    assert len(found["ours"]) == 12
    for matmul in found["ours"]:
        report = matmul["report"]
        assert report["vgpr_spills"] == report["sgpr_spills"] == report["scratch_bytes"] == 0
        assert report["loop_scratch"] == 0
        assert report["lds_bytes"] <= LDS_BYTES
        assert set(report["mfma"]) <= BF16_MFMA
        assert sum(report["mfma"].values()) > 0
        assert report["fp4_conversions"] > 0
        assert report["loop_mfma"] > 0
        assert report["workgroups"] >= 2


@pytest.mark.emulate
def test_upstream_spills(compile_layer: Compile) -> None:
    """What users of Triton 3.6 have: hundreds of spilled registers from 128 tokens on, and ours have none."""
    found = facts(compile_layer("matmul_ogs", "--upstream", "--tokens", "1024"))
    for upstream, ours in zip(found["upstream"], found["ours"], strict=True):
        assert upstream["report"]["vgpr_spills"] > 180
        assert upstream["report"]["scratch_bytes"] > 400
        assert ours["report"]["vgpr_spills"] == 0


@pytest.mark.emulate
def test_upstream_overflows_with_triton_3_8(compile_layer: Compile) -> None:
    """The same tiles with Triton 3.8 need 275,424 bytes of LDS, and ours do not."""
    found = facts(compile_layer("matmul_ogs-3.8", "--upstream", "--tokens", "1024"))
    assert all("Required: 275424, Hardware limit: 163840" in m["error"] for m in found["upstream"])
    assert found["fits"]


def test_the_tile_that_users_report(paths: dict[str, list[Path]]) -> None:
    """256x256x256, upstream's choice for large batches, needs 165,888 bytes of LDS."""
    code = (
        "from vllm_mxfp4_gfx950.gfx950.layer import CompiledLayer\n"
        "from vllm_mxfp4_gfx950.models import layer_shape\n"
        "from vllm_mxfp4_gfx950.tiles import TileConfig\n"
        "layer = CompiledLayer(layer_shape('gpt-oss-20b'))\n"
        "print(*(m.error for m in layer.tried(64, TileConfig(256, 256, 256, 1, 8, 2, 0))), sep='\\n')\n"
    )
    result = run_python(["-c", code], path=paths["matmul_ogs"])
    errors = result.stdout.splitlines()
    assert len(errors) == 2, result.stderr
    assert all("Required: 165888, Hardware limit: 163840" in error for error in errors)


@pytest.mark.parametrize(
    ("tile", "fault"),
    [
        pytest.param([256, 256, 256, 1, 8, 2, 0], "OutOfResources", id="overflow"),
        pytest.param([128, 512, 256, 1, 8, 2, 0], "", id="spill"),
    ],
)
def test_a_bad_row_is_found(compile_layer: Compile, tmp_path: Path, tile: list[int], fault: str) -> None:
    """The command fails on a table that was edited by hand."""
    shutil.copytree(ROOT / "vllm_mxfp4_gfx950", tmp_path / "vllm_mxfp4_gfx950")
    file = tmp_path / "vllm_mxfp4_gfx950/tables/gfx950.json"
    table = store.read(file, "gfx950")
    key = "matmul_ogs", "3.6", Gemm("w2", 2880, 2880, 32, 32)
    table.tiles[key] = table.tiles[key].map(lambda _: TileConfig(*tile))
    store.write(file, "gfx950", table)
    result = compile_layer("matmul_ogs", "--tokens", "64", ours=tmp_path)
    w13, w2 = facts(result)["ours"]
    assert result.returncode == 1
    assert w13["report"]["vgpr_spills"] == 0
    assert fault in w2["error"]
    assert fault or w2["report"]["vgpr_spills"] > 0


ASSEMBLY = """
kernel:
.LBB0_1:
	v_mov_b32 v0, v1
	s_cbranch_scc1 .LBB0_3
.LBB0_2:        ; inner loop
	scratch_load_dword v2, off, off
	v_cvt_scalef32_pk_bf16_fp4 v3, v4, v5
	v_mfma_f32_16x16x32_bf16 v[0:3], v[4:7], v[8:11], 0
	v_mfma_f32_16x16x32_bf16 v[0:3], v[4:7], v[8:11], 0
	s_cbranch_scc1 .LBB0_2
.LBB0_3:
	buffer_load_dwordx4 v1, s[0:3], 0 offen lds ; straight there
	global_load_lds_dwordx4 v[0:1], off
	s_cbranch_scc1 .LBB0_2
	s_cbranch_scc0 .LBB0_1
	s_endpgm
	.amdhsa_kernel kernel
; Occupancy: 3
  - .agpr_count:     4
    .max_flat_workgroup_size: 512
    .private_segment_fixed_size: 16
    .sgpr_count:     40
    .sgpr_spill_count: 1
    .vgpr_count:     168
    .vgpr_spill_count: 2
"""


def test_report() -> None:
    """Every figure, read from a kernel written by hand: 8 waves, two nested loops."""
    report = read(Launch("kernel", ASSEMBLY, 100_000, (1, 1, 1), ()))
    assert (report.vgprs, report.agprs, report.sgprs) == (168, 4, 40)
    assert (report.vgpr_spills, report.sgpr_spills, report.scratch_bytes) == (2, 1, 16)
    assert report.mfma == {"v_mfma_f32_16x16x32_bf16": 2}
    assert (report.fp4_conversions, report.lds_loads, report.instructions) == (1, 2, 12)
    # Two branches lead back to one loop: it goes on to the second.
    assert (report.loop_instructions, report.loop_mfma, report.loop_scratch) == (8, 2, 1)
    assert report.is_w4a16
    # The LDS of one workgroup fits; its 8 waves are 2 on each of 4 SIMDs.
    assert (report.waves, report.lds_bytes, report.workgroups, report.occupancy) == (8, 100_000, 1, 2)


@pytest.mark.parametrize(
    ("waves", "lds_bytes", "workgroups", "occupancy"),
    [(8, 0, 1, 2), (4, 0, 3, 3), (2, 0, 6, 3), (2, 50_000, 3, 2), (2, 100_000, 1, 1), (4, 81_920, 2, 2)],
)
def test_workgroups_of_a_compute_unit(waves: int, lds_bytes: int, workgroups: int, occupancy: int) -> None:
    """Whole ones only, by registers (3 waves a SIMD) and by LDS."""
    assembly = ASSEMBLY.replace("size: 512", f"size: {64 * waves}")
    report = read(Launch("kernel", assembly, lds_bytes, (1, 1, 1), ()))
    assert (report.workgroups, report.occupancy) == (workgroups, occupancy)


def test_a_tile_reaches_the_kernel(paths: dict[str, list[Path]]) -> None:
    """Its waves, its stages and its waves per SIMD as well as its blocks."""
    code = (
        "from vllm_mxfp4_gfx950.gfx950.layer import CompiledLayer\n"
        "from vllm_mxfp4_gfx950.models import layer_shape\n"
        "from vllm_mxfp4_gfx950.tiles import TileConfig\n"
        "layer = CompiledLayer(layer_shape('gpt-oss-20b'))\n"
        "for rest in ((4, 1, 0), (8, 1, 0), (4, 2, 0), (4, 1, 2)):\n"
        "    report = layer.tried(64, TileConfig(16, 128, 256, 1, *rest))[1].report\n"
        "    print(report.waves, report.lds_bytes, report.vgprs)\n"
    )
    result = run_python(["-c", code], path=paths["matmul_ogs"])
    plain, waves, stages, per_simd = (list(map(int, line.split())) for line in result.stdout.splitlines())
    assert (plain[0], waves[0]) == (4, 8)
    assert stages[1] > plain[1]
    assert per_simd[2] > plain[2]


@pytest.mark.emulate
def test_a_miss_of_the_table_fits(compile_layer: Compile, tmp_path: Path) -> None:
    """Sizes that GPT-OSS does not have take the nearest tiles."""
    sizes = {
        "model_type": "gpt_oss",
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "hidden_size": 3072,
        "intermediate_size": 3072,
    }
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    result = compile_layer("matmul_ogs", f"--model={tmp_path / 'config.json'}", "--tokens", "1", "64", "1024")
    assert facts(result)["fits"]
    assert "no tiles for" in result.stderr


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("v_mfma_f32_16x16x32_bf16", "v_mfma_scale_f32_16x16x128_f8f6f4", id="f8f6f4"),
        pytest.param("v_cvt_scalef32_pk_bf16_fp4", "v_cvt_scalef32_pk_bf16_fp8", id="no-fp4"),
        pytest.param("v_mfma_f32_16x16x32_bf16", "v_fma_f32", id="no-matrices"),
    ],
)
def test_quantized_activations_are_seen(old: str, new: str) -> None:
    """A kernel that is not W4A16 does not fit, however little it takes."""
    report = read(Launch("kernel", ASSEMBLY.replace(old, new), 0, (1, 1, 1), ()))
    assert not report.is_w4a16
    spotless = replace(report, vgpr_spills=0, sgpr_spills=0, scratch_bytes=0)
    assert not CompiledMatmul("w2", 1, 1, spotless, "table", None).fits
    w4a16 = replace(spotless, mfma={"v_mfma_f32_16x16x32_bf16": 2}, fp4_conversions=1)
    assert CompiledMatmul("w2", 1, 1, w4a16, "table", None).fits


SCALED = ASSEMBLY.replace("v_cvt_scalef32_pk_bf16_fp4", "v_mov_b32").replace(
    "v_mfma_f32_16x16x32_bf16 v[0:3], v[4:7], v[8:11], 0",
    "v_mfma_scale_f32_16x16x128_f8f6f4 v[0:3], v[4:7], v[8:15], 0, v16, v17 op_sel_hi:[0,0,0] cbsz:4",
)


@pytest.mark.parametrize(
    ("old", "new", "addends", "lossless"),
    [
        pytest.param("", "", 2, True, id="two-addends"),
        pytest.param("", "", 1, False, id="one-addend"),
        pytest.param("", "", 0, False, id="no-codes"),
        pytest.param("cbsz:4", "cbsz:4 blgp:1", 2, False, id="e5m2"),
        pytest.param("cbsz:4", "cbsz:4 blgp:4", 2, False, id="fp4-activations"),
        pytest.param("cbsz:4", "", 2, False, id="fp8-weights"),
        pytest.param("v_mov_b32 v3", "v_cvt_scalef32_pk_bf16_fp4 v3", 2, False, id="converted-too"),
        pytest.param(
            "v_mfma_scale_f32_16x16x128_f8f6f4", "v_mfma_f32_16x16x128_f8f6f4", 2, False, id="no-scales"
        ),
    ],
)
def test_two_addends(old: str, new: str, addends: int, lossless: bool) -> None:
    """FP4 by FP8 loses nothing where a bf16 is two of them, and only there."""
    codes = {"Codes": torch.zeros(3, addends, 64, dtype=torch.uint8)} if addends else {}
    signature = dict.fromkeys(codes, "*u8")
    assembly = SCALED.replace(old, new) if old else SCALED
    report = read(Launch("kernel", assembly, 0, (1, 1, 1), tuple(codes.values()), signature))
    spotless = replace(report, vgpr_spills=0, sgpr_spills=0, scratch_bytes=0)
    assert (report.is_lossless, report.is_w4a16) == (lossless, False)
    assert CompiledMatmul("w2", 1, 1, spotless, "table", None).fits == lossless
    json.dumps(asdict(report))


def test_presented_restores() -> None:
    """After an error too, Triton's driver and torch are what they were."""
    from triton import knobs
    from triton.runtime import driver

    def state() -> tuple[object, ...]:
        hook = knobs.runtime.kernel_load_start_hook
        return driver._active, hook, torch.cuda.get_device_properties, torch.cuda.get_device_capability

    def fail_inside() -> None:
        with presented(lambda launch: None):
            assert driver.active.get_current_target().arch == "gfx950"
            assert torch.cuda.get_device_properties(0).multi_processor_count == 256
            raise KeyError

    before = state()
    with pytest.raises(KeyError):
        fail_inside()
    assert state() == before
