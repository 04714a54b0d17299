"""A layer prepared for triton_kernels: what all generations of the package share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
import triton

from vllm_mxfp4_gfx950.arch import ARCHES, HOPPER_K
from vllm_mxfp4_gfx950.backends.triton import own, package, routing, two_fp8
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights, pad_intermediate
from vllm_mxfp4_gfx950.tables import ladder
from vllm_mxfp4_gfx950.tables import plans as users_plans
from vllm_mxfp4_gfx950.tiles import Ladder, Plan, TileConfig, gemms

OwnKernels: TypeAlias = own.Own | two_fp8.TwoFp8


@dataclass(frozen=True)
class Prepared(ABC):
    """The weights in kernel layout, and everything else that stays the same from call to call.

    Args:
        arch: the GPU, as `backends.arch_of` names it.
        shape: the layer.
        w13, w2: its matmuls.
        activation: the fused SwiGLU, as triton_kernels takes it.
        order: as `routing.order_of` returns it.
        sizes: how many sizes of tiles the routing schedules, from 16 rows on.
        plans: which of them serves how many tokens.
        pinned: whether the user's table says so.
        tiles: w13's and w2's by number of tokens; None leaves a call to the package.
        flags: the same as triton_kernels' OptFlags.
        own: our own matmuls, for as many tokens as their table has tiles; None where they do not serve.
        two_fp8: those with two FP8 addends, for any number of tokens; None where the GPU has no such thing.
    """

    NAME: ClassVar[str]
    """The backend's, which is the class itself."""

    KERNELS: ClassVar[str]
    """The package's matmul, as the tile tables name it."""

    OWN: ClassVar[bool]
    """Whether our own matmuls may serve in front of it."""

    SCATTERS: ClassVar[bool]
    """Whether its w2 writes each row to the place of its pair, and not in the order of the rows."""

    arch: str
    shape: MoeShape
    w13: package.Weight
    w2: package.Weight
    activation: Any
    order: torch.Tensor | None
    sizes: int
    plans: Ladder[Plan]
    pinned: bool
    tiles: tuple[Ladder[TileConfig | None], Ladder[TileConfig | None]]
    flags: tuple[Ladder[Any], Ladder[Any]]
    own: own.Own | None
    two_fp8: two_fp8.TwoFp8 | None

    source = staticmethod(package.source)

    @staticmethod
    @abstractmethod
    def pads() -> bool:
        """Whether the layout of the values needs a depth of whole groups of HOPPER_K."""

    @staticmethod
    @abstractmethod
    def to_weight(blocks: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor) -> package.Weight:
        """uint8[E, N, K/2], uint8[E, N, K/32] and fp32[E, N] in this GPU's layout."""

    @staticmethod
    @abstractmethod
    def fused_swiglu(alpha: float, limit: float) -> Any:
        """The activation as this generation takes it."""

    @staticmethod
    @abstractmethod
    def block_sizes() -> Sequence[int]:
        """The sizes of tiles that the package may choose among, for which it may ask the driver."""

    @staticmethod
    @abstractmethod
    def to_opt_flags(tile: TileConfig, arch: str) -> Any:
        """A tile as this generation takes it."""

    @abstractmethod
    def matmuls(
        self, x: torch.Tensor, routed: routing.Routing, w13_flags: Any, w2_flags: Any
    ) -> torch.Tensor:
        """w13 with the SwiGLU fused, w2, and the sum over a token's experts: bf16[T, H] to bf16[T, H].

        Args:
            x: the tokens.
            routed: their routing.
            w13_flags, w2_flags: OptFlags; None for those that the package chooses.
        """

    @classmethod
    def prepare(cls, weights: MoeWeights, shape: MoeShape, tables: Path | None = None) -> Prepared:
        """Swizzle blocks and scales into the layouts that this GPU's kernels read.

        Blocks are swizzled expert by expert in the memory that they already hold, so that no second
        copy of a layer ever exists.

        Args:
            weights: consumed; their tensors must not be used afterwards.
            shape: the layer's sizes.
            tables: the directory of the user's tile tables.
        """
        if cls.pads():
            weights = pad_intermediate(weights, HOPPER_K)
        w13 = cls.to_weight(weights.w13, weights.w13_scale, weights.w13_bias)
        w2 = cls.to_weight(weights.w2, weights.w2_scale, weights.w2_bias)
        order = routing.order_of(weights.expert_map)
        arch = package.arch_of_target()
        by_package: Ladder[TileConfig | None] = Ladder((1,), (None,))
        w13_tiles, w2_tiles = (
            ladder(arch, cls.KERNELS, triton.__version__, gemm, tables) or by_package for gemm in gemms(shape)
        )
        has_own = cls.OWN and "own" in ARCHES[arch].candidates
        kernels = own.own_for(arch, shape, w13, w2, order, tables) if has_own else None
        package_plan: Plan = "package" if w13_tiles is by_package else "table"
        plans = Ladder[Plan]((1,), (package_plan,))
        if kernels is not None:
            plans = Ladder((kernels.most, kernels.most + 1), ("own", package_plan))
        pinned = users_plans(arch, triton.__version__, shape, tables)
        layer = cls(
            arch=arch,
            shape=shape,
            w13=w13,
            w2=w2,
            activation=cls.fused_swiglu(shape.alpha, shape.limit),
            order=order,
            sizes=len(cls.block_sizes()),
            plans=plans,
            pinned=pinned is not None,
            tiles=(w13_tiles, w2_tiles),
            flags=(cls._flags(w13_tiles, arch), cls._flags(w2_tiles, arch)),
            own=kernels,
            two_fp8=two_fp8.for_layer(shape, w13, w2, order) if ARCHES[arch].two_fp8 else None,
        )
        return layer if pinned is None else layer.with_plans(pinned)

    def run(self, x: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        """bf16[T, H] and bf16 or fp32[T, global_experts] to bf16[T, H], by the plan for so many tokens."""
        tokens = x.shape[0]
        if not tokens:
            return torch.empty_like(x)
        plan = self.plans.at(tokens)
        kernels = self._own_kernels(plan)
        if kernels is not None:
            return kernels.run(x, router_logits)
        flags = (rungs.at(tokens) if plan == "table" else None for rungs in self.flags)
        return self.matmuls(x, self.route(router_logits), *flags)

    def tensors(self) -> list[torch.Tensor]:
        """What the package's matmuls and our own read, which is the same memory."""
        return package.tensors_of(self.w13, self.w2, self.order)

    def route(self, router_logits: torch.Tensor) -> routing.Routing:
        """Choose experts, and sort the choices that live on this rank."""
        return routing.route(router_logits, self.shape.topk, self.shape.experts, self.order, self.sizes)

    def keeps_nan(self, tokens: int) -> bool:
        """Whether a NaN among so many tokens comes out as one."""
        return self.plans.at(tokens) == "two_fp8"

    def first_batches(self) -> set[int]:
        """The smallest batch of each plan and of each of its tiles, but those of one token."""
        ladders = [self.plans, *self.tiles]
        for kernels in (self.own, self.two_fp8):
            ladders += [] if kernels is None else kernels.tiles
        lasts = {bound for rungs in ladders for bound in rungs.bounds}
        return {last + 1 for last in lasts if self._served_by(last) != self._served_by(last + 1)}

    def _own_kernels(self, plan: Plan) -> OwnKernels | None:
        """Those of ours that a plan runs through; None where it is the package's."""
        return self.own if plan == "own" else self.two_fp8 if plan == "two_fp8" else None

    def _served_by(self, tokens: int) -> tuple[Plan, tuple[TileConfig | None, TileConfig | None]]:
        return self.plans.at(tokens), self.tiles_at(tokens)

    def tiles_at(self, tokens: int) -> tuple[TileConfig | None, TileConfig | None]:
        """The tiles of w13 and of w2 with which it serves so many tokens."""
        plan = self.plans.at(tokens)
        if plan == "package":
            return None, None
        kernels = self._own_kernels(plan)
        w13, w2 = self.tiles if kernels is None else kernels.tiles
        return w13.at(tokens), w2.at(tokens)

    def offered(self, tokens: int) -> tuple[Plan, ...]:
        """The plans that can serve so many tokens."""
        found: dict[Plan, bool] = {
            "own": self.own is not None and tokens <= self.own.most,
            "two_fp8": self.two_fp8 is not None,
            "table": self.tiles[0].at(tokens) is not None,
            "package": True,
        }
        return tuple(plan for plan, there in found.items() if there)

    def with_plans(self, plans: Ladder[Plan]) -> Prepared:
        """The same layer by these plans; for one that it does not have, the package serves."""
        return self._with(plans, self.offered(1))

    def without(self, *plans: Plan) -> Prepared | None:
        """The same layer, the package serving instead of these; None when that is one of them."""
        left = tuple(plan for plan in self.offered(1) if plan not in plans)
        return self._with(self.plans, left) if {"table", "package"} & {*left} else None

    def _with(self, plans: Ladder[Plan], allowed: tuple[Plan, ...]) -> Prepared:
        """Plans, and for those that are not allowed the package's that is."""
        other: Plan = "table" if "table" in allowed else "package"
        return replace(self, plans=plans.map(lambda plan: plan if plan in allowed else other).merged())

    def with_tiles(self, w13: TileConfig | None, w2: TileConfig | None) -> Prepared:
        """The same layer through the package, with these tiles for every batch."""
        tiles = Ladder((1,), (w13,)), Ladder((1,), (w2,))
        flags = self._flags(tiles[0], self.arch), self._flags(tiles[1], self.arch)
        return replace(self, tiles=tiles, flags=flags, plans=Ladder((1,), ("table",)))

    def with_own_tiles(self, w13: TileConfig, w2: TileConfig) -> Prepared | None:
        """The same layer through our own matmuls for every batch; None where they cannot read it."""
        if not self.OWN:
            return None
        tiles = Ladder((2**30,), (w13,)), Ladder((2**30,), (w2,))
        made = own.make(self.shape, self.w13, self.w2, self.order, tiles)
        return None if made is None else replace(self, own=made, plans=Ladder((1,), ("own",)))

    @classmethod
    def _flags(cls, tiles: Ladder[TileConfig | None], arch: str) -> Ladder[Any]:
        return tiles.map(lambda tile: tile and cls.to_opt_flags(tile, arch))
