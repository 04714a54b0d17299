"""GPT-OSS's checkpoint: its tensors' names, shapes and dtypes, and how a rank's share of them is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch

from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights, check_weights, tensor_shapes
from vllm_mxfp4_gfx950.mxfp4 import BLOCK

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
"""What frameworks call each of a layer's parameters, as a file may too, and its field in MoeWeights."""

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


def rank_columns(shape: MoeShape, intermediate: int, rank: int) -> range:
    """One rank's columns of the intermediate size.

    Args:
        shape: the layer on each rank.
        intermediate: the model's, of which the last ranks' shares may be shorter than the shape's, or empty.
        rank: among those that share each expert.
    """
    start = rank * shape.intermediate
    return range(start, max(start, min(start + shape.intermediate, intermediate)))


def slice_expert(field: str, tensor: torch.Tensor, columns: range) -> torch.Tensor:
    """One rank's share of one expert's tensor.

    Args:
        field: the tensor's name in MoeWeights.
        tensor: one whole expert; packed blocks as [rows, blocks, 16] or [rows, bytes].
        columns: as `rank_columns` returns them.
    """
    start, stop = columns.start, columns.stop
    if field in ("w13", "w2"):
        tensor = tensor.flatten(1)
    if field.startswith("w13"):
        return tensor[2 * start : 2 * stop]
    if field == "w2":
        return tensor[:, start // 2 : stop // 2]
    return tensor[:, start // BLOCK : stop // BLOCK] if field == "w2_scale" else tensor


def register_parameters(
    layer: torch.nn.Module,
    names: Mapping[str, str],
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    weight_loader: Callable[..., object],
) -> None:
    """Give a framework's layer the six parameters that its loader fills.

    They are zeroed: zero blocks and biases add nothing where a rank is short.

    Args:
        layer: the framework's.
        names: what the framework calls each, and its field in MoeWeights.
        tensors: dtype and shape by field, as `moe.tensor_shapes` returns them.
        weight_loader: what the framework calls for each tensor of the checkpoint.
    """
    for name, field in names.items():
        dtype, size = tensors[field]
        parameter = torch.nn.Parameter(torch.zeros(size, dtype=dtype), requires_grad=False)
        parameter.weight_loader = weight_loader  # type: ignore[attr-defined]
        layer.register_parameter(name, parameter)


class LayerLoader:
    """One layer's experts on one rank, while a framework loads them into tensors of its own.

    Args:
        prefix: the layer's name, for error texts.
        shape: the layer on this rank.
        columns: as `rank_columns` returns them.
        expert_map: as in MoeWeights.
    """

    def __init__(self, prefix: str, shape: MoeShape, columns: range, expert_map: torch.Tensor | None) -> None:
        self.prefix, self.shape, self.columns, self.expert_map = prefix, shape, columns, expert_map
        self._await_all()

    def _await_all(self) -> None:
        # Experts of this rank that each field still waits for.
        self.missing = {field: set(range(self.shape.experts)) for field in TENSORS}

    def load(self, field: str, target: torch.Tensor, loaded: torch.Tensor, expert: int | None = None) -> bool:
        """Copy a tensor of the checkpoint to where it belongs.

        Args:
            field: the tensor's name in MoeWeights.
            target: all of that field on this rank, or as much of it as the rank's columns fill. Where the
                columns are fewer than the shape's, the rest is zeroed, as zero blocks and biases add nothing.
                On the meta device, nothing has come.
            loaded: all of this rank's experts, sliced for it already; or, with `expert`, one of the model's
                experts whole.
            expert: its number in the model.

        Returns:
            Whether it lives on this rank.

        Raises:
            Mxfp4Error: the tensor has the wrong dtype or shape.
        """
        experts = range(self.shape.experts)
        if expert is not None:
            local = expert if self.expert_map is None else int(self.expert_map[expert])
            if local == -1:
                return False
            experts = range(local, local + 1)
            loaded = slice_expert(field, loaded, self.columns)[None]
        size = tensor_shapes(len(experts), self.shape.hidden, len(self.columns))[field][1]
        loaded = read(f"{self.prefix}.{TENSORS[field]}", field, loaded, size)
        if field == "w2_bias" and self.columns.start > 0:
            loaded = torch.zeros_like(loaded)  # The ranks' outputs are summed: it counts on the first.
        target = target[experts.start : experts.stop]
        if target.shape != loaded.shape:
            target.zero_()
        target[tuple(slice(0, n) for n in loaded.shape)].copy_(loaded)
        if not target.is_meta:
            self.missing[field] -= {*experts}
        return True

    def check_whole(self, fix: str = "Put the whole checkpoint where it is loaded from") -> None:
        """Raise Mxfp4Error where an expert of this rank did not come; wait for all of them anew."""
        missing = self.missing
        self._await_all()
        for field, experts in missing.items():
            if experts:
                raise Mxfp4Error(
                    f"{self.prefix}.{TENSORS[field]}",
                    "in the checkpoint",
                    f"nothing for {len(experts)} of this rank's {self.shape.experts} experts",
                    fix,
                )

    def weights(self, tensors: dict[str, torch.Tensor]) -> MoeWeights:
        """What was loaded, as a backend's `prepare` takes it.

        Args:
            tensors: the six, by field.

        Raises:
            Mxfp4Error: a scale is NaN, or a bias is not finite.
        """
        expert_map = self.expert_map
        if expert_map is not None:
            expert_map = expert_map.to(tensors["w13"].device)
        weights = MoeWeights(**tensors, expert_map=expert_map)
        check_weights(weights, self.shape, f"{self.prefix}.")
        return weights
