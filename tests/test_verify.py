"""The command that executes a layer on the emulated gfx950: what it prints, and that it can fail."""

import json
import re
import shutil
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from run_python import ROOT, run_python
from test_verification import paths_of

from vllm_mxfp4_gfx950.tables.store import Content, write
from vllm_mxfp4_gfx950.tiles import Gemm, Ladder, Plan, TileConfig

pytestmark = pytest.mark.compile

SIZES = {"num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size": 288, "intermediate_size": 256}
W13, W2 = Gemm("w13", 288, 512, 4, 4), Gemm("w2", 256, 288, 4, 4)


def verify(
    tmp_path: Path, *arguments: str, ours: Path = ROOT, command: str = "verify", **environment: str
) -> CompletedProcess[str]:
    """Run the command on a small model, with Triton 3.6.0 and a copy of ours."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "gpt_oss"} | SIZES))
    whole = ["-m", "vllm_mxfp4_gfx950.cli", command, f"--model={config}", *arguments]
    path = [ours, *paths_of("3.6.0", "matmul_ogs")]
    # Without PYTHONSAFEPATH, the working directory's package would come before the copy.
    return run_python(whole, path=path, PYTHONSAFEPATH="1", **environment)


def test_right(tmp_path: Path) -> None:
    """A line for every stage; the layer as a whole where every workgroup was executed."""
    result = verify(tmp_path, "--tokens", "1", "40", "--sample", "4")
    assert result.returncode == 0, result.stderr
    first, header, *rows = result.stdout.splitlines()
    assert "triton_ogs" in first
    assert "emulated gfx950" in first
    assert header.split()[:3] == ["tokens", "stage", "workgroups"]
    assert [row.split()[:2] for row in rows] == [
        [tokens, stage] for tokens in ("1", "40") for stage in ("routing", "w13", "w2")
    ]
    assert all(row.endswith("  ok") for row in rows)
    assert rows[1].split()[2].startswith("4/")


def test_json(tmp_path: Path) -> None:
    """Everything that was counted."""
    result = verify(tmp_path, "--tokens", "3", "--json")
    facts = json.loads(result.stdout)
    assert result.returncode == 0
    assert facts["right"]
    assert facts["fault"] == ""
    routing, w13, w2, layer = facts["checks"]
    assert (routing["stage"], layer["stage"]) == ("routing", "layer")
    # In bf16, a row for each of the two experts of each of the three tokens.
    assert w13["counts"]["bytes_written"]["Y+YPtr"] == 3 * 2 * 256 * 2
    assert w2["counts"]["bytes_written"]["Y+YPtr"] == 3 * 2 * 288 * 2
    assert 0 < layer["frobenius"] < 4e-3
    assert 0 < layer["row"] < 1


@pytest.mark.parametrize(
    ("file", "old", "new", "complaint"),
    [
        pytest.param("layer.py", "(shape.alpha, ", "(1.0, ", "w13 +[0-9/]+ .*FAIL row", id="alpha"),
        pytest.param(
            "package.py",
            "return torch.nn.functional.pad(scales, (0, -groups % SCALE_GROUPS, 0, -rows % SCALE_ROWS))",
            "return torch.nn.functional.pad(scales, (0, -groups % SCALE_GROUPS, 0, -rows % 32))",
            "FAIL _matmul.*, line [0-9]+: \\w+_load_.*: reads [0-9]+ bytes at .* bytes into ",
            id="unpadded",
        ),
    ],
)
def test_wrong(tmp_path: Path, file: str, old: str, new: str, complaint: str) -> None:
    """A package that computes something else, or reads what is not its own, makes the command fail."""
    shutil.copytree(ROOT / "vllm_mxfp4_gfx950", tmp_path / "vllm_mxfp4_gfx950")
    edited = tmp_path / "vllm_mxfp4_gfx950/backends/triton" / file
    assert edited.read_text().count(old) == 1
    edited.write_text(edited.read_text().replace(old, new))
    result = verify(tmp_path, "--tokens", "3", ours=tmp_path)
    assert result.returncode == 1, result.stderr
    assert re.search(complaint, result.stdout), result.stdout


def test_rank_without_rows(tmp_path: Path) -> None:
    """Nobody chose this rank's expert: nothing to compare is not a failure."""
    result = verify(tmp_path, "--tp", "4", "--ep", "4", "--tokens", "1", "3", "--json")
    assert result.returncode == 0, result.stderr
    notes = {(each["tokens"], each["stage"]): each["note"] for each in json.loads(result.stdout)["checks"]}
    assert (notes[1, "w13"], notes[1, "w2"]) == ("no rows", "no rows")
    assert (notes[3, "w13"], notes[3, "w2"]) == ("", "")


