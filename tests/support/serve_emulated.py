"""Serve from the emulated gfx950, with whichever Triton and triton_kernels come first on sys.path.

    python serve_emulated.py CHECKPOINT PROMPTS TOKENS KERNEL ANSWERS

From the flag on, everything is vLLM's, the plugin's, triton_kernels' and Triton's own code. What would go to
the GPU, a compiled kernel with its grid and its arguments, goes to the emulator. KERNEL is "sound", or
"broken" for a wrong instruction in each matmul's. test_engine_emulated runs this.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from unittest import mock

import engine
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from vllm_mxfp4_gfx950 import backends
from vllm_mxfp4_gfx950.gfx950.driver import ARCH, Launch, presented
from vllm_mxfp4_gfx950.gfx950.emulator.execution import execute
from vllm_mxfp4_gfx950.gfx950.layer import MATMULS

CONVERSION = re.compile(r"(v_cvt_scalef32_pk_bf16_fp4 .*) op_sel:\[1,\d,\d\]")
"""Two FP4 values to bf16, from another byte of a register than the first."""


@dataclasses.dataclass
class Call:
    """One MoE layer in one forward.

    Args:
        tokens: in the batch.
        kernels: the launches in order, each with the number of matrix instructions that its waves executed.
    """

    tokens: int
    kernels: list[tuple[str, int]] = dataclasses.field(default_factory=list)


def broken(launch: Launch) -> Launch:
    """The same with each CONVERSION from the register's first byte."""
    assembly, found = CONVERSION.subn(r"\1", launch.assembly)
    assert found, launch.name
    return dataclasses.replace(launch, assembly=assembly)


def main(checkpoint: str, prompts: str, tokens: str, kernel: str, answers: str) -> None:
    """Serve, and write what engine.Served has, and `calls`."""
    engine.start()
    from vllm.model_executor.models.gpt_oss import MLPBlock

    calls: list[Call] = []

    def note_call(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, MLPBlock):
            calls.append(Call(arguments[0].shape[0]))

    def on_launch(launch: Launch) -> None:
        wrong = kernel == "broken" and launch.name.startswith(MATMULS)
        counts = execute(broken(launch) if wrong else launch)
        if calls:  # While it loads, the layer checks itself.
            calls[-1].kernels.append((launch.name, counts.instructions["matrix"]))

    register_module_forward_pre_hook(note_call)
    arguments = {"quantization": engine.FLAG, "dtype": "bfloat16"}
    with mock.patch.object(backends, "arch_of", return_value=ARCH), presented(on_launch):
        served = engine.serve_here(Path(checkpoint), json.loads(prompts), int(tokens), arguments)
    result = {**vars(served), "moe_methods": sorted(served.moe_methods), "calls": list(map(vars, calls))}
    Path(answers).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
