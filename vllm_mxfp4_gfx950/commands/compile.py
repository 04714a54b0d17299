"""Compile a model's MoE kernels for gfx950, here and now, and show what each takes."""

from __future__ import annotations

import argparse
import dataclasses
import json

import triton

from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.gfx950.driver import ARCH
from vllm_mxfp4_gfx950.gfx950.layer import CompiledLayer, CompiledMatmul
from vllm_mxfp4_gfx950.models import layer_shape
from vllm_mxfp4_gfx950.settings import from_environment
from vllm_mxfp4_gfx950.tables import whose
from vllm_mxfp4_gfx950.tiles import gemms
from vllm_mxfp4_gfx950.timing import progress

FIGURES = ("waves", "LDS", "VGPR", "AGPR", "spills", "scratch", "per CU", "occupancy", "per MFMA")
HEADER = "tokens gemm workgroups  tile          " + "".join(f"{name:>10}" for name in FIGURES)


def run(args: argparse.Namespace) -> int:
    """Print the table; the exit code is 1 when a kernel of ours does not fit."""
    shape = layer_shape(args.model, args.tp, args.ep)
    if min(args.tokens) < 1:
        raise Mxfp4Error("--tokens", "at least 1", min(args.tokens), "Correct it")
    tables = from_environment().tables
    layer = CompiledLayer(shape, tables)
    ours: list[CompiledMatmul] = []
    upstream: list[CompiledMatmul] = []
    for done, tokens in enumerate(args.tokens):
        progress(done, len(args.tokens))
        ours += layer.served(tokens)
        if args.upstream:
            upstream += layer.upstream(tokens)
    progress(len(args.tokens), len(args.tokens))
    fits = all(matmul.fits for matmul in ours)
    if args.json:
        facts = {"model": args.model, "shape": dataclasses.asdict(shape), "triton": triton.__version__}
        rows = {
            kind: [dataclasses.asdict(matmul) | {"fits": matmul.fits} for matmul in found]
            for kind, found in (("ours", ours), ("upstream", upstream))
        }
        print(json.dumps(facts | {"fits": fits} | rows))
        return 0 if fits else 1
    print(f"{args.model}: {shape}, {layer.backend.NAME}, {layer.backend.source()}, compiled for gfx950")
    origins = dict.fromkeys(
        whose(ARCH, layer.backend.KERNELS, triton.__version__, gemm, tables) for gemm in gemms(shape)
    )
    for title, found in (
        (f"tiles of {' and '.join(origins)}", ours),
        ("triton_kernels' own tiles", upstream),
    ):
        if found:
            print(f"\n{title}\n{HEADER}")
            print("\n".join(map(line, found)))
    return 0 if fits else 1


def line(matmul: CompiledMatmul) -> str:
    """One row of the table."""
    start = f"{matmul.tokens:6} {matmul.gemm:4}"
    report = matmul.report
    if report is None:
        return f"{start} FAIL {matmul.error.splitlines()[0][:100]}"
    tile = report.name.rpartition("mxfp4_")[2].removesuffix("_swiglu")
    if matmul.tile is not None:
        tile = "x".join(map(str, dataclasses.astuple(matmul.tile)[:4]))
    figures = (
        report.waves,
        report.lds_bytes,
        report.vgprs,
        report.agprs,
        report.vgpr_spills + report.sgpr_spills,
        report.scratch_bytes,
        report.workgroups,
        report.occupancy,
        round(report.per_mfma, 1),
    )
    row = "".join(f"{figure:10}" for figure in figures)
    plan = "" if matmul.plan in ("table", "package") else f"  {matmul.plan}"
    return f"{start} {matmul.workgroups:11}  {tile:14}{row}{plan}{'' if matmul.fits else '  FAIL'}"
