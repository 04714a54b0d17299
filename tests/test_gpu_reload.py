"""One GPU's engine asleep and awake, and with other weights, under its captured graphs."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from engine import OUR_METHOD, Served, Turn
from test_gpu_ranks import PATHS, SERVED, TOKENS, ask, double_bias, is_near, widen, write

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
OURS: dict[str, Any] = SERVED | PATHS["ours"]


def reloaded(path: Path) -> tuple[str, dict[str, Any]]:
    """What has vLLM load a checkpoint into the model that it serves."""
    return "collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}


@pytest.fixture(scope="module", name="served")
def fixture_served(tmp_path_factory: pytest.TempPathFactory) -> list[Served]:
    """The answers of one engine after each of its turns, and last those of an engine of the other weights."""
    folder = tmp_path_factory.mktemp("reload")
    one, other = write(folder / "one", widen), write(folder / "other", double_bias)
    asleep = [("sleep", {"level": 1}), ("wake_up", {})]
    emptied = [("sleep", {"level": 2}), ("wake_up", {})]
    turns = [
        Turn(),
        Turn(tuple(asleep)),
        Turn((reloaded(other),)),
        Turn((*emptied, reloaded(one))),
        Turn((*emptied, reloaded(other))),
    ]
    served = engine.serve_in_turn(one, ask(), TOKENS, turns, enable_sleep_mode=True, **OURS)
    return [*served, engine.serve(other, ask(), TOKENS, **OURS)]


def test_asleep(served: list[Served]) -> None:
    """The same tokens after level 1."""
    assert served[0].moe_methods == {OUR_METHOD}
    assert is_near(served[0], served[1])


def test_emptied(served: list[Served], request: pytest.FixtureRequest) -> None:
    """The same tokens after level 2 with the same weights loaded again."""
    if not hasattr(importlib.import_module("vllm.model_executor.models.gpt_oss"), "make_attention_sink"):
        reason = (
            "by its source, this vLLM loses the attention sinks at level 2, whatever computes the experts"
        )
        request.applymarker(pytest.mark.xfail(reason=reason, strict=False))
    assert is_near(served[0], served[3])


def test_other_weights(served: list[Served]) -> None:
    """Those of an engine that began with them, and not those of before."""
    assert is_near(served[5], served[2])
    assert is_near(served[5], served[4])
    assert not is_near(served[0], served[2])
