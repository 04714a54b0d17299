"""GPT-OSS served by a real vLLM through the plugin, held against transformers on the same checkpoint."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import engine
import numpy as np
import pytest
import tiny_checkpoint
import torch
from engine import FLAG, OUR_METHOD, Served
from run_python import run_python
from safetensors.torch import load_file, save_file
from tiny_checkpoint import TinyGptOss

from vllm_mxfp4_gfx950 import checkpoint

pytestmark = pytest.mark.engine

VOCAB = 320
TOKENS = 64
SHAPES = {
    "E8-k2-H128-I128": TinyGptOss(experts=8, topk=2, hidden=128, intermediate=128, vocab=VOCAB, seed=2),
    "E4-k1-H96-I160": TinyGptOss(experts=4, topk=1, hidden=96, intermediate=160, vocab=VOCAB, seed=3),
    "E32-k4-H256-I288": TinyGptOss(experts=32, topk=4, hidden=256, intermediate=288, vocab=VOCAB, seed=2),
    "E16-k4-H288-I96": TinyGptOss(
        experts=16, topk=4, hidden=288, intermediate=96, layers=3, vocab=VOCAB, seed=1
    ),
}
COMPILED = "E8-k2-H128-I128"
"""Runs as users get it by default, traced and compiled; the others run eagerly, to save time."""

UNEVEN = "E4-k1-H96-I160"
"""Two ranks hold 96 and 64 of its intermediate size; and each token's only expert lives on one of them."""

TWO_RANKS: dict[str, Any] = {"quantization": FLAG, "dtype": "float32", "tensor_parallel_size": 2}
LOGPROB_TOLERANCE = 1e-3
BUILT_IN_CONFIG = "vllm.model_executor.layers.quantization.mxfp4.GptOssMxfp4Config"
OUR_CONFIG = "vllm_mxfp4_gfx950.vllm_plugin.Mxfp4TritonConfig"


