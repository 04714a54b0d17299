"""Drive a layer of GPT-OSS by SGLang's own Python, without and with our opt-in: test_sglang_layer runs this.

    python load_in_sglang.py

SGLang comes first on sys.path. Prints what was seen, as a line of JSON.
"""

import json
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import spread_in_sglang
import torch
from block_in_sglang import OneBlock, build, forward, load, load_plugins, publish
from overrides import check_overrides, check_takes
from sglang.srt.layers.dp_attention import is_dp_attention_enabled
from sglang.srt.layers.moe.topk import BypassedTopKOutput, TopKOutputFormat
from sglang.srt.layers.moe.utils import MoeA2ABackend, MoeRunnerBackend
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase, QuantizationConfig
from sglang.srt.model_loader.weight_utils import initialize_dummy_weights
from sglang.srt.models.gpt_oss import GptOssSparseMoeBlock
from sglang.srt.runtime_context import get_flags

from vllm_mxfp4_gfx950 import sglang_layer
from vllm_mxfp4_gfx950.backends import reference
from vllm_mxfp4_gfx950.random_layer import make_shape, random_weights
from vllm_mxfp4_gfx950.tolerance import compare

SHAPE = make_shape(8, 2, 96, 160)
"""Five blocks of the intermediate size, so that two ranks' shares differ."""

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


def miss(models: list[OneBlock], x: torch.Tensor) -> str:
    """What is wrong with the sum of some ranks' outputs, held against float64."""
    out = torch.stack([forward(model, x) for model in models]).sum(0)
    with torch.inference_mode():
        logits = models[0].block.router(x)[0]
    return compare(out, *reference.truth_and_plain(x, logits, WEIGHTS, SHAPE)).miss


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


def differing(ours: OneBlock, theirs: OneBlock, fill: Callable[[torch.nn.Module], None]) -> list[str]:
    """The parameters of two blocks that are not the same once each is filled."""
    for model in (ours, theirs):
        fill(model)
    found = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert [*found[0]] == [*found[1]]
    return [name for name, one in found[0].items() if not torch.equal(one.float(), found[1][name].float())]


def main() -> None:
    """See it all."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
    publish()
    seen: dict[str, Any] = {"without": {"end": load_plugins()}}
    constructor = GptOssSparseMoeBlock.__init__
    theirs = build(SHAPE)
    block = theirs.block
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
    tp = [load(build(SHAPE, tp=(2, rank)), WEIGHTS) for rank in range(2)]
    ep = [load(build(SHAPE, ep=(2, rank)), WEIGHTS) for rank in range(2)]
    whole = load(build(SHAPE), WEIGHTS)
    seen["with"] |= {"method": type(whole.block.experts.quant_method).__name__, "lines": lines}
    assert type(whole.block.topk(x, whole.block.router(x)[0])) is BypassedTopKOutput
    seen["parameters left"] = [name for name, _ in whole.block.experts.named_parameters()]
    seen["miss"] = {"tp 1": miss([whole], x), "tp 2": miss(tp, x), "ep 2": miss(ep, x)}
    spread = partial(spread_in_sglang.fill, initialize_dummy_weights)
    seen["dummies that differ"] = {
        "by SGLang": differing(build(SHAPE), theirs, initialize_dummy_weights),
        "spread": differing(build(SHAPE), theirs, spread),
    }
    seen["wrong ranks"] = {"tp": miss([tp[0]] * 2, x), "ep": miss([ep[0]] * 2, x)}
    seen["a tensor is missing"] = error_of(lambda: load(build(SHAPE), WEIGHTS, without="down_proj_scales"))
    seen["state"] = error_of(whole.state_dict)
    seen["not mxfp4"] = error_of(lambda: OneBlock(SHAPE, None))
    seen["nothing refused"] = error_of(sglang_layer.check_servable)
    seen["refused"] = refusals(sglang_layer.check_servable)
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
