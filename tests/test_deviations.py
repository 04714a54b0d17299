"""Where the emulator leaves AMD's manual: entries name instructions that exist, and the page shows all."""

import pytest
from run_python import ROOT

from vllm_mxfp4_gfx950.gfx950.emulator.decode import entry
from vllm_mxfp4_gfx950.gfx950.emulator.deviations import DEVIATIONS, Deviation

PAGE = ROOT / "docs/gfx950.md"
HEADER = "| instruction | manual or hardware | emulator | source |"


def unknown(deviations: tuple[Deviation, ...]) -> list[str]:
    """The instructions named that no table has."""
    return [name for each in deviations for name in each.instructions if entry(name) is None]


def shown(page: str) -> list[str]:
    """The rows of the page's table."""
    lines = page.splitlines()
    rows = lines[lines.index(HEADER) + 2 :]
    return rows[: next(i for i, line in enumerate(rows) if not line.startswith("|"))]


def row(deviation: Deviation) -> str:
    """A deviation as the page shows it."""
    names = ", ".join(f"`{name}`" for name in deviation.instructions)
    return f"| {names} | {deviation.manual} | {deviation.emulator} | {deviation.source} |"


def test_instructions_exist() -> None:
    """Every entry's."""
    assert unknown(DEVIATIONS) == []


@pytest.mark.parametrize("name", ["v_exp_f64", "v_exp_f32_e32", "v_mfma_f32_16x16x16_bf16"])
def test_an_instruction_that_is_not_there_is_found(name: str) -> None:
    """Negative control: other instructions, and one with the suffix of its encoding."""
    assert unknown((*DEVIATIONS, Deviation(("v_exp_f32", name), "", "", ""))) == [name]


def test_page_shows_them() -> None:
    """All of them, in order, and nothing else."""
    assert shown(PAGE.read_text()) == [row(deviation) for deviation in DEVIATIONS]