def random_sequences(lengths: tuple[int, ...], seed: int) -> list[list[int]]:
    """Token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCAB, (length,), generator=generator).tolist() for length in lengths]


# One token; around the sliding window of 16; two and four of its lengths.
PROMPTS = random_sequences((1, 3, 7, 17, 18, 31, 40, 63), seed=7)


@pytest.fixture(scope="session", name="checkpoints")
def fixture_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One MXFP4 checkpoint for each of SHAPES."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: tiny_checkpoint.write(model, root / name) for name, model in SHAPES.items()}


@cache
def serve_fp32(checkpoint: Path, *, compiled: bool, cpu: str = "this-cpu") -> Served:
    """The answers to PROMPTS on one rank."""
    return engine.serve(
        checkpoint, PROMPTS, TOKENS, cpu, quantization=FLAG, dtype="float32", enforce_eager=not compiled
    )


@pytest.mark.parametrize(
    ("name", "cpu"), [*((name, "this-cpu") for name in SHAPES), ("E16-k4-H288-I96", "avx2")]
)
def test_fp32_equals_transformers(name: str, cpu: str, checkpoints: dict[str, Path]) -> None:
    """64 greedy tokens on 8 prompts, and the log-probabilities of the 20 likeliest tokens at each step."""
    served = serve_fp32(checkpoints[name], compiled=name == COMPILED, cpu=cpu)
    assert served.moe_methods == {OUR_METHOD}
    assert_equals_transformers(served, checkpoints[name])


def assert_equals_transformers(
    served: Served, checkpoint: Path, added: dict[str, torch.Tensor] | None = None
) -> None:
    """Hold the answers to PROMPTS against transformers on a checkpoint, with `added` to its weights."""
    # Each step is compared after the tokens that vLLM chose. While all agree, transformers chose the same.
    sequences = [prompt + answer for prompt, answer in zip(PROMPTS, served.token_ids, strict=True)]
    truth = tiny_checkpoint.transformers_logprobs(checkpoint, sequences, added)
    for prompt, answer, logprobs, expected in zip(
        PROMPTS, served.token_ids, served.logprobs, truth, strict=True
    ):
        steps = expected[len(prompt) - 1 : -1]
        best, second = steps.topk(2).values.T
        assert (best - second).min() > LOGPROB_TOLERANCE, "this checkpoint's tokens hang on rounding"
        assert len(set(answer)) > TOKENS // 2, "this checkpoint repeats itself"
        assert answer == steps.argmax(-1).tolist()
        for step, alternatives in zip(steps, logprobs, strict=True):
            found = torch.tensor(list(alternatives.values()))
            torch.testing.assert_close(found, step[list(alternatives)], rtol=0, atol=LOGPROB_TOLERANCE)


def excess(ours: np.ndarray, theirs: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """By how much our log-probabilities err more than theirs, relative to what theirs err by on average.

    Compared are logits up to the constant of each position that softmax divides out: in log-probabilities
    the likeliest token's error is that of all others, too.

    Args:
        ours: float64[sequences, positions, vocab].
        theirs: likewise.
        truth: likewise.

    Returns:
        The mean, and its standard error, taken over sequences.
    """

    def errors(scores: np.ndarray) -> np.ndarray:
        off = scores - truth
        return np.abs(off - off.mean(axis=2, keepdims=True)).mean(axis=(1, 2))

    difference = (errors(ours) - errors(theirs)) / errors(theirs).mean()
    return difference.mean(), difference.std(ddof=1) / len(difference) ** 0.5


@pytest.mark.parametrize("cpu", engine.CPUS)
@pytest.mark.parametrize(
    ("model", "bound"),
    [
        # Every expert is always chosen, so no rounding sends a token elsewhere, and no layer stands between
        # the experts and what is compared: tiny differences show.
        pytest.param(
            TinyGptOss(experts=4, topk=4, hidden=160, intermediate=224, layers=1, vocab=VOCAB),
            0.003,
            marks=pytest.mark.load,
            id="E4-k4",
        ),
        # Rounding does send tokens to other experts, now in one run, now in the other.
        pytest.param(
            TinyGptOss(experts=32, topk=4, hidden=128, intermediate=128, vocab=VOCAB), 0.15, id="E32-k4"
        ),
    ],
)
def test_bf16_is_as_accurate_as_vllm_unquantized(
    model: TinyGptOss, bound: float, cpu: str, tmp_path: Path
) -> None:
    """In bf16, MXFP4 through the plugin is as near to the truth as vLLM on the dequantized checkpoint.

    Where the two round depends on the CPU: in the same places with AVX-512's bf16, in different ones with
    AVX2. On either, our mean error exceeds theirs by less than the bound, and by three standard errors so.

    Args:
        model: the checkpoint.
        bound: of the excess, relative to their mean error.
        cpu: one of engine.CPUS.
        tmp_path: for the checkpoints.
    """
    checkpoint = tiny_checkpoint.write(model, tmp_path / "mxfp4")
    dequantized = tiny_checkpoint.write_dequantized(checkpoint, tmp_path / "bf16")
    sequences = random_sequences((64,) * 128, seed=3)
    rows = tiny_checkpoint.transformers_logprobs(checkpoint, sequences)
    truth = torch.stack(rows)[:, :-1].double().numpy()
    ours = engine.score(checkpoint, sequences, cpu, dtype="bfloat16", quantization=FLAG)
    theirs = engine.score(dequantized, sequences, cpu, dtype="bfloat16")
    mean, standard_error = excess(ours, theirs, truth)
    print(f"excess {mean:+.5f}, its standard error {standard_error:.5f}")
    assert mean + 3 * standard_error < bound
    # Negative control: errors larger by three times the bound.
    mean, standard_error = excess(truth + (1 + 3 * bound) * (ours - truth), theirs, truth)
    assert mean + 3 * standard_error > bound


@pytest.mark.parametrize("expert_parallel", [False, True], ids=["TP2", "TP2-EP"])
def test_two_ranks(expert_parallel: bool, checkpoints: dict[str, Path]) -> None:
    """Two ranks give the same tokens as one."""
    whole = checkpoints[UNEVEN]
    served = engine.serve(whole, PROMPTS, TOKENS, **TWO_RANKS, enable_expert_parallel=expert_parallel)
    assert served.moe_methods == {OUR_METHOD}
    assert served.token_ids == serve_fp32(whole, compiled=False).token_ids


@pytest.mark.load
@pytest.mark.parametrize("expert_parallel", [False, True], ids=["TP2", "TP2-EP"])
def test_allreduce_fusion(expert_parallel: bool, checkpoints: dict[str, Path]) -> None:
    """vLLM fuses the all-reduce behind each attention and each MoE with the norm that follows."""
    whole = checkpoints[UNEVEN]
    served, matches = engine.fuse(whole, PROMPTS, TOKENS, **TWO_RANKS, enable_expert_parallel=expert_parallel)
    assert matches == [[2 * SHAPES[UNEVEN].layers]] * 2
    assert served.moe_methods == {OUR_METHOD}
    assert served.token_ids == serve_fp32(whole, compiled=False).token_ids


def change_biases(tensors: dict[str, torch.Tensor]) -> None:
    """Give experts biases that bf16 has not: fp32 where they are added to gate and up, else fp16."""
    for name, bias in tensors.items():
        if name.endswith(".experts.gate_up_proj_bias"):
            tensors[name] = bias.float() * (1 + 2**-9)
        elif name.endswith(".experts.down_proj_bias"):
            tensors[name] = (bias.float() * (1 + 2**-9)).half()


def mix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same experts in every form that vLLM's loader takes.

    Layer 0 has all experts of w13 in one tensor, with flat blocks, and a tensor for each expert of w2.
    Layer 1 has it the other way round, under vLLM's own names. All scales are in float8.
    """
    parameters = {checkpoint.TENSORS[field]: parameter for parameter, field in checkpoint.PARAMETERS.items()}
    mixed = {}
    for name, tensor in tensors.items():
        experts, _, last = name.rpartition(".")
        if last not in parameters:
            mixed[name] = tensor
            continue
        first = ".0." in experts
        new = f"{experts}.{last if first else parameters[last]}"
        form = tensor.view(torch.float8_e8m0fnu) if last.endswith("_scales") else tensor
        if last.startswith("gate_up") == first:
            mixed[new] = form.flatten(2) if last.endswith("_blocks") else form
        else:
            mixed |= {
                new.replace(".experts.", f".experts.{i}."): expert.clone() for i, expert in enumerate(form)
            }
    return mixed


