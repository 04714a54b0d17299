"""What vLLM's pass for AMD's GPUs fuses, all-reduce and RMSNorm, in the graph that a rank on the CPU traces.

Real, from vLLM: the traced model, the passes before the fusion, its patterns. Stood in for: AITER's kernel,
here the two operators one after the other. And as on a GPU, each all-reduce is one operator of the graph,
with a result of its own. The graph is run as it is, without Inductor.

Source: vLLM 0.32, compilation/passes/fusion/allreduce_rms_fusion.py and compilation/backends.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import vllm.ir.ops
from torch._dynamo.backends.common import aot_autograd
from vllm._aiter_ops import _rocm_aiter_fused_allreduce_rmsnorm_fake
from vllm.compilation.passes.inductor_pass import pass_context
from vllm.compilation.passes.ir.inplace_functionalization import VllmIRInplaceFunctionalizationPass
from vllm.compilation.passes.utility.noop_elimination import NoOpEliminationPass
from vllm.compilation.passes.vllm_inductor_pass import VllmFusionPatternMatcherPass
from vllm.config import VllmConfig
from vllm.config.utils import Range
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.platforms.cpu import CpuPlatform
from vllm.utils.torch_utils import direct_register_custom_op

# CUDA's operators, of which vLLM's module looks up the names.
for name in (
    "rms_norm_static_fp8_quant",
    "fused_add_rms_norm_static_fp8_quant",
    "rms_norm_dynamic_per_token_quant",
):
    torch.library.define(f"_C::{name}", "() -> ()")

from vllm.compilation.passes.fusion.allreduce_rms_fusion import (  # noqa: E402
    AiterAllreduceFusedAddRMSNormOutputOnlyPattern,
    AiterAllreduceFusedAddRMSNormPattern,
)

EPSILON = 1e-5
"""GPT-OSS's."""

CpuPlatform.use_custom_op_collectives = classmethod(lambda cls: True)
CpuPlatform.get_device_communicator_cls = classmethod(lambda cls: "allreduce_fusion.Communicator")


class Communicator(CpuCommunicator):
    """vLLM's reduces in place, which an operator of a traced graph must not."""

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in a tensor of its own."""
        return super().all_reduce(input_.clone())


class Rank:
    """An extension of vLLM's workers, which import this module for it before they make process groups."""

    matches: ClassVar[list[int]] = []
    """What was fused in each graph that this process has compiled."""

    def fused_matches(self) -> list[int]:
        """`matches`, for LLM.collective_rpc."""
        return self.matches


def fused(
    input_: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    gemma_norm: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stand-in for AITER's kernel."""
    assert not gemma_norm
    reduced = tensor_model_parallel_all_reduce(input_)
    return vllm.ir.ops.fused_add_rms_norm(reduced, residual.clone(), weight, epsilon)


direct_register_custom_op(
    "rocm_aiter_fused_allreduce_rmsnorm", fused, fake_impl=_rocm_aiter_fused_allreduce_rmsnorm_fake
)


def compile_model(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """A backend of torch.compile: what vLLM's does up to the fusion."""
    config = VllmConfig()
    fusion = VllmFusionPatternMatcherPass(config, "allreduce_rmsnorm")
    # The second is the norm behind the last layer, whose residual nobody reads.
    for pattern in (AiterAllreduceFusedAddRMSNormPattern, AiterAllreduceFusedAddRMSNormOutputOnlyPattern):
        fusion.register(pattern(EPSILON, torch.float32, "cpu"))
    with pass_context(Range(1, 1)):
        VllmIRInplaceFunctionalizationPass(config)(module.graph)
    module.recompile()

    def fuse(traced: torch.fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        NoOpEliminationPass(config)(traced.graph)
        fusion(traced.graph)
        Rank.matches.append(fusion.matched_count)
        traced.recompile()
        return traced.forward

    return aot_autograd(fw_compiler=fuse)(module, inputs)
