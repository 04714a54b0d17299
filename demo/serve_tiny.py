"""Serve a tiny GPT-OSS through the plugin and hold every answer against transformers (`make demo`).

Exits with 0 only if the plugin computed the experts, all tokens are those of transformers, the
log-probabilities agree, and the server left no process behind.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import requests
import tiny_checkpoint
from tiny_checkpoint import TinyGptOss

from vllm_mxfp4_gfx950.errors import Mxfp4Error, first_error
from vllm_mxfp4_gfx950.process import ServerProcess

MODEL = TinyGptOss()
PROMPTS = ["bada baki", "dona dimu tiri salo", "<end>", "miro nasu dika bola duvi bana"]
TOKENS = 32
ALLOWED = 1e-3
"""Largest difference of two log-probabilities, both computed in fp32."""

OUR_LINE = re.compile(r"\[serving\.py:\d+\] (MoE layers run through .*)")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # One thread, bound to no core: this model is too small to share, and the machine may be busy.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


class DemoError(Exception):
    """Something is not as it must be."""


def main() -> int:
    """Run the demo and return the exit code."""
    with tempfile.TemporaryDirectory(prefix="tiny-gpt-oss-") as directory:
        log = Path(directory) / "server.log"
        try:
            _demo(Path(directory) / "checkpoint", log)
        except (DemoError, Mxfp4Error) as error:
            if log.exists():
                text = log.read_text()
                print("\nthe server's last lines:", *text.splitlines()[-25:], sep="\n    ")
                print(f"\nits first error: {first_error(text) or 'none'}")
            print(f"\nFAIL  {error}")
            return 1
    print(
        "\nok    vLLM served an MXFP4 checkpoint through the plugin, which computed its experts right."
        "\n      This ran on the CPU, on the reference backend. It says nothing about gfx950's kernels."
    )
    return 0


def _demo(checkpoint: Path, log: Path) -> None:
    tiny_checkpoint.write(MODEL, checkpoint)
    size_bytes = (checkpoint / "model.safetensors").stat().st_size
    _step("write", f"a GPT-OSS with random weights in MXFP4, {size_bytes / 1e6:.1f} MB")

    options = ["--quantization", "mxfp4-triton", "--dtype", "float32", "--max-model-len", "256"]
    options += ["--kv-cache-memory-bytes", str(2**26)]
    _step("serve", " ".join(["vllm serve CHECKPOINT", *options]))
    prompts, answers = [], []
    with ServerProcess(["serve", str(checkpoint), *options], os.environ | ENVIRONMENT, log) as server:
        _wait(server)
        path = OUR_LINE.search(log.read_text())
        if path is None:
            raise DemoError("the server's log does not say that its MoE layers run through the plugin")
        _step("log", path.group(1))
        for prompt in PROMPTS:
            prompt_ids, answer = _ask(server.url, prompt)
            _step("answer", f"{prompt} -> {' '.join(answer['text'].split()[:6])} ...")
            prompts.append(prompt_ids)
            answers.append(answer)
        _stop(server)
    _compare(checkpoint, prompts, answers)


def _compare(checkpoint: Path, prompts: list[list[int]], answers: list[dict]) -> None:
    sequences = [prompt + answer["token_ids"] for prompt, answer in zip(prompts, answers, strict=True)]
    _step("compare", "with transformers' GptOss on the same checkpoint, which it dequantizes, in fp32:")
    truth = tiny_checkpoint.transformers_logprobs(checkpoint, sequences)
    same, largest = 0, 0.0
    for prompt, answer, logprobs in zip(prompts, answers, truth, strict=True):
        predicted = logprobs[len(prompt) - 1 : -1]
        for row, token, logprob in zip(
            predicted, answer["token_ids"], answer["logprobs"]["token_logprobs"], strict=True
        ):
            same += int(row.argmax()) == token
            largest = max(largest, abs(float(row[token]) - logprob))
    tokens = len(PROMPTS) * TOKENS
    _step("", f"{same} of {tokens} tokens are the same")
    _step("", f"log-probabilities differ by {largest:.1e} at most; {ALLOWED:.0e} is allowed")
    if same != tokens or not largest <= ALLOWED:
        raise DemoError("the server's answers are not those of transformers")


def _ask(url: str, prompt: str) -> tuple[list[int], dict]:
    """Complete a prompt greedily; returns the prompt's token ids, and the answer as the API gives it."""
    request = {
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 1,
        "return_token_ids": True,
    }
    response = requests.post(f"{url}/v1/completions", json=request, timeout=60)
    if not response.ok:
        raise DemoError(f"the server answered {response.status_code}: {response.text[:500]}")
    choice = response.json()["choices"][0]
    return choice["prompt_token_ids"], choice


def _wait(server: ServerProcess) -> None:
    began = time.monotonic()
    print("  ready   ", end="", flush=True)
    server.wait_until_healthy(look=lambda: print(".", end="", flush=True))
    print(f" after {time.monotonic() - began:.0f} s", flush=True)


def _stop(server: ServerProcess) -> None:
    began = time.monotonic()
    left, code = server.stop(), server.main.returncode
    _step("stop", f"exit code {code} after {time.monotonic() - began:.0f} s, {len(left)} processes left")
    if code or left:
        raise DemoError("the server must exit with 0 and leave no process")


def _step(name: str, text: str) -> None:
    print(f"  {name:8}  {text}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    sys.exit(main())