@pytest.mark.load
def test_mixed_files(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Experts in every form of `mix`, sliced by two ranks, with the biases exactly as the files have them."""
    whole, mixed = tmp_path / "whole", tmp_path / "mixed"
    for directory in (whole, mixed):
        shutil.copytree(checkpoints[UNEVEN], directory)
    tensors = load_file(whole / "model.safetensors")
    change_biases(tensors)
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    (mixed / "model.safetensors").unlink()
    forms = mix(tensors)
    for part in (0, 1):
        names = sorted(forms)[part::2]
        save_file({name: forms[name] for name in names}, mixed / f"model-{part}.safetensors")
    served = engine.serve(mixed, PROMPTS, TOKENS, **TWO_RANKS)
    assert served.moe_methods == {OUR_METHOD}
    assert_equals_transformers(served, whole)
    with pytest.raises(AssertionError):  # Negative control: biases rounded to bf16 are seen.
        assert_equals_transformers(served, checkpoints[UNEVEN])


def test_classifier(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """A model with a score head in place of lm_head: the labels' scores, before any softmax."""
    folder = tmp_path / "classifier"
    shutil.copytree(checkpoints[UNEVEN], folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    tensors["score.weight"] = torch.randn(3, SHAPES[UNEVEN].hidden).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    architecture = "GptOssForSequenceClassification"
    config |= {"architectures": [architecture], "num_labels": 3}
    (folder / "config.json").write_text(json.dumps(config))
    moe_methods, scores = engine.classify(folder, PROMPTS, quantization=FLAG, dtype="float32")
    assert moe_methods == {OUR_METHOD}
    model = tiny_checkpoint.transformers_model(folder, architecture).float()

    def assert_right() -> None:
        with torch.inference_mode():
            truth = torch.cat([model(torch.tensor([prompt])).logits for prompt in PROMPTS])
        torch.testing.assert_close(torch.from_numpy(scores), truth, rtol=0, atol=LOGPROB_TOLERANCE)

    assert_right()
    model.get_parameter("model.layers.1.mlp.experts.down_proj_bias").data *= 1 + 2**-6  # Negative control.
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_right()


def test_dummy_weights(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """`--load-format dummy`, as benchmarks use it: no weights on disk, and none missed."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((checkpoints[COMPILED] / name).read_text())
    served = engine.serve(tmp_path, PROMPTS, 4, quantization=FLAG, dtype="bfloat16", load_format="dummy")
    assert served.moe_methods == {OUR_METHOD}


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        pytest.param(FLAG, OUR_CONFIG, id="flag"),
        pytest.param(None, BUILT_IN_CONFIG, id="no-flag"),
        pytest.param("mxfp4-tritn", BUILT_IN_CONFIG, id="misspelt"),
    ],
)
def test_which_path(quantization: str | None, expected: str, checkpoints: dict[str, Path]) -> None:
    """Only the flag chooses the plugin. vLLM serves a misspelt one by its own path and does not say so."""
    assert engine.quantization_class(checkpoints[COMPILED], quantization) == expected


def test_which_path_without_the_plugin(checkpoints: dict[str, Path]) -> None:
    """The same with the flag right and the plugin shut out."""
    code = "import engine, pathlib, sys; print(engine.create_config(pathlib.Path(sys.argv[1]), sys.argv[2]))"
    arguments = ["-c", code, str(checkpoints[COMPILED]), FLAG]
    result = run_python(arguments, VLLM_PLUGINS="", VLLM_LOGGING_LEVEL="ERROR")
    assert result.stdout.split()[-1:] == [BUILT_IN_CONFIG], result.stderr


def test_without_the_flag(checkpoints: dict[str, Path]) -> None:
    """The model is built of vLLM's own MoE method, which finds that it cannot run on most CPUs."""
    outcome = engine.outcome(checkpoints[COMPILED], dtype="bfloat16")
    assert "No MXFP4 MoE backend supports" in outcome or outcome.startswith(
        "served by {'vllm.model_executor."
    )
