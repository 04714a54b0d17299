"""GPT-OSS served by a real vLLM whose MoE layers run on the emulated gfx950: pytest -m emulate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine
import pytest
import tiny_checkpoint
import torch
from engine import FLAG, OUR_METHOD, Served
from run_python import SUPPORT, run_python
from test_verification import OF_BACKEND, paths_of
from tiny_checkpoint import TinyGptOss

from vllm_mxfp4_gfx950.gfx950.layer import MATMULS
from vllm_mxfp4_gfx950.random_layer import make_shape
from vllm_mxfp4_gfx950.tables import store
from vllm_mxfp4_gfx950.tiles import Ladder, TileConfig, gemms, release_of

pytestmark = pytest.mark.emulate

MODEL = TinyGptOss(experts=4, topk=2, hidden=288, intermediate=160)
"""The last tiles along each K and N are not full."""

TOKENS = 6
LENGTHS = (1, 3, 18, 33)
"""Of the prompts: one token; around the sliding window of 16; two of its lengths."""

CANDIDATES = 128
"""Prompts of each length, of which one is served."""

MARGIN = 0.6
"""The best token's least lead, in log-probability; rounding to bf16 must change less than half of it."""

Emulated = dict[str, Any]
Serve = Callable[..., Emulated]


def serve_reference(checkpoint: Path, prompts: list[list[int]]) -> Served:
    """What the reference backend answers, on the CPU as it is."""
    return engine.serve(checkpoint, prompts, TOKENS, quantization=FLAG, dtype="bfloat16")


def margin(alternatives: dict[int, float]) -> float:
    """The best token's lead."""
    second, best = sorted(alternatives.values())[-2:]
    return best - second


def serve_emulated(
    checkpoint: Path,
    prompts: list[list[int]],
    directory: Path,
    path: list[Path],
    kernel: str,
    backend: str,
    environment: dict[str, str],
) -> Emulated:
    """Serve the prompts from the emulated gfx950.

    Args:
        checkpoint: the model.
        prompts: to serve.
        directory: an empty one.
        path: what comes first on sys.path.
        kernel: as serve_emulated.py takes it.
        backend: how vLLM's log goes on where it names the backend.
        environment: variables to set, that of the self-check among them.
    """
    answers = directory / "answers.json"
    script = str(SUPPORT / "serve_emulated.py")
    command = [script, str(checkpoint), json.dumps(prompts), str(TOKENS), kernel, str(answers)]
    result = run_python(command, path=path, **environment)
    log = result.stdout + result.stderr
    if result.returncode:
        raise RuntimeError(log)
    self_check = environment["VLLM_MXFP4_SELF_CHECK"]
    assert ("Self-check of model.layers.0.mlp.experts" in log) == (self_check == "first")
    assert ("Layers are not checked: VLLM_MXFP4_SELF_CHECK=off." in log) == (self_check == "off")
    assert f"MoE layers run through {backend}" in log
    served: Emulated = json.loads(answers.read_text())
    return served


def check_answers(reference: Served, emulated: Emulated) -> None:
    """Every token, and by less than half of its lead the log-probabilities that decide it."""
    leads, errors = [], []
    for expected, found in zip(reference.logprobs, emulated["logprobs"], strict=True):
        for step, alternatives in zip(expected, found, strict=True):
            leads.append(margin(step))
            # The two report 20 alternatives each, and may differ in the last.
            errors += [abs(step[int(i)] - p) for i, p in alternatives.items() if int(i) in step]
    print(f"smallest lead {min(leads):.3f}, largest difference of {len(errors)} logprobs {max(errors):.3f}")
    assert emulated["token_ids"] == reference.token_ids
    assert len(errors) > 15 * len(leads)
    assert max(errors) < min(leads) / 2


@pytest.fixture(scope="module", name="checkpoint")
def fixture_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-OSS."""
    return tiny_checkpoint.write(MODEL, tmp_path_factory.mktemp("emulated") / "checkpoint")


@pytest.fixture(scope="module", name="prompts")
def fixture_prompts(checkpoint: Path) -> list[list[int]]:
    """One of each length, whose answer does not hang on rounding."""
    generator = torch.Generator().manual_seed(0)
    shape = (CANDIDATES, max(LENGTHS))
    candidates = torch.randint(2, MODEL.vocab, shape, generator=generator).tolist()
    prompts = [candidate[:length] for length in LENGTHS for candidate in candidates]
    served = serve_reference(checkpoint, prompts)
    decided = {
        len(prompt): prompt
        for prompt, logprobs in zip(prompts, served.logprobs, strict=True)
        if min(map(margin, logprobs)) > MARGIN
    }
    assert len(decided) == len(LENGTHS), "all answers hang on rounding: take another seed"
    return list(decided.values())


@pytest.fixture(scope="module", name="reference")
def fixture_reference(checkpoint: Path, prompts: list[list[int]]) -> Served:
    """The answers to be met."""
    return serve_reference(checkpoint, prompts)


@pytest.fixture(scope="module", name="backend", params=["triton_matmul", "triton_ragged", "triton_ogs"])
def fixture_backend(request: pytest.FixtureRequest) -> str:
    """Each generation of triton_kernels."""
    return str(request.param)


@pytest.fixture(scope="module", name="serve")
def fixture_serve(
    backend: str,
    checkpoint: Path,
    prompts: list[list[int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Serve:
    """Serve the prompts with a generation's packages, and see which backend vLLM says it took."""
    triton, kernels = OF_BACKEND[backend]
    path = paths_of(triton, kernels)
    source = f"triton_kernels in {path[-1] / 'triton_kernels'}, triton {triton})"

    def run(kernel: str, self_check: str = "first", name: str = backend, **environment: str) -> Emulated:
        directory = tmp_path_factory.mktemp("emulated")
        environment["VLLM_MXFP4_SELF_CHECK"] = self_check
        return serve_emulated(
            checkpoint, prompts, directory, path, kernel, f"{name} on gfx950 ({source}", environment
        )

    return run


