"""A stand-in for the two collectives of data parallelism that vLLM's CPU communicator lacks.

Source: vLLM 0.32, distributed/device_communicators/base_device_communicator.py, where they raise
NotImplementedError, and cuda_communicator.py, which says what they give.
"""

from __future__ import annotations

import torch
from torch import distributed
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.platforms.cpu import CpuPlatform

CpuPlatform.get_device_communicator_cls = classmethod(lambda cls: "cpu_collectives.Communicator")


class Rank:
    """An extension of vLLM's workers, which import this module for it before they make process groups."""


class Communicator(CpuCommunicator):
    """vLLM's, and shares of different sizes, by broadcasts and a sum over all ranks."""

    def all_gatherv(
        self, input_: torch.Tensor | list[torch.Tensor], dim: int = 0, sizes: list[int] | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """Every rank's [size, ...], one behind the other."""
        assert dim == 0
        if isinstance(input_, list):
            return [self.all_gatherv(each, dim, sizes) for each in input_]
        sizes = sizes or [len(input_)] * self.world_size
        assert sizes[self.rank_in_group] == len(input_)
        shares = [input_.new_empty(size, *input_.shape[1:]) for size in sizes]
        shares[self.rank_in_group].copy_(input_)
        for rank, share in zip(self.ranks, shares, strict=True):
            distributed.broadcast(share, rank, self.device_group)
        return torch.cat(shares)

    def reduce_scatterv(
        self, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None
    ) -> torch.Tensor:
        """This rank's [size, ...] of the sum of what all ranks give."""
        assert dim == 0
        total = input_.clone()
        distributed.all_reduce(total, group=self.device_group)
        sizes = sizes or [len(input_) // self.world_size] * self.world_size
        return total.split(sizes)[self.rank_in_group].clone()
