"""What a benchmark writes, and the plot of it."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_mxfp4_gfx950.errors import Mxfp4Error

SUFFIXES = (".png", ".svg")
COLORS = {"ours": "C0", "TRITON": "C1", "MARLIN": "C2"}
OTHERS = "C7"
DRAWN = {
    "layer": {"layer", "tokens", "floor_us", "us"},
    "serve": {"engine", "model", "routing", "batch", "input", "output", "tokens_per_s"},
}
"""For each kind of benchmark, what a row has to have."""

PANELS = 5
"""Side by side, of serving's rows."""


def versions() -> dict[str, str]:
    """Of what the figures depend on; what is not installed is left out."""
    found = {}
    for name in ("torch", "triton", "vllm"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write(file: Path, report: dict[str, Any]) -> None:
    """Write JSON, so that whoever is cut off leaves the last whole one."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(partial, file)


def read(file: Path) -> dict[str, Any]:
    """What `write` wrote.

    Raises:
        Mxfp4Error: it is not there, or something else.
    """
    try:
        report: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise Mxfp4Error(str(file), "a report of `bench`", str(error), "Name a file of --json") from error
    miss = _miss(report)
    if miss:
        raise Mxfp4Error(str(file), "a report of `bench`", miss, "Name a file of --json, or measure again")
    return report


def _miss(content: Any) -> str:
    """Why this is not what `draw` takes; "" when it is."""
    if not isinstance(content, dict) or content.get("bench") not in list(DRAWN):
        return "another JSON"
    rows = content.get("rows")
    if not isinstance(content.get("device"), str) or not isinstance(content.get("versions"), dict):
        return "one without device or versions"
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return "one without rows"
    absent = sorted(set().union(*(DRAWN[content["bench"]] - row.keys() for row in rows)))
    return f"one with a row without {', '.join(absent)}" if absent else ""


def check_place(option: str, file: Path) -> None:
    """Raise Mxfp4Error unless a file could be there, before anything is measured for it."""
    if file.is_dir() or not file.parent.is_dir():
        raise Mxfp4Error(option, "a file in a directory that exists", file, "Make it, or correct the path")


def check_plot(file: Path) -> None:
    """Raise Mxfp4Error unless `draw` could write there, before anything is measured for it."""
    if file.suffix not in SUFFIXES:
        raise Mxfp4Error("--plot", f"a name that ends in {' or '.join(SUFFIXES)}", file, "Correct it")
    if importlib.util.find_spec("matplotlib") is None:
        fix = "pip install matplotlib, or draw later, elsewhere: vllm-mxfp4 bench plot FILE.json --plot OUT"
        raise Mxfp4Error("matplotlib", "installed for --plot", "nothing", fix)


def draw(reports: list[dict[str, Any]], file: Path) -> None:
    """Plot what was measured, by one kind of benchmark, as if it were one run's.

    Args:
        reports: at least one.
        file: its suffix says the format.

    Raises:
        Mxfp4Error: there is nothing to plot, or it is not of one kind, device and set of versions.
    """
    from matplotlib.figure import Figure

    kinds = {report["bench"] for report in reports}
    if len(kinds) > 1:
        raise Mxfp4Error("the reports", "all of one kind", " and ".join(sorted(kinds)), "Plot each by itself")
    rows = [row for report in reports for row in report["rows"]]
    if not rows:
        raise Mxfp4Error("the report", "one that has rows", "none", "Measure again")
    named = [", ".join(f"{name} {version}" for name, version in r["versions"].items()) for r in reports]
    places = sorted({f"{r['device']}, {each}" for r, each in zip(reports, named, strict=True)})
    if len(places) > 1:
        rule = "all of one device and the same versions"
        raise Mxfp4Error("the reports", rule, " and ".join(places), "Plot each by itself")
    figure = Figure(layout="constrained")
    (draw_layers if kinds == {"layer"} else draw_serving)(figure, rows)
    figure.suptitle(places[0], fontsize="small")
    figure.savefig(file, dpi=150)


def draw_layers(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Time against tokens, a line for each backend and one for the floor, a panel for each layer."""
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    figure.set_size_inches(5.5 * len(layers), 4.5)
    panels = figure.subplots(1, len(layers), squeeze=False, sharey=True)[0]
    for panel, layer in zip(panels, layers, strict=True):
        some = sorted((row for row in rows if row["layer"] == layer), key=lambda row: row["tokens"])
        panel.plot([r["tokens"] for r in some], [r["floor_us"] for r in some], "k--", label="floor")
        for name in dict.fromkeys(name for row in some for name in row["us"]):
            timed = [row for row in some if name in row["us"]]
            panel.plot(
                [row["tokens"] for row in timed],
                [statistics.median(row["us"][name]) for row in timed],
                marker="o",
                markersize=3,
                label=name,
                color=COLORS.get(name, OTHERS),
            )
        panel.set(xscale="log", yscale="log", xlabel="tokens", ylabel="µs of one layer")
        panel.set_title(layer, fontsize="small")
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
        panel.legend()


def draw_serving(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Tokens a second: a panel for each load, a bar for each engine with its slowest and fastest round."""
    titles = list(dict.fromkeys(_title(row) for row in rows))
    width = min(PANELS, len(titles))
    height = -(-len(titles) // width)
    figure.set_size_inches(2.4 * width, 3 * height)
    panels = list(figure.subplots(height, width, squeeze=False).flat)
    for panel in panels[len(titles) :]:
        panel.set_axis_off()
    for panel, title in zip(panels, titles, strict=False):
        some = [row for row in rows if _title(row) == title]
        names = [row["engine"] for row in some]
        middle = [statistics.median(row["tokens_per_s"]) for row in some]
        below = [m - min(row["tokens_per_s"]) for m, row in zip(middle, some, strict=True)]
        above = [max(row["tokens_per_s"]) - m for m, row in zip(middle, some, strict=True)]
        bars = panel.bar(
            names, middle, yerr=(below, above), color=[COLORS.get(name, OTHERS) for name in names]
        )
        panel.bar_label(bars, fmt="{:.0f}", label_type="center", fontsize="x-small")
        panel.set_title(title, fontsize="small")
        panel.tick_params(labelsize="x-small")
    figure.supylabel("tokens/s", fontsize="small")


def spread(some: list[float]) -> float:
    """Half of the way from the least to the greatest, as a fraction of the median."""
    return (max(some) - min(some)) / 2 / statistics.median(some)


def overlap(some: list[float], others: list[float]) -> bool:
    """Whether the range of some rounds meets that of others."""
    return max(min(some), min(others)) <= min(max(some), max(others))


def over_best(rounds: dict[str, list[float]], best: Callable[..., list[float]]) -> str:
    """The median of ours over that of the best of the others, and whether their rounds overlap.

    Args:
        rounds: of each engine.
        best: `max` or `min`, by which of the others is the best.

    Returns:
        "" without ours or without another.
    """
    ours, peers = rounds.get("ours"), [some for name, some in rounds.items() if name != "ours" and some]
    if not ours or not peers:
        return ""
    peer = best(peers, key=statistics.median)
    ratio = f"{statistics.median(ours) / statistics.median(peer):.3f}"
    several = min(len(ours), len(peer)) > 1
    return f"{ratio}, within the spread" if several and overlap(ours, peer) else ratio


def load(row: dict[str, Any]) -> tuple[str, int, int, int]:
    """What an engine was asked for, the same for all engines."""
    return row["routing"], row["batch"], row["input"], row["output"]


def _title(row: dict[str, Any]) -> str:
    """A panel's, the same for all engines."""
    routing, batch, inputs, outputs = load(row)
    return f"{Path(row['model']).name}, {routing}\nbatch {batch}, {inputs}/{outputs}"
