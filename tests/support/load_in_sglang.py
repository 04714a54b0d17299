"""Drive a layer of GPT-OSS by SGLang's own Python, without and with our opt-in: test_sglang_layer runs this.

    python load_in_sglang.py

SGLang comes first on sys.path. Prints what was seen, as a line of JSON.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import sglang_stand_ins
import torch
from overrides import check_overrides, check_takes

from vllm_mxfp4_gfx950.backends import reference
from vllm_mxfp4_gfx950.checkpoint import TENSORS
from vllm_mxfp4_gfx950.moe import MoeWeights
from vllm_mxfp4_gfx950.random_layer import make_shape, random_weights
from vllm_mxfp4_gfx950.tolerance import compare

sglang_stand_ins.install()

# The first of SGLang that is imported, as in a server that has just started.
from vllm_mxfp4_gfx950 import sglang_layer  # noqa: E402, I001
from sglang.srt import plugins  # noqa: E402
from sglang.srt.distributed import parallel_state  # noqa: E402
from sglang.srt.layers.dp_attention import is_dp_attention_enabled  # noqa: E402
from sglang.srt.layers.moe.topk import BypassedTopKOutput, TopKOutputFormat  # noqa: E402
from sglang.srt.layers.moe.utils import MoeA2ABackend, MoeRunnerBackend  # noqa: E402
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase, QuantizationConfig  # noqa: E402
from sglang.srt.layers.quantization.mxfp4 import Mxfp4Config  # noqa: E402
from sglang.srt.model_loader.loader import DefaultModelLoader  # noqa: E402
from sglang.srt.models.gpt_oss import GptOssForCausalLM, GptOssSparseMoeBlock  # noqa: E402
from sglang.srt.runtime_context import get_context, get_flags, get_parallel  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402
from transformers import GptOssConfig  # noqa: E402

SHAPE = make_shape(8, 2, 96, 160)
"""Five blocks of the intermediate size, so that two ranks' shares differ."""

MLP = "model.layers.0.mlp"
CONFIG = GptOssConfig(
    num_hidden_layers=1,
    hidden_size=SHAPE.hidden,
    intermediate_size=SHAPE.intermediate,
    num_local_experts=SHAPE.experts,
    num_experts_per_tok=SHAPE.topk,
    swiglu_limit=SHAPE.limit,
    dtype="bfloat16",
)
FORMAT = {"quant_method": "mxfp4"}
WEIGHTS = random_weights(SHAPE, 1)

REFUSED: dict[str, Any] = {
    "enable_eplb": True,
    "init_expert_location": "random",
    "ep_num_redundant_experts": 2,
    "elastic_ep_backend": "mooncake",
    "moe_dp_size": 2,
    "enable_lora": True,
    "lora_paths": ["adapter"],
    "enable_return_routed_experts": True,
    "expert_distribution_recorder_mode": "stat",
    "cpu_offload_gb": 1,
    "offload_group_size": 2,
    "load_format": "sharded_state",
}


class OneBlock(GptOssForCausalLM):
    """SGLang's GPT-OSS with the MoE block of one layer alone."""

    def __init__(self, quantization: Mxfp4Config | None) -> None:
        torch.nn.Module.__init__(self)
        self.config, self.quant_config = CONFIG, quantization
        self.model, layer = torch.nn.Module(), torch.nn.Module()
        layer.mlp = GptOssSparseMoeBlock(layer_id=0, config=CONFIG, quant_config=quantization, prefix=MLP)
        self.model.layers = torch.nn.ModuleList([layer])

    @property
    def block(self) -> GptOssSparseMoeBlock:
        """It."""
        return self.model.layers[0].mlp


def build(tp: tuple[int, int] = (1, 0), ep: tuple[int, int] = (1, 0)) -> OneBlock:
    """A block as one rank has it; the size and the rank of each kind."""
    size, rank = tp[0] * ep[0], tp[1] + ep[1]
    ranks = {"tp_size": size, "tp_rank": rank, "attn_tp_size": size, "attn_tp_rank": rank, "tp_group": None}
    ranks |= {"moe_tp_size": tp[0], "moe_tp_rank": tp[1], "moe_ep_size": ep[0], "moe_ep_rank": ep[1]}
    with get_parallel().override(**ranks):
        model = OneBlock(Mxfp4Config.from_config(FORMAT))
    model.ranks = ranks
    model.block.tp_size = 1  # In 0.5.16 it sums over the ranks, which `miss` does here.
    return model


def checkpoint(weights: MoeWeights) -> Iterator[tuple[str, torch.Tensor]]:
    """The block's tensors by their names, as a GPT-OSS has them."""
    generator = torch.Generator().manual_seed(2)
    router = torch.randn(SHAPE.experts, SHAPE.hidden, generator=generator).bfloat16()
    yield f"{MLP}.router.weight", router
    yield f"{MLP}.router.bias", torch.randn(SHAPE.experts, generator=generator).bfloat16()
    for field, name in TENSORS.items():
        tensor = getattr(weights, field)
        if field in ("w13", "w2"):
            tensor = tensor.unflatten(-1, (-1, 16))
        yield f"{MLP}.experts.{name}", tensor.bfloat16() if field.endswith("bias") else tensor


