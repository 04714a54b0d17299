"""The options of each command, declared without what it runs: its help needs neither torch nor Triton."""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_mxfp4_gfx950.settings import TABLES_VAR

MODELS = ("gpt-oss-20b", "gpt-oss-120b")
TOKENS = tuple(2**i for i in range(14))
"""Both as in `models`, which needs torch."""

VERIFIED_TOKENS = (1, 3, 16, 64, 1024)
WHOLE_TOKENS = 3
"""Up to so many tokens `verify` executes every workgroup."""

SAMPLE = 16
"""Workgroups of each matmul that it executes for more."""

PEERS = ("TRITON", "MARLIN")
"""vLLM's layers that `bench` can measure."""

LAYER = "time one MoE layer, this package's and vLLM's own, after each was compared with float64"
SERVE = "measure vLLM's servers with its own client, with this package and with its own MoE backends"
PLOT = "draw what was measured"

EPILOG = """\
A side is one of:
  "[NAME=VALUE ...] MODEL [arguments of vllm serve ...]"   a server that is started and stopped here
  "[NAME=VALUE ...] sglang MODEL [arguments ...]"          one of SGLang's
  "http://host:port [LOG]"                                 one that runs, with the file of its log
  DIRECTORY                                                what an earlier run kept of a side

A server that demands a key is asked with the --api-key of its side, or with OPENAI_API_KEY.
"""


