"""The vLLM adapter: `--quantization mxfp4-triton`, from the flag to the MoE layers' forward.

It uses what vLLM offers to plugins and to models, the same calls from vLLM 0.24 to 0.33: an entry
point, a registered QuantizationConfig, and a FusedMoEMethodBase that does its own routing.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from vllm import envs
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from vllm_mxfp4_gfx950 import backends, self_check, settings
from vllm_mxfp4_gfx950.errors import brief
from vllm_mxfp4_gfx950.moe import (
    MoeShape,
    MoeWeights,
    Mxfp4Error,
    check_tensor,
    check_weights,
    tensor_shapes,
    whole_layer,
)
from vllm_mxfp4_gfx950.mxfp4 import BLOCK

NAME = "mxfp4-triton"
CHECKPOINT_METHODS = ("mxfp4", "gpt_oss_mxfp4")
"""What GPT-OSS calls its format, and what vLLM renames it to while it reads the config."""

PICKLES = ("pt", "npcache")
"""vLLM's load formats that read nothing but pickles."""

# Loggers below `vllm` print where vLLM's own do.
logger = init_logger("vllm.mxfp4_triton")

PARAMETERS = {
    "w13_weight": ("w13", "gate_up_proj_blocks"),
    "w13_weight_scale": ("w13_scale", "gate_up_proj_scales"),
    "w13_bias": ("w13_bias", "gate_up_proj_bias"),
    "w2_weight": ("w2", "down_proj_blocks"),
    "w2_weight_scale": ("w2_scale", "down_proj_scales"),
    "w2_bias": ("w2_bias", "down_proj_bias"),
}
"""vLLM's name of each of a layer's parameters, its field in MoeWeights, and its name in the checkpoint."""


def register() -> None:
    """Make the flag and our environment variables known; vLLM calls this in each of its processes."""
    register_quantization_config(NAME)(Mxfp4TritonConfig)
    # vLLM warns of VLLM_* variables that it does not know, and keys its compile cache by those it does.
    for name in (settings.BACKEND_VAR, settings.STRICT_VAR, settings.SELF_CHECK_VAR, settings.TABLES_VAR):
        envs.environment_variables.setdefault(name, functools.partial(os.environ.get, name))


class Mxfp4TritonConfig(QuantizationConfig):
    """GPT-OSS in MXFP4 with its experts computed by this package; all other layers are vLLM's own.

    Args:
        quant_method: the checkpoint's own name for its format; None when it has no quantization.

    Raises:
        Mxfp4Error: the checkpoint is not MXFP4.
    """

    def __init__(self, quant_method: str | None = None) -> None:
        super().__init__()
        check_checkpoint_method(quant_method)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Mxfp4TritonConfig:
        """Read `quantization_config` of the model's config.json."""
        return cls(config.get("quant_method"))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim a checkpoint, only when the user asked for it by flag."""
        if user_quant != NAME:
            return None
        check_checkpoint_method(hf_quant_cfg.get("quant_method"))
        return NAME

    @classmethod
    def get_name(cls) -> str:
        """The value of `--quantization`."""
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """All that vLLM has: which of them a device's backend takes is checked with the device known."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Hopper on NVIDIA; vLLM counts gfx942 as 94 and gfx950 as 95."""
        return 90

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: the format is stated in config.json."""
        return []

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Refuse other models and impossible sizes, as soon as vLLM has read them."""
        config = hf_config.get_text_config()
        model_type = config.model_type
        if model_type != "gpt_oss":
            raise Mxfp4Error(
                "model_type", "gpt_oss", model_type, f"Serve this model without --quantization {NAME}"
            )
        whole_layer(config)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Our method for the experts; vLLM's unquantized one for linear layers, its default for others."""
        if isinstance(layer, RoutedExperts):
            return Mxfp4TritonMoEMethod(layer.moe_config, prefix)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


