"""Runs the aiter_triton backend on the emulated gfx950: cases on stdin, what came out on stdout."""

import contextlib
import sys
from typing import Any
from unittest import mock

import plant_preparation
import torch
from emulated import Launches, answer, layer_of, tokens_of
from plant_preparation import SHAPES
from serve_emulated import broken

from vllm_mxfp4_gfx950 import backends, self_check
from vllm_mxfp4_gfx950.backends import reference
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.gfx950.driver import ARCH, Launch, presented
from vllm_mxfp4_gfx950.gfx950.emulator.execution import execute
from vllm_mxfp4_gfx950.gfx950.report import read
from vllm_mxfp4_gfx950.models import layer_shape
from vllm_mxfp4_gfx950.moe import MoeWeights, tensor_shapes
from vllm_mxfp4_gfx950.random_layer import random_weights
from vllm_mxfp4_gfx950.settings import Settings
from vllm_mxfp4_gfx950.tolerance import compare

ASKED = Settings("aiter_triton")
KERNEL = "_moe_gemm_a16w4"


def check_layer(case: dict[str, Any]) -> dict[str, Any]:
    """One layer on one batch of tokens."""
    shape, weights = layer_of(case)
    x, logits = tokens_of(case, shape)
    launches = Launches()
    with presented(launches):
        out = backends.select(shape, ARCH, ASKED).backend.prepare(weights.clone(), shape).run(x, logits)
    found = compare(out, *reference.truth_and_plain(x, logits, weights, shape))
    return {
        "miss": found.miss,
        "frobenius": found.frobenius,
        "kernels": [one.name for one in launches],
        "lossless": [read(one).is_lossless for one in launches if one.name == KERNEL],
    }


def compile_layer() -> list[dict[str, Any]]:
    """GPT-OSS-20B's two matmuls, compiled for batches of every size of tiles."""
    shape, found = layer_shape("gpt-oss-20b"), []
    sizes = tensor_shapes(shape.experts, shape.hidden, shape.intermediate).items()
    weights = MoeWeights(**{name: torch.empty(size, dtype=dtype) for name, (dtype, size) in sizes})
    launches: list[Launch] = []
    with presented(launches.append):
        layer = backends.select(shape, ARCH, ASKED).backend.prepare(weights, shape)
        for tokens in (1, 256, 512, 2048):
            launches.clear()
            x = torch.empty(tokens, shape.hidden, dtype=torch.bfloat16)
            layer.run(x, torch.empty(tokens, shape.experts, dtype=torch.bfloat16))
            for report in (read(one) for one in launches if one.name == KERNEL):
                found.append(
                    {
                        "tokens": tokens,
                        "vgprs": report.vgprs,
                        "spills": report.vgpr_spills,
                        "lds_bytes": report.lds_bytes,
                        "lossless": report.is_lossless,
                    }
                )
    return found


def refusal() -> str:
    """What is said where the kernel converts two FP4 from a wrong byte."""
    weights = random_weights(SHAPES[0], seed=0)
    with (
        presented(lambda one: execute(broken(one) if one.name == KERNEL else one) and None),
        mock.patch.object(self_check, "sizes", return_value=(1, 8)),
        contextlib.suppress(Mxfp4Error),
    ):
        selection = backends.select(SHAPES[0], ARCH, ASKED)
        try:
            self_check.prepare(selection, weights, SHAPES[0], ASKED, lambda *_: None)
        except Mxfp4Error as error:
            return str(error)
    return ""


def check(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything."""
    shape = SHAPES[0]
    with contextlib.redirect_stdout(sys.stderr):  # aiter says something when it is imported.
        with presented(execute):
            selection = backends.select(shape, ARCH, ASKED)
            layer = selection.backend.prepare(random_weights(shape, seed=0), shape)
            poisoned = plant_preparation.poisoned(layer.run, shape, "cpu")
        return {
            "selected": str(selection),
            "layers": [check_layer(case) for case in cases],
            "full": compile_layer(),
            "broken": refusal(),
            "poisoned": poisoned,
        }


if __name__ == "__main__":
    answer(check)
