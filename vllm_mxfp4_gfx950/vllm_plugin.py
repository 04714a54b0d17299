"""The vLLM adapter: `--quantization mxfp4-triton`, from the flag to the MoE layers' forward.

It uses what vLLM offers to plugins and to models, the same calls from vLLM 0.24 to 0.33: an entry
point, a registered QuantizationConfig, and a FusedMoEMethodBase that does its own routing.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import torch
from vllm import envs
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from vllm_mxfp4_gfx950 import backends, checkpoint, serving, settings
from vllm_mxfp4_gfx950.checkpoint import PARAMETERS
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.moe import (
    MoeShape,
    MoeWeights,
    check_weights,
    tensor_shapes,
    whole_layer,
)
from vllm_mxfp4_gfx950.mxfp4 import BLOCK
from vllm_mxfp4_gfx950.settings import FLAG

# Loggers below `vllm` print where vLLM's own do.
logger = init_logger("vllm.mxfp4_triton")


def register() -> None:
    """Make the flag and our environment variables known; vLLM calls this in each of its processes."""
    register_quantization_config(FLAG)(Mxfp4TritonConfig)
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
        checkpoint.check_method(quant_method)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Mxfp4TritonConfig:
        """Read `quantization_config` of the model's config.json."""
        return cls(config.get("quant_method"))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim a checkpoint, only when the user asked for it by flag."""
        if user_quant != FLAG:
            return None
        checkpoint.check_method(hf_quant_cfg.get("quant_method"))
        return FLAG

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
        """Refuse other models and impossible sizes, as soon as vLLM has read them."""
        config = hf_config.get_text_config()
        model_type = config.model_type
        if model_type != "gpt_oss":
            raise Mxfp4Error(
                "model_type", "gpt_oss", model_type, f"Serve this model without --quantization {FLAG}"
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
        serving.check_activation_dtype(moe.in_dtype, arch)
        self.layers = serving.model_layers(self.shape, arch, settings.from_environment())
        check_capture(config, self.layers.selection)
        logger.info_once(
            "MoE layers run through %s. Each is %s.", str(self.layers.selection), str(self.shape)
        )
        self.prepared: backends.Layer | None = None
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
        for name, field in PARAMETERS.items():
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
        field = PARAMETERS[name]
        start = self.moe.moe_parallel_config.tp_rank * self.shape.intermediate
        stop = max(start, min(start + self.shape.intermediate, self.moe.intermediate_size))
        target = parameter.data
        experts = set(range(self.shape.experts))
        if expert_id is not None:
            local_id = self.local_expert(expert_id)
            if local_id == -1:
                return False if return_success else None
            target = target[local_id : local_id + 1]
            loaded = checkpoint.slice_expert(field, loaded, start, stop)[None]
            experts = {local_id}
        size = tensor_shapes(len(experts), self.shape.hidden, stop - start)[field][1]
        loaded = checkpoint.read(f"{self.prefix}.{checkpoint.TENSORS[field]}", field, loaded, size)
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
                    f"{self.prefix}.{checkpoint.TENSORS[PARAMETERS[name]]}",
                    "in the checkpoint",
                    f"nothing for {len(experts)} of this rank's {self.shape.experts} experts",
                    "Download the checkpoint again",
                )
        fields = {field: getattr(layer, name).data for name, field in PARAMETERS.items()}
        expert_map = layer.expert_map_manager.expert_map
        if expert_map is not None:
            expert_map = expert_map.to(fields["w13"].device)
        weights = MoeWeights(**fields, expert_map=expert_map)
        check_weights(weights, self.shape, f"{self.prefix}.")
        self.prepared = self.layers.prepare(weights, self.prefix)
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
        raise Mxfp4Error("--enable-lora", "off", "on", f"Serve adapters without --quantization {FLAG}")
    if moe.moe_backend != "auto":
        fix = f"Leave it out, or choose a backend with {settings.BACKEND_VAR}"
        raise Mxfp4Error("--moe-backend", f"auto with --quantization {FLAG}", moe.moe_backend, fix)
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
    if load_format in checkpoint.PICKLES:
        raise Mxfp4Error("--load-format", "one that reads safetensors", load_format, "Leave it out")
    text_config = config.model_config.hf_text_config
    if load_format != "dummy":
        checkpoint.check_files(
            config.model_config.model, text_config.num_hidden_layers, whole_layer(text_config)
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


def check_capture(config: VllmConfig, selection: backends.Selection) -> None:
    """Raise Mxfp4Error where a GPU would capture the reference in a graph: it looks at what was routed."""
    captured = not config.model_config.enforce_eager and selection.arch != "cpu"
    if captured and selection.backend.NAME == "reference":
        fix = f"Add --enforce-eager, or choose another with {settings.BACKEND_VAR}"
        raise Mxfp4Error("--enforce-eager", "given for the reference backend on a GPU", "nothing", fix)
