"""The vLLM adapter: `--quantization mxfp4-triton`, from the flag to the MoE layers' forward.

It uses what vLLM offers to plugins and to models, the same calls from vLLM 0.24 to 0.33: an entry
point, a registered QuantizationConfig, and a FusedMoEMethodBase that does its own routing.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import torch
from vllm import envs
from vllm.config import CompilationMode, VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.model_loader.utils import initialize_model

from vllm_mxfp4_gfx950 import backends, checkpoint, files, models, serving, settings
from vllm_mxfp4_gfx950.checkpoint import PARAMETERS, LayerLoader
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.moe import MoeShape, tensor_shapes, whole_layer
from vllm_mxfp4_gfx950.mxfp4 import BLOCK
from vllm_mxfp4_gfx950.settings import FLAG
from vllm_mxfp4_gfx950.vllm_checks import (
    check_capture,
    check_registry,
    check_servable,
    files_to_load,
    names_in_checkpoint,
)


def register() -> None:
    """Make the flag and our environment variables known; vLLM calls this in each of its processes."""
    register_quantization_config(FLAG)(Mxfp4TritonConfig)
    # vLLM warns of VLLM_* variables that it does not know, and keys its compile cache by those it does.
    for name in settings.VARIABLES:
        envs.environment_variables.setdefault(name, functools.partial(os.environ.get, name))


class Mxfp4TritonConfig(QuantizationConfig):
    """GPT-OSS in MXFP4 with its experts computed by this package; all other layers are vLLM's own.

    Args:
        quant_method: the checkpoint's own name for its format; None when it has no quantization.
    """

    def __init__(self, quant_method: str | None = None) -> None:
        super().__init__()
        self.quant_method = quant_method
        self.checked = False

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Mxfp4TritonConfig:
        """Read `quantization_config` of the model's config.json."""
        return cls(config.get("quant_method"))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim a checkpoint, only when the user asked for it by flag."""
        return FLAG if user_quant == FLAG else None

    @classmethod
    def get_name(cls) -> str:
        """The value of `--quantization`."""
        return FLAG

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
        """Refuse other models, other formats and impossible sizes, as soon as vLLM has read them."""
        check_registry()
        config = hf_config.get_text_config()
        model_type = config.model_type
        if model_type != "gpt_oss":
            raise Mxfp4Error(
                "model_type", "gpt_oss", model_type, f"Serve this model without --quantization {FLAG}"
            )
        files.check_method(Path(model_name), self.quant_method)
        file = Path(model_name) / "config.json"
        if file.is_file():  # transformers keeps one of two counts, and does not say which.
            models.check_counts(file, models.read_json(file))
        whole_layer(config)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Our method for the experts; vLLM's unquantized one for linear layers, its default for others."""
        if not isinstance(layer, (RoutedExperts, LinearBase)):
            return None  # vLLM asks for attention while it reloads too, where it has no current config.
        config = get_current_vllm_config()
        if config.model_config.using_transformers_backend():
            fix = "Leave out --model-impl, and have GptOssForCausalLM among config.json's architectures"
            raise Mxfp4Error("the model", f"vLLM's own for --quantization {FLAG}", "transformers'", fix)
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        if not self.checked:  # With a model's first layer.
            check_servable(config, layer.moe_config)
            check_checkpoint(config)
            self.checked = True
        return self.moe_method(layer.moe_config, prefix)

    def moe_method(self, moe: FusedMoEConfig, prefix: str) -> Mxfp4TritonMoEMethod:
        """A layer's method."""
        return Mxfp4TritonMoEMethod(moe, prefix)


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
        self.prefix = prefix
        self.shape = moe_shape(config.model_config.hf_text_config, moe)
        arch = backends.arch_of(torch.device(moe.device))
        serving.check_activation_dtype(moe.in_dtype, arch)
        # Data-parallel ranks bring their tokens together.
        ranks = config.parallel_config.data_parallel_size
        largest = ranks * config.scheduler_config.max_num_batched_tokens
        captured = ranks * max(config.compilation_config.cudagraph_capture_sizes or (), default=0)
        self.layers = serving.model_layers(self.shape, arch, settings.from_environment(), largest, captured)
        check_capture(config, self.layers.selection)
        self.prepared: backends.Layer | None = None
        self.from_checkpoint = config.load_config.load_format != "dummy"

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

    @property
    def columns(self) -> range:
        """This rank's share of the intermediate size."""
        rank = self.moe.moe_parallel_config.tp_rank
        return checkpoint.rank_columns(self.shape, self.moe.intermediate_size, rank)

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the six parameters."""
        self.loader = LayerLoader(self.prefix, self.shape, self.columns, layer.expert_map_manager.expert_map)
        tensors = tensor_shapes(num_experts, hidden_size, intermediate_size_per_partition)
        checkpoint.register_parameters(layer, PARAMETERS, tensors, self.load_weight)

    def load_weight(
        self,
        param: torch.nn.Parameter,
        loaded: torch.Tensor,
        weight_name: str,
        shard_id: str | None = None,
        expert_id: int | None = None,
        return_success: bool = False,
    ) -> bool | None:
        """Copy a tensor of the checkpoint into a parameter.

        Where weights are loaded again, vLLM calls this twice: for a parameter on the meta device, to count
        what comes, and for one in memory that was never written.

        Args:
            param: one of the six, by the name under which vLLM hands over the second.
            loaded: all of this rank's experts, which vLLM's GPT-OSS model has sliced for this rank;
                or, with `expert_id`, one whole expert of the model.
            weight_name: ends in the parameter's name.
            shard_id: not needed; the name says it.
            expert_id: the expert's number in the model.
            return_success: whether the caller wants to know if the expert lives here.

        Raises:
            Mxfp4Error: the tensor has the wrong dtype or shape.
        """
        field = PARAMETERS[weight_name.rpartition(".")[2]]
        here = self.loader.load(field, param.data, loaded, expert_id)
        return here if return_success else None

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Check the layer, hand it to the backend, and let go of the parameters.

        Where weights are loaded again, they go where the first ones lie, as captured graphs read those.

        Raises:
            Mxfp4Error: a tensor was missing, a scale is NaN, or no backend computed the layer right.
        """
        if self.prepared is not None:
            self.loader.check_whole("Give all of a layer's experts together")
        elif self.from_checkpoint:
            self.loader.check_whole()
        tensors = {field: getattr(layer, name).data for name, field in PARAMETERS.items()}
        weights = self.loader.weights(tensors)
        if self.prepared is None:
            self.prepared = self.layers.prepare(weights, self.prefix)
            layer.register_state_dict_pre_hook(serving.refuse_state_dict)
        else:
            self.layers.refill(self.prepared, weights, self.prefix)
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
        assert self.prepared is not None
        return self.prepared.run(x, router_logits)


