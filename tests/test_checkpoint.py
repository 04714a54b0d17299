"""Which tensors of experts a checkpoint may have, by their headers and as they are loaded."""

import dataclasses
import re

import pytest
import torch

from vllm_mxfp4_gfx950 import checkpoint
from vllm_mxfp4_gfx950.checkpoint import LayerLoader
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.moe import MoeShape, tensor_shapes

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


def whole_layer() -> dict[str, torch.Tensor]:
    """SHAPE's experts as a checkpoint has them, every value another or nearly so; biases in bf16."""
    generator = torch.Generator().manual_seed(5)
    shapes = tensor_shapes(SHAPE.experts, SHAPE.hidden, SHAPE.intermediate)
    whole = {}
    for field, (dtype, size) in shapes.items():
        if dtype == torch.uint8:
            whole[field] = torch.randint(255, size, dtype=dtype, generator=generator)
        else:
            whole[field] = torch.randn(size, generator=generator).bfloat16()
    return whole


def load(
    shape: MoeShape, rank: int, expert_map: torch.Tensor | None, whole: dict[str, torch.Tensor]
) -> tuple[LayerLoader, dict[str, torch.Tensor]]:
    """What a rank makes of a checkpoint whose experts come one by one, in memory that held something."""
    columns = checkpoint.rank_columns(shape, SHAPE.intermediate, rank)
    loader = LayerLoader("layer", shape, columns, expert_map)
    shapes = tensor_shapes(shape.experts, shape.hidden, shape.intermediate)
    tensors = {field: torch.full(size, 7, dtype=dtype) for field, (dtype, size) in shapes.items()}
    for field, target in tensors.items():
        for expert in range(SHAPE.experts):
            here = loader.load(field, target, whole[field][expert], expert)
            assert here == (expert_map is None or int(expert_map[expert]) >= 0)
    loader.check_whole()
    return loader, tensors


@pytest.mark.parametrize(
    ("ranks", "widths"), [(1, [96]), (2, [64, 32]), (3, [32, 32, 32]), (4, [32, 32, 32, 0])]
)
def test_ranks_make_the_whole(ranks: int, widths: list[int]) -> None:
    """Ranks that share each expert in whole blocks, the last with fewer or none: they sum to the layer."""
    whole = whole_layer()
    shape = dataclasses.replace(SHAPE, intermediate=widths[0])
    parts = []
    for rank, width in enumerate(widths):
        loader, tensors = load(shape, rank, None, whole)
        assert len(loader.columns) == width
        assert torch.equal(loader.weights(tensors).w2, tensors["w2"])
        sizes = tensor_shapes(SHAPE.experts, SHAPE.hidden, width)
        parts.append({f: tensors[f][tuple(map(slice, size))] for f, (_, size) in sizes.items()})
        rest = sum(int(tensors[field].count_nonzero()) for field in ("w13", "w13_bias", "w2"))
        assert rest == sum(int(parts[-1][field].count_nonzero()) for field in ("w13", "w13_bias", "w2"))
    for field, tensor in whole.items():
        found = [part[field] for part in parts]
        if field == "w2_bias":
            assert torch.equal(sum(found), tensor.float())
        else:
            assert torch.equal(torch.cat(found, 1 if field.startswith("w13") else 2), tensor.to(found[0]))


def test_experts_of_another_rank() -> None:
    """Each goes where the map says, and those that it does not name are left out."""
    whole = whole_layer()
    expert_map = torch.tensor([-1, 2, -1, 0, -1, -1, 1, -1], dtype=torch.int32)
    shape = dataclasses.replace(SHAPE, experts=3)
    loader, tensors = load(shape, 0, expert_map, whole)
    for field, tensor in whole.items():
        assert torch.equal(tensors[field], tensor[[3, 6, 1]].to(tensors[field]))
    assert torch.equal(loader.weights(tensors).expert_map, expert_map)


def test_an_expert_did_not_come() -> None:
    """All but one of one tensor; and a tensor of all experts gives each of them."""
    whole = whole_layer()
    loader = LayerLoader("layer", SHAPE, range(96), None)
    target = torch.zeros(8, 192)
    loader.load("w13_bias", target, whole["w13_bias"][3], 3)
    text = (
        "layer.gate_up_proj_bias must be in the checkpoint; got nothing for 7 of this rank's 8 experts. "
        "Put the whole checkpoint where it is loaded from."
    )
    loader.missing = {"w13_bias": loader.missing["w13_bias"]}
    with pytest.raises(Mxfp4Error, match=f"^{re.escape(text)}$"):
        loader.check_whole()
    loader.missing = {"w13_bias": loader.missing["w13_bias"]}  # All of them anew.
    loader.load("w13_bias", target, whole["w13_bias"])
    loader.check_whole()
    assert torch.equal(target, whole["w13_bias"].float())
