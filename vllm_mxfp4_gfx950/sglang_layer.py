"""The SGLang adapter: GPT-OSS's block with our method, what is refused, and a layer from load to forward.

It uses what SGLang offers to plugins and to models, the same calls in SGLang 0.5.16 and 0.5.23: a hook around
one constructor, a QuantizationConfig, and a FusedMoEMethodBase that takes the router's logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.layers.dp_attention import is_dp_attention_enabled
from sglang.srt.layers.moe import get_moe_a2a_backend, get_moe_runner_backend
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.moe.topk import TopKOutputFormat
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase, QuantizationConfig
from sglang.srt.layers.quantization.mxfp4 import Mxfp4Config
from sglang.srt.models.gpt_oss import GptOssSparseMoeBlock
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_server_args

from vllm_mxfp4_gfx950 import backends, checkpoint, serving, settings
from vllm_mxfp4_gfx950.checkpoint import LayerLoader
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.moe import MoeShape, tensor_shapes, whole_layer
from vllm_mxfp4_gfx950.mxfp4 import BLOCK
from vllm_mxfp4_gfx950.settings import SGLANG_VAR

TARGET = f"{GptOssSparseMoeBlock.__module__}.{GptOssSparseMoeBlock.__name__}.__init__"

PARAMETERS = {name.replace("bias", "weight_bias"): field for name, field in checkpoint.PARAMETERS.items()}
"""What SGLang's loader calls each of a layer's parameters, and its field in MoeWeights."""

OTHER_RUNNER = f"Leave it out, or choose a backend with {settings.BACKEND_VAR}"
NOT_MOVED = "Leave it out: experts cannot be moved between ranks"
ROUTED_INSIDE = "Leave it out: the routing is inside of the layer"
STAY = "Leave it out: prepared experts stay where they are"
OTHER_PLAN = f"Leave it out, or serve without {SGLANG_VAR}"

ALLOWED: dict[str, tuple[tuple[Any, ...], str]] = {
    "enable_eplb": ((False,), NOT_MOVED),
    "init_expert_location": (("trivial",), NOT_MOVED),
    "ep_num_redundant_experts": ((0,), NOT_MOVED),
    "elastic_ep_backend": ((None,), NOT_MOVED),
    "moe_dp_size": ((1,), OTHER_PLAN),
    "enable_lora": ((None, False), f"Serve adapters without {SGLANG_VAR}"),
    "lora_paths": ((None,), f"Serve adapters without {SGLANG_VAR}"),
    "enable_return_routed_experts": ((False,), ROUTED_INSIDE),
    "expert_distribution_recorder_mode": ((None,), ROUTED_INSIDE),
    "cpu_offload_gb": ((0,), STAY),
    "offload_group_size": ((-1,), STAY),
    "load_format": (("auto", "safetensors", "fastsafetensors", "runai_streamer", "dummy"), "Leave it out"),
}
"""What SGLang may be told, by the name in its ServerArgs, and what to do about anything else."""

RUNNERS = ("auto", "triton_kernel")
"""As the user may have it: SGLang makes the second of the first where it finds triton_kernels."""


def hook() -> None:
    """Have SGLang build GPT-OSS's blocks through `build_block`, once its plugins are loaded."""
    HookRegistry.register(TARGET, build_block, HookType.AROUND)


def build_block(
    original: Callable[..., None],
    block: GptOssSparseMoeBlock,
    layer_id: int,
    config: Any,
    quant_config: QuantizationConfig | None = None,
    prefix: str = "",
) -> None:
    """Build a block as SGLang does, but with our config for its experts, and its router's logits handed on.

    Args:
        original: SGLang's `__init__`.
        block: what is built.
        layer_id: the layer's number.
        config: the model's config.json, as attributes.
        quant_config: SGLang's, for the checkpoint's format.
        prefix: the block's name.

    Raises:
        Mxfp4Error: the checkpoint is not MXFP4, its sizes, its dtype or something that was asked for cannot
            be served, or no backend can run here.
    """
    if not (isinstance(quant_config, Mxfp4Config) and quant_config.is_checkpoint_mxfp4_serialized):
        found = quant_config.get_name() if quant_config else None
        fix = f"Serve this checkpoint without {SGLANG_VAR}, or use one of GPT-OSS's MXFP4 checkpoints"
        raise Mxfp4Error("the checkpoint's quantization", f"mxfp4 for {SGLANG_VAR}=1", found, fix)
    check_servable()
    original(block, layer_id, config, ExpertsConfig(config), prefix)
    method = block.experts.quant_method
    if not isinstance(method, ExpertsMethod):
        raise Mxfp4Error("the experts' method", f"ours for {SGLANG_VAR}=1", type(method).__name__, OTHER_PLAN)
    block.topk.topk_config.output_format = TopKOutputFormat.BYPASSED


