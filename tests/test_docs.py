"""Links between the documents lead somewhere, and CONTRIBUTING knows every part of the package."""

import re
from pathlib import Path

import pytest
from run_python import ROOT

LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)")
CODE = re.compile(r"^(?:```.*?^```|    .*?$)", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The fragments of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: Path) -> list[str]:
    """The links of a page that lead to no file, or to no heading of it."""
    dead = []
    for name, fragment in LINK.findall(page.read_text()):
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (fragment and fragment not in anchors(target)):
            dead.append(f"{name}#{fragment}" if fragment else name)
    return dead


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("accuracy/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    """Every page's."""
    assert dead_links(page) == []


def test_dead_links_are_found(tmp_path: Path) -> None:
    """Negative control: a file that is not there, a heading that is not there, and one that is."""
    other = tmp_path / "other.md"
    other.write_text("# One of two: `x`\n\n    # no heading\n")
    page = tmp_path / "page.md"
    page.write_text("[a](none.md) [b](other.md#no-heading) [c](other.md#one-of-two-x) [d](https://x.y/z#q)")
    assert dead_links(page) == ["none.md", "other.md#no-heading"]


def unnamed(package: Path, text: str) -> list[str]:
    """The files and folders of a package that a text does not name."""
    names = {path.name + "/" * path.is_dir() for path in package.iterdir()} - {"__init__.py", "__pycache__/"}
    return sorted(name for name in names if not re.search(rf"(?<![\w.]){re.escape(name)}", text))


def test_every_part_is_named(tmp_path: Path) -> None:
    """In CONTRIBUTING's list; negative control: a file and a folder that are not."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    listed = text[text.index("## Where things are") : text.index("The data goes one way")]
    assert unnamed(ROOT / "vllm_mxfp4_gfx950", listed) == []
    (tmp_path / "del_moe.py").touch()
    (tmp_path / "moe.py").touch()
    (tmp_path / "more").mkdir()
    assert unnamed(tmp_path, listed) == ["del_moe.py", "more/"]
