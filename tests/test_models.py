"""A config.json is read alike by the commands, with transformers and without, and by vLLM."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine  # noqa: F401  (for tiny_checkpoint)
import pytest
import tiny_checkpoint
import torch
import transformers
from safetensors.torch import save_file
from tiny_checkpoint import TinyGptOss

from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.models import GPT_OSS, experts_in, layer_shape
from vllm_mxfp4_gfx950.moe import MoeShape, whole_layer

SOUND = tiny_checkpoint.config(TinyGptOss(experts=8, topk=4, hidden=96, intermediate=160))
SIZES = {"num_local_experts", "num_experts", "num_experts_per_tok", "hidden_size", "intermediate_size"}


def without(*names: str) -> dict[str, Any]:
    """SOUND without some of its keys."""
    return {name: value for name, value in SOUND.items() if name not in names}


def write(folder: Path, content: Any) -> Path:
    """A config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(content))
    return file


def in_serving(folder: Path) -> MoeShape:
    """The layer by transformers' config, as the plugin takes it from vLLM."""
    config = transformers.AutoConfig.from_pretrained(folder).get_text_config()
    assert config.model_type == "gpt_oss"
    return whole_layer(config)


@pytest.fixture(params=[True, False], ids=["transformers", "alone"], name="reading")
def fixture_reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With transformers, and where it is not installed."""
    if not request.param:
        monkeypatch.setitem(sys.modules, "transformers", None)
    return "transformers" if request.param else "alone"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(SOUND, id="sound"),
        pytest.param(without("num_local_experts") | {"num_experts": 16}, id="num_experts"),
        pytest.param(SOUND | {"num_experts": 8}, id="both-counts"),
        pytest.param(without("num_experts_per_tok"), id="experts_per_token"),
        pytest.param(without("swiglu_limit"), id="no-limit"),
        pytest.param(SOUND | {"swiglu_limit": 5.5, "swiglu_alpha": 1.5}, id="swiglu"),
        *(pytest.param(without(name), id=f"no-{name}") for name in sorted(SIZES)),
        pytest.param(without(*SIZES), id="no-sizes"),
        pytest.param({"model_type": "llava", "text_config": SOUND, "hidden_size": 32}, id="text_config"),
    ],
)
def test_one_reading(content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer that vLLM's config has, from the file, from its directory and without transformers."""
    file = write(tmp_path, content)
    expected = in_serving(tmp_path)
    assert layer_shape(str(file)) == expected
    assert layer_shape(str(tmp_path)) == expected
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert layer_shape(str(file)) == expected


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda config: config.update(model_type="llama"), id="llama"),
        pytest.param(lambda config: config.pop("model_type"), id="no-model_type"),
        *(
            pytest.param(
                lambda config, key=key, value=value: config.update({key: value}), id=f"{key}-{value}"
            )
            for key in sorted(SIZES - {"num_experts"})
            for value in (None, "32", 32.0, True, 0)
        ),
        pytest.param(lambda config: config.update(swiglu_limit="7"), id="swiglu_limit"),
        pytest.param(lambda config: config.update(swiglu_limit=None), id="no-swiglu_limit"),
    ],
)
def test_refused_alike(change: Callable[[dict[str, Any]], Any], tmp_path: Path, reading: str) -> None:
    """What vLLM does not serve, in our words."""
    content = dict(SOUND)
    change(content)
    file = write(tmp_path, content)
    with pytest.raises(Mxfp4Error):
        layer_shape(str(file))
    if reading == "transformers":
        with pytest.raises(Exception, match=r".+"):
            in_serving(tmp_path)


def test_defaults_are_transformers() -> None:
    """What a file leaves out has the values of gpt-oss-120b."""
    expected = {name: getattr(transformers.GptOssConfig(), name) for name in GPT_OSS["gpt-oss-120b"]}
    assert GPT_OSS["gpt-oss-120b"] == expected


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({}, "got 8 and 32. Keep one, with the number that the files have."),
        ({"model": {"gate_up_proj_bias": (8, 4)}}, "got 8 and 32, and 8 in the files. Delete num_experts."),
        (
            {"a": {"3.w2_bias": (4,)}, "b": {"31.w2_bias": (4,)}},
            "got 8 and 32, and 32 in the files. Delete num_local_experts.",
        ),
        (
            {"model": {"routed_experts.w2_bias": (16, 4)}},
            "got 8 and 32, and 16 in the files. Keep one, with the number that the files have.",
        ),
    ],
    ids=["no-files", "first", "second", "neither"],
)
def test_two_counts(files: dict[str, Any], text: str, tmp_path: Path, reading: str) -> None:
    """Both are named, and what the files have; with the one deleted that the error says, the file is read."""
    for name, shapes in files.items():
        tensors = {f"model.layers.0.mlp.experts.{key}": torch.zeros(size) for key, size in shapes.items()}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    file = write(tmp_path, dict(sorted((SOUND | {"num_experts": 32}).items())))
    expected = f"num_local_experts and num_experts in {file} must be the same number; {text}"
    for path in (file, tmp_path):
        with pytest.raises(Mxfp4Error, match=f"^{re.escape(expected)}$"):
            layer_shape(str(path))
    wrong = re.search(r"Delete (\w+)\.$", text)
    if wrong:
        content = json.loads(file.read_text())
        count = content["num_local_experts"] + content["num_experts"] - content.pop(wrong[1])
        write(tmp_path, content)
        assert layer_shape(str(file)).experts == count


def test_experts_in_takes_no_harm(tmp_path: Path) -> None:
    """Files that are none are passed over."""
    (tmp_path / "a.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    (tmp_path / "b.safetensors").write_bytes(b"")
    (tmp_path / "c.safetensors").write_bytes((9).to_bytes(8, "little") + b'{"x": []}')
    entry = json.dumps({"model.layers.0.mlp.experts.w2_bias": {"shape": []}}).encode()
    (tmp_path / "d.safetensors").write_bytes(len(entry).to_bytes(8, "little") + entry)
    (tmp_path / "._e.safetensors").write_bytes(b"\0" * 9)
    assert experts_in(tmp_path) is None


@pytest.mark.parametrize("name", ["nowhere", "folder"])
def test_no_file(name: str, tmp_path: Path) -> None:
    """Neither a model's name nor a path, and a directory without a config.json."""
    (tmp_path / "folder").mkdir()
    rule = "gpt-oss-20b, gpt-oss-120b, or the path of a config.json or of a checkpoint"
    with pytest.raises(Mxfp4Error, match=rf"^--model must be {rule}; got .* Correct the name\.$"):
        layer_shape(str(tmp_path / name))
