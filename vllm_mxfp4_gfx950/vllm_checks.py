"""What vLLM was told to do, of which some is not served, and what of a checkpoint it will read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.model_loader import DefaultModelLoader, RunaiModelStreamerLoader, get_model_loader
from vllm.model_executor.models import ModelRegistry

from vllm_mxfp4_gfx950 import backends, files, plugins, settings
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.settings import FLAG

PICKLES = ("pt", "npcache")
"""Load formats that read nothing but pickles."""

STATES = ("sharded_state", "runai_streamer_sharded", "tensorizer")
"""Those that fill a model's parameters, or some of whose files do, and not by the parameters' own loaders."""

NO_ADAPTERS = ("experts", "routed_experts", "router", "gate_up_proj", "down_proj")
"""What the experts, their matmuls and what routes to them are called in vLLM and in adapters."""


def check_registry() -> None:
    """Raise Mxfp4Error where another plugin has replaced vLLM's GPT-OSS, whose layers ask for ours."""
    model = ModelRegistry.models["GptOssForCausalLM"]
    # A name for what is imported when it is needed, or a class.
    module = getattr(model, "module_name", None) or model.model_cls.__module__
    if plugins.package_of(module) != "vllm":
        rule = f"vLLM's own for --quantization {FLAG}"
        raise Mxfp4Error("GptOssForCausalLM", rule, module, plugins.how_to_turn_off(module))


def check_servable(config: VllmConfig, moe: FusedMoEConfig) -> None:
    """Raise Mxfp4Error for a checkpoint or a way of running that this package does not serve."""
    ranks = moe.moe_parallel_config.ep_size
    # vLLM's GPT-OSS rounds each rank's share down as it loads, and loses what is left.
    if moe.num_experts % ranks:
        raise Mxfp4Error(
            "the number of expert-parallel ranks", f"a divisor of {moe.num_experts}", ranks, "Change it"
        )
    if moe.moe_parallel_config.enable_eplb:
        raise Mxfp4Error("--enable-eplb", "off", "on", "Leave it out: experts cannot be moved between ranks")
    if moe.is_lora_enabled:
        check_adapters(config)
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
    check_data_parallel(config)
    # Asked of vLLM's that have it: with expert parallelism its ranks do not gather each other's tokens.
    context_parallel_size = getattr(config.parallel_config, "prefill_context_parallel_size", 1)
    if context_parallel_size != 1:
        raise Mxfp4Error("--prefill-context-parallel-size", "1", context_parallel_size, "Leave it out")
    load_format = config.load_config.load_format
    if load_format in STATES:
        fix = "Leave it out, and serve the checkpoint that the state was made from"
        raise Mxfp4Error("--load-format", "one that reads a checkpoint", load_format, fix)
    if load_format in PICKLES:
        raise Mxfp4Error("--load-format", "one that reads safetensors", load_format, "Leave it out")


def check_adapters(config: VllmConfig) -> None:
    """Raise Mxfp4Error where adapters may change the experts or what routes to them.

    vLLM wraps the layers that are named, or all that it can, and its own kernels of the experts only.
    """
    # Asked of vLLM's that have it.
    names = getattr(config.lora_config, "target_modules", None)
    refused = [name for name in names or () if name.rpartition(".")[2] in NO_ADAPTERS]
    if refused or not names:
        rule = f"given, without experts or their router, where --enable-lora meets --quantization {FLAG}"
        fix = "Name what else your adapters change, such as qkv_proj o_proj, or serve them without the flag"
        raise Mxfp4Error("--lora-target-modules", rule, ", ".join(refused) or "nothing", fix)


def check_data_parallel(config: VllmConfig) -> None:
    """Raise Mxfp4Error where data-parallel ranks, which share the experts, would not share their tokens.

    vLLM's runner gathers tokens and logits in front of a method that brings no kernel of vLLM's own, and
    hands the sums back behind it, by the collectives of one all-to-all backend.
    """
    ranks, backend = config.parallel_config.data_parallel_size, config.parallel_config.all2all_backend
    if ranks == 1:
        return
    if not hasattr(MoERunner, "do_naive_dispatch_combine"):
        rule = "1 with this vLLM, which gathers tokens for its own kernels only"
        raise Mxfp4Error("--data-parallel-size", rule, ranks, "Start one server for each replica instead")
    if backend != "allgather_reducescatter":
        rule = f"allgather_reducescatter with --quantization {FLAG}"
        raise Mxfp4Error("--all2all-backend", rule, backend, "Leave it out")


def check_capture(config: VllmConfig, selection: backends.Selection) -> None:
    """Raise Mxfp4Error where a GPU would capture the reference in a graph: it looks at what was routed."""
    captured = not config.model_config.enforce_eager and selection.arch != "cpu"
    if captured and selection.backend.NAME == "reference":
        fix = f"Add --enforce-eager, or choose another with {settings.BACKEND_VAR}"
        raise Mxfp4Error("--enforce-eager", "given for the reference backend on a GPU", "nothing", fix)


def files_to_load(config: VllmConfig) -> list[Path]:
    """The files that vLLM will read; none where it reads no files, or none on this machine.

    Raises:
        Mxfp4Error: there are none, they are pickles, or not all that an index lists are there.
    """
    loader, model = get_model_loader(config.load_config), config.model_config
    try:
        if isinstance(loader, DefaultModelLoader):
            _, found, *_ = loader._prepare_weights(model.model, None, model.revision, True, None)
        elif isinstance(loader, RunaiModelStreamerLoader) and "://" not in model.model:
            found = loader._prepare_weights(model.model, model.revision)
        else:
            return []
    except (FileNotFoundError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        folder = Path(model.model)
        if not folder.is_dir():
            raise
        files.check_index(folder)
        raise Mxfp4Error(
            model.model, "a checkpoint in safetensors", str(error), "Download it in that format"
        ) from error
    pickles = sorted(file.name for file in map(Path, found) if file.suffix != ".safetensors")
    if pickles:
        fix = "Download it in that format"
        raise Mxfp4Error(model.model, "a checkpoint in safetensors", ", ".join(pickles), fix)
    return [Path(file) for file in sorted(found)]


def names_in_checkpoint(model: Any, parameter: str) -> list[str]:
    """What a parameter of vLLM's model is made of in a checkpoint."""
    name = parameter.replace(".routed_experts.", ".")
    for old, new in model.hf_to_vllm_mapper.orig_to_new_suffix.items():
        if name.endswith(new):
            name = name.removesuffix(new) + old
            break
    for old, new in model.hf_to_vllm_mapper.orig_to_new_substr.items():
        name = name.replace(new, old)
    for new, parts in model.packed_modules_mapping.items():
        if f".{new}." in name:
            return [name.replace(f".{new}.", f".{part}.") for part in parts]
    return [name]
