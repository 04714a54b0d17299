"""A layer prepared for triton_kernels: what both generations of the package share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import triton

from vllm_mxfp4_gfx950.arch import HOPPER_K
from vllm_mxfp4_gfx950.backends.triton import own, package, routing, two_fp8
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights, pad_intermediate
from vllm_mxfp4_gfx950.tables import ladder
from vllm_mxfp4_gfx950.tiles import Ladder, TileConfig, gemms


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
        tiles: w13's and w2's by number of tokens; None leaves a call to the package.
        flags: the same as triton_kernels' OptFlags.
        own: our own matmuls, for few tokens or, with two FP8 addends, for any; None where they do not serve.
    """

    KERNELS: ClassVar[str]
    """The package's generation, as the tile tables name it."""

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
    tiles: tuple[Ladder[TileConfig | None], Ladder[TileConfig | None]]
    flags: tuple[Ladder[Any], Ladder[Any]]
    own: own.Own | two_fp8.TwoFp8 | None

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
    def count_sizes() -> int:
        """As in `sizes`."""

    @staticmethod
    @abstractmethod
    def to_opt_flags(tile: TileConfig, arch: str) -> Any:
        """A tile as this generation takes it."""

    @abstractmethod
    def matmuls(self, x: torch.Tensor, routed: routing.Routing) -> torch.Tensor:
        """w13 with the SwiGLU fused, w2, and the sum over a token's experts: bf16[T, H] to bf16[T, H]."""

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
        return cls(
            arch=arch,
            shape=shape,
            w13=w13,
            w2=w2,
            activation=cls.fused_swiglu(shape.alpha, shape.limit),
            order=order,
            sizes=cls.count_sizes(),
            tiles=(w13_tiles, w2_tiles),
            flags=(cls._flags(w13_tiles, arch), cls._flags(w2_tiles, arch)),
            own=own.own_for(arch, shape, w13, w2, order, tables) if cls.OWN else None,
        )

    def run(self, x: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        """The layer: through our own matmuls where they serve so many tokens, else through the package's.

        Args:
            x: bf16[T, H].
            router_logits: bf16 or fp32[T, global_experts].

        Returns:
            bf16[T, H]
        """
        tokens = x.shape[0]
        if not tokens:
            return torch.empty_like(x)
        if self.own is not None and self.own.serves(tokens):
            return self.own.run(x, router_logits)
        return self.matmuls(x, self.route(router_logits))

    def route(self, router_logits: torch.Tensor) -> routing.Routing:
        """Choose experts, and sort the choices that live on this rank."""
        return routing.route(router_logits, self.shape.topk, self.shape.experts, self.order, self.sizes)

    @property
    def keeps_nan(self) -> bool:
        """Whether a token with a NaN comes out as NaN."""
        return isinstance(self.own, two_fp8.TwoFp8)

    def first_batches(self) -> set[int]:
        """The smallest batch of each of the ladders' rungs but the first ones.

        A rung of the package's may begin where our own matmuls still serve, and end behind them.
        """
        lasts = {bound for rungs in self.tiles for bound in rungs.bounds[:-1]}
        if self.own is not None:
            lasts |= {bound for rungs in self.own.tiles for bound in rungs.bounds if self.own.ends(bound)}
        return {last + 1 for last in lasts}

    def tiles_at(self, tokens: int) -> tuple[TileConfig | None, TileConfig | None]:
        """The tiles of w13 and of w2 with which the package serves so many tokens."""
        return self.tiles[0].at(tokens), self.tiles[1].at(tokens)

    def with_tiles(self, w13: TileConfig | None, w2: TileConfig | None) -> Prepared:
        """The same layer with these tiles for every batch, and without our own matmuls."""
        tiles = Ladder((1,), (w13,)), Ladder((1,), (w2,))
        flags = self._flags(tiles[0], self.arch), self._flags(tiles[1], self.arch)
        return replace(self, tiles=tiles, flags=flags, own=None)

    def with_own_tiles(self, w13: TileConfig, w2: TileConfig) -> Prepared | None:
        """The same layer through our own matmuls for every batch; None where they cannot read it."""
        if not self.OWN:
            return None
        tiles = Ladder((2**30,), (w13,)), Ladder((2**30,), (w2,))
        made = own.make(self.arch, self.shape, self.w13, self.w2, self.order, tiles)
        return None if made is None else replace(self, own=made)

    def without_own(self) -> Prepared | None:
        """The same layer through the package alone; None when it has nothing else."""
        return None if self.own is None else replace(self, own=None)

    @classmethod
    def _flags(cls, tiles: Ladder[TileConfig | None], arch: str) -> Ladder[Any]:
        return tiles.map(lambda tile: tile and cls.to_opt_flags(tile, arch))