class Mxfp4TritonMoEMethod(FusedMoEMethodBase):
    """One MoE layer: create its parameters, load them, prepare them for the backend, and run it.

    Args:
        moe: vLLM's description of the layer on this rank.
        prefix: the layer's name, for error texts.

    Raises:
        Mxfp4Error: the model is not GPT-OSS, its sizes, dtype or parallelism cannot be served, or no
            backend can run here.
    """

    # vLLM's GPT-OSS loader streams single experts of a method that says so (since 0.30).
    weight_dtype = "mxfp4"

    def __init__(self, moe: FusedMoEConfig, prefix: str) -> None:
        super().__init__(moe)
        config = get_current_vllm_config()
        check_servable(config, moe)
        self.prefix = prefix
        self.shape = moe_shape(config.model_config.hf_text_config, moe)
        arch = backends.arch_of(torch.device(moe.device))
        check_activation_dtype(moe.in_dtype, arch)
        self.choice = choose_once(self.shape, arch, settings.from_environment())
        check_capture(config, self.choice.selection)
        logger.info_once(
            "MoE layers run through %s. Each is %s.", str(self.choice.selection), str(self.shape)
        )
        self.backend = self.choice.selection.backend
        self.prepared: Any = None
        # Local experts that each parameter still waits for.
        from_checkpoint = config.load_config.load_format != "dummy"
        self.missing = {name: set(range(self.shape.experts if from_checkpoint else 0)) for name in PARAMETERS}

    @property
    def is_monolithic(self) -> bool:
        """The backends route from the router's logits themselves."""
        return True

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig | None:
        """None: it describes layers to vLLM's own kernels."""
        return None

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, *_: Any, **__: Any
    ) -> tuple[int, int]:
        """Slice the intermediate size at whole blocks; the last rank's share may be shorter."""
        return hidden_size, self.shape.intermediate

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the six parameters, zeroed: zero blocks and biases add nothing where a rank is short."""
        self.local_expert = layer.expert_map_manager.map_global_to_local
        tensors = tensor_shapes(num_experts, hidden_size, intermediate_size_per_partition)
        for name, (field, _) in PARAMETERS.items():
            dtype, size = tensors[field]
            parameter = torch.nn.Parameter(torch.zeros(size, dtype=dtype), requires_grad=False)
            parameter.weight_loader = self.load_weight  # type: ignore[attr-defined]
            layer.register_parameter(name, parameter)

    def load_weight(
        self,
        parameter: torch.nn.Parameter,
        loaded: torch.Tensor,
        weight_name: str,
        shard_id: str | None = None,
        expert_id: int | None = None,
        return_success: bool = False,
    ) -> bool | None:
        """Copy a tensor of the checkpoint into a parameter.

        Args:
            parameter: one of the six.
            loaded: all of this rank's experts, which vLLM's GPT-OSS model has sliced for this rank;
                or, with `expert_id`, one whole expert of the model.
            weight_name: ends in the parameter's name.
            shard_id: not needed; the name says it.
            expert_id: the expert's number in the model.
            return_success: whether the caller wants to know if the expert lives here.

        Raises:
            Mxfp4Error: the tensor has the wrong dtype or shape, or the layer is prepared already.
        """
        if self.prepared is not None:
            fix = "Start the server anew: reload_weights and sleep level 2 are not served"
            raise Mxfp4Error(f"{self.prefix}'s weights", "loaded once", "a second time", fix)
        name = weight_name.rpartition(".")[2]
        field, checkpoint_name = PARAMETERS[name]
        start = self.moe.moe_parallel_config.tp_rank * self.shape.intermediate
        stop = max(start, min(start + self.shape.intermediate, self.moe.intermediate_size))
        target = parameter.data
        experts = set(range(self.shape.experts))
        if expert_id is not None:
            local_id = self.local_expert(expert_id)
            if local_id == -1:
                return False if return_success else None
            target = target[local_id : local_id + 1]
            loaded = slice_expert(field, loaded, start, stop)[None]
            experts = {local_id}
        dtype, size = tensor_shapes(len(experts), self.shape.hidden, stop - start)[field]
        check_tensor(f"{self.prefix}.{checkpoint_name}", loaded, dtype, size)
        if field == "w2_bias" and start > 0:
            loaded = torch.zeros_like(loaded)  # The ranks' outputs are summed: it counts on the first.
        target[tuple(slice(0, n) for n in loaded.shape)].copy_(loaded)
        self.missing[name] -= experts
        return True if return_success else None

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Check the layer, hand it to the backend, and let go of the parameters.

        Raises:
            Mxfp4Error: a tensor was missing, a scale is NaN, or no backend computed the layer right.
        """
        for name, experts in self.missing.items():
            if experts:
                raise Mxfp4Error(
                    f"{self.prefix}.{PARAMETERS[name][1]}",
                    "in the checkpoint",
                    f"nothing for {len(experts)} of this rank's {self.shape.experts} experts",
                    "Download the checkpoint again",
                )
        fields = {field: getattr(layer, name).data for name, (field, _) in PARAMETERS.items()}
        expert_map = layer.expert_map_manager.expert_map
        if expert_map is not None:
            expert_map = expert_map.to(fields["w13"].device)
        weights = MoeWeights(**fields, expert_map=expert_map)
        check_weights(weights, self.shape, f"{self.prefix}.")
        self.backend, self.prepared = self.choice.prepare(weights, self.prefix)
        for name in PARAMETERS:
            delattr(layer, name)

    def apply_monolithic(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        router_logits: torch.Tensor,
        input_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """bf16[T, H] and the router's logits [T, global_experts] to bf16[T, H]."""
        return self.backend.run(self.prepared, x, router_logits)


def check_checkpoint_method(quant_method: str | None) -> None:
    """Raise Mxfp4Error unless a checkpoint says that it is MXFP4."""
    if quant_method not in CHECKPOINT_METHODS:
        raise Mxfp4Error(
            "quantization_config.quant_method",
            f"mxfp4 for --quantization {NAME}",
            quant_method,
            "Serve this checkpoint without the flag, or use one of GPT-OSS's MXFP4 checkpoints",
        )


def check_servable(config: VllmConfig, moe: FusedMoEConfig) -> None:
    """Raise Mxfp4Error for a checkpoint or a way of running that this package does not serve."""
    ranks = moe.moe_parallel_config.ep_size
    if moe.num_experts % ranks:
        raise Mxfp4Error(
            "the number of expert-parallel ranks", f"a divisor of {moe.num_experts}", ranks, "Change it"
        )
    if moe.moe_parallel_config.enable_eplb:
        raise Mxfp4Error("--enable-eplb", "off", "on", "Leave it out: experts cannot be moved between ranks")
    if moe.is_lora_enabled:
        raise Mxfp4Error("--enable-lora", "off", "on", f"Serve adapters without --quantization {NAME}")
    if moe.moe_backend != "auto":
        fix = f"Leave it out, or choose a backend with {settings.BACKEND_VAR}"
        raise Mxfp4Error("--moe-backend", f"auto with --quantization {NAME}", moe.moe_backend, fix)
    offload = config.offload_config
    for name, amount in (
        ("--cpu-offload-gb", offload.uva.cpu_offload_gb),
        ("--offload-group-size", offload.prefetch.offload_group_size),
    ):
        if amount:
            raise Mxfp4Error(name, "0", amount, "Leave it out: prepared experts stay where they are")
    # vLLM 0.32 has it elsewhere, and refuses it itself.
    if getattr(config.model_config, "enable_return_routed_experts", False):
        fix = "Leave it out: the routing is inside of the layer"
        raise Mxfp4Error("--enable-return-routed-experts", "off", "on", fix)
    data_parallel_size = config.parallel_config.data_parallel_size
    if data_parallel_size != 1:
        raise Mxfp4Error(
            "--data-parallel-size", "1", data_parallel_size, "Start one server for each replica instead"
        )
    load_format = config.load_config.load_format
    if load_format in PICKLES:
        raise Mxfp4Error("--load-format", "one that reads safetensors", load_format, "Leave it out")
    text_config = config.model_config.hf_text_config
    if load_format != "dummy":
        check_files(config.model_config.model, text_config.num_hidden_layers, whole_layer(text_config))


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
    for field, name in PARAMETERS.values():
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


class Choice:
    """The backend of a model's layers: chosen before they are loaded, and again if a layer comes out wrong.

    Args:
        shape: each layer on this rank.
        arch: as `backends.arch_of` names it.
        wanted: what the user asked for.

    Raises:
        Mxfp4Error: no backend can serve it.
    """

    def __init__(self, shape: MoeShape, arch: str, wanted: settings.Settings) -> None:
        self.shape, self.wanted = shape, wanted
        self.selection = backends.select(shape, arch, wanted)
        self.checked = self.narrow = False

    def prepare(self, weights: MoeWeights, prefix: str) -> tuple[backends.Backend, Any]:
        """A layer for the backend that serves it, compared with float64 where the user wants that.

        The reference is what others are compared with, so it is not.

        Args:
            weights: consumed.
            prefix: the layer's name, for the log.

        Raises:
            Mxfp4Error: no backend computed the layer right, or there was too little memory.
        """
        try:
            return self._prepare(weights, prefix)
        except torch.OutOfMemoryError as error:
            name, rule = "the GPU's free memory", f"enough to prepare {prefix}"
            fix = "Stop what else uses this GPU, or serve with a larger --tensor-parallel-size"
            raise Mxfp4Error(name, rule, brief(error).rstrip("."), fix) from error

    def _prepare(self, weights: MoeWeights, prefix: str) -> tuple[backends.Backend, Any]:
        backend, when = self.selection.backend, self.wanted.self_check
        if when == "off":
            logger.info_once("Layers are not checked: %s=off.", settings.SELF_CHECK_VAR)
        if backend.NAME == "reference" or when == "off" or (when == "first" and self.checked):
            prepared = backend.prepare(weights, self.shape, self.wanted.tables)
            if self.narrow:
                # None where this layer's scales are not for those kernels anyway.
                prepared = backend.without_decode(prepared) or prepared
            return backend, prepared

        def report(name: str, outcome: self_check.Outcome) -> None:
            log = logger.warning if outcome.miss else logger.info
            log("Self-check of %s through %s: %s.", prefix, name, outcome)

        before = self.selection
        self.selection, prepared, self.narrow = self_check.prepare(
            before, weights, self.shape, self.wanted, report
        )
        self.checked = True
        if self.selection is not before:
            logger.warning("MoE layers run through %s.", self.selection)
        return self.selection.backend, prepared


@functools.cache
def choose_once(shape: MoeShape, arch: str, wanted: settings.Settings) -> Choice:
    """The choice that all layers share."""
    return Choice(shape, arch, wanted)


def check_capture(config: VllmConfig, selection: backends.Selection) -> None:
    """Raise Mxfp4Error where a GPU would capture the reference in a graph: it looks at what was routed."""
    captured = not config.model_config.enforce_eager and selection.arch != "cpu"
    if captured and selection.backend.NAME == "reference":
        fix = f"Add --enforce-eager, or choose another with {settings.BACKEND_VAR}"
        raise Mxfp4Error("--enforce-eager", "given for the reference backend on a GPU", "nothing", fix)


def check_activation_dtype(dtype: torch.dtype, arch: str) -> None:
    """Raise Mxfp4Error unless the experts can take activations of this dtype on this arch."""
    allowed = (torch.bfloat16, torch.float32) if arch == "cpu" else (torch.bfloat16,)
    if dtype not in allowed:
        raise Mxfp4Error(
            "--dtype", f"{' or '.join(map(str, allowed))} on {arch}", dtype, "Serve with --dtype bfloat16"
        )


def moe_shape(config: Any, moe: FusedMoEConfig) -> MoeShape:
    """One layer of the model on this rank.

    Args:
        config: as in `moe.whole_layer`.
        moe: vLLM's description of the layer, its sizes not yet rounded.
    """
    return dataclasses.replace(
        whole_layer(config),
        experts=moe.num_local_experts,
        intermediate=-(-moe.intermediate_size_per_partition // BLOCK) * BLOCK,
    )


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
