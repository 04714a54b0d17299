"""Which tensors of experts a checkpoint may have, by their headers and as they are loaded."""

import re

import pytest
import torch

from vllm_mxfp4_gfx950 import checkpoint
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.moe import MoeShape

SHAPE = MoeShape(experts=8, global_experts=8, topk=2, hidden=64, intermediate=96, alpha=1.702, limit=7.0)
EXPERTS = "model.layers.1.mlp.experts"
OTHER_MODEL = "Check that the checkpoint is GPT-OSS in MXFP4 and fits its config.json."
BLOCKS = "U8 or I8 [8, 192, 2, 16] or [8, 192, 32]"
ONE = "U8 or I8 [192, 2, 16] or [192, 32]"


@pytest.mark.parametrize(
    ("name", "dtype", "size"),
    [
        ("gate_up_proj_blocks", "U8", [8, 192, 2, 16]),
        ("gate_up_proj_blocks", "I8", [8, 192, 32]),
        ("routed_experts.w13_weight", "U8", [8, 192, 32]),
        ("7.gate_up_proj_blocks", "U8", [192, 2, 16]),
        ("7.w2_weight", "U8", [64, 48]),
        ("down_proj_scales", "F8_E8M0", [8, 64, 3]),
        ("w13_weight_scale", "U8", [8, 192, 2]),
        ("0.down_proj_scales", "U8", [64, 3]),
        *(("gate_up_proj_bias", dtype, [8, 192]) for dtype in ("BF16", "F16", "F32")),
        ("w2_bias", "F32", [8, 64]),
        ("3.down_proj_bias", "F16", [64]),
        ("something_else", "I64", [1]),
    ],
)
def test_check_expert_accepts(name: str, dtype: str, size: list[int]) -> None:
    """Every form that the loader takes, and what is no expert's tensor."""
    checkpoint.check_expert(f"{EXPERTS}.{name}", dtype, size, 2, SHAPE)


@pytest.mark.parametrize(
    ("name", "dtype", "size", "rule"),
    [
        ("gate_up_proj_blocks", "U8", [16, 192, 2, 16], BLOCKS),
        ("gate_up_proj_blocks", "U8", [8, 192, 16, 2], BLOCKS),
        ("w13_weight", "F4", [8, 192, 64], BLOCKS),
        ("3.gate_up_proj_blocks", "U8", [192, 2, 15], ONE),
        ("3.gate_up_proj_blocks", "U8", [8, 192, 32], ONE),
        ("3.w13_weight", "BF16", [192, 64], ONE),
        ("down_proj_scales", "F8_E4M3", [8, 64, 3], "U8 or F8_E8M0 [8, 64, 3]"),
        ("3.w2_weight_scale", "I8", [64, 3], "U8 or F8_E8M0 [64, 3]"),
        ("down_proj_bias", "F64", [8, 64], "BF16 or F16 or F32 [8, 64]"),
        ("3.w13_bias", "BF16", [191], "BF16 or F16 or F32 [192]"),
    ],
)
def test_check_expert_refuses(name: str, dtype: str, size: list[int], rule: str) -> None:
    """Another dtype or shape, of all experts and of one, under either name; and not of a layer left out."""
    text = f"{EXPERTS}.{name} must be {rule}; got {dtype} {size}. {OTHER_MODEL}"
    with pytest.raises(Mxfp4Error, match=f"^{re.escape(text)}$"):
        checkpoint.check_expert(f"{EXPERTS}.{name}", dtype, size, 2, SHAPE)
    checkpoint.check_expert(f"{EXPERTS}.{name}", dtype, size, 1, SHAPE)


def test_check_expert_refuses_an_expert_too_many() -> None:
    """Left over from a model with more of them."""
    text = (
        f"{EXPERTS}.8.down_proj_bias must be of one of the model's experts, 0 to 7; got expert 8. "
        "Check num_local_experts in config.json, or take the checkpoint that it belongs to."
    )
    with pytest.raises(Mxfp4Error, match=f"^{re.escape(text)}$"):
        checkpoint.check_expert(f"{EXPERTS}.8.down_proj_bias", "BF16", [64], 2, SHAPE)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e8m0fnu], ids=str)
def test_read_keeps_bytes(dtype: torch.dtype) -> None:
    """All 256, whatever their dtype makes of them, in a slice of a tensor too."""
    content = torch.arange(256, dtype=torch.uint8).view(4, 64)
    field = "w2_scale" if dtype == torch.float8_e8m0fnu else "w2"
    found = checkpoint.read("x", field, content.view(dtype)[:, 3:50], (4, 47))
    assert found.dtype == torch.uint8
    assert torch.equal(found, content[:, 3:50])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_read_keeps_biases(dtype: torch.dtype) -> None:
    """To be copied into fp32."""
    bias = torch.randn(4, 64).to(dtype)
    assert torch.equal(torch.zeros(4, 64).copy_(checkpoint.read("x", "w2_bias", bias, (4, 64))), bias.float())


@pytest.mark.parametrize(
    ("field", "tensor", "rule", "got"),
    [
        ("w2", torch.zeros(4, 4), "torch.uint8 or torch.int8 [4, 4]", "torch.float32 [4, 4]"),
        (
            "w2",
            torch.zeros(4, 5, dtype=torch.uint8),
            "torch.uint8 or torch.int8 [4, 4]",
            "torch.uint8 [4, 5]",
        ),
        (
            "w13_bias",
            torch.zeros(4, 4).double(),
            "torch.bfloat16 or torch.float16 or torch.float32 [4, 4]",
            "torch.float64 [4, 4]",
        ),
    ],
)
def test_read_refuses(field: str, tensor: torch.Tensor, rule: str, got: str) -> None:
    """What a header would have shown: a checkpoint that is streamed has none."""
    with pytest.raises(Mxfp4Error, match=re.escape(f"x must be {rule}; got {got}. {OTHER_MODEL}")):
        checkpoint.read("x", field, tensor, (4, 4))
