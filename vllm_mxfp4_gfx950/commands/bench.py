"""Measure this package beside vLLM's own MoE backends: one layer, or a served model."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import shlex
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_mxfp4_gfx950.bench import report
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.options import PEERS
from vllm_mxfp4_gfx950.process import ending_on_sigterm

# What needs torch is imported where it measures: `plot` draws where there is none.
if TYPE_CHECKING:
    from vllm_mxfp4_gfx950.bench.layer import Row
    from vllm_mxfp4_gfx950.bench.serve import Servers, Turn

FIGURES = {
    "tokens_per_s": ("tokens/s", max),
    "first_token_ms": ("ms first token", min),
    "next_token_ms": ("ms next token", min),
}
"""Of serving: what each is called when it is printed, and which is the best of several."""


def run(args: argparse.Namespace) -> int:
    """Measure or draw; the exit code is 1 when a backend failed, or what ran was not what was asked for."""
    for option, file in (("--plot", args.plot), ("--json", getattr(args, "json", None))):
        if file:
            report.check_place(option, file)
    if args.plot:
        report.check_plot(args.plot)
    if args.kind == "plot":
        found, code = [report.read(file) for file in args.files], 0
    else:
        done, code = (run_layer if args.kind == "layer" else run_serve)(args)
        found = [done]
    if args.plot:
        report.draw(found, args.plot)
    return code


def peers_here() -> tuple[str, ...]:
    """Those of PEERS that this device can run: both are Triton or CUDA, and MARLIN is CUDA alone."""
    import torch

    if not torch.cuda.is_available():
        return ()
    return PEERS[:1] if torch.version.hip else PEERS


def run_layer(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Print a line for each row; the report, and the exit code."""
    import torch

    from vllm_mxfp4_gfx950.bench import layer, vllm_layers
    from vllm_mxfp4_gfx950.models import TOKENS, layer_shape
    from vllm_mxfp4_gfx950.timing import REPLAYS

    token_counts = list(args.tokens or TOKENS)
    if min(token_counts) < 1:
        raise Mxfp4Error("--tokens", "at least 1", min(token_counts), "Correct it")
    if args.captured is not None and args.captured < 0:
        raise Mxfp4Error("--captured", "at least 0", args.captured, "Correct it")
    shapes = [layer_shape(model, args.tp, args.ep) for model in args.model]
    peers = peers_here() if args.peers is None else args.peers

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = [str(layer.as_served(shape, device, args.captured).selection) for shape in shapes]
    reached = layer.speeds(device)
    done: dict[str, Any] = {
        "bench": "layer",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "versions": report.versions(),
        "ours": chosen,
        "captured": args.captured,
        "copy_bytes_per_s": reached.copy,
        "flops_per_s": reached.multiply,
        "rows": [],
    }
    print(f"{done['device']}, " + ", ".join(map(" ".join, done["versions"].items())))
    print(f"copies {reached.copy / 1e12:.3f} TB/s, multiplies bf16 at {reached.multiply / 1e12:.1f} TFLOP/s")
    print(
        f"microseconds of one layer, after its rows were compared with float64: the median of "
        f"{2 * REPLAYS} replays of {layer.CALLS} calls, ± half of the way from fastest to slowest"
    )
    if args.captured is not None:
        print(f"above {args.captured} tokens without a graph, the CPU's time to launch included")
    ours = functools.partial(layer.ours, captured=args.captured)
    builders = {"ours": ours} | {name: vllm_layers.BUILDERS[name] for name in peers}
    for shape, choice in zip(shapes, chosen, strict=True):
        print(f"\n{shape}, {layer.copies(shape, device)} layers in turn; ours: {choice}")
        columns = "".join(f"{name:>17}" for name in builders)
        print(f"tokens MB read   GFLOP    floor{columns}  ours/floor  ours/best peer  host: ours", flush=True)
        for row in layer.measure(shape, token_counts, builders, reached, device, args.captured):
            print(layer_line(row, list(builders)), flush=True)
            done["rows"].append(dataclasses.asdict(row))
            if args.json:
                report.write(args.json, done)
        print(f"ours: {layer.as_served(shape, device, args.captured)}")
    return done, 1 if any(row["failed"] for row in done["rows"]) else 0


def layer_line(row: Row, names: list[str]) -> str:
    """One row of the table, and a line for each backend that has no time."""
    median = {name: statistics.median(times) for name, times in row.us.items()}
    figures = ""
    for name in names:
        some = row.us.get(name)
        figures += f"{median[name]:9.1f} ±{report.spread(some):5.1%} " if some else f"{'FAIL':>17}"
    line = f"{row.tokens:6} {row.weight_bytes / 1e6:7.1f} {row.flops / 1e9:7.1f} {row.floor_us:8.1f}{figures}"
    if "ours" in median:
        line += f"  {median['ours'] / row.floor_us:10.2f}"
        peers = [each for name, each in median.items() if name != "ours"]
        line += f"  {median['ours'] / min(peers):14.3f}" if peers else ""
        line += f"  {row.host_us['ours']:10.1f}" if row.host_us else ""
    return "\n".join([line, *(f"       {name}: {reason}" for name, reason in row.failed.items())])


