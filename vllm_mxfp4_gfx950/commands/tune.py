"""Choose tiles by timing them on this machine's GPU; or rank gfx950's by compiling, without a GPU."""

from __future__ import annotations

import argparse

import torch
import triton

from vllm_mxfp4_gfx950 import backends
from vllm_mxfp4_gfx950.choice import choose, clock
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.gfx950 import ranking
from vllm_mxfp4_gfx950.models import layer_shape
from vllm_mxfp4_gfx950.settings import TABLES_VAR
from vllm_mxfp4_gfx950.timing import progress
from vllm_mxfp4_gfx950.tuning.record import CAPTURED, SIZES, Table
from vllm_mxfp4_gfx950.tuning.search import Batch, Layers, tune, warm_up


def run(args: argparse.Namespace) -> int:
    """Bring a table up to date, and say what was found."""
    fix = "Give --out DIR to time on this GPU, or --arch gfx950 --table FILE to rank by compiling"
    needed = "table" if args.arch else "out"
    if getattr(args, needed) is None:
        raise Mxfp4Error(f"--{needed}", "given", "nothing", fix)
    timing = {"out": None, "quick": False, "model": "gpt-oss-20b", "tp": 1, "ep": 1}
    others = timing if args.arch else {"table": None}
    for name, default in others.items():
        if getattr(args, name) != default:
            rule = f"left out {'with' if args.arch else 'without'} --arch"
            raise Mxfp4Error(f"--{name}", rule, getattr(args, name), fix)
    if args.arch:
        ranking.rank(args.table, progress)
        return 0
    shape = layer_shape(args.model, args.tp, args.ep)
    if not torch.cuda.is_available():
        fix = "Run where the model is served, or rank gfx950's tiles by compiling: --arch gfx950 --table FILE"
        raise Mxfp4Error("the machine", "one with a GPU", "none that torch sees", fix)
    device = torch.device("cuda")
    arch = backends.arch_of(device)
    backend = backends.select_tiled(shape, arch)
    args.out.mkdir(parents=True, exist_ok=True)
    table = Table(
        args.out / f"{arch}.json",
        arch,
        shape,
        backend.KERNELS,
        triton.__version__,
        f"timed on one {torch.cuda.get_device_name()}, torch {torch.__version__}",
        f"vllm-mxfp4 tune --model {args.model} --tp {args.tp} --ep {args.ep}" + " --quick" * args.quick,
    )
    print(f"{args.model}: {shape}, {backend.NAME}, {backend.source()}, {table.evidence}")
    missing = [] if args.quick else [tokens for tokens in SIZES if not table.has(tokens)]
    if missing:
        layers = Layers(shape, arch, "cuda")
        warm_up(layers, missing)
        print("tokens  kernels, us of the layer, w13's tile and w2's")
        for tokens in missing:
            print(tune(Batch(layers, tokens), table), flush=True)
        del layers
    if args.quick or not table.pinned:
        layer = Layers(shape, arch, "cuda", copies=1, tables=args.out).prepared[0]
        found = choose(layer, SIZES[-1], clock(shape, device, CAPTURED), CAPTURED)
        table.pin(found.plans)
        print(found)
    print(f"{table.file} has this layer. To serve by it: {TABLES_VAR}={args.out.resolve()}")
    return 0
