"""GPT-OSS's checkpoint: its tensors' names, shapes and dtypes, and one rank's share of them."""

from __future__ import annotations

import re

import torch

from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.moe import MoeShape, tensor_shapes
from vllm_mxfp4_gfx950.mxfp4 import BLOCK
from vllm_mxfp4_gfx950.settings import FLAG

METHODS = ("mxfp4", "gpt_oss_mxfp4")
"""What GPT-OSS calls its format, and what vLLM renames it to while it reads the config."""

PICKLES = ("pt", "npcache")
"""vLLM's load formats that read nothing but pickles."""

STATES = ("sharded_state", "runai_streamer_sharded", "tensorizer")
"""Those that fill a model's parameters, or some of whose files do, and not by the parameters' own loaders."""

TENSORS = {
    "w13": "gate_up_proj_blocks",
    "w13_scale": "gate_up_proj_scales",
    "w13_bias": "gate_up_proj_bias",
    "w2": "down_proj_blocks",
    "w2_scale": "down_proj_scales",
    "w2_bias": "down_proj_bias",
}
"""The name of each field of MoeWeights in a checkpoint, behind `model.layers.N.mlp.experts.`."""

PARAMETERS = {
    "w13_weight": "w13",
    "w13_weight_scale": "w13_scale",
    "w13_bias": "w13_bias",
    "w2_weight": "w2",
    "w2_weight_scale": "w2_scale",
    "w2_bias": "w2_bias",
}
"""vLLM's name of each of a layer's parameters, which a file may have too, and its field in MoeWeights."""

DTYPES = {
    "blocks": {"U8": torch.uint8, "I8": torch.int8},
    "scales": {"U8": torch.uint8, "F8_E8M0": torch.float8_e8m0fnu},
    "bias": {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32},
}
"""What a checkpoint may have its tensors in without another meaning, by the end of their names in TENSORS."""

FIELDS = PARAMETERS | {name: field for field, name in TENSORS.items()}
"""The field of MoeWeights behind either name."""

EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(?:routed_experts\.)?(?:(\d+)\.)?(\w+)")
"""The name of a tensor of all experts, or of the one whose number it has."""


OTHER_MODEL = "Check that the checkpoint is GPT-OSS in MXFP4 and fits its config.json"


def check_method(quant_method: str | None) -> None:
    """Raise Mxfp4Error unless a checkpoint says that it is MXFP4."""
    if quant_method not in METHODS:
        raise Mxfp4Error(
            "quantization_config.quant_method",
            f"mxfp4 for --quantization {FLAG}",
            quant_method,
            "Serve this checkpoint without the flag, or use one of GPT-OSS's MXFP4 checkpoints",
        )


def check_expert(name: str, dtype: str, size: list[int], layers: int, shape: MoeShape) -> None:
    """Hold the header of one tensor of experts against the model; other tensors pass.

    Args:
        name: the tensor's, in the checkpoint or in vLLM.
        dtype, size: as safetensors gives them.
        layers: of the model.
        shape: of one of its layers, all of it.

    Raises:
        Mxfp4Error: the tensor has the wrong dtype or shape, or is of an expert that the model has not.
    """
    match = EXPERT.fullmatch(name)
    field = match and FIELDS.get(match[3])
    if not match or not field or int(match[1]) >= layers:
        return
    if match[2] and int(match[2]) >= shape.experts:
        rule = f"of one of the model's experts, 0 to {shape.experts - 1}"
        fix = "Check num_local_experts in config.json, or take the checkpoint that it belongs to"
        raise Mxfp4Error(name, rule, f"expert {match[2]}", fix)
    whole = tensor_shapes(shape.experts, shape.hidden, shape.intermediate)[field][1]
    packed = list(whole[1:] if match[2] else whole)
    sizes = [[*packed[:-1], packed[-1] // 16, 16], packed] if field in ("w13", "w2") else [packed]
    dtypes = DTYPES[kind(field)]
    if dtype not in dtypes or size not in sizes:
        rule = f"{' or '.join(dtypes)} {' or '.join(map(str, sizes))}"
        raise Mxfp4Error(name, rule, f"{dtype} {size}", OTHER_MODEL)


def kind(field: str) -> str:
    """Of what a field of MoeWeights is one: blocks, scales or bias."""
    return TENSORS[field].rpartition("_")[2]


def read(name: str, field: str, tensor: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """A loaded tensor, its bytes as MoeWeights has them; a bias may be of any float dtype.

    Args:
        name: for the error's text.
        field: the tensor's name in MoeWeights.
        tensor: this rank's share of it.
        size: what its shape must be.

    Raises:
        Mxfp4Error: the tensor has the wrong dtype or shape.
    """
    dtypes = DTYPES[kind(field)].values()
    if tensor.dtype not in dtypes or tuple(tensor.shape) != size:
        rule = f"{' or '.join(map(str, dtypes))} {list(size)}"
        raise Mxfp4Error(name, rule, f"{tensor.dtype} {list(tensor.shape)}", OTHER_MODEL)
    return tensor if field.endswith("bias") else tensor.view(torch.uint8)


def slice_expert(field: str, tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """This rank's share of one expert's tensor.

    Args:
        field: the tensor's name in MoeWeights.
        tensor: one whole expert; packed blocks as [rows, blocks, 16] or [rows, bytes].
        start, stop: this rank's columns of the intermediate size.
    """
    if field in ("w13", "w2"):
        tensor = tensor.flatten(1)
    if field.startswith("w13"):
        return tensor[2 * start : 2 * stop]
    if field == "w2":
        return tensor[:, start // 2 : stop // 2]
    return tensor[:, start // BLOCK : stop // BLOCK] if field == "w2_scale" else tensor
