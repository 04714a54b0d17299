"""Serve a model with vLLM, each time through another MoE backend, and measure throughput and latency."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch

from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.models import CONFIG, GPT_OSS

LAYERS = {"gpt-oss-20b": 24, "gpt-oss-120b": 36}

Load: TypeAlias = tuple[int, int, int]
"""Requests in a batch, and of each of them input and output tokens."""

SHORT: list[Load] = [(1, 128, 128), (16, 128, 128), (64, 128, 128), (256, 128, 64), (16, 2048, 1)]
LENGTHS = {"1k1k": (1024, 1024), "1k8k": (1024, 8192), "8k1k": (8192, 1024)}
"""InferenceMax's."""

ROUTINGS = ("alike", "spread")
"""Of dummy weights, in the order in which an engine can be measured with them: all tokens have the same
experts, as vLLM makes such weights; or each has experts of its own, once `spread` has changed them."""

SPREAD = ("norm", "embedding", "router")
"""How the names of the modules end whose weights it changes."""

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # The function that asks each rank which path its layers take is sent there.
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    # What vLLM says goes where the user sees it; the other stream is for rows.
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}


def loads(name: str, concurrency: list[int]) -> list[Load]:
    """What a name stands for.

    Args:
        name: "short", one of LENGTHS, or BATCH/INPUT/OUTPUT.
        concurrency: the batches of LENGTHS.

    Raises:
        Mxfp4Error: it is something else.
    """
    if name == "short":
        return SHORT
    if name in LENGTHS:
        return [(batch, *LENGTHS[name]) for batch in concurrency]
    parts = name.split("/")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        rule = f"short, {', '.join(LENGTHS)} or BATCH/INPUT/OUTPUT"
        raise Mxfp4Error("--load", rule, name, "Correct it, as in 16/128/64")
    batch, inputs, outputs = map(int, parts)
    return [(batch, inputs, outputs)]


def routings(model: str, asked: list[str] | None) -> list[str]:
    """With which experts a model is measured.

    Args:
        model: as in `arguments`.
        asked: of ROUTINGS; None for the default.

    Raises:
        Mxfp4Error: the model is a checkpoint, whose tokens choose what they choose.
    """
    if model in LAYERS:
        return [routing for routing in ROUTINGS if routing in (asked or ["spread"])]
    if asked:
        fix = f"Leave it out, or measure {' or '.join(LAYERS)}"
        raise Mxfp4Error("--routing", "left out with a checkpoint", " ".join(asked), fix)
    return ["checkpoint"]


def config(model: str) -> dict[str, Any]:
    """A model's config.json, as far as vLLM reads it.

    Source: as of `models.CONFIG`.
    """
    sizes = {name: value for name, value in GPT_OSS[model].items() if name != "swiglu_alpha"}
    return {
        **CONFIG,
        **sizes,
        "eos_token_id": 200002,
        "head_dim": 64,
        "layer_types": ["sliding_attention", "full_attention"] * (LAYERS[model] // 2),
        "num_attention_heads": 64,
        "num_hidden_layers": LAYERS[model],
        "num_key_value_heads": 8,
        "pad_token_id": 199999,
        "quantization_config": {"quant_method": "mxfp4"},
        "sliding_window": 128,
        "vocab_size": 201088,
    }


def arguments(
    model: str, engine: str, measured: list[Load], directory: Path, extra: dict[str, Any]
) -> dict[str, Any]:
    """Of vllm.LLM.

    Args:
        model: a name in LAYERS, which is served with dummy weights; or what vLLM takes for a model.
        engine: "ours", or a name of vLLM's `--moe-backend` in capitals.
        measured: the loads.
        directory: for a dummy model's config.json.
        extra: the user's own, which come last.
    """
    if model in LAYERS:
        (directory / "config.json").write_text(json.dumps(config(model)))
    largest = max(batch for batch, _, _ in measured)
    batches = {2**i for i in range(largest.bit_length())} | {batch for batch, _, _ in measured}
    return {
        "model": str(directory) if model in LAYERS else model,
        "load_format": "dummy" if model in LAYERS else "auto",
        "skip_tokenizer_init": True,
        "max_model_len": max(inputs + outputs for _, inputs, outputs in measured),
        "enable_prefix_caching": False,
        "compilation_config": {"cudagraph_capture_sizes": sorted(batches)},
        **({"quantization": "mxfp4-triton"} if engine == "ours" else {"moe_backend": engine.lower()}),
        **extra,
    }


def spread(model: torch.nn.Module) -> None:
    """Let tokens choose experts of their own, which vLLM's dummy weights do not.

    Those of a norm and of a router are so small that the router's bias decides, for all tokens alike.

    Raises:
        Mxfp4Error: the model has no such weights, as on most CPUs, where vLLM packs those of the router.
    """
    generator = torch.Generator().manual_seed(0)
    found = set()
    for name, parameter in model.named_parameters():
        kind = next((kind for kind in SPREAD if name.endswith(f"{kind}.weight") and parameter.numel()), "")
        found.add(kind)
        if kind == "norm":
            parameter.data.fill_(1)
        elif kind:
            size = 1.0 if kind == "embedding" else parameter.shape[1] ** -0.5
            values = torch.randn(parameter.shape, generator=generator) * size
            parameter.data.copy_(values.to(parameter.dtype))
    absent = sorted(set(SPREAD) - found)
    if absent:
        rule = f"one with weights of {', '.join(SPREAD)}"
        raise Mxfp4Error(
            "the model", rule, f"none of {' or '.join(absent)}", "Measure it as it is: --routing alike"
        )


def measure(engine: str, job: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> str:
    """Run an engine in a process of its own.

    Args:
        engine: as in `arguments`.
        job: what `vllm_engine` takes.
        report: called with what it says, as soon as it does.

    Returns:
        why it did not get to its end; "" when it did.
    """
    failure = ""
    command = [
        sys.executable,
        "-m",
        "vllm_mxfp4_gfx950.bench.vllm_engine",
        json.dumps(job | {"engine": engine}),
    ]
    with subprocess.Popen(
        command, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout or ():
            name, _, content = line.partition(" ")
            if name == "ROW":
                report(json.loads(content))
            elif name == "FAILED":
                failure = json.loads(content)
            else:
                print(line, end="", file=sys.stderr, flush=True)
    return failure or (f"it ended with exit code {process.returncode}" if process.returncode else "")
