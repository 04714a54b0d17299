"""A small GPT-OSS, trained here and quantized to MXFP4, that can answer the questions of questions.py.

    python accuracy/train.py DIRECTORY

writes its checkpoint, and in scores.json how many of them it answers right.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import questions
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales
from questions import END, SKILLS, UNKNOWN, VOCABULARY
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import GptOssConfig, GptOssForCausalLM

sys.path.append(str(Path(__file__).parents[1] / "demo"))
import tiny_checkpoint
from tiny_checkpoint import TinyGptOss

from vllm_mxfp4_gfx950.mxfp4 import BLOCK

MODEL = TinyGptOss(
    experts=16, topk=4, hidden=256, intermediate=128, layers=2, head_dim=64, vocab=64, sliding_window=16
)
STEPS = 500
ROWS, LENGTH = 32, 96
LEARNING_RATE = 2e-3
IGNORED = -100
"""The label of a token that is given, by transformers' convention."""

TOKEN_ID = {token: i for i, token in enumerate(VOCABULARY)}


def train() -> GptOssForCausalLM:
    """Train in fp32; the same on every machine with the same versions, but for rounding."""
    torch.manual_seed(MODEL.seed)
    content = tiny_checkpoint.config(MODEL)
    del content["quantization_config"], content["torch_dtype"]
    # The auxiliary loss keeps every expert in use; 0.9 of it would leave no room for the skills.
    content |= {"router_aux_loss_coef": 0.01, "initializer_range": 0.04}
    model = GptOssForCausalLM(GptOssConfig(**content, attn_implementation="eager")).train()
    for layer in model.model.layers:  # Zeros would hardly grow, and hide a path without biases.
        torch.nn.init.normal_(layer.mlp.experts.gate_up_proj_bias, std=0.3)
        torch.nn.init.normal_(layer.mlp.experts.down_proj_bias, std=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=STEPS + 1, pct_start=0.05, anneal_strategy="linear"
    )
    for step, (tokens, labels) in enumerate(_batches(), 1):
        out = model(input_ids=tokens, labels=labels, output_router_logits=True)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step} of {STEPS}, loss {out.loss.item():.3f}", flush=True)
        if step == STEPS:
            break
    _vary_scales(model)
    return model.eval()


@torch.no_grad()
def _vary_scales(model: GptOssForCausalLM) -> None:
    """Move powers of two between the norms and what reads them, which changes no result.

    Otherwise nearly all scales were one of two, as in no grown model, and a path that mixed them up would
    answer as well.
    """
    for layer in model.model.layers:
        factors = 2.0 ** torch.randint(-4, 5, (MODEL.hidden // BLOCK,)).repeat_interleave(BLOCK)
        layer.post_attention_layernorm.weight /= factors
        layer.mlp.router.weight *= factors
        layer.mlp.experts.gate_up_proj *= factors[:, None]


def _batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels int64[ROWS, LENGTH], where only answers are to be learnt."""
    examples = questions.training(MODEL.seed)
    while True:
        tokens, labels = [], []
        for _ in range(ROWS):
            row, learnt = [], []
            while len(row) < LENGTH:
                question, answer = next(examples)
                spoken = [TOKEN_ID[token] for token in (*answer, END)]
                row += [TOKEN_ID[token] for token in question] + spoken
                learnt += [IGNORED] * len(question) + spoken
            tokens.append(row[:LENGTH])
            labels.append(learnt[:LENGTH])
        yield torch.tensor(tokens), torch.tensor(labels)


def quantize(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to MXFP4.

    Args:
        weights: fp32[E, rows, columns].

    Returns:
        blocks: uint8[E, rows, columns / 32, 16].
        scales: uint8[E, rows, columns / 32].
    """
    groups = weights.unflatten(-1, (-1, BLOCK))
    scales = generate_mx_scales(groups.abs().amax(-1))
    numbers = torch.ldexp(groups, 127 - scales.unsqueeze(-1))
    blocks = pack_fp4_to_uint8(numbers.flatten(0, -2))
    return blocks.view(*scales.shape, BLOCK // 2), scales.to(torch.uint8)


@torch.inference_mode()
def outcomes(model: torch.nn.Module, skill: str) -> list[bool]:
    """Which of a skill's questions a model answers right.

    A greedy answer is right just when each token of the right one is the likeliest after those before it,
    so one forward is enough.
    """
    asked = questions.read(skill)
    sequences = [[TOKEN_ID[token] for token in q["question"] + q["answer"]] for q in asked]
    # No token sees what stands behind it, so what fills the rows up does not matter.
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sequences], batch_first=True)
    likeliest = model(rows).logits.argmax(-1).tolist()
    answers = [slice(len(q["question"]), len(q["question"] + q["answer"])) for q in asked]
    return [
        row[answer.start - 1 : answer.stop - 1] == sequence[answer]
        for row, sequence, answer in zip(likeliest, sequences, answers, strict=True)
    ]


def write(model: torch.nn.Module, directory: Path) -> None:
    """Write a checkpoint as openai/gpt-oss-20b's: experts in MXFP4, the rest in bf16."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, weight in model.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = quantize(weight.mT)
        else:
            tensors[name] = weight.bfloat16()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    end = TOKEN_ID[END]
    _write_json(directory / "config.json", tiny_checkpoint.config(MODEL))
    _write_json(
        directory / "generation_config.json", {"do_sample": False, "eos_token_id": end, "pad_token_id": end}
    )
    _write_tokenizer(directory)


def _write_tokenizer(directory: Path) -> None:
    tokenizer = Tokenizer(WordLevel(TOKEN_ID, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens([UNKNOWN, END])
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"unk_token": UNKNOWN, "eos_token": END, "pad_token": END}
    _write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main(directory: Path) -> None:
    """Train, write, and ask what was written."""
    began = time.monotonic()
    model = train()
    seconds = time.monotonic() - began
    write(model, directory)
    before = {skill: statistics.mean(outcomes(model, skill)) for skill in SKILLS}
    written = tiny_checkpoint.transformers_model(directory).float()
    record = {
        "accuracy": {skill: statistics.mean(outcomes(written, skill)) for skill in SKILLS},
        "accuracy_before_quantization": before,
        "questions": {skill: len(questions.read(skill)) for skill in SKILLS},
        "seed": MODEL.seed,
        "steps": STEPS,
        "training_seconds": round(seconds),
        "versions": {
            p: importlib.metadata.version(p) for p in ("torch", "transformers", "compressed-tensors")
        },
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
    }
    _write_json(directory / "scores.json", record)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)  # The matrices are too small to share.
    main(args.directory)
