"""One vLLM engine in this process: which path its MoE layers take, then its times. `serve` runs this.

    python -m vllm_mxfp4_gfx950.bench.vllm_engine JOB

JOB is a JSON object: the engine's name, vllm.LLM's arguments, routings, loads and rounds. Each load's figures
are printed as a line that begins with ROW, and what went wrong as one that begins with FAILED.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from vllm import LLM, SamplingParams

from vllm_mxfp4_gfx950.bench.serve import Load, spread
from vllm_mxfp4_gfx950.errors import Mxfp4Error, brief

OURS = "Mxfp4TritonMoEMethod"
BUILT_IN = "GptOssMxfp4MoEMethod"


def main(text: str) -> int:
    """Start the engine, check it and measure it."""
    try:
        run(json.loads(text))
    except Exception as error:
        print("FAILED " + json.dumps(brief(error)), flush=True)
        raise
    return 0


def run(job: dict[str, Any]) -> None:
    """Print a row for each load.

    Raises:
        Mxfp4Error: the MoE layers do not take the path that is to be measured.
    """
    began = time.perf_counter()
    llm = LLM(**job["arguments"])
    started = time.perf_counter() - began
    paths = sorted(set().union(*llm.apply_model(moe_paths)))
    check_path(job["engine"], paths)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    for routing in job["routings"]:
        if routing == "spread":
            llm.apply_model(spread)
        facts = {
            "engine": job["engine"],
            "path": paths[0],
            "device": device,
            "start_s": started,
            "routing": routing,
        }
        for load in job["loads"]:
            print("ROW " + json.dumps(facts | measure(llm, load, job["rounds"])), flush=True)


def measure(llm: LLM, load: Load, rounds: int) -> dict[str, Any]:
    """One load's figures, of each round after one that warms up."""
    batch, inputs, outputs = load
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    prompts: list[Any] = [
        {"prompt_token_ids": [(7 * i + j) % vocabulary for j in range(inputs)]} for i in range(batch)
    ]
    generate(llm, prompts, outputs)
    whole, first = [], []
    for _ in range(rounds):
        whole.append(generate(llm, prompts, outputs))
        first.append(generate(llm, prompts, 1) if outputs > 1 else whole[-1])
    return {
        "batch": batch,
        "input": inputs,
        "output": outputs,
        "tokens_per_s": [batch * (outputs if outputs > 1 else inputs) / seconds for seconds in whole],
        "first_token_ms": [1e3 * seconds for seconds in first],
        "next_token_ms": [
            1e3 * (seconds - until) / (outputs - 1)
            for seconds, until in zip(whole, first, strict=True)
            if outputs > 1
        ],
    }


def generate(llm: LLM, prompts: list[Any], outputs: int) -> float:
    """Seconds that it takes to answer all prompts with so many tokens each."""
    params = SamplingParams(max_tokens=outputs, temperature=0, detokenize=False, ignore_eos=True)
    began = time.perf_counter()
    answers = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    short = [len(answer.outputs[0].token_ids) for answer in answers]
    if short != [outputs] * len(prompts):
        raise Mxfp4Error("the answers", f"{outputs} tokens each", sorted(set(short)), "Raise max_model_len")
    return seconds


def moe_paths(model: torch.nn.Module) -> set[str]:
    """The class that computes each MoE layer, and the backend that it chose."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    found = set()
    for layer in model.modules():
        if isinstance(layer, RoutedExperts):
            method = layer.quant_method
            selection = getattr(getattr(method, "layers", None), "selection", "")
            ours = str(selection).partition(" on ")[0]
            theirs = getattr(getattr(method, "mxfp4_backend", None), "value", "")
            found.add(f"{type(method).__name__} {ours or theirs}".strip())
    return found


def check_path(engine: str, paths: list[str]) -> None:
    """Raise Mxfp4Error unless all layers take the path that the engine's name says."""
    if engine == "ours":
        right = len(paths) == 1 and paths[0].startswith(f"{OURS} ")
        wanted, fix = OURS, "See `vllm-mxfp4 doctor`: vLLM ignores the flag where the plugin is not installed"
    else:
        from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import map_mxfp4_backend

        allowed = [f"{BUILT_IN} {backend.value}" for backend in map_mxfp4_backend(engine.lower())]
        right = len(paths) == 1 and paths[0] in allowed
        wanted, fix = " or ".join(allowed), "Name another of vLLM's MoE backends"
    if not right:
        raise Mxfp4Error(f"the path of {engine}'s MoE layers", wanted, ", ".join(paths) or "none", fix)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
