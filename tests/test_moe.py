"""The rules that a layer's sizes and weights must meet, and the text of each refusal."""

import dataclasses
import re
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from vllm_mxfp4_gfx950.backends import reference
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.moe import (
    VERIFY,
    MoeShape,
    check_tensor,
    check_weights,
    pad_intermediate,
    tensor_shapes,
)
from vllm_mxfp4_gfx950.random_layer import make_shape, random_tokens, random_weights

GPT_OSS_20B: dict[str, Any] = {
    "experts": 32,
    "global_experts": 32,
    "topk": 4,
    "hidden": 2880,
    "intermediate": 2880,
    "alpha": 1.702,
    "limit": 7.0,
}
SMALL = MoeShape(experts=2, global_experts=4, topk=2, hidden=64, intermediate=32, alpha=1.702, limit=7.0)
NO_BLOCKS = "MXFP4 stores blocks of 32 values; this model cannot be stored in it."
OTHER_MODEL = "Check that the checkpoint is GPT-OSS in MXFP4 and fits its config.json."


def refusal(text: str) -> AbstractContextManager[Any]:
    """Expect an Mxfp4Error with exactly this text."""
    return pytest.raises(Mxfp4Error, match=f"^{re.escape(text)}$")


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"hidden": 2881}, f"hidden must be a positive multiple of 32; got 2881. {NO_BLOCKS}"),
        ({"hidden": 0}, f"hidden must be a positive multiple of 32; got 0. {NO_BLOCKS}"),
        ({"intermediate": 720}, f"intermediate must be a positive multiple of 32; got 720. {NO_BLOCKS}"),
        ({"intermediate": -32}, f"intermediate must be a positive multiple of 32; got -32. {NO_BLOCKS}"),
        (
            {"experts": 0},
            "experts must be between 1 and the model's 32; got 0. Use fewer expert-parallel ranks.",
        ),
        (
            {"experts": 33},
            "experts must be between 1 and the model's 32; got 33. Use fewer expert-parallel ranks.",
        ),
        (
            {"topk": 0},
            "topk must be between 1 and the number of experts, 32; got 0. "
            "Correct num_experts_per_tok in the model's config.json.",
        ),
        (
            {"topk": 33},
            "topk must be between 1 and the number of experts, 32; got 33. "
            "Correct num_experts_per_tok in the model's config.json.",
        ),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_moe_shape_refuses(sizes: dict[str, int], text: str) -> None:
    """Sizes that no rank of no GPT-OSS can have."""
    with refusal(text):
        MoeShape(**GPT_OSS_20B | sizes)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({}, "E=32 topk=4 H=2880 I=2880 alpha=1.702 limit=7"),
        ({"experts": 8}, "E=8 of 32 topk=4 H=2880 I=2880 alpha=1.702 limit=7"),
        ({"experts": 1, "topk": 32}, "E=1 of 32 topk=32 H=2880 I=2880 alpha=1.702 limit=7"),
    ],
)
def test_moe_shape_names_itself(sizes: dict[str, int], text: str) -> None:
    """The text that logs and errors carry; the sizes at both ends of their rules are taken."""
    assert str(MoeShape(**GPT_OSS_20B | sizes)) == text


def test_tensor_shapes_are_the_checkpoints() -> None:
    """The sizes of openai/gpt-oss-20b, its blocks' last two axes taken as one."""
    sizes = {name: size for name, (_, size) in tensor_shapes(32, 2880, 2880).items()}
    assert sizes == {
        "w13": (32, 5760, 90 * 16),
        "w13_scale": (32, 5760, 90),
        "w13_bias": (32, 5760),
        "w2": (32, 2880, 90 * 16),
        "w2_scale": (32, 2880, 90),
        "w2_bias": (32, 2880),
    }


def test_check_weights_accepts() -> None:
    """Weights that fit their shape."""
    check_weights(random_weights(SMALL, seed=0), SMALL)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("w13", "torch.uint8 [2, 64, 32]"),
        ("w13_scale", "torch.uint8 [2, 64, 2]"),
        ("w13_bias", "torch.float32 [2, 64]"),
        ("w2", "torch.uint8 [2, 64, 16]"),
        ("w2_scale", "torch.uint8 [2, 64, 1]"),
        ("w2_bias", "torch.float32 [2, 64]"),
    ],
)
def test_check_weights_refuses_each_tensor(name: str, rule: str) -> None:
    """Each of the six tensors, once with another shape and once with another dtype."""
    weights = random_weights(SMALL, seed=0)
    tensor = getattr(weights, name)
    dtype, size = rule.split(" ", 1)
    longer = str([*tensor.shape[:-1], tensor.shape[-1] + 1])
    for wrong, got in (
        (torch.nn.functional.pad(tensor, (0, 1)), f"{dtype} {longer}"),
        (tensor.double(), f"torch.float64 {size}"),
    ):
        with refusal(f"{name} must be {rule}; got {got}. {OTHER_MODEL}"):
            check_weights(dataclasses.replace(weights, **{name: wrong}), SMALL)


@pytest.mark.parametrize("name", ["w13_scale", "w2_scale"])
def test_check_weights_refuses_nan_scales(name: str) -> None:
    """0xFF is NaN in E8M0; a layer with one would answer NaN for every token that meets it."""
    weights = random_weights(SMALL, seed=0)
    getattr(weights, name)[1, 3:6, 0] = 0xFF
    text = f"{name} must be free of NaN scales (0xFF); got 3 of them. {VERIFY}."
    with refusal(text):
        check_weights(weights, SMALL)


@pytest.mark.parametrize("name", ["w13_bias", "w2_bias"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_check_weights_refuses_biases_that_are_not_finite(name: str, value: str) -> None:
    """The self-check would put them down to the backend."""
    weights = random_weights(SMALL, seed=0)
    getattr(weights, name)[1, 3:5] = float(value)
    with refusal(f"{name} must be free of NaN and Inf; got 2 of them. {VERIFY}."):
        check_weights(weights, SMALL)


def test_check_tensor_carries_the_callers_name() -> None:
    """The name in the text is the one that the caller gave."""
    name = "model.layers.3.mlp.experts.down_proj_bias"
    text = f"{name} must be torch.bfloat16 [2, 64]; got torch.bfloat16 [64, 2]. {OTHER_MODEL}"
    with refusal(text):
        check_tensor(name, torch.zeros(64, 2, dtype=torch.bfloat16), torch.bfloat16, (2, 64))


@pytest.mark.parametrize(("multiple", "intermediate"), [(32, 32), (64, 64), (256, 256)])
def test_pad_intermediate_adds_nothing(multiple: int, intermediate: int) -> None:
    """The widened layer fits its shape and answers the same."""
    shape = make_shape(4, 2, 64, 32)
    weights = random_weights(shape, seed=0)
    wider = dataclasses.replace(shape, intermediate=intermediate)
    padded = pad_intermediate(weights, multiple)
    assert (padded is weights) == (wider == shape)
    check_weights(padded, wider)
    x, logits = (tensor.double() for tensor in random_tokens(shape, 37, seed=1))
    got, expected = (reference.prepare(w, s).run(x, logits) for w, s in ((padded, wider), (weights, shape)))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
