"""A layer on the emulated gfx950, through the `prepare` and `run` that serve, against float64.

Routing must be exact. Each matmul is compared on the input that it really had, so that an error shows
in the stage that made it; where every workgroup was executed, the layer as a whole is compared as well.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_mxfp4_gfx950 import backends
from vllm_mxfp4_gfx950.backends import reference
from vllm_mxfp4_gfx950.backends.triton.routing import Routing
from vllm_mxfp4_gfx950.gfx950.driver import ARCH, Launch, presented
from vllm_mxfp4_gfx950.gfx950.emulator.execution import Counts, execute
from vllm_mxfp4_gfx950.gfx950.emulator.memory import Fault
from vllm_mxfp4_gfx950.gfx950.layer import MATMULS
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights
from vllm_mxfp4_gfx950.tolerance import compare

MAX_FROBENIUS = 4e-3
"""Relative error of a matmul as a whole, beside the rule for its rows."""

UNTOUCHED = {2: (torch.int16, 0x7FA5), 4: (torch.int32, 0x7FA57FA5)}
"""Bits of a bf16 and of an fp32, by their size in bytes, that no kernel writes: a NaN of its own."""


@dataclass(frozen=True)
class Check:
    """One stage of a layer, executed and compared.

    Args:
        tokens: T.
        stage: "routing", "w13", "w2" or "layer".
        executed, workgroups: of its launch; 0 where the stage is not one launch.
        frobenius: relative error; None where there is none: routing is exact or missed, and what a split of
            K leaves is partial sums, which show in the layer.
        row: the worst row's error over what `tolerance` allows; None likewise.
        seconds: of emulation.
        counts: what was executed; None where the stage is not one launch.
        miss: why it is not right; "" when it is.
        note: why there is no error: "exact", "in layer" or "no rows".
    """

    tokens: int
    stage: str
    executed: int
    workgroups: int
    frobenius: float | None
    row: float | None
    seconds: float
    counts: Counts | None
    miss: str
    note: str = ""


class EmulatedLayer:
    """A layer, prepared for gfx950 by the backend that would serve it there, with triton_kernels' matmuls.

    Args:
        weights: the experts, which stay as they are.
        shape: their sizes.
        edit: what to make of each launch before it is executed: tests plant faults with it.
        tables: the directory of the user's own tiles.

    Raises:
        Mxfp4Error: the packages here have no Triton backend for it, or the user's table is not a table.
        Fault: a kernel of `prepare` did what a right one does not.
    """

    def __init__(
        self,
        weights: MoeWeights,
        shape: MoeShape,
        edit: Callable[[Launch], Launch] = lambda launch: launch,
        tables: Path | None = None,
    ) -> None:
        self.weights, self.shape, self.edit = weights, shape, edit
        self.backend = backends.select_tiled(shape, ARCH, tables)
        with presented(self._execute):
            prepared = self.backend.prepare(weights.clone(), shape, tables)
        # What lies between its matmuls are FP8 codes, which no stage here can judge.
        without = prepared.without("two_fp8")
        assert without is not None, "the package is never left out by this"
        self.prepared = without

    def check(self, x: torch.Tensor, logits: torch.Tensor, sample: int | None = None) -> list[Check]:
        """Run the layer on some tokens, and compare every stage.

        Args:
            x: bf16[T, H].
            logits: bf16 or fp32[T, global_experts].
            sample: how many workgroups of each matmul to execute; all when None. The routing, and what
                sums up the rows, is always executed whole.

        Raises:
            Fault: a kernel did what a right one does not, or does not exist.
        """
        tokens = len(x)
        with presented(self._execute):
            began = time.perf_counter()
            routed = self.prepared.route(logits)
            seconds = time.perf_counter() - began
        topk_ids, topk_weights = reference.route(logits, self.shape.topk)
        miss = self._routing_miss(routed, topk_ids, topk_weights)
        checks = [Check(tokens, "routing", 0, 0, None, None, seconds, None, miss, "" if miss else "exact")]
        stages: list[Callable[[], Check]] = []

        def launched(launch: Launch) -> None:
            if launch.name.startswith(MATMULS):
                stages.append(self._matmul(self.edit(launch), len(stages), tokens, x, routed, sample))
            else:
                self._execute(launch)

        with presented(launched):
            try:
                out = self.prepared.run(x, logits)
            except Fault:
                raise
            except Exception as error:  # Triton has a dozen kinds, from out of LDS to a failed pass.
                raise Fault(f"{type(error).__name__}: {error}") from error
        if len(stages) != 2:
            raise Fault(f"{len(stages)} matmuls were launched, 2 expected")
        checks += [stage() for stage in stages]
        if sample is None:
            found = compare(out, *reference.truth_and_plain(x, logits, self.weights, self.shape))
            checks.append(Check(tokens, "layer", 0, 0, found.frobenius, found.row, 0.0, None, found.miss))
        return checks

    def _execute(self, launch: Launch) -> None:
        execute(self.edit(launch))

    def _routing_miss(self, routed: Routing, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> str:
        """Why the routing is not the reference's, bit for bit."""
        for local, expert in enumerate(self._experts()):
            token, slot = torch.where(topk_ids == expert)
            start, count = int(routed.start[local]), int(routed.count[local])
            if count != len(token):
                return f"expert {expert} has {count} tokens instead of {len(token)}"
            rows = slice(start, start + count)
            if not torch.equal(routed.gather[rows].long() // self.shape.topk, token):
                return f"expert {expert} has other tokens"
            if not torch.equal(routed.weights[rows], topk_weights[token, slot]):
                return f"expert {expert} has other weights"
        return ""

    def _experts(self) -> list[int]:
        """The model's number of each of this rank's experts."""
        expert_map = self.weights.expert_map
        if expert_map is None:
            return list(range(self.shape.experts))
        return [int(each) for each in torch.argsort(expert_map)[(expert_map < 0).sum() :]]

    def _matmul(
        self, launch: Launch, index: int, tokens: int, x: torch.Tensor, routed: Routing, sample: int | None
    ) -> Callable[[], Check]:
        """Execute a matmul's launch; what is returned compares it, when all is done."""
        named = dict(zip(launch.signature, launch.arguments, strict=True))
        tensors = {name: value for name, value in launch.values() if isinstance(value, torch.Tensor)}
        y, rows = tensors["Y"], tensors["X"]
        x_grid, y_grid, z_grid = launch.grid
        total = x_grid * y_grid * z_grid
        chosen = None
        if sample is not None and sample < total:
            chosen = np.unique(np.linspace(0, total - 1, sample).astype(int)).tolist()
        bits, untouched = UNTOUCHED[y.element_size()]
        y.view(bits).fill_(untouched)
        if index == 1 and sample is not None:
            # What the sampled workgroups of w13 did not compute, those of w2 may read.
            missing = ~touched(rows)
            generator = torch.Generator().manual_seed(2)
            rows[missing] = torch.randn(int(missing.sum()), generator=generator).to(rows)
        given = x if index == 0 else rows.reshape(-1, rows.shape[-1]).clone()
        began = time.perf_counter()
        counts = execute(launch, chosen)
        seconds = time.perf_counter() - began
        got = y.reshape(-1, y.shape[-1]).clone()
        split, rows_expected = named["SPLIT_K"], len(routed.gather)
        if len(got) != split * rows_expected:
            raise Fault(f"{launch.name} gives {len(got)} rows instead of {split} x {rows_expected}")
        check = Check(tokens, ("w13", "w2")[index], counts.workgroups, total, None, None, seconds, counts, "")
        if split > 1:
            miss = "" if sample is None else "what a split K leaves cannot be sampled"
            return lambda: dataclasses.replace(check, miss=miss, note="in layer")
        if not routed.count.any():
            return lambda: dataclasses.replace(check, note="no rows")
        tile = named["BLOCK_M"], named["BLOCK_N"] * got.shape[1] // named["N"]
        busy = counts.workgroups - counts.idle_workgroups
        return lambda: self._compared(check, busy, index, tile, given, got, routed, whole=chosen is None)

    def _compared(
        self,
        check: Check,
        busy: int,
        index: int,
        tile: tuple[int, int],
        given: torch.Tensor,
        got: torch.Tensor,
        routed: Routing,
        *,
        whole: bool,
    ) -> Check:
        """Compare what a matmul wrote: all of it, or each tile of it of which any element was written."""
        written = touched(got)
        truth = torch.zeros(got.shape, dtype=torch.float64)
        plain = torch.zeros(got.shape, dtype=torch.bfloat16)
        where = torch.zeros(got.shape, dtype=torch.bool)
        tiles = 0
        starts, counts = routed.start[:-1].tolist(), routed.count.tolist()
        for expert, (start, count) in enumerate(zip(starts, counts, strict=True)):
            for first in range(start, start + count, tile[0]):
                row = torch.arange(first, min(first + tile[0], start + count))
                target = routed.gather[row].long() if index and self.prepared.SCATTERS else row
                columns_at = range(0, got.shape[1], tile[1])
                computed = torch.stack([written[target, n : n + tile[1]].any() for n in columns_at])
                tiles += int(computed.sum())
                columns = (computed | whole).repeat_interleave(tile[1])[: got.shape[1]]
                where[target] = columns
                for dtype, into in ((torch.float64, truth), (torch.bfloat16, plain)):
                    values = self._truth(index, expert, given, row, columns, routed, dtype)
                    into[target[:, None], columns.nonzero()[:, 0]] = values
        if tiles != busy:
            return dataclasses.replace(check, miss=f"{busy} workgroups wrote {tiles} tiles")
        if not tiles:
            return dataclasses.replace(check, miss="no workgroup of the sample had anything to do")
        if (got[written & ~where] != 0).any():
            return dataclasses.replace(check, miss="wrote rows that no expert of this rank computes")
        some = where.any(dim=1)
        found = compare(got[some], truth[some], plain[some], where[some])
        miss = found.miss
        if not miss and found.frobenius > MAX_FROBENIUS:
            miss = f"errs by {found.frobenius:.2e} (relative Frobenius), {MAX_FROBENIUS:.0e} is allowed"
        return dataclasses.replace(check, frobenius=found.frobenius, row=found.row, miss=miss)

    def _truth(
        self,
        index: int,
        expert: int,
        given: torch.Tensor,
        row: torch.Tensor,
        columns: torch.Tensor,
        routed: Routing,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """What w13 (index 0) or w2 (1) of an expert must give: dtype[len(row), columns.sum()]."""
        if index == 0:
            part = self._part(expert, columns.repeat_interleave(2), slice(0))
            return reference.through_w13(
                given[routed.gather[row].long() // self.shape.topk].to(dtype), 0, part, self.shape
            )
        part = self._part(expert, slice(0), columns)
        return reference.through_w2(given[row].to(dtype), 0, part) * routed.weights[row, None].to(dtype)

    def _part(self, expert: int, w13: Any, w2: Any) -> MoeWeights:
        """One expert, with some of the rows of its matrices."""
        weights = self.weights
        return MoeWeights(
            weights.w13[expert][w13][None],
            weights.w13_scale[expert][w13][None],
            weights.w13_bias[expert][w13][None],
            weights.w2[expert][w2][None],
            weights.w2_scale[expert][w2][None],
            weights.w2_bias[expert][w2][None],
        )


def touched(tensor: torch.Tensor) -> torch.Tensor:
    """Which elements of a tensor that was filled with UNTOUCHED were written."""
    bits, untouched = UNTOUCHED[tensor.element_size()]
    return tensor.view(bits) != untouched
