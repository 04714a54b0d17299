"""GPT-OSS's checkpoint: its files, its tensors' names, shapes and dtypes, and one rank's share of them."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.moe import MoeShape, tensor_shapes
from vllm_mxfp4_gfx950.mxfp4 import BLOCK
from vllm_mxfp4_gfx950.settings import FLAG

METHODS = ("mxfp4", "gpt_oss_mxfp4")
"""What GPT-OSS calls its format, and what vLLM renames it to while it reads the config."""

PICKLES = ("pt", "npcache")
"""vLLM's load formats that read nothing but pickles."""

TENSORS = {
    "w13": "gate_up_proj_blocks",
    "w13_scale": "gate_up_proj_scales",
    "w13_bias": "gate_up_proj_bias",
    "w2": "down_proj_blocks",
    "w2_scale": "down_proj_scales",
    "w2_bias": "down_proj_bias",
}
"""The name of each field of MoeWeights in a checkpoint, behind `model.layers.N.mlp.experts.`."""


def check_method(quant_method: str | None) -> None:
    """Raise Mxfp4Error unless a checkpoint says that it is MXFP4."""
    if quant_method not in METHODS:
        raise Mxfp4Error(
            "quantization_config.quant_method",
            f"mxfp4 for --quantization {FLAG}",
            quant_method,
            "Serve this checkpoint without the flag, or use one of GPT-OSS's MXFP4 checkpoints",
        )


@functools.cache
def check_files(model: str, layers: int, shape: MoeShape) -> None:
    """Raise Mxfp4Error for a local checkpoint that is no safetensors, is cut off, or does not fit its config.

    Before it is loaded: vLLM itself starts without the tensors that it misses, if the model is quantized.
    """
    files = sorted(Path(model).glob("*.safetensors"))
    pickles = sorted(file.name for kind in ("*.bin", "*.pt") for file in Path(model).glob(kind))
    if pickles and not files:
        fix = "Download it in that format"
        raise Mxfp4Error(model, "a checkpoint in safetensors", ", ".join(pickles), fix)
    names: set[str] = set()
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                names.update(tensors.keys())
                for name, expected in expert_tensors(layers, shape).items():
                    if name in tensors.keys():  # noqa: SIM118  (it is no mapping)
                        header = tensors.get_slice(name)
                        check_header(name, expected, (header.get_dtype(), header.get_shape()))
        except SafetensorError as error:
            raise Mxfp4Error(
                str(file), "a whole safetensors file", str(error), "Download the file again"
            ) from error
    absent = sorted(unquantized_tensors(layers) - names) if files else []
    if absent:
        raise Mxfp4Error(
            f"{model}/*.safetensors",
            "the whole checkpoint",
            f"{len(names)} tensors without {', '.join(absent[:3])}{' and more' if absent[3:] else ''}",
            "Download the checkpoint again",
        )


def check_header(name: str, expected: tuple[str, list[int]], found: tuple[str, list[int]]) -> None:
    """Raise Mxfp4Error unless a tensor has this dtype and shape, as safetensors names them."""
    if found != expected:
        rule, got = (f"{dtype} {size}" for dtype, size in (expected, found))
        fix = "Check that the checkpoint is GPT-OSS in MXFP4 and fits its config.json"
        raise Mxfp4Error(name, rule, got, fix)


def expert_tensors(layers: int, shape: MoeShape) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of all experts' tensors by their names in a checkpoint, as safetensors names them."""
    tensors = tensor_shapes(shape.experts, shape.hidden, shape.intermediate)
    found = {}
    for field, name in TENSORS.items():
        dtype, size = tensors[field]
        dims = [*size[:-1], size[-1] // 16, 16] if field in ("w13", "w2") else [*size]
        found[name] = ("U8" if dtype is torch.uint8 else "BF16", dims)
    return {
        f"model.layers.{i}.mlp.experts.{name}": entry for i in range(layers) for name, entry in found.items()
    }


def unquantized_tensors(layers: int) -> set[str]:
    """The names in a checkpoint of all but the experts' tensors, which are counted as they are loaded."""
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    linear = ("mlp.router", *(f"self_attn.{name}" for name in attention))
    in_layer = [f"{name}.{part}" for name in linear for part in ("weight", "bias")]
    in_layer += ["self_attn.sinks", "input_layernorm.weight", "post_attention_layernorm.weight"]
    outside = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    return outside | {f"model.layers.{index}.{name}" for index in range(layers) for name in in_layer}


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
