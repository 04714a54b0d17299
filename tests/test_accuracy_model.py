"""The small trained GPT-OSS of accuracy/model, and the questions that it is asked."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import engine
import pytest
import questions
import tiny_checkpoint
import torch
import train
from questions import SKILLS
from safetensors.torch import load_file
from small_model import CHECKPOINT, changed

from vllm_mxfp4_gfx950.mxfp4 import dequantize

ASKED_OF_VLLM = 60
RECORD = json.loads((CHECKPOINT / "scores.json").read_text())


def accuracy(model: torch.nn.Module, skill: str) -> float:
    """The share of a skill's questions that a model answers right."""
    outcomes = train.outcomes(model, skill)
    return sum(outcomes) / len(outcomes)


@pytest.mark.parametrize("skill", SKILLS)
def test_questions_are_those_of_the_generator(skill: str) -> None:
    """Bit for bit."""
    assert questions.read(skill) == questions.generate(skill)


def test_right_answers() -> None:
    """They are worked out here in another way."""
    for question in questions.read("arithmetic"):
        a, _, b = question["question"].strip("=").partition("+")
        assert int(question["answer"][::-1]) == int(a[::-1]) + int(b[::-1])
    for question in questions.read("copying"):
        letters, places = question["question"][:-2], int(question["question"][-2])
        moved = [chr((ord(letter) - ord("a") + places) % 26 + ord("a")) for letter in letters]
        assert question["answer"] == "".join(moved)
    facts: dict[str, set[str]] = {}
    for question in questions.read("recall"):
        for letter, topic, digit in zip(
            question["question"][:5], question["question"][5:10], question["answer"], strict=True
        ):
            facts.setdefault(letter + topic, set()).add(digit)
    assert len(facts) > 100
    assert all(len(digits) == 1 for digits in facts.values())


def test_no_question_is_trained() -> None:
    """The questions are held out, and nothing that is trained is."""
    asked = [question["question"] for skill in SKILLS for question in questions.read(skill)]
    trained = [question for question, _ in islice(questions.training(train.MODEL.seed), 10_000)]
    assert all(questions.held_out(question) for question in asked)
    assert not any(questions.held_out(question) for question in trained)


def test_quantizer_returns_what_it_wrote() -> None:
    """Random blocks that use their range come back bit for bit, and so do the model's own."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (3, 40, 5, 16), generator=generator, dtype=torch.uint8)
    blocks[..., 7] = 0x7F  # 6 and -6
    scales = torch.randint(100, 140, (3, 40, 5), generator=generator, dtype=torch.uint8)
    tensors = load_file(CHECKPOINT / "model.safetensors")
    pairs = [(blocks, scales)] + [
        (tensor, tensors[name.replace("blocks", "scales")])
        for name, tensor in tensors.items()
        if name.endswith("blocks")
    ]
    assert len(pairs) == 1 + 2 * train.MODEL.layers
    for blocks, scales in pairs:
        again = train.quantize(dequantize(blocks.flatten(2), scales, torch.float32))
        assert torch.equal(again[0], blocks)
        assert torch.equal(again[1], scales)


@pytest.mark.parametrize("skill", SKILLS)
def test_accuracy(skill: str) -> None:
    """The shipped model answers as it did when it was written, and that is far above chance."""
    model = tiny_checkpoint.transformers_model(CHECKPOINT).float()
    assert accuracy(model, skill) == pytest.approx(RECORD["accuracy"][skill], abs=0.005)
    assert RECORD["accuracy"][skill] > 0.8  # Chance is nil.


def shuffle_scales(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The right scales at wrong places."""
    order = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(0))
    return tensor.flatten()[order].view(tensor.shape) if name.endswith("scales") else tensor


def next_expert(_: str, tensor: torch.Tensor) -> torch.Tensor:
    """Each expert's weights under the next one's number."""
    return tensor.roll(1, 0)


def swap_nibbles(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The high nibble first."""
    return (tensor >> 4) | (tensor << 4) if name.endswith("blocks") else tensor


@pytest.mark.parametrize("change", [shuffle_scales, next_expert, swap_nibbles])
def test_broken_experts_answer_nothing(
    change: Callable[[str, torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    """No skill lives beside the experts: none is left where their layout is read wrongly."""
    model = tiny_checkpoint.transformers_model(changed(tmp_path / "broken", change)).float()
    for skill in SKILLS:
        assert accuracy(model, skill) < 0.02


@pytest.mark.engine
def test_vllm_answers_as_transformers() -> None:
    """The plugin, from the MXFP4 bytes, gets the same questions right."""
    asked = [(skill, question) for skill in SKILLS for question in questions.read(skill)[:ASKED_OF_VLLM]]
    prompts = [[train.TOKEN_ID[token] for token in question["question"]] for _, question in asked]
    served = engine.serve(CHECKPOINT, prompts, 12, quantization=engine.FLAG, dtype="float32")
    assert served.moe_methods == {engine.OUR_METHOD}
    answers = [[train.TOKEN_ID[token] for token in question["answer"]] for _, question in asked]
    right = [
        tokens[: len(answer)] == answer for tokens, answer in zip(served.token_ids, answers, strict=True)
    ]
    model = tiny_checkpoint.transformers_model(CHECKPOINT).float()
    assert right == [outcome for skill in SKILLS for outcome in train.outcomes(model, skill)[:ASKED_OF_VLLM]]