def check_servable() -> None:
    """Raise Mxfp4Error for a way of running that this package does not serve."""
    arguments = get_server_args()
    asked = [(name, getattr(arguments, name), allowed, fix) for name, (allowed, fix) in ALLOWED.items()]
    asked.append(("moe_runner_backend", get_moe_runner_backend().value, RUNNERS, OTHER_RUNNER))
    asked.append(("moe_a2a_backend", get_moe_a2a_backend().value, ("none",), OTHER_PLAN))
    for name, value, allowed, fix in asked:
        if value not in allowed:
            rule = f"{' or '.join(map(str, allowed))} with {SGLANG_VAR}=1"
            raise Mxfp4Error(f"--{name.replace('_', '-')}", rule, value, fix)
    if is_dp_attention_enabled():
        raise Mxfp4Error("--enable-dp-attention", f"off with {SGLANG_VAR}=1", "on", OTHER_PLAN)
    if envs.SGLANG_AITER_FUSE_RMSNORM_PAD.get():
        fix = "Unset it: our layers take activations as wide as the model"
        raise Mxfp4Error("SGLANG_AITER_FUSE_RMSNORM_PAD", f"off with {SGLANG_VAR}=1", "on", fix)


class ExpertsConfig(Mxfp4Config):
    """SGLang's config of MXFP4, for the experts of one GPT-OSS.

    Args:
        model: the model's config.json, as attributes.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(is_checkpoint_mxfp4_serialized=True)
        self.model = model

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> ExpertsMethod:
        """Our method, for the only layer that a block gives this config to."""
        return ExpertsMethod(self.model, layer, prefix)


class ExpertsMethod(FusedMoEMethodBase):
    """One MoE layer: create its parameters, load them, prepare them for the backend, and run it.

    Args:
        model: the model's config.json, as attributes.
        layer: SGLang's FusedMoE, with its ranks, before it has parameters.
        prefix: the layer's name, for error texts.
    """

    # SGLang asks for it: no runner of its own is used.
    runner = None

    def __init__(self, model: Any, layer: Any, prefix: str) -> None:
        super().__init__()
        whole = whole_layer(model)
        share = -(-whole.intermediate // layer.moe_tp_size // BLOCK) * BLOCK
        self.shape = dataclasses.replace(whole, experts=layer.num_local_experts, intermediate=share)
        arch = backends.arch_of(torch.get_default_device())
        serving.check_activation_dtype(layer.params_dtype, arch)
        arguments = get_server_args()
        chunk = arguments.chunked_prefill_size or -1
        largest = chunk if chunk > 0 else arguments.max_prefill_tokens
        self.layers = serving.model_layers(self.shape, arch, settings.from_environment(), largest)
        if arch != "cpu" and self.layers.selection.backend.NAME == "reference":
            fix = f"Choose another with {settings.BACKEND_VAR}: this one waits for the GPU, and graphs cannot"
            raise Mxfp4Error("the backend", "one for this GPU", "reference", fix)
        columns = checkpoint.rank_columns(self.shape, whole.intermediate, layer.moe_tp_rank)
        self.loader = LayerLoader(prefix, self.shape, columns, rank_experts(self.shape, layer.moe_ep_rank))
        self.from_checkpoint = arguments.load_format != "dummy"
        self.prepared: backends.Layer | None = None

    def create_weights(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the six parameters."""
        tensors = tensor_shapes(self.shape.experts, self.shape.hidden, self.shape.intermediate)
        checkpoint.register_parameters(layer, PARAMETERS, tensors, self.load_weight)

    def create_moe_runner(self, layer: torch.nn.Module, moe_runner_config: Any) -> None:
        """None: `apply` does it all."""

    def load_weight(
        self,
        parameter: torch.nn.Parameter,
        loaded: torch.Tensor,
        weight_name: str,
        shard_id: str | None = None,
        expert_id: int | None = None,
    ) -> None:
        """Copy a tensor of the checkpoint into a parameter.

        Args:
            parameter: one of the six.
            loaded: all of this rank's experts, which SGLang's GPT-OSS model has sliced for this rank.
            weight_name: ends in the parameter's name.
            shard_id, expert_id: not needed; the name says it, and it is of all experts.

        Raises:
            Mxfp4Error: the tensor has the wrong dtype or shape.
        """
        self.loader.load(PARAMETERS[weight_name.rpartition(".")[2]], parameter.data, loaded)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check the layer, hand it to the backend, and let go of the parameters.

        Raises:
            Mxfp4Error: a tensor was missing, a scale is NaN, or no backend computed the layer right.
        """
        if self.from_checkpoint:
            self.loader.check_whole()
        tensors = {field: getattr(layer, name).data for name, field in PARAMETERS.items()}
        self.prepared = self.layers.prepare(self.loader.weights(tensors), self.loader.prefix)
        for name in PARAMETERS:
            delattr(layer, name)
        layer.register_state_dict_pre_hook(serving.refuse_state_dict)

    def apply(self, layer: torch.nn.Module, dispatch_output: Any) -> StandardCombineInput:
        """bf16[T, H] and the router's logits [T, global_experts], as dispatched, to bf16[T, H]."""
        assert self.prepared is not None
        logits = dispatch_output.topk_output.router_logits
        return StandardCombineInput(hidden_states=self.prepared.run(dispatch_output.hidden_states, logits))


def rank_experts(shape: MoeShape, rank: int) -> torch.Tensor | None:
    """The expert_map of one of the ranks that share the experts out in order; None when it holds all."""
    if shape.experts == shape.global_experts:
        return None
    local = torch.arange(shape.global_experts, dtype=torch.int32, device="cpu") - rank * shape.experts
    return torch.where((local >= 0) & (local < shape.experts), local, -1)
