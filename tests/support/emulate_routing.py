"""Routes on the emulated gfx950: cases on stdin, what came out on stdout."""

from typing import Any
from unittest import mock

import torch
from emulated import answer

from vllm_mxfp4_gfx950.backends.triton import routing as triton_routing
from vllm_mxfp4_gfx950.gfx950.driver import LDS_BYTES, Launch, presented
from vllm_mxfp4_gfx950.gfx950.emulator.execution import execute
from vllm_mxfp4_gfx950.gfx950.report import read

ZERO, ONE, TWO, INF = 0, 0x3F800000, 0x40000000, 0x7F800000
NEGATIVE = 0x80000000
NAN, OTHER_NAN, SIGNALLING_NAN = 0x7FC00000, 0x7FFF0000, 0x7F810000
DENORMAL = 0x00010000
EDGES = (
    (NEGATIVE, ZERO),
    (ONE, NEGATIVE | NAN, NEGATIVE | INF, OTHER_NAN, INF, NEGATIVE | SIGNALLING_NAN, TWO),
    (NEGATIVE | INF,) * 10 + (NEGATIVE | OTHER_NAN,),
    (ZERO, DENORMAL, NEGATIVE | DENORMAL, 2 * DENORMAL),
    (ONE, INF, NEGATIVE | INF),
    (NEGATIVE | INF,),
)
"""Rows of logits where a comparison of bits or of floats may go wrong, as words of fp32, to be repeated."""


def logits_of(tokens: int, experts: int, dtype: torch.dtype) -> torch.Tensor:
    """Random logits, with an edge in every third row."""
    generator = torch.Generator().manual_seed(tokens)
    # Steps of a quarter make ties of many logits.
    logits = ((torch.randn(tokens, experts, generator=generator) * 4).round() / 4).to(dtype)
    for token, words in zip(range(0, tokens, 3), EDGES, strict=False):
        # Converting a NaN to bf16 would lose its sign.
        row = torch.tensor(words).repeat(experts)[:experts]
        logits[token] = row.int().view(dtype) if dtype == torch.float32 else (row >> 16).short().view(dtype)
    return logits


def check(case: dict[str, Any]) -> dict[str, Any]:
    """One batch of tokens."""
    tokens, topk, global_experts = case["tokens"], case["topk"], case["global_experts"]
    expert_map = None if case["expert_map"] is None else torch.tensor(case["expert_map"], dtype=torch.int32)
    experts = global_experts if expert_map is None else int((expert_map >= 0).sum())
    logits = logits_of(tokens, global_experts, getattr(torch, case["dtype"]))
    launches: list[Launch] = []

    def launch(one: Launch) -> None:
        launches.append(one)
        execute(one)

    order = triton_routing.order_of(expert_map)
    given = order.roll(1) if case["spoil"] == "order" and order is not None else order
    few, sums = triton_routing.FEW_BLOCKS, triton_routing.BLOCK_SUMS
    if case["few"]:
        few, sums = case["few"], (4, 2)
    with presented(launch), mock.patch.multiple(triton_routing, FEW_BLOCKS=few, BLOCK_SUMS=sums):
        routing = triton_routing.route(logits, topk, experts, given, case["sizes"], smallest=case["smallest"])
    smallest = case["smallest"] * (2 if case["spoil"] == "smallest" else 1)
    twin = triton_routing.route_in_torch(logits, topk, experts, order, case["sizes"], smallest=smallest)
    return {
        "kernels": [one.name for one in launches],
        "overflows": [one.name for one in launches if one.lds_bytes > LDS_BYTES],
        "spills": [
            f"{one.name}: {report}"
            for one, report in zip(launches, map(read, launches), strict=True)
            if report.vgpr_spills or report.sgpr_spills or report.scratch_bytes
        ],
        "unaligned": [
            name
            for name, rows in vars(routing).items()
            for row in (rows if rows.dim() == 2 else [rows])
            if row.data_ptr() % 16
        ],
        "miss": miss(routing, twin),
    }


def miss(got: triton_routing.Routing, want: triton_routing.Routing) -> str:
    """Which field of a routing is not the twin's, of which size; weights count up to the last row only."""
    rows = int(want.start[-1])
    for name, field in vars(want).items():
        other = getattr(got, name)
        if name == "weights":
            # Those of fp32 differ in the last bit: exp is not torch's.
            allowed = 0.0 if field.dtype == torch.bfloat16 else 1e-6
            if not torch.allclose(other[:rows], field[:rows], rtol=allowed, atol=0, equal_nan=True):
                return "other weights"
        elif field.dim() == 1 and not torch.equal(other, field):
            return f"other {name}"
        elif field.dim() == 2:
            for size, pair in enumerate(zip(other, field, strict=True)):
                if not torch.equal(*pair):
                    return f"other {name} {size}"
    return ""


if __name__ == "__main__":
    answer(lambda cases: [check(case) for case in cases])