def load(model: OneBlock, without: str = "nothing") -> OneBlock:
    """Have SGLang load a checkpoint, or all of it but one tensor."""
    tensors = [(name, tensor) for name, tensor in checkpoint(WEIGHTS) if not name.endswith(without)]
    with get_parallel().override(**model.ranks):
        DefaultModelLoader.load_weights_and_postprocess(model, tensors, torch.device("cpu"))
    return model


def forward(model: OneBlock, x: torch.Tensor) -> torch.Tensor:
    """SGLang's forward of a block, its top-k as on a GPU: without one, SGLang would route by itself."""
    block = model.block
    block.topk.forward = block.topk.forward_cuda
    with torch.inference_mode(), get_parallel().override(**model.ranks):
        assert type(block.topk(x, block.router(x)[0])) is BypassedTopKOutput
        return block(x)


def miss(models: list[OneBlock], x: torch.Tensor) -> str:
    """What is wrong with the sum of some ranks' outputs, held against float64."""
    out = torch.stack([forward(model, x) for model in models]).sum(0)
    with torch.inference_mode():
        logits = models[0].block.router(x)[0]
    return compare(out, *reference.truth_and_plain(x, logits, WEIGHTS, SHAPE)).miss


def publish(**fields: Any) -> None:
    """Have SGLang believe that it was started with these."""
    get_context().set_server_args(ServerArgs(model_path="dummy", **fields))


def load_plugins() -> str:
    """Have SGLang load its plugins anew; what ended the process, if anything did."""
    plugins._plugins_loaded = False
    try:
        plugins.load_plugins()
    except SystemExit as end:
        return str(end)
    return ""


def error_of(call: Callable[[], object]) -> str:
    """What it raises."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refusals(check: Callable[[], None]) -> dict[str, str]:
    """What is said of each way to run that is not served."""
    texts = {}
    for name, value in REFUSED.items():
        publish(**{name: value})
        texts[name] = error_of(check)
    publish()
    moe, attention = get_flags().moe, get_flags().dp
    with moe.override(runner_backend=MoeRunnerBackend.FLASHINFER_MXFP4):
        texts["moe_runner_backend"] = error_of(check)
    with moe.override(a2a_backend=MoeA2ABackend.DEEPEP):
        texts["moe_a2a_backend"] = error_of(check)
    with attention.override(enabled=True):
        assert is_dp_attention_enabled()
        texts["enable_dp_attention"] = error_of(check)
    os.environ["SGLANG_AITER_FUSE_RMSNORM_PAD"] = "1"
    texts["SGLANG_AITER_FUSE_RMSNORM_PAD"] = error_of(check)
    del os.environ["SGLANG_AITER_FUSE_RMSNORM_PAD"]
    return texts


def main() -> None:
    """See it all."""
    torch.set_default_dtype(torch.bfloat16)
    parallel_state._TP = SimpleNamespace(world_size=1)  # 0.5.16 asks for it, and does nothing with it.
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
    publish()
    seen: dict[str, Any] = {"without": {"end": load_plugins()}}
    constructor = GptOssSparseMoeBlock.__init__
    block = build().block
    seen["without"] |= {"method": type(block.experts.quant_method).__name__, "lines": lines.copy()}
    seen["without"]["bypassed"] = block.topk.topk_config.output_format is TopKOutputFormat.BYPASSED

    os.environ["VLLM_MXFP4_SGLANG"] = "yes"
    seen["wrong value"] = load_plugins()
    os.environ["VLLM_MXFP4_SGLANG"] = "1"
    seen["with"] = {"end": load_plugins()}

    check_overrides(sglang_layer.ExpertsMethod, FusedMoEMethodBase)
    check_overrides(sglang_layer.ExpertsConfig, QuantizationConfig)
    check_takes(sglang_layer.build_block, constructor, "original", "block")

    x = torch.randn(37, SHAPE.hidden, generator=torch.Generator().manual_seed(3)).bfloat16()
    tp = [load(build(tp=(2, rank))) for rank in range(2)]
    ep = [load(build(ep=(2, rank))) for rank in range(2)]
    whole = load(build())
    seen["with"] |= {"method": type(whole.block.experts.quant_method).__name__, "lines": lines}
    seen["parameters left"] = [name for name, _ in whole.block.experts.named_parameters()]
    seen["miss"] = {"tp 1": miss([whole], x), "tp 2": miss(tp, x), "ep 2": miss(ep, x)}
    seen["wrong ranks"] = {"tp": miss([tp[0]] * 2, x), "ep": miss([ep[0]] * 2, x)}
    seen["a tensor is missing"] = error_of(lambda: load(build(), "down_proj_scales"))
    seen["state"] = error_of(whole.state_dict)
    seen["not mxfp4"] = error_of(lambda: OneBlock(None))
    seen["nothing refused"] = error_of(sglang_layer.check_servable)
    seen["refused"] = refusals(sglang_layer.check_servable)
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
