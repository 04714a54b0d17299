"""Measure this package beside vLLM's own MoE backends: one layer, or a served model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_mxfp4_gfx950.bench import report
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.options import PEERS

# What needs torch is imported where it measures: `plot` draws where there is none.
if TYPE_CHECKING:
    from vllm_mxfp4_gfx950.bench.layer import Row


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
    shapes = [layer_shape(model, args.tp, args.ep) for model in args.model]
    peers = peers_here() if args.peers is None else args.peers

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = [str(layer.as_served(shape, device).selection) for shape in shapes]
    reached = layer.speeds(device)
    done: dict[str, Any] = {
        "bench": "layer",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "versions": report.versions(),
        "ours": chosen,
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
    builders = {"ours": layer.ours} | {name: vllm_layers.BUILDERS[name] for name in peers}
    for shape, choice in zip(shapes, chosen, strict=True):
        print(f"\n{shape}, {layer.copies(shape, device)} layers in turn; ours: {choice}")
        columns = "".join(f"{name:>17}" for name in builders)
        print(f"tokens MB read   GFLOP    floor{columns}  ours/floor  ours/best peer", flush=True)
        for row in layer.measure(shape, token_counts, builders, reached, device):
            print(layer_line(row, list(builders)), flush=True)
            done["rows"].append(dataclasses.asdict(row))
            if args.json:
                report.write(args.json, done)
        print(f"ours: {layer.as_served(shape, device)}")
    return done, 1 if any(row["failed"] for row in done["rows"]) else 0


def layer_line(row: Row, names: list[str]) -> str:
    """One row of the table, and a line for each backend that has no time."""
    median = {name: statistics.median(times) for name, times in row.us.items()}
    figures = ""
    for name in names:
        figures += f"{median[name]:9.1f} ±{spread(row.us[name]):5.1%} " if name in median else f"{'FAIL':>17}"
    line = f"{row.tokens:6} {row.weight_bytes / 1e6:7.1f} {row.flops / 1e9:7.1f} {row.floor_us:8.1f}{figures}"
    if "ours" in median:
        line += f"  {median['ours'] / row.floor_us:10.2f}"
        peers = [each for name, each in median.items() if name != "ours"]
        line += f"  {median['ours'] / min(peers):14.3f}" if peers else ""
    return "\n".join([line, *(f"       {name}: {reason}" for name, reason in row.failed.items())])


def spread(times: list[float]) -> float:
    """Half of the way from the fastest to the slowest, as a fraction of the median."""
    return (max(times) - min(times)) / 2 / statistics.median(times)


def run_serve(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Print each engine's path and loads, a line each, then the comparison; the report, and the exit code."""
    from vllm_mxfp4_gfx950.bench import serve

    if args.rounds < 1:
        raise Mxfp4Error("--rounds", "at least 1", args.rounds, "Correct it")
    if min(args.concurrency) < 1:
        raise Mxfp4Error("--concurrency", "at least 1", min(args.concurrency), "Correct it")
    loads = list(dict.fromkeys(load for name in args.load for load in serve.loads(name, args.concurrency)))
    routings = serve.routings(args.model, args.routing)
    extra = engine_arguments(args.engine_args)
    engines = [
        "ours" if name.lower() == "ours" else name.upper() for name in args.engines or ("ours", *peers_here())
    ]
    done: dict[str, Any] = {
        "bench": "serve",
        "device": "",
        "versions": report.versions(),
        "model": args.model,
        "engine_args": extra,
        "rows": [],
        "failed": {},
    }

    def keep(row: dict[str, Any]) -> None:
        if row["engine"] not in (each["engine"] for each in done["rows"]):
            print(f"{row['engine']:8} through {row['path']}")
        done["device"] = row["device"]
        done["rows"].append({"model": args.model} | row)
        print(serve_line(row), flush=True)
        if args.json:
            report.write(args.json, done)

    for engine in engines:
        with tempfile.TemporaryDirectory() as directory:
            arguments = serve.arguments(args.model, engine, loads, Path(directory), extra)
            job = {"arguments": arguments, "routings": routings, "loads": loads, "rounds": args.rounds}
            failure = serve.measure(engine, job, keep)
        if failure:
            done["failed"][engine] = failure
            print(f"{engine:8} FAIL {failure}", flush=True)
    if args.json:
        report.write(args.json, done)
    print("\n".join(comparison(done["rows"], engines)))
    return done, 1 if done["failed"] else 0


def engine_arguments(text: str) -> dict[str, Any]:
    """The user's arguments of vllm.LLM."""
    try:
        extra = json.loads(text)
    except json.JSONDecodeError:
        extra = None
    if not isinstance(extra, dict):
        fix = """Correct it, as in '{"tensor_parallel_size": 2}'"""
        raise Mxfp4Error("--engine-args", "a JSON object", text, fix)
    return extra


def serve_line(row: dict[str, Any]) -> str:
    """Medians of one engine under one load, and the rounds' extremes."""
    rates, following = row["tokens_per_s"], row["next_token_ms"]
    kind = "output" if following else "input"
    line = (
        f"{row['engine']:8} {row['routing']:10} batch {row['batch']:4} {row['input']:5}/{row['output']:<5}"
        f"{statistics.median(rates):10.1f} {kind} tokens/s ({min(rates):.1f} to {max(rates):.1f}), "
        f"first token of all after {statistics.median(row['first_token_ms']):.1f} ms"
    )
    return line + (f", then one every {statistics.median(following):.2f} ms" if following else "")


def comparison(rows: list[dict[str, Any]], engines: list[str]) -> list[str]:
    """A line for each load: every engine's tokens/s, and ours over the best of the others."""
    title = f"{'routing':10} {'batch in/out':18}"
    lines = [title + "".join(f"{name:>10}" for name in engines) + "  ours/best peer"]
    for load in dict.fromkeys(report.load(row) for row in rows):
        rates = {
            row["engine"]: statistics.median(row["tokens_per_s"]) for row in rows if report.load(row) == load
        }
        routing, batch, inputs, outputs = load
        line = f"{routing:10} {batch:5} {f'{inputs}/{outputs}':12}"
        line += "".join(f"{rates[name]:10.1f}" if name in rates else f"{'FAIL':>10}" for name in engines)
        peers = [rate for name, rate in rates.items() if name != "ours"]
        lines.append(line + (f"{rates['ours'] / max(peers):16.3f}" if "ours" in rates and peers else ""))
    return lines
