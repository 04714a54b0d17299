"""The ways in which operators run vLLM, each held against one plain engine or against transformers."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import additions
import engine
import pytest
import tiny_checkpoint
from engine import FLAG, OUR_METHOD, Served, Turn
from safetensors.torch import load_file, save_file
from test_engine import PROMPTS, SHAPES, TOKENS, UNEVEN, assert_equals_transformers
from tiny_checkpoint import TinyGptOss

pytestmark = pytest.mark.engine

OURS: dict[str, Any] = {"quantization": FLAG, "dtype": "float32"}
DRAFTED = TinyGptOss(experts=4, topk=1, kv_heads=4, vocab=320, seed=3)
"""A model whose keys have as many values as it is wide, as `additions.write_draft` wants it."""

OTHER = TinyGptOss(experts=4, topk=1, hidden=96, intermediate=160, vocab=320, seed=6)
"""A model of the same shape as UNEVEN's."""

WAYS: dict[str, dict[str, Any]] = {
    "prefix-caching": {"enable_prefix_caching": True},
    "chunked-prefill": {"enable_chunked_prefill": True, "max_num_batched_tokens": 16, "max_num_seqs": 4},
    "async-scheduling": {"async_scheduling": True},
    "hf-overrides": {
        "hf_overrides": {"architectures": ["GptOssForCausalLM"], "max_position_embeddings": 512}
    },
    "mp": {"distributed_executor_backend": "mp"},
    "TP2-mp-EP": {
        "distributed_executor_backend": "mp",
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
    },
    "n-gram": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 1},
        "disable_log_stats": False,
    },
    "PP2": {"pipeline_parallel_size": 2, "enforce_eager": False},
}
"""Options of vLLM that change how a model is served, and none of its tokens."""


@pytest.fixture(scope="module", name="folder")
def fixture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For checkpoints."""
    return tmp_path_factory.mktemp("ways")


@functools.cache
def write(model: TinyGptOss, folder: Path) -> Path:
    """A model's checkpoint."""
    return tiny_checkpoint.write(model, folder / f"{model.kv_heads}-{model.seed}")


@functools.cache
def plain(checkpoint: Path) -> Served:
    """What one rank answers, which is what transformers does."""
    served = engine.serve(checkpoint, PROMPTS, TOKENS, **OURS)
    assert_equals_transformers(served, checkpoint)
    return served


@pytest.mark.parametrize(
    ("tensor_parallel_size", "enable_expert_parallel"),
    [
        pytest.param(1, False, marks=pytest.mark.load, id="DP2"),
        pytest.param(1, True, marks=pytest.mark.load, id="DP2-EP"),
        pytest.param(2, True, marks=pytest.mark.load, id="DP2-TP2-EP"),
    ],
)
def test_data_parallel(tensor_parallel_size: int, enable_expert_parallel: bool, folder: Path) -> None:
    """Two ranks with other prompts each, two at once, of which one has long ended when the other does."""
    checkpoint = write(SHAPES[UNEVEN], folder)
    served = engine.serve_on_ranks(
        checkpoint,
        [PROMPTS[:6], PROMPTS[6:]],
        TOKENS,
        **OURS,
        max_num_seqs=2,
        worker_extension_cls="cpu_collectives.Rank",
        tensor_parallel_size=tensor_parallel_size,
        enable_expert_parallel=enable_expert_parallel,
    )
    assert [rank.moe_methods for rank in served] == [{OUR_METHOD}] * 2
    assert served[0].token_ids + served[1].token_ids == plain(checkpoint).token_ids


def test_lora_on_attention(folder: Path) -> None:
    """An adapter's tokens are those of the merged weights, between two turns of the model alone."""
    checkpoint = write(SHAPES[UNEVEN], folder)
    added = additions.write_adapter(SHAPES[UNEVEN], folder / "adapter")
    adapters = {"enable_lora": True, "lora_target_modules": ["qkv_proj", "o_proj"], "max_lora_rank": 8}
    turns = [Turn(), Turn(adapter=folder / "adapter"), Turn()]
    before, adapted, after = engine.serve_in_turn(checkpoint, PROMPTS, TOKENS, turns, **OURS, **adapters)
    assert adapted.moe_methods == {OUR_METHOD}
    assert_equals_transformers(adapted, checkpoint, added)
    assert before.token_ids == after.token_ids == plain(checkpoint).token_ids
    assert all(one != other for one, other in zip(before.token_ids, adapted.token_ids, strict=True))


def keep_sinks(one: Path, other: Path) -> None:
    """Give the other model the attention sinks of the one, which vLLM 0.32 does not load a second time."""
    file = other / "model.safetensors"
    sinks = {name: sink for name, sink in load_file(one / file.name).items() if name.endswith(".sinks")}
    save_file(load_file(file) | sinks, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "tensor_parallel_size", [1, pytest.param(2, marks=pytest.mark.load)], ids=["TP1", "TP2"]
)
def test_reload(tensor_parallel_size: int, folder: Path) -> None:
    """`reload_weights` by a path: the tokens become those of the other checkpoint, and back."""
    one, other = write(SHAPES[UNEVEN], folder), write(OTHER, folder)
    keep_sinks(one, other)
    turns = [
        Turn((("collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}),))
        for path in (other, one)
    ]
    ranks = {"tensor_parallel_size": tensor_parallel_size}
    served = engine.serve_in_turn(one, PROMPTS, TOKENS, [Turn(), *turns], **OURS, **ranks)
    assert served[0].token_ids == served[2].token_ids == plain(one).token_ids
    assert_equals_transformers(served[1], other)


@pytest.mark.load
@pytest.mark.parametrize("way", WAYS)
def test_way(way: str, folder: Path) -> None:
    """The tokens of the plain engine; where drafts are made, some are accepted."""
    checkpoint = write(SHAPES[UNEVEN], folder)
    expected = plain(checkpoint)
    try:
        served = engine.serve(checkpoint, PROMPTS, TOKENS, **OURS | WAYS[way])
    finally:
        if (
            way == "n-gram"
        ):  # What it compiles on the CPU, vLLM 0.32 trips over when it starts another engine.
            engine.renew()
    assert served.moe_methods == {OUR_METHOD}
    assert served.token_ids == expected.token_ids
    assert (served.accepted > 0) == ("speculative_config" in WAYS[way])


@pytest.mark.load
def test_eagle3(folder: Path) -> None:
    """A draft that is right now and then, 11 times here: its tokens are taken, and all are the model's."""
    checkpoint = write(DRAFTED, folder)
    draft = additions.write_draft(DRAFTED, checkpoint, folder / "draft")
    speculative = {"method": "eagle3", "model": str(draft), "num_speculative_tokens": 2}
    served = engine.serve(
        checkpoint, PROMPTS, TOKENS, **OURS, speculative_config=speculative, disable_log_stats=False
    )
    print(f"{served.accepted} drafts accepted in {len(PROMPTS) * TOKENS} tokens")
    assert served.moe_methods == {OUR_METHOD}
    assert served.token_ids == plain(checkpoint).token_ids
    assert served.accepted > 0
