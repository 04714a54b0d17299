"""The MoE block of one layer of GPT-OSS, built, loaded and run by SGLang's own Python.

SGLang comes first on sys.path, and nothing of it has been imported before this.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import sglang_stand_ins
import torch

from vllm_mxfp4_gfx950.checkpoint import TENSORS
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights

sglang_stand_ins.install()

# The first of SGLang that is imported, as in a server that has just started.
from vllm_mxfp4_gfx950 import sglang_layer  # noqa: E402, F401, I001
from sglang.srt import plugins  # noqa: E402
from sglang.srt.distributed import parallel_state  # noqa: E402
from sglang.srt.layers.quantization.mxfp4 import Mxfp4Config  # noqa: E402
from sglang.srt.model_loader.loader import DefaultModelLoader  # noqa: E402
from sglang.srt.model_loader.utils import set_default_torch_dtype  # noqa: E402
from sglang.srt.models.gpt_oss import GptOssForCausalLM, GptOssSparseMoeBlock  # noqa: E402
from sglang.srt.runtime_context import get_context, get_parallel  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402
from transformers import GptOssConfig  # noqa: E402

MLP = "model.layers.0.mlp"
FORMAT = {"quant_method": "mxfp4"}

parallel_state._TP = SimpleNamespace(world_size=1)  # 0.5.16 asks for it, and does nothing with it.


class OneBlock(GptOssForCausalLM):
    """SGLang's GPT-OSS with the MoE block of one layer alone.

    Args:
        shape: of the whole layer.
        quantization: the checkpoint's.
    """

    def __init__(self, shape: MoeShape, quantization: Mxfp4Config | None) -> None:
        torch.nn.Module.__init__(self)
        self.config, self.quant_config = config_of(shape), quantization
        self.model, layer = torch.nn.Module(), torch.nn.Module()
        layer.mlp = GptOssSparseMoeBlock(
            layer_id=0, config=self.config, quant_config=quantization, prefix=MLP
        )
        self.model.layers = torch.nn.ModuleList([layer])

    @property
    def block(self) -> GptOssSparseMoeBlock:
        """It."""
        return self.model.layers[0].mlp


def config_of(shape: MoeShape) -> GptOssConfig:
    """The model's config.json, as attributes."""
    return GptOssConfig(
        num_hidden_layers=1,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.topk,
        swiglu_limit=shape.limit,
        dtype="bfloat16",
    )


def build(
    shape: MoeShape, device: str = "cpu", tp: tuple[int, int] = (1, 0), ep: tuple[int, int] = (1, 0)
) -> OneBlock:
    """A block as one rank has it; the size and the rank of each kind."""
    size, rank = tp[0] * ep[0], tp[1] + ep[1]
    ranks = {"tp_size": size, "tp_rank": rank, "attn_tp_size": size, "attn_tp_rank": rank, "tp_group": None}
    ranks |= {"moe_tp_size": tp[0], "moe_tp_rank": tp[1], "moe_ep_size": ep[0], "moe_ep_rank": ep[1]}
    with get_parallel().override(**ranks), set_default_torch_dtype(torch.bfloat16), torch.device(device):
        model = OneBlock(shape, Mxfp4Config.from_config(FORMAT))
    model.ranks = ranks
    model.block.tp_size = 1  # In 0.5.16 it sums over the ranks, of which there are none here.
    # As on a GPU: without one, SGLang would route by itself.
    model.block.topk.forward = model.block.topk.forward_cuda
    return model


def checkpoint(weights: MoeWeights) -> Iterator[tuple[str, torch.Tensor]]:
    """The block's tensors by their names, as a GPT-OSS has them."""
    experts, hidden = weights.w2_bias.shape
    generator = torch.Generator().manual_seed(2)
    router = torch.randn(experts, hidden, generator=generator).bfloat16()
    yield f"{MLP}.router.weight", router
    yield f"{MLP}.router.bias", torch.randn(experts, generator=generator).bfloat16()
    for field, name in TENSORS.items():
        tensor = getattr(weights, field)
        if field in ("w13", "w2"):
            tensor = tensor.unflatten(-1, (-1, 16))
        yield f"{MLP}.experts.{name}", tensor.bfloat16() if field.endswith("bias") else tensor


def load(model: OneBlock, weights: MoeWeights, device: str = "cpu", without: str = "nothing") -> OneBlock:
    """Have SGLang load a checkpoint, or all of it but one tensor."""
    tensors = [(name, tensor) for name, tensor in checkpoint(weights) if not name.endswith(without)]
    with get_parallel().override(**model.ranks), set_default_torch_dtype(torch.bfloat16):
        DefaultModelLoader.load_weights_and_postprocess(model, tensors, torch.device(device))
    return model


def forward(model: OneBlock, x: torch.Tensor) -> torch.Tensor:
    """SGLang's forward of a block."""
    with torch.inference_mode(), get_parallel().override(**model.ranks):
        return model.block(x)


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