def of_shape(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a layer."""
    parser.add_argument(
        "--model",
        default="gpt-oss-20b",
        help=f"{', '.join(MODELS)}, or a checkpoint's directory or config.json",
    )
    of_ranks(parser)


def of_ranks(parser: argparse.ArgumentParser) -> None:
    """Declare how many ranks share a layer."""
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--ep", type=int, default=1, help="expert-parallel ranks, which hold experts whole")


def of_doctor(parser: argparse.ArgumentParser) -> None:
    """Of `doctor`."""
    parser.add_argument("--json", action="store_true", help="print a JSON list: ok, what, found, needed, fix")
    parser.add_argument("--arch", help="answer for this GPU, such as gfx950, instead of those found")
    parser.add_argument(
        "--model", help="gpt-oss-20b, gpt-oss-120b, or a checkpoint's directory; by default both"
    )
    of_ranks(parser)


def of_compile(parser: argparse.ArgumentParser) -> None:
    """Of `compile`."""
    of_shape(parser)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="tokens of a forward")
    parser.add_argument("--upstream", action="store_true", help="show triton_kernels' own tiles too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def of_verify(parser: argparse.ArgumentParser) -> None:
    """Of `verify`."""
    of_shape(parser)
    parser.add_argument("--tokens", type=int, nargs="+", default=VERIFIED_TOKENS, help="tokens of a forward")
    parser.add_argument(
        "--sample",
        type=int,
        help=f"workgroups of each matmul to execute; by default all up to {WHOLE_TOKENS} tokens, "
        f"{SAMPLE} for more; 0 for all",
    )
    parser.add_argument("--upstream", action="store_true", help="with triton_kernels' own tiles")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def of_predict(parser: argparse.ArgumentParser) -> None:
    """Of `predict`."""
    of_shape(parser)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="tokens of a forward")
    parser.add_argument("--backend", choices=("triton", "two_fp8"), default="triton", help="whose matmuls")
    parser.add_argument("--all", action="store_true", help="every model and division instead")
    parser.add_argument(
        "--aiter",
        type=Path,
        help="hold the model to aiter's kernels in this directory, compiled here, instead",
    )
    parser.add_argument(
        "--search",
        type=int,
        nargs="+",
        metavar="ROWS",
        help="with the best tiles of a wide search of these block_m",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--read", type=Path, nargs="+", help="print the tables of such objects instead")


def of_bench(parser: argparse.ArgumentParser) -> None:
    """Of `bench`."""
    kinds = parser.add_subparsers(metavar="kind", dest="kind", required=True)
    layer = kinds.add_parser("layer", help=LAYER, description=LAYER)
    layer.add_argument(
        "--model",
        nargs="+",
        default=MODELS,
        help=f"{', '.join(MODELS)}, or a config.json; more than one is measured in turn",
    )
    of_ranks(layer)
    layer.add_argument("--tokens", type=int, nargs="+", help="tokens of a forward")
    layer.add_argument(
        "--captured",
        type=int,
        metavar="N",
        help="run batches of more tokens without a graph, so that the CPU's time to launch them counts; "
        "vLLM's N is 512 where it is not told otherwise; by default all have a graph",
    )
    layer.add_argument(
        "--peers",
        type=str.upper,
        nargs="*",
        choices=PEERS,
        help="vLLM's, beside ours; by default those that this device can run",
    )
    serving = kinds.add_parser("serve", help=SERVE, description=SERVE)
    serving.add_argument(
        "--model",
        default=MODELS[0],
        help=f"{', '.join(MODELS)} with dummy weights, or a checkpoint as vLLM takes it",
    )
    serving.add_argument(
        "--load",
        nargs="+",
        default=["short"],
        help="short, 1k1k, 1k8k, 8k1k, or BATCH/INPUT/OUTPUT, requests at a time and tokens of each",
    )
    serving.add_argument(
        "--concurrency",
        type=int,
        nargs="+",
        default=(4, 16, 64),
        help="requests at a time of 1k1k, 1k8k and 8k1k",
    )
    serving.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="times that each load is measured, at least 2; the engines alternate",
    )
    serving.add_argument(
        "--engines",
        nargs="+",
        help="ours, or names of vLLM's --moe-backend; by default ours and those that this device can run",
    )
    serving.add_argument(
        "--routing",
        nargs="+",
        choices=("alike", "spread"),
        help="of dummy weights: alike, all tokens choose the same experts, as vLLM makes them; spread (the "
        "default), each token has its own, as in a trained model; or both, measured in turn",
    )
    serving.add_argument(
        "--one-by-one",
        action="store_true",
        help="start one server at a time, back and forth; by default all at once, if they fit into memory so",
    )
    serving.add_argument(
        "--engine-args",
        default="",
        metavar="TEXT",
        help="more arguments of vllm serve, as in --engine-args='--tensor-parallel-size 2'",
    )
    plot = kinds.add_parser("plot", help=PLOT, description=PLOT)
    plot.add_argument("files", type=Path, nargs="+", help="what --json wrote; more than one are drawn as one")
    plot.add_argument("--plot", type=Path, required=True, help="the .png or .svg to write")
    for each in (layer, serving):
        each.add_argument("--json", type=Path, help="write the figures there, anew after each measurement")
        each.add_argument("--plot", type=Path, help="draw them there, a .png or .svg")


def of_eval(parser: argparse.ArgumentParser) -> None:
    """Of `eval`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "sides", nargs="+", metavar="side", help="the tested one, and what it is held against"
    )
    parser.add_argument("--tasks", nargs="+", help="of lm-eval; by default gsm8k, or all of --include-path")
    parser.add_argument("--include-path", type=Path, help="folder with task files to take the tasks from")
    parser.add_argument("--limit", type=int, help="questions of each task; by default all")
    parser.add_argument("--concurrency", type=int, default=64, help="requests at a time")
    parser.add_argument("--endpoint", choices=("chat", "completions"), help="by default what the model needs")
    parser.add_argument("--margin", type=float, default=0.02, help="loss of accuracy that is allowed")
    parser.add_argument("--logprobs", type=Path, metavar="TEXT", help="compare distributions over this file")
    parser.add_argument("--top", type=int, default=20, help="tokens of each distribution, -1 for all")
    parser.add_argument("--window", type=int, default=512, help="tokens that are read at once")
    parser.add_argument("--max-kl", type=float, default=0.01, help="mean KL that is allowed, in nats")
    parser.add_argument("--same-path", action="store_true", help="compare even where both may be one path")
    parser.add_argument(
        "--out", type=Path, default=Path("mxfp4-eval"), help="directory of results and report"
    )


def of_tune(parser: argparse.ArgumentParser) -> None:
    """Of `tune`."""
    of_shape(parser)
    parser.add_argument("--out", type=Path, help=f"the directory of your tables, as for {TABLES_VAR}")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="only choose among the tiles that there are, as at load, and write the choice down",
    )
    parser.add_argument("--arch", choices=["gfx950"], help="rank its tiles by compiling, all models at once")
    parser.add_argument("--table", type=Path, help="with --arch: the file to bring up to date")
