"""The page of evidence is what its files say."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from run_python import ROOT, run_python

sys.path.append(str(ROOT / "environments"))
import write_evidence


def test_page_is_up_to_date() -> None:
    """docs/evidence.md was written from docs/evidence/."""
    entries = json.loads((write_evidence.FOLDER / "index.json").read_text())
    assert write_evidence.PAGE.read_text() == write_evidence.page(entries)
    assert {entry["file"] for entry in entries} | {"index.json"} == {
        file.name for file in write_evidence.FOLDER.iterdir()
    }


@pytest.mark.parametrize("key", ["hardware", "versions", "date", "command"])
def test_every_figure_says_where_it_comes_from(key: str) -> None:
    """Each entry has its hardware, versions, date and command."""
    entries = json.loads((write_evidence.FOLDER / "index.json").read_text())
    assert all(entry[key].strip() for entry in entries)


def test_check_notices(tmp_path: Path) -> None:
    """Negative control: a figure that was changed by hand."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "environments").mkdir()
    script = shutil.copy(ROOT / "environments/write_evidence.py", tmp_path / "environments")
    assert run_python([script, "--check"]).returncode == 0
    page = tmp_path / "docs/evidence.md"
    page.write_text(page.read_text().replace("| 1 | w13 |", "| 1 | w2 |", 1))
    result = run_python([script, "--check"])
    assert result.returncode == 1
    assert "not what write_evidence.py writes" in result.stdout


def test_layers_show_the_host() -> None:
    """What the CPU takes to launch a layer of each, where it was measured."""
    row = {
        "layer": "E=8 topk=2 H=64 I=32",
        "tokens": 4,
        "floor_us": 5.0,
        "us": {"ours": [10.0], "TRITON": [20.0]},
        "frobenius": {"ours": 1e-3},
    }
    (before,) = write_evidence.layers({"rows": [row]})
    (shown,) = write_evidence.layers({"rows": [row | {"host_us": {"ours": 31.4, "TRITON": 62.6}}]})
    assert (shown["experts"], shown["intermediate"]) == ("8", "32")
    assert shown.items() - before.items() == {("host of ours, us", "31"), ("host of TRITON, us", "63")}


def test_serving_shows_the_spread() -> None:
    """Of several rounds, and whether the rounds of ours and of the best other one meet."""
    load = {"model": "m", "routing": "spread", "batch": 1, "input": 2, "output": 3}
    rounds = {"ours": ([100.0, 120.0], [8.0, 9.0]), "A": ([95.0, 101.0], [10.0, 11.0]), "B": ([9.0], [90.0])}
    rows = [
        load | {"engine": name, "tokens_per_s": rates, "first_token_ms": times, "next_token_ms": []}
        for name, (rates, times) in rounds.items()
    ]
    (row,) = write_evidence.serving({"rows": rows})
    assert list(row.values())[4:] == [
        "110 ±9.1%", "98 ±3.1%", "9", "1.122, within the spread", "0.810", "",
    ]  # fmt: skip
