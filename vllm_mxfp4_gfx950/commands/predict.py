"""Predict what a layer takes on a gfx950, or hold the prediction to what was measured on one by others."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import triton

from vllm_mxfp4_gfx950.backends.triton import two_fp8
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.gfx950 import trial
from vllm_mxfp4_gfx950.gfx950.driver import ARCH
from vllm_mxfp4_gfx950.gfx950.published import CURVES
from vllm_mxfp4_gfx950.gfx950.ranking import Installed, Measured, best, predicted, wide
from vllm_mxfp4_gfx950.models import DIVISIONS, GPT_OSS, layer_shape
from vllm_mxfp4_gfx950.tables import ladder
from vllm_mxfp4_gfx950.tiles import Ladder, TileConfig, gemms, release_of
from vllm_mxfp4_gfx950.timing import progress

Report = dict[str, Any]

SEARCHED = {"triton": ((16, 32, 64, 128), (256,)), "two_fp8": ((8, 16, 32, 64, 128), (256, 512))}
"""block_m and block_k that a search may try, by backend."""

EVIDENCE = "Predicted for a gfx950 from what kernels execute on the emulator; nothing ran on one."


def run(args: argparse.Namespace) -> int:
    """Print the tables, in Markdown."""
    if args.read is not None:
        print("\n\n".join(text(report) for report in map(read, args.read)))
        return 0
    if min(args.tokens) < 1:
        raise Mxfp4Error("--tokens", "at least 1", min(args.tokens), "Correct it")
    rows, _ = SEARCHED[args.backend]
    if args.search and not set(args.search) <= set(rows):
        rule = f"of {', '.join(map(str, rows))}"
        raise Mxfp4Error("--search", rule, " ".join(map(str, args.search)), "Correct it")
    divisions = [(args.model, args.tp, args.ep)]
    if args.all:
        divisions = [(model, tp, ep) for model in GPT_OSS for tp, ep in DIVISIONS]
    report = tried(args.aiter) if args.aiter else layers(args.backend, divisions, args.tokens, args.search)
    print(json.dumps(rounded(report)) if args.json else text(rounded(report)))
    return 0


def rounded(value: Any) -> Any:
    """The same with two decimals in every float."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return round(value, 2) if isinstance(value, float) else value


def read(file: Path) -> Report:
    """What `--json` printed."""
    try:
        report: Report = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        fix = "Name a file with what `vllm-mxfp4 predict --json` printed"
        raise Mxfp4Error("--read", "a file of JSON", f"{file} ({error})", fix) from error
    return report


def layers(
    backend: str, divisions: list[tuple[str, int, int]], tokens: list[int], search: list[int] | None
) -> Report:
    """Predict layers with the tiles that would serve them, or with the best of a search.

    Args:
        backend: a name in SEARCHED.
        divisions: model, tensor-parallel and expert-parallel ranks of each.
        tokens: T of each forward.
        search: block_m of the tiles to search; None for those that would serve.
    """
    installed = Installed(backend)
    kernels = installed.layer.backend.KERNELS if backend == "triton" else backend
    measured: dict[tuple[str, TileConfig], Measured] = {}

    def measure(tile: TileConfig) -> None:
        tile = replace(tile, split_k=1)
        if all(each != tile for _, each in measured):
            measured.update({(name, tile): each for name, each in installed.measured(tile).items()})

    tiles = list(wide(search, SEARCHED[backend][1])) if search else []
    for done, tile in enumerate(tiles):
        progress(done, len(tiles))
        measure(tile)
    rows = []
    for model, tp, ep in divisions:
        shape = layer_shape(model, tp, ep)
        pair = gemms(shape)
        ladders: Sequence[Ladder[TileConfig] | None]
        if backend == "two_fp8":
            ladders = two_fp8.tiles_for(shape, release_of(triton.__version__))
        else:
            ladders = [ladder(ARCH, kernels, triton.__version__, gemm) for gemm in pair]
        for each in tokens:
            matmuls = []
            for gemm, rungs in zip(pair, ladders, strict=True):
                if search:
                    tile, found = best(gemm, measured, each, shape.topk)
                else:
                    assert rungs is not None
                    tile = rungs.at(each)
                    measure(tile)
                    done_by = measured[gemm.name, replace(tile, split_k=1)].at(tile, gemm.k)
                    found = predicted(gemm, tile, done_by, each, shape.topk)
                us, limits = [one.us for one in found], [one.limits for one in found]
                matmuls.append({"tile": astuple(tile), "us": us, "limits": limits})
            row = {"model": model, "tp": tp, "ep": ep, "tokens": each, "matmuls": matmuls}
            rows.append(row | {"us": [sum(pair) for pair in zip(*(m["us"] for m in matmuls), strict=True)]})
    whole = [curve for curve in CURVES if curve.experts == 128 and curve.intermediate == 3072]
    published = {curve.kernel: {str(tokens): us for tokens, us in curve.us.items()} for curve in whole}
    facts = {"kind": "layers", "kernels": kernels, "triton": triton.__version__, "published": published}
    return facts | {"searched": len(tiles), "rows": rows}


def tried(source: Path) -> Report:
    """Hold the model to verdicts and times from a card.

    Args:
        source: the directory that has `aiter/`.
    """
    executed = trial.Executed(source)
    return {
        "kind": "trial",
        "triton": triton.__version__,
        "verdicts": trial.judge(executed, progress),
        "absolute": trial.absolute(executed),
        "curves": trial.by_bytes(),
    }