@pytest.mark.emulate
def test_split_is_not_sampled(tmp_path: Path) -> None:
    """Upstream's tiles split K here: whole it shows in the layer, of a sample nothing can be said."""
    whole = verify(tmp_path, "--upstream", "--tokens", "1")
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("in layer") == 2
    sample = verify(tmp_path, "--upstream", "--tokens", "1", "--sample", "2")
    assert sample.returncode == 1
    assert sample.stdout.count("FAIL what a split K leaves cannot be sampled") == 2


def write_table(directory: Path, tile: TileConfig) -> None:
    """A table of the user's own, which has one tile for the small model."""
    tiles = {("matmul_ogs", "3.6", gemm): Ladder((64,), (tile,)) for gemm in (W13, W2)}
    write(directory / "gfx950.json", "gfx950", Content(tiles=tiles))


def test_tables_of_ones_own(tmp_path: Path) -> None:
    """`compile` and `verify` take and refuse the tables that a server takes and refuses."""
    tables = {"VLLM_MXFP4_TABLES": str(tmp_path)}
    write_table(tmp_path, TileConfig(32, 128, 256, 1, 4, 1, 0))
    compiled = verify(tmp_path, "--tokens", "3", command="compile", **tables)
    assert compiled.returncode == 0, compiled.stderr
    assert f"tiles of {tmp_path / 'gfx950.json'}\n" in compiled.stdout
    assert compiled.stdout.count(" 32x128x256") == 2
    without = verify(tmp_path, "--tokens", "3", command="compile")
    assert "tiles of this package\n" in without.stdout
    assert " 32x128x256" not in without.stdout
    # One that overflows the LDS can only fail where it is used.
    write_table(tmp_path, TileConfig(256, 256, 256, 1, 8, 2, 0))
    failed = verify(tmp_path, "--tokens", "3", **tables)
    assert failed.returncode == 1, failed.stderr
    assert "Required: 165888, Hardware limit: 163840" in failed.stdout
    (tmp_path / "gfx950.json").write_text("{}")
    for command in ("compile", "verify"):
        refused = verify(tmp_path, command=command, **tables)
        assert refused.returncode == 2
        assert refused.stderr.startswith(f"vllm-mxfp4 {command}: {tmp_path / 'gfx950.json'} must be of arch")


def test_two_fp8_of_ones_own(tmp_path: Path) -> None:
    """Where a table has them serve, `compile` counts their work, and `verify` looks at the package's."""
    tiles = Ladder((8192,), (TileConfig(32, 128, 256, 1, 4, 1, 0),))
    plans: Ladder[Plan] = Ladder((8192,), ("two_fp8",))
    content = Content(tiles={("matmul_ogs", "3.6", W13): tiles}, plans={("3.6", W13): plans})
    write(tmp_path / "gfx950.json", "gfx950", content)
    tables = {"VLLM_MXFP4_TABLES": str(tmp_path)}
    compiled = verify(tmp_path, "--tokens", "40", "--json", command="compile", **tables)
    w13, w2 = json.loads(compiled.stdout)["ours"]
    assert (w13["plan"], w2["plan"], w13["fits"], w2["fits"]) == ("two_fp8", "two_fp8", True, True)
    # 6 tiles of 32 rows. Of 128 columns w13 has 8, with the zeros behind the rows, and w2 has 3.
    assert (w13["workgroups"], w2["workgroups"]) == (48, 18)
    verified = verify(tmp_path, "--tokens", "1", **tables)
    assert verified.returncode == 0, verified.stdout


@pytest.mark.parametrize("arguments", [("--sample", "-1"), ("--tokens", "0")])
def test_bad_arguments(tmp_path: Path, arguments: tuple[str, str]) -> None:
    """Refused by name."""
    result = verify(tmp_path, *arguments)
    assert result.returncode == 2
    assert f"{arguments[0]} must be" in result.stderr
