"""Write docs/evidence.md from what was measured: docs/evidence/index.json and the files that it names.

    python environments/write_evidence.py          writes the page
    python environments/write_evidence.py --check  fails where the page is not what would be written

A file is the JSON that the command of its entry printed or wrote. To bring a figure up to date, replace the
file and change its entry's date.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vllm_mxfp4_gfx950.bench.report import over_best, spread

FOLDER = Path(__file__).parents[1] / "docs/evidence"
PAGE = FOLDER.with_suffix(".md")
HEAD = """# Evidence

What commands measured, with hardware, versions and date: microseconds of a layer, tokens a second of a
server. What the figures mean is in [performance.md](performance.md), [accuracy.md](accuracy.md) and
[gfx950.md](gfx950.md). Nothing here was run on a gfx950.
`environments/write_evidence.py` writes this page from `docs/evidence/`.
"""

Rows = Iterable[dict[str, object]]


def main() -> int:
    """Write or check the page; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="say whether the page is right instead")
    args = parser.parse_args()
    text = page(json.loads((FOLDER / "index.json").read_text()))
    if args.check:
        same = PAGE.read_text() == text
        print(f"{PAGE.name} is {'up to date' if same else 'not what write_evidence.py writes'}")
        return 0 if same else 1
    PAGE.write_text(text)
    return 0


def page(entries: list[dict[str, str]]) -> str:
    """The page's text."""
    parts = [HEAD]
    for entry in entries:
        rows = KINDS[entry["kind"]](json.loads((FOLDER / entry["file"]).read_text()))
        facts = [f"{entry['hardware']}. {entry['versions']}. {entry['date']}.", f"    {entry['command']}"]
        parts += [f"## {entry['title']}", *facts, table(rows)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def table(rows: Rows) -> str:
    """Markdown, with the columns of the first row."""
    rows = list(rows)
    lines = [rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(
        "| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |" for line in lines
    )


def layers(report: dict[str, Any]) -> Rows:
    """Microseconds of a layer: medians, and the spread of ours."""
    for row in report["rows"]:
        us = {name: statistics.median(some) for name, some in row["us"].items()}
        best = min(us[name] for name in us if name != "ours")
        ours = sorted(row["us"]["ours"])
        yield {
            "experts": sizes(row)["E"],
            "intermediate": sizes(row)["I"],
            "tokens": row["tokens"],
            "floor, us": f"{row['floor_us']:.1f}",
            **{f"{name}, us": f"{each:.1f}" for name, each in us.items()},
            "ours / floor": f"{us['ours'] / row['floor_us']:.2f}",
            "ours / best": f"{us['ours'] / best:.3f}",
            "ours, fastest to slowest, us": f"{ours[0]:.1f} to {ours[-1]:.1f}",
            **{f"host of {name}, us": f"{each:.0f}" for name, each in row.get("host_us", {}).items()},
            "error of ours, relative": f"{row['frobenius']['ours']:.1e}",
        }


def sizes(row: dict[str, Any]) -> dict[str, str]:
    """Of a row's layer, by letter."""
    return dict(size.split("=") for size in row["layer"].split())


def serving(report: dict[str, Any]) -> Rows:
    """Tokens a second of each load, of input where one token is asked for, and ratios of its latencies."""
    loads: dict[tuple[object, ...], dict[str, dict[str, Any]]] = {}
    for row in report["rows"]:
        load = row["model"], row["routing"], row["batch"], f"{row['input']}/{row['output']}"
        loads.setdefault(load, {})[row["engine"]] = row
    times = {"first_token_ms": "first token, ours / best", "next_token_ms": "next token, ours / best"}
    for (model, routing, batch, lengths), engines in loads.items():
        rates = {name: row["tokens_per_s"] for name, row in engines.items()}
        yield {
            "model": model,
            "routing": routing,
            "batch": batch,
            "in/out, tokens": lengths,
            **{f"{name}, tokens/s": rounds(each) for name, each in rates.items()},
            "ours / best": over_best(rates, max),
            **{
                title: over_best({name: row[figure] for name, row in engines.items()}, min)
                for figure, title in times.items()
                if all(figure in row for row in engines.values())
            },
        }


def rounds(some: list[float]) -> str:
    """The median, and the spread of several."""
    return f"{statistics.median(some):.0f}" + (f" ±{spread(some):.1%}" if len(some) > 1 else "")


def compiled(report: dict[str, Any]) -> Rows:
    """What each kernel takes, ours and triton_kernels' own choice."""
    for whose in ("ours", "upstream"):
        for row in report[whose]:
            found = row["report"]
            taken = {
                "waves": found and found["waves"],
                "LDS, bytes": found and found["lds_bytes"],
                "VGPRs": found and found["vgprs"],
                "spilled registers": found and found["vgpr_spills"] + found["sgpr_spills"],
                "scratch, bytes": found and found["scratch_bytes"],
                "workgroups a CU": found and found["workgroups"],
            }
            tile = found["name"].rpartition("mxfp4_")[2].removesuffix("_swiglu") if found else None
            error = row["error"].splitlines()[0][:90] if row["error"] else ""
            yield {
                "tiles": whose,
                "tokens": row["tokens"],
                "matmul": row["gemm"],
                "workgroups": row["workgroups"],
                "tile, block_m x n x k x split_k": tile,
                **taken,
                "fits": "yes" if row["fits"] else f"no {error}".strip(),
            }


def executed(report: dict[str, Any]) -> Rows:
    """Each stage of a layer against float64."""
    for row in report["checks"]:
        counts = row["counts"] or {}
        instructions = counts.get("instructions", {})
        total, matrix = sum(instructions.values()), instructions.get("matrix", 0)
        yield {
            "tokens": row["tokens"],
            "stage": row["stage"],
            "workgroups executed": f"{row['executed']} of {row['workgroups']}" if row["workgroups"] else "",
            "relative error": row["note"] if row["frobenius"] is None else f"{row['frobenius']:.1e}",
            "worst row / what is allowed": None if row["row"] is None else f"{row['row']:.2f}",
            "instructions": total or None,
            "instructions / matrix instruction": f"{total / matrix:.1f}" if matrix else None,
            "result": row["miss"] or "ok",
        }


def beside(report: dict[str, Any]) -> Rows:
    """A layer in SGLang through this package and through its own kernels: two files of run_in_sglang.py."""
    for ours, theirs in zip(report["ours"]["rows"], report["theirs"]["rows"], strict=True):
        us = [statistics.median(row["us"]["layer"]) for row in (ours, theirs)]
        yield {
            "tokens": ours["tokens"],
            "floor, us": f"{ours['floor_us']:.1f}",
            "this package, us": f"{us[0]:.1f}",
            "SGLang's triton_kernel, us": f"{us[1]:.1f}",
            "ratio": f"{us[0] / us[1]:.3f}",
            "error of this package, relative": f"{ours['frobenius']['layer']:.1e}",
            "error of SGLang's, relative": f"{theirs['frobenius']['layer']:.1e}",
        }


KINDS: dict[str, Callable[[Any], Rows]] = {
    "layer": layers,
    "serve": serving,
    "compile": compiled,
    "verify": executed,
    "sglang": beside,
    "rows": lambda report: report["rows"],
}
"""How each kind of file is shown."""

if __name__ == "__main__":
    sys.exit(main())
