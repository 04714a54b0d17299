"""What scripts that execute a case on the emulated gfx950 share: its layer, its tokens and its launches."""

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from vllm_mxfp4_gfx950.gfx950.driver import LDS_BYTES, Launch
from vllm_mxfp4_gfx950.gfx950.emulator.execution import execute
from vllm_mxfp4_gfx950.gfx950.report import KernelReport, read
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights
from vllm_mxfp4_gfx950.random_layer import random_tokens, random_weights


def layer_of(case: dict[str, Any]) -> tuple[MoeShape, MoeWeights]:
    """A case's layer, with GPT-OSS's activation."""
    shape = MoeShape(*case["shape"], alpha=1.702, limit=7.0)
    expert_map = None if case["expert_map"] is None else torch.tensor(case["expert_map"], dtype=torch.int32)
    return shape, dataclasses.replace(random_weights(shape, seed=0), expert_map=expert_map)


def tokens_of(case: dict[str, Any], shape: MoeShape) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16[T, H], and logits [T, global_experts] of the case's dtype."""
    x, logits = random_tokens(shape, case["tokens"], seed=case["tokens"])
    return x, logits.to(getattr(torch, case["dtype"]))


class Launches(list[Launch]):
    """Executes what is launched, and keeps it."""

    def __call__(self, launch: Launch) -> None:
        """Take the place of the GPU, as `presented` wants it."""
        self.append(launch)
        execute(launch)

    def reports(self) -> list[KernelReport]:
        """What each kernel takes."""
        return [read(launch) for launch in self]

    def misfits(self) -> list[str]:
        """The kernels that spill or need more LDS than there is."""
        return [
            f"{launch.name}: {report}"
            for launch, report in zip(self, self.reports(), strict=True)
            if report.vgpr_spills
            or report.sgpr_spills
            or report.scratch_bytes
            or launch.lds_bytes > LDS_BYTES
        ]


def answer(check: Callable[[list[dict[str, Any]]], object]) -> None:
    """Read cases from stdin, and write what came of them to stdout."""
    # Memory that is allocated and not written holds NaN, or the largest integer.
    torch.use_deterministic_algorithms(True)
    json.dump(check(json.load(sys.stdin)), sys.stdout)