def run_serve(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Print each round of each engine, a line each, then the comparison; the report, and the exit code."""
    from vllm_mxfp4_gfx950.bench import serve

    if args.rounds < 2:
        raise Mxfp4Error("--rounds", "at least 2, to show how far they differ", args.rounds, "Correct it")
    if min(args.concurrency) < 1:
        raise Mxfp4Error("--concurrency", "at least 1", min(args.concurrency), "Correct it")
    loads = list(dict.fromkeys(load for name in args.load for load in serve.loads(name, args.concurrency)))
    routings = serve.routings(args.model, args.routing)
    extra = engine_arguments(args.engine_args)
    engines = list(
        dict.fromkeys(
            "ours" if name.lower() == "ours" else name.upper()
            for name in args.engines or ("ours", *peers_here())
        )
    )
    together = len(engines) > 1 and not args.one_by_one
    done: dict[str, Any] = {
        "bench": "serve",
        "device": "",
        "versions": report.versions(),
        "model": args.model,
        "engine_args": args.engine_args,
        "together": together,
        "rows": [],
        "failed": {},
    }
    folder = Path(tempfile.mkdtemp(prefix="mxfp4-bench-"))
    try:
        with ending_on_sigterm(), serve.Servers(args.model, loads, extra, folder) as servers:
            if together:
                try:
                    servers.start_all(engines)
                except Mxfp4Error as error:
                    print(f"not all at once: {error}\none by one:", flush=True)
                    servers.stop()
                    done["together"] = together = False
            for turn in serve.turns(engines, routings, loads, args.rounds, together):
                measure_turn(servers, turn, done)
                if args.json:
                    report.write(args.json, done)
    finally:
        print("\n".join(comparison(done["rows"], engines)))
    if not done["failed"]:
        shutil.rmtree(folder)
    return done, 1 if done["failed"] else 0


def measure_turn(servers: Servers, turn: Turn, done: dict[str, Any]) -> None:
    """Measure an engine, print its figures or why it has none, and keep them; one that failed is left out."""
    engine = turn[0]
    if engine in done["failed"]:
        return
    try:
        found = servers.measure(turn)
    except Mxfp4Error as error:
        servers.stop(engine)
        done["failed"][engine] = str(error)
        print(f"{engine:8} FAIL {error}", flush=True)
    else:
        keep(done, turn, found)


def engine_arguments(text: str) -> list[str]:
    """The user's arguments of `vllm serve`."""
    try:
        return shlex.split(text)
    except ValueError as error:
        rule, fix = "quoted as for a shell", f"{error}: correct it"
        raise Mxfp4Error("--engine-args", rule, repr(text), fix) from error


def keep(done: dict[str, Any], turn: Turn, found: dict[str, Any]) -> None:
    """Print a round's figures, and put them into its engine's and load's row, which the first one begins."""
    engine, routing, (batch, inputs, outputs), number = turn
    done["device"] = found["device"]
    names = {"engine": engine, "routing": routing, "batch": batch, "input": inputs, "output": outputs}
    if engine not in (row["engine"] for row in done["rows"]):
        print(f"{engine:8} through {found['path']}, answered after {found['start_s']:.0f} s")
    row = next((row for row in done["rows"] if names.items() <= row.items()), None)
    if row is None:
        facts = {name: found[name] for name in ("path", "device", "start_s")}
        row = {"model": done["model"]} | names | facts | {name: [] for name in FIGURES}
        done["rows"].append(row)
    line = f"{engine:8} {routing:10} {batch:5} {f'{inputs}/{outputs}':12} round {number + 1}"
    for name, (unit, _) in FIGURES.items():
        if found[name] is not None:
            row[name].append(found[name])
            line += f"{digits([found[name]]):>10} {unit}"
    print(line, flush=True)


def comparison(rows: list[dict[str, Any]], engines: list[str]) -> list[str]:
    """A line for each load and figure: each engine's median and spread, and ours over the best of the others.

    Where the rounds of these two overlap, it says that they differ within the spread, which is no finding.
    """
    title = f"{'routing':10} {'batch in/out':18} {'':16}"
    lines = [title + "".join(f"{name:>17}" for name in engines) + "  ours/best peer"]
    for load in dict.fromkeys(report.load(row) for row in rows):
        routing, batch, inputs, outputs = load
        for figure, (unit, best) in FIGURES.items():
            rounds = {row["engine"]: row[figure] for row in rows if report.load(row) == load}
            if not any(rounds.values()):
                continue
            line = f"{routing:10} {batch:5} {f'{inputs}/{outputs}':12} {unit:16}"
            for name in engines:
                some = rounds.get(name)
                line += f"{digits(some):>9} ±{report.spread(some):5.1%} " if some else f"{'none':>17}"
            whole = {name: some for name, some in rounds.items() if len(some) > 1}
            lines.append(f"{line}  {report.over_best(whole, best)}".rstrip())
    return lines


def digits(some: list[float]) -> str:
    """The median, with as many decimals as its size asks for."""
    middle = statistics.median(some)
    return f"{middle:.{1 if middle >= 100 else 3}f}"
