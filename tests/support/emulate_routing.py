"""Routes on the emulated gfx950: cases on stdin, what came out on stdout."""

import json
import sys
from typing import Any
from unittest import mock

import torch

from vllm_mxfp4_gfx950.backends import reference
from vllm_mxfp4_gfx950.backends.triton import routing as triton_routing
from vllm_mxfp4_gfx950.gfx950.driver import LDS_BYTES, Launch, presented
from vllm_mxfp4_gfx950.gfx950.emulator.execution import execute
from vllm_mxfp4_gfx950.gfx950.report import read


def check(case: dict[str, Any]) -> dict[str, Any]:
    """One batch of tokens."""
    tokens, topk, global_experts = case["tokens"], case["topk"], case["global_experts"]
    expert_map = None if case["expert_map"] is None else torch.tensor(case["expert_map"], dtype=torch.int32)
    experts = global_experts if expert_map is None else int((expert_map >= 0).sum())
    generator = torch.Generator().manual_seed(tokens)
    # Steps of a quarter make ties of many logits.
    logits = (torch.randn(tokens, global_experts, generator=generator) * 4).round() / 4
    logits[0] = torch.tensor([-0.0, 0.0]).repeat(global_experts // 2)
    logits = logits.to(getattr(torch, case["dtype"]))
    launches: list[Launch] = []

    def launch(one: Launch) -> None:
        launches.append(one)
        execute(one)

    order = triton_routing.order_of(expert_map)
    if case["spoil"] == "order":
        assert order is not None
        order = order.roll(1)
    groups = case["groups"] or triton_routing.MAX_GROUPS
    with presented(launch), mock.patch.object(triton_routing, "MAX_GROUPS", groups):
        routing = triton_routing.route(logits, topk, experts, order, case["sizes"], smallest=case["smallest"])
    reports = [read(one) for one in launches]
    smallest = case["smallest"]
    if case["spoil"] == "smallest":
        smallest *= 2
    return {
        "kernels": [one.name for one in launches],
        "misfits": [
            f"{one.name}: {report}"
            for one, report in zip(launches, reports, strict=True)
            if report.vgpr_spills or report.sgpr_spills or report.scratch_bytes or one.lds_bytes > LDS_BYTES
        ],
        "unaligned": [
            name
            for name, rows in vars(routing).items()
            for row in (rows if rows.dim() == 2 else [rows])
            if row.data_ptr() % 16
        ],
        "miss": miss(routing, logits, topk, experts, expert_map, smallest),
    }


def miss(
    routing: triton_routing.Routing,
    logits: torch.Tensor,
    topk: int,
    experts: int,
    expert_map: torch.Tensor | None,
    smallest: int,
) -> str:
    """Why the routing is not what its fields say, computed from the reference's choices."""
    ids, weights = reference.route(logits, topk)
    local = ids if expert_map is None else expert_map[ids].long()
    local, order = torch.where(local < 0, experts, local).sort(dim=1, stable=True)
    by_expert, pairs = local.flatten().sort(stable=True)
    count = by_expert.bincount(minlength=experts + 1)[:-1]
    rows = int(count.sum())
    gather, scatter = torch.full_like(pairs, -1), torch.full_like(pairs, -1)
    gather[:rows] = pairs[:rows]
    scatter[pairs[:rows]] = torch.arange(rows)
    wanted = {"count": count, "start": sums(count), "gather": gather, "scatter": scatter}
    for size in range(len(routing.schedule)):
        tiles = -(-count // (smallest << size))
        schedule = [tile << 16 | expert for expert, some in enumerate(tiles.tolist()) for tile in range(some)]
        schedule += [-1] * (routing.schedule.shape[1] - len(schedule))
        wanted |= {f"block_start {size}": sums(tiles), f"schedule {size}": torch.tensor(schedule)}
    for name, want in wanted.items():
        field, _, size = name.partition(" ")
        got = getattr(routing, field)
        if not torch.equal((got[int(size)] if size else got).long(), want):
            return f"other {name}"
    # Those of fp32 differ in the last bit: exp is not torch's.
    allowed = 0.0 if logits.dtype == torch.bfloat16 else 1e-6
    want = weights.gather(1, order).flatten()[pairs[:rows]]
    return "" if torch.allclose(routing.weights[:rows], want, rtol=allowed, atol=0) else "other weights"


def sums(count: torch.Tensor) -> torch.Tensor:
    """The sum of those before each, and of all."""
    return torch.nn.functional.pad(count.cumsum(0), (1, 0))


if __name__ == "__main__":
    # Memory that is allocated and not written holds NaN, or the largest integer.
    torch.use_deterministic_algorithms(True)
    json.dump([check(case) for case in json.load(sys.stdin)], sys.stdout)