class UnloadedConfig(Mxfp4TritonConfig):
    """For a model that is there to be asked what it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.checked = True

    def moe_method(self, moe: FusedMoEConfig, prefix: str) -> Mxfp4TritonMoEMethod:
        """A layer's method."""
        return UnloadedMoEMethod(moe, prefix)


class UnloadedMoEMethod(Mxfp4TritonMoEMethod):
    """One MoE layer's parameters, which take no memory, and their loader."""

    def __init__(self, moe: FusedMoEConfig, prefix: str) -> None:
        FusedMoEMethodBase.__init__(self, moe)
        self.prefix = prefix
        self.shape = moe_shape(get_current_vllm_config().model_config.hf_text_config, moe)
        self.prepared = None

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the six parameters, no wider than what a checkpoint has for them."""
        with torch.device("meta"):
            super().create_weights(layer, num_experts, hidden_size, len(self.columns), params_dtype)


def check_checkpoint(config: VllmConfig) -> None:
    """Raise Mxfp4Error for a checkpoint whose files do not give the model all that it needs."""
    found = files_to_load(config)
    if found:
        text_config = config.model_config.hf_text_config
        model = unloaded_model(config)
        files.check_files(
            found,
            model,
            functools.partial(names_in_checkpoint, model),
            bool(getattr(text_config, "tie_word_embeddings", False)),
            text_config.num_hidden_layers,
            whole_layer(text_config),
        )


def unloaded_model(config: VllmConfig) -> Any:
    """The model that is being built, another one, that takes no memory: nothing is ever written to it."""
    compilation = copy.copy(config.compilation_config)
    compilation.mode = CompilationMode.NONE
    compilation.static_forward_context, compilation.static_all_moe_layers = {}, []
    config = copy.copy(config)
    config.compilation_config, config.quant_config = compilation, UnloadedConfig()
    with torch.device("cpu"):
        return initialize_model(config)


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
