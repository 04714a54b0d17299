"""Execute a model's MoE layer on an emulated gfx950, here and now, and compare it with float64."""

from __future__ import annotations

import argparse
import dataclasses
import json

import triton

from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.gfx950.emulator.memory import Fault
from vllm_mxfp4_gfx950.gfx950.verification import Check, EmulatedLayer
from vllm_mxfp4_gfx950.models import layer_shape
from vllm_mxfp4_gfx950.moe import first_experts
from vllm_mxfp4_gfx950.options import SAMPLE, WHOLE_TOKENS
from vllm_mxfp4_gfx950.random_layer import random_tokens, random_weights
from vllm_mxfp4_gfx950.settings import from_environment
from vllm_mxfp4_gfx950.timing import progress

FIGURES = (
    "error",
    "worst row",
    "executed",
    "per MFMA",
    "scratch",
    "conflicts",
    "MB read",
    "no work",
    "seconds",
)
HEADER = "tokens stage   workgroups " + "".join(f"{name:>10}" for name in FIGURES) + "  result"


def run(args: argparse.Namespace) -> int:
    """Print the table; the exit code is 1 when any stage is not right."""
    shape = layer_shape(args.model, args.tp, args.ep)
    if args.sample is not None and args.sample < 0:
        raise Mxfp4Error("--sample", "0 or more", args.sample, "Correct it")
    if min(args.tokens) < 1:
        raise Mxfp4Error("--tokens", "at least 1", min(args.tokens), "Correct it")
    tables = from_environment().tables
    checks: list[Check] = []
    fault = ""
    try:
        weights = dataclasses.replace(random_weights(shape, seed=0), expert_map=first_experts(shape))
        layer = EmulatedLayer(weights, shape, tables=tables)
        if args.upstream:
            layer.prepared = layer.prepared.with_tiles(None, None)
        if not args.json:
            print(f"{args.model}: {shape}, {layer.backend.NAME}, {layer.backend.source()}, emulated gfx950")
            print(HEADER)
        for done, tokens in enumerate(args.tokens):
            progress(done, len(args.tokens))
            sample = args.sample
            if sample is None:
                sample = 0 if tokens <= WHOLE_TOKENS else SAMPLE
            found = layer.check(*random_tokens(shape, tokens, seed=tokens), sample=sample or None)
            checks += found
            if not args.json:
                print("\n".join(map(line, found)), flush=True)
        progress(len(args.tokens), len(args.tokens))
    except Fault as error:
        fault = str(error)
    right = not fault and not any(check.miss for check in checks)
    if args.json:
        facts = {"model": args.model, "shape": dataclasses.asdict(shape), "triton": triton.__version__}
        rows = [dataclasses.asdict(check) for check in checks]
        print(json.dumps(facts | {"right": right, "fault": fault, "checks": rows}))
    elif fault:
        print(f"FAIL {fault.splitlines()[0]}")
    return 0 if right else 1


def line(check: Check) -> str:
    """One row of the table."""
    figures: list[object] = [""] * len(FIGURES)
    if check.frobenius is not None:
        figures[:2] = f"{check.frobenius:.1e}", f"{check.row:.2f}"
    figures[0] = figures[0] or check.note
    counts = check.counts
    if counts:
        executed, matrix = sum(counts.instructions.values()), counts.instructions["matrix"]
        figures[2:8] = (
            executed,
            f"{executed / matrix:.1f}" if matrix else "",
            counts.instructions["scratch"],
            f"{counts.lds_conflicts / max(1, counts.lds_passes):.0%}",
            f"{sum(counts.bytes_read.values()) / 1e6:.1f}",
            counts.idle_workgroups,
        )
    if check.seconds:
        figures[8] = f"{check.seconds:.1f}"
    row = "".join(f"{figure:>10}" for figure in figures)
    executed_of = f"{check.executed}/{check.workgroups}" if check.workgroups else ""
    result = f"FAIL {check.miss}" if check.miss else "ok"
    return f"{check.tokens:6} {check.stage:7} {executed_of:10} {row}  {result}"