def text(report: Report) -> str:
    """A report as Markdown."""
    return f"{EVIDENCE}\n\n{ {'layers': layers_text, 'trial': trial_text}[report['kind']](report) }"


def span(us: list[float]) -> str:
    """Both ends of a prediction, or of a ratio."""
    low, high = sorted(us)
    return f"{low:.2f} to {high:.2f}" if high < 10 else f"{low:.0f} to {high:.0f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def layers_text(report: Report) -> str:
    """Predicted layers: for each model a column for each division, and what limits the first of them."""
    rows = report["rows"]
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        divisions = list(dict.fromkeys((row["tp"], row["ep"]) for row in own))
        us = {(row["tp"], row["ep"], row["tokens"]): row["us"] for row in own}
        names = [f"TP {tp}" if ep == 1 else f"EP {ep}" for tp, ep in divisions]
        # What was published is for the whole layer of the larger model.
        published = report["published"] if (model, divisions[0]) == ("gpt-oss-120b", (1, 1)) else {}
        head = ["tokens", *names, *(f"{name}, published" for name in published)]
        body = []
        for tokens in dict.fromkeys(row["tokens"] for row in own):
            ranges = [span(us[(*division, tokens)]) for division in divisions]
            times = [str(times.get(str(tokens), "")) for times in published.values()]
            body.append([str(tokens), *ranges, *times])
        title = f"{model}, {report['kernels']}, triton {report['triton']}: us of both matmuls, predicted"
        parts += [title, table(head, body)]
        first = [row for row in own if (row["tp"], row["ep"]) == divisions[0]]
        if report.get("searched"):
            body = [[str(row["tokens"]), *(tile_text(m["tile"]) for m in row["matmuls"])] for row in first]
            parts += [
                f"{model}, {names[0]}: best of {report['searched']} tiles",
                table(["tokens", "w13", "w2"], body),
            ]
        limits = list(first[0]["matmuls"][0]["limits"][0])
        body = [
            [str(row["tokens"]), *(span(both_cards(row["matmuls"], limit)) for limit in limits)]
            for row in first
        ]
        parts += [f"{model}, {names[0]}: us that each resource takes", table(["tokens", *limits], body)]
    return "\n\n".join(parts)


def tile_text(tile: list[int]) -> str:
    """A tile in a few words."""
    block_m, block_n, block_k, split_k, num_warps, num_stages, waves_per_eu = tile
    text = f"{block_m}x{block_n}x{block_k}, {num_warps} warps, {num_stages} stages"
    text += f", split {split_k}" if split_k > 1 else ""
    return text + (f", {waves_per_eu} waves" if waves_per_eu else "")


def both_cards(matmuls: list[Report], limit: str) -> list[float]:
    """What a resource takes for both matmuls, by card."""
    return [sum(m["limits"][card][limit] for m in matmuls) for card in range(len(matmuls[0]["limits"]))]


def trial_text(report: Report) -> str:
    """The trial: hits by subject, misses one by one, and times."""
    verdicts = report["verdicts"]
    answers = ("yes", "same", "open", "no", "not executed")
    body = []
    for subject in dict.fromkeys(verdict["subject"] for verdict in verdicts):
        own = [verdict for verdict in verdicts if verdict["subject"] == subject]
        count = Counter(verdict["called"] for verdict in own)
        published = {f"{v['published_ratio']}" for v in own if v["published_ratio"]}
        ratios = [ratio for verdict in own for ratio in verdict["ratios"] or ()]
        body.append(
            [
                subject,
                own[0]["source"],
                ", ".join(sorted(published)),
                span([min(ratios), max(ratios)]) if ratios else "",
                *(str(count[answer] or "") for answer in answers),
            ]
        )
    count = Counter(verdict["called"] for verdict in verdicts)
    body.append(["all", "", "", "", *(str(count[answer]) for answer in answers)])
    parts = [table(["faster on the card", "source", "published ratio", "predicted ratio", *answers], body)]
    missed = [
        [v["subject"], v["faster"], v["slower"], span(v["ratios"])] for v in verdicts if v["called"] == "no"
    ]
    if missed:
        parts.append(table(["called wrong", "faster on the card", "slower there", "predicted ratio"], missed))
    body = [
        [
            str(row["tokens"]),
            str(row["block_m"]),
            f"{row['published_us']:.0f}",
            span(row["us"]),
            ", ".join(dict.fromkeys(each for side in row["limit"] for each in side)),
        ]
        for row in report["absolute"]
    ]
    parts.append(table(["tokens", "block_m", "published us", "predicted us", "limited by"], body))
    body = [
        [
            row["kernel"],
            *(
                figure
                for name in ("own", "others")
                for figure in (
                    f"{row[name]['t0_us']:.1f}",
                    f"{row[name]['tb_per_s']:.2f}",
                    f"{row[name]['error']:.0%}",
                    f"{row[name]['worst']:+.0%}",
                )
            ),
        ]
        for row in report["curves"]
    ]
    head = ["kernel", "t0 us", "TB/s", "error", "worst"]
    parts.append(table([*head, *(f"{name}, from the others" for name in head[1:])], body))
    return "\n\n".join(parts)
