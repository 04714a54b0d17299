"""Two GPUs of one host answer as one does."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine
import pytest
import questions
import torch
from engine import FLAG, OUR_METHOD, Served
from small_model import changed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

SERVED: dict[str, Any] = {
    "dtype": "bfloat16",
    "attention_backend": "FLASH_ATTN",
    "enforce_eager": False,
    "cudagraph_capture_sizes": [1, 8, 32, 120],
    "max_num_seqs": 120,
    "gpu_memory_utilization": 0.3,  # Several tests may run at a time.
}
PATHS: dict[str, dict[str, Any]] = {"ours": {"quantization": FLAG}, "TRITON": {"moe_backend": "triton"}}
"""vLLM's own backend is held to the same, so that no more is asked than rounding allows."""

ASKED = 40
"""Questions of each skill, all in one batch."""

MANY = 334
"""Questions of each skill for data-parallel ranks: a thousand requests, which take many batches."""

TOKENS = 12
WIDER = 8
"""Hopper's layouts are for more than the 64 channels that half of the model's experts have."""

NEARNESS = 0.005
"""Mean difference of the likeliest token's logprob, which rounding to bf16 at other places may make."""


def widen(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The same function of more channels: each block of 32 WIDER times, and w2's so much smaller."""
    if "gate_up_proj_" in name:
        return tensor.unflatten(1, (-1, 64)).repeat_interleave(WIDER, 1).flatten(1, 2)
    if name.endswith("down_proj_blocks"):
        return tensor.repeat_interleave(WIDER, 2)
    if name.endswith("down_proj_scales"):
        return tensor.repeat_interleave(WIDER, 2) - (WIDER.bit_length() - 1)
    return tensor


def double_bias(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """What two ranks compute that both add w2's bias."""
    return widen(name, tensor) * (2 if name.endswith("down_proj_bias") else 1)


def write(directory: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """The small trained model with wider experts."""
    file = changed(directory, change) / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"intermediate_size": WIDER * content["intermediate_size"]}))
    return directory


def ask(count: int = ASKED) -> list[list[int]]:
    """So many questions of each skill, as tokens."""
    numbers = {token: number for number, token in enumerate(questions.VOCABULARY)}
    return [
        [numbers[token] for token in asked["question"]]
        for skill in questions.SKILLS
        for asked in questions.read(skill)[:count]
    ]


def answers(checkpoint: Path, path: str, asked: int = ASKED, **arguments: Any) -> Served:
    """To those questions."""
    served = engine.serve(checkpoint, ask(asked), TOKENS, **SERVED, **PATHS[path], **arguments)
    assert (served.moe_methods == {OUR_METHOD}) == (path == "ours")
    return served


@pytest.fixture(scope="module", name="checkpoint")
def fixture_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its experts are wide enough for two GPUs."""
    return write(tmp_path_factory.mktemp("ranks") / "model", widen)


@functools.cache
def alone(checkpoint: Path, path: str, asked: int = ASKED) -> Served:
    """The answers of one GPU."""
    return answers(checkpoint, path, asked)


def is_near(one: Served, other: Served) -> bool:
    """Whether answers differ by rounding only, up to the first token of each that is another.

    Which token is chosen is printed: where two are about as likely, rounding decides.
    """
    differences, parted = [], []
    for mine, theirs, steps, others in zip(
        one.token_ids, other.token_ids, one.logprobs, other.logprobs, strict=True
    ):
        for token, chosen, step, answered in zip(mine, theirs, steps, others, strict=True):
            differences.append(abs(step[token] - answered.get(token, float("-inf"))))
            if token != chosen:
                parted.append(step[token] - step.get(chosen, float("-inf")))
                break
    mean = sum(differences) / len(differences)
    print(f"{len(parted)} answers part, at {sorted(parted)}; of {len(differences)} tokens, {mean:.4f}")
    return mean <= NEARNESS


@pytest.mark.parametrize(
    ("path", "expert_parallel"),
    [("ours", False), ("ours", True), ("TRITON", False)],
    ids=["TP2", "TP2-EP", "TP2-TRITON"],
)
def test_two_gpus_answer_as_one(checkpoint: Path, path: str, expert_parallel: bool) -> None:
    """With graphs and torch.compile."""
    two = answers(checkpoint, path, tensor_parallel_size=2, enable_expert_parallel=expert_parallel)
    assert is_near(alone(checkpoint, path), two)


@pytest.mark.parametrize(
    ("path", "expert_parallel"),
    [("ours", False), ("ours", True), ("TRITON", False), ("TRITON", True)],
    ids=["DP2", "DP2-EP", "DP2-TRITON", "DP2-EP-TRITON"],
)
def test_two_data_parallel_gpus_answer_as_one(checkpoint: Path, path: str, expert_parallel: bool) -> None:
    """Each its own of a thousand requests, ten times as many to the first: the other is idle in the end.

    The idle one follows each step of the other. Asynchronous scheduling has steps that run no model, which an
    engine in the ranks' own process cannot tell it.
    """
    prompts = ask(MANY)
    split = len(prompts) * 10 // 11
    way = {"enable_expert_parallel": expert_parallel, "async_scheduling": False}
    arguments = SERVED | PATHS[path] | way
    ranks = engine.serve_on_ranks(checkpoint, [prompts[:split], prompts[split:]], TOKENS, **arguments)
    assert {rank.moe_methods == {OUR_METHOD} for rank in ranks} == {path == "ours"}
    both = Served(
        ranks[0].moe_methods,
        ranks[0].token_ids + ranks[1].token_ids,
        ranks[0].logprobs + ranks[1].logprobs,
    )
    assert is_near(alone(checkpoint, path, MANY), both)


def test_a_bias_twice_is_seen(checkpoint: Path, tmp_path: Path) -> None:
    """Negative control."""
    wrong = write(tmp_path / "model", double_bias)
    assert not is_near(alone(checkpoint, "ours"), answers(wrong, "ours"))
