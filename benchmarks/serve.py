"""Serve GPT-OSS-20B's shape with dummy weights and measure throughput, this package beside vLLM's TRITON.

    python benchmarks/serve.py [--rounds 3] [--engines ours triton]

Runs one engine after the other, each in its own process with CUDA graphs and torch.compile on, and
prints output tokens/s (input tokens/s in the last row). It ends with an error if an engine's log does
not say that the path which was to be measured is the one that ran.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "eos_token_id": 200002,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "pad_token_id": 199999,
    "quantization_config": {"quant_method": "mxfp4"},
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
"""openai/gpt-oss-20b's config.json, as far as vLLM reads it."""

ENGINES = {
    "ours": ({"quantization": "mxfp4-triton"}, "MoE layers run through triton_"),
    "triton": ({"moe_backend": "triton"}, "Using 'TRITON' Mxfp4 MoE backend"),
}
"""Arguments of each engine, and what its log must say."""

ROWS = [(1, 128, 128), (16, 128, 128), (64, 128, 128), (256, 128, 64), (16, 2048, 1)]
"""Batch size, input tokens, output tokens."""

GRAPHS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
"""Batch sizes that get a graph: those of the rows, and what they pass through."""


def measure(engine: str, rounds: int) -> None:
    """Start an engine in this process and print one JSON line a row."""
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(CONFIG))
        start = time.perf_counter()
        llm = LLM(
            directory,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=4096,
            gpu_memory_utilization=0.8,
            enable_prefix_caching=False,
            attention_backend="FLASH_ATTN",
            compilation_config={"cudagraph_capture_sizes": GRAPHS},
            **ENGINES[engine][0],
        )
        print(f"engine {engine} ready after {time.perf_counter() - start:.0f} s", flush=True)
        for batch, inputs, outputs in ROWS:
            prompts = [
                {"prompt_token_ids": [(7 * i + j) % 200000 for j in range(inputs)]} for i in range(batch)
            ]
            params = SamplingParams(max_tokens=outputs, temperature=0, detokenize=False, ignore_eos=True)
            rates = []
            for _ in range(rounds + 1):
                start = time.perf_counter()
                llm.generate(prompts, params, use_tqdm=False)
                rates.append(batch * (outputs if outputs > 1 else inputs) / (time.perf_counter() - start))
            row = {"engine": engine, "row": [batch, inputs, outputs], "tokens_per_s": rates[1:]}
            print("ROW " + json.dumps(row), flush=True)


def main() -> int:
    """Run every engine in a process of its own and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--measure", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, args.rounds)
        return 0
    medians: dict[str, list[float]] = {}
    for engine in args.engines:
        command = [sys.executable, __file__, "--measure", engine, "--rounds", str(args.rounds)]
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        log = ""
        with subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            for line in process.stdout or ():
                log += line
                print(line, end="", flush=True)
        if process.returncode or ENGINES[engine][1] not in log:
            print(f"{engine}: ended with {process.returncode}, or its log lacks {ENGINES[engine][1]!r}")
            return 1
        rows = [json.loads(line[4:]) for line in log.splitlines() if line.startswith("ROW ")]
        medians[engine] = [statistics.median(row["tokens_per_s"]) for row in rows]
    for i, row in enumerate(ROWS):
        rates = {engine: rates[i] for engine, rates in medians.items()}
        ratio = f"  ratio {rates['ours'] / rates['triton']:.3f}" if len(rates) == 2 else ""
        print(f"batch, in, out {row}: " + "  ".join(f"{e} {r:.0f}" for e, r in rates.items()) + ratio)
    return 0


if __name__ == "__main__":
    sys.exit(main())