@pytest.fixture(scope="module", name="emulated")
def fixture_emulated(serve: Serve) -> Emulated:
    """What was served with the kernels as they are."""
    return serve("sound")


def test_same_tokens_as_the_reference(reference: Served, emulated: Emulated) -> None:
    """With each generation of triton_kernels."""
    check_answers(reference, emulated)


def test_every_layer_ran_on_the_emulator(prompts: list[list[int]], emulated: Emulated) -> None:
    """Two matmuls a layer in each forward: one over the prompts, then one a token."""
    assert emulated["moe_methods"] == [OUR_METHOD]
    tokens = [sum(map(len, prompts)), *[len(prompts)] * (TOKENS - 1)]
    assert [call["tokens"] for call in emulated["calls"]] == [n for n in tokens for _ in range(MODEL.layers)]
    for call in emulated["calls"]:
        w13, w2 = ((name, done) for name, done in call["kernels"] if name.startswith(MATMULS))
        assert w13[0].endswith("_swiglu")
        assert not w2[0].endswith("_swiglu")
        assert w13[1] > 0
        assert w2[1] > 0


def test_two_fp8(serve: Serve, backend: str, reference: Served, prompts: list[list[int]]) -> None:
    """Our kernels with two FP8 addends, asked for by name: the same tokens, by four launches a layer.

    What the self-check says of them is test_two_fp8's: its batches take a quarter of an hour here.
    """
    name = backend.replace("triton", "two_fp8")
    served = serve("sound", self_check="off", name=name, VLLM_MXFP4_BACKEND="two_fp8")
    assert served["token_ids"] == reference.token_ids
    assert len(served["calls"]) == MODEL.layers * TOKENS
    for call in served["calls"]:
        split, w13, w2, combine = call["kernels"]
        assert split[0] == ("place_and_split" if call["tokens"] > len(prompts) else "few_and_split")
        assert (w13[0], w2[0], combine[0]) == ("two_fp8_matmul", "two_fp8_matmul", "combine")
        assert min(w13[1], w2[1]) > 0


@pytest.mark.aiter
def test_aiter_triton(
    checkpoint: Path, prompts: list[list[int]], reference: Served, aiter_source: Path, tmp_path: Path
) -> None:
    """aiter's Triton kernel, asked for by name, without any triton_kernels: the same tokens.

    What the self-check says of it is test_aiter_triton's.
    """
    environment = {
        "AITER_TRITON_ONLY": "1",
        "VLLM_MXFP4_BACKEND": "aiter_triton",
        "VLLM_MXFP4_SELF_CHECK": "off",
    }
    backend = "aiter_triton on gfx950 (aiter "
    served = serve_emulated(checkpoint, prompts, tmp_path, [aiter_source], "sound", backend, environment)
    check_answers(reference, served)
    assert len(served["calls"]) == MODEL.layers * TOKENS
    for call in served["calls"]:
        *_, route, w13, w2, combine = call["kernels"]
        assert route[0] == ("place" if call["tokens"] > len(prompts) else "few")
        assert (w13[0], w2[0], combine[0]) == ("_moe_gemm_a16w4", "_moe_gemm_a16w4", "combine")
        assert min(w13[1], w2[1]) > 0


def test_a_wrong_instruction_shows(serve: Serve, reference: Served) -> None:
    """Negative control: w13's kernel converts one pair of FP4 values in place of another."""
    served = serve("broken", self_check="off")
    same = [mine == theirs for mine, theirs in zip(served["token_ids"], reference.token_ids, strict=True)]
    print(f"{same.count(False)} of {len(same)} answers differ")
    assert not all(same)


def test_a_wrong_instruction_is_found_at_load(serve: Serve, backend: str) -> None:
    """With the self-check on, the same kernel never serves."""
    with pytest.raises(RuntimeError, match=rf"{backend}: FAILED after \S+ s: 1 tokens: row 0 errs by "):
        serve("broken")


def test_a_kernel_that_does_not_fit(serve: Serve, backend: str, tmp_path: Path) -> None:
    """With the self-check off, it ends the warm-up: a table's tile that needs more LDS than there is."""
    shape = make_shape(MODEL.experts, MODEL.topk, MODEL.hidden, MODEL.intermediate)
    tiles = Ladder((8192,), (TileConfig(256, 256, 256, 1, 8, 2, 0),))
    triton, kernels = OF_BACKEND[backend]
    name = "matmul" if kernels == "matmul" else "matmul_ogs"
    table = store.Content(tiles={(name, release_of(triton), gemm): tiles for gemm in gemms(shape)})
    store.write(tmp_path / "gfx950.json", "gfx950", table)
    with pytest.raises(RuntimeError, match="OutOfResources: out of resource: shared memory"):
        serve("sound", self_check="off", VLLM_MXFP4_TABLES=str(tmp_path))
