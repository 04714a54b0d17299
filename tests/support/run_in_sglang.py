"""Run a layer of GPT-OSS in SGLang's own FusedMoE on a device, and time it.

    [VLLM_MXFP4_SGLANG=1] python run_in_sglang.py [--device cpu] [--shape 8 2 96 160] [--json FILE] ...

With the variable the experts are this package's, else SGLang's own of `--moe-runner-backend triton_kernel`.
SGLang, a distribution with our entry points and the triton_kernels to be used are first on sys.path.
The last line says what came out; the exit code is 1 where a layer is wrong.
"""

import argparse
import dataclasses
import faulthandler
import json
import logging
import statistics
import sys
import traceback
from importlib.metadata import version
from pathlib import Path

import torch
from block_in_sglang import OneBlock, build, forward, load, load_plugins, publish
from sglang.srt.layers.moe.utils import MoeRunnerBackend
from sglang.srt.runtime_context import get_flags, get_parallel

from vllm_mxfp4_gfx950 import sglang_layer
from vllm_mxfp4_gfx950.backends import reference
from vllm_mxfp4_gfx950.bench.layer import Layer, measure, speeds
from vllm_mxfp4_gfx950.errors import brief
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights
from vllm_mxfp4_gfx950.random_layer import make_shape, random_tokens, random_weights
from vllm_mxfp4_gfx950.tolerance import compare

SECONDS = 250
"""After which it ends, whatever it does."""


def loaded(weights: MoeWeights, shape: MoeShape) -> OneBlock:
    """A block with these weights, where they are."""
    device = str(weights.w13.device)
    return load(build(shape, device), weights, device)


def layer(weights: MoeWeights, shape: MoeShape) -> Layer:
    """A block's top-k and experts, behind its router."""
    model = loaded(weights, shape)

    def run(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), get_parallel().override(**model.ranks):
            out: torch.Tensor = model.block.experts(x, model.block.topk(x, logits))
        return out

    return run


def misses(model: OneBlock, weights: MoeWeights, shape: MoeShape, tokens: int) -> tuple[str, str]:
    """What is wrong with a block's output, router and all; and what would be if w2 had other scales."""
    x, _ = random_tokens(shape, tokens, tokens, str(weights.w13.device))
    out = forward(model, x)
    with torch.no_grad():
        logits = model.block.router(x)[0]
    other = weights.clone()
    other.w2_scale[:, :, 0] += 1
    sound, control = (
        compare(out, *reference.truth_and_plain(x, logits, each, shape)).miss for each in (weights, other)
    )
    return sound, control


def examine(args: argparse.Namespace) -> str:
    """Check a block and time its experts: what they are, and their times.

    Raises:
        AssertionError: something is wrong.
    """
    shape, device = make_shape(*args.shape), torch.device(args.device)
    publish()
    end = load_plugins()
    assert not end, end
    with get_flags().moe.override(runner_backend=MoeRunnerBackend.TRITON_KERNELS):
        weights = random_weights(shape, 1, args.device)
        model = loaded(weights, shape)
        found = {tokens: misses(model, weights, shape, tokens) for tokens in args.tokens}
        rows = list(measure(shape, args.tokens, {"layer": layer}, speeds(device), device))
    method = model.block.experts.quant_method
    ours = isinstance(method, sglang_layer.ExpertsMethod)
    experts = str(method.layers) if ours else f"its own {type(method).__name__}"
    wrong = [f"{tokens} tokens: {miss}" for tokens, (miss, _) in found.items() if miss]
    wrong += [f"{n} tokens: other scales are not noticed" for n, (_, control) in found.items() if not control]
    wrong += [f"{row.tokens} tokens, timed: {row.failed['layer']}" for row in rows if row.failed]
    if args.json:
        on = torch.cuda.get_device_name() if device.type == "cuda" else args.device
        versions = {name: version(name) for name in ("sglang", "torch", "triton", "transformers")}
        seen = {"device": on, "versions": versions, "experts": experts, "wrong": wrong}
        args.json.write_text(json.dumps(seen | {"rows": [dataclasses.asdict(row) for row in rows]}))
    assert not wrong, f"{experts}: {'; '.join(wrong)}"
    times = ", ".join(f"{row.tokens}: {statistics.median(row.us['layer']):.1f}" for row in rows)
    return f"SGLang {version('sglang')} with {experts}: all within the tolerance; us by tokens {times}"


def main() -> int:
    """Say it in a line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", type=int, nargs=4, default=(32, 4, 2880, 2880), metavar="N")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 7, 64, 700])
    parser.add_argument("--json", type=Path, help="for what was seen, and with which versions")
    args = parser.parse_args()
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    logging.basicConfig(level=logging.INFO)
    try:
        print(f"RIGHT: {examine(args)}")
    except Exception as error:  # A package that is missing or another may raise anything.
        traceback.print_exc()
        print(f"FAILED: {brief(error)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
