"""Compiles matmul_ogs for Hopper with our tiles, without a GPU: tiles on stdin, what came out on stdout."""

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as triton_driver
from triton_kernels import matmul_ogs
from triton_kernels.matmul_ogs_details.opt_flags import make_opt_flags

from vllm_mxfp4_gfx950.backends.triton import own_kernels
from vllm_mxfp4_gfx950.backends.triton.matmul_ogs import Generation
from vllm_mxfp4_gfx950.gfx950 import driver
from vllm_mxfp4_gfx950.random_layer import make_shape, random_tokens, random_weights
from vllm_mxfp4_gfx950.tiles import TileConfig

SHARED_BYTES = 232448
"""What a workgroup of an H200 may have."""


class Utils(driver._Utils):
    """What Triton asks of an H200's driver."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        """The limits that it checks."""
        return {
            "max_shared_mem": SHARED_BYTES,
            "max_num_regs": 65536,
            "multiprocessor_count": 132,
            "warpSize": 32,
        }

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """The handle is the binary itself."""
        return None, (name, binary, shared), 0, 0, 1024


class Driver(driver._Driver):
    """A Hopper that compiles instead of launching."""

    def __init__(self, on_launch: Callable[[driver.Launch], None]) -> None:
        super().__init__(on_launch)
        self.utils = Utils()

    def get_current_target(self) -> GPUTarget:
        """Hopper."""
        return GPUTarget("cuda", 90, 32)


@contextmanager
def presented(on_launch: Callable[[driver.Launch], None]) -> Iterator[None]:
    """As the gfx950's."""
    properties = SimpleNamespace(
        multi_processor_count=132, shared_memory_per_block_optin=SHARED_BYTES, major=9, minor=0
    )
    before = triton_driver._active
    triton_driver.set_active(Driver(on_launch))
    try:
        with (
            mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
            mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        ):
            yield
    finally:
        triton_driver._active = before


def codes(blocks: torch.Tensor) -> torch.Tensor:
    """The checkpoint's codes one by one."""
    return torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)


def spills(binary: bytes) -> int:
    """Instructions that load from or store to local memory."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(tools / "nvdisasm"), "-c", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return len(re.findall(r"\b(?:LDL|STL)\b", code))


def main(tiles: list[list[int]]) -> dict[str, Any]:
    """Its own choices and ours for the same tile, and the spills of each tile's two matmuls."""
    shape = make_shape(8, 4, 320, 320)
    kernels: list[driver.Launch] = []
    own: list[Any] = []

    def launched(launch: driver.Launch) -> None:
        # Nothing is computed. Host code indexes with what routing would have written: zero is an index.
        for argument in launch.arguments:
            if isinstance(argument, torch.Tensor) and not argument.is_floating_point():
                argument.zero_()
        if launch.name.startswith("_matmul_ogs"):
            kernels.append(launch)

    def noted(*arguments: Any, **named: Any) -> Any:
        own.append(make_opt_flags(*arguments, **named))
        return own[-1]

    with presented(lambda launch: None):
        prepared = Generation.prepare(random_weights(shape, 0), shape)
    weights = random_weights(shape, 0)
    layouts = [
        torch.equal(own_kernels.codes_in_torch(weight.values)[:, :rows, :depth], codes(blocks))
        and torch.equal(own_kernels.scales_in_torch(weight.scales)[:, :rows, : depth // 32], scales)
        for weight, blocks, scales in (
            (prepared.w13, weights.w13, weights.w13_scale),
            (prepared.w2, weights.w2, weights.w2_scale),
        )
        for rows, depth in [(blocks.shape[1], 2 * blocks.shape[2])]
    ]
    pairs = []
    untuned = prepared.with_tiles(None, None)
    for tokens in (1, 1024):
        with presented(launched), mock.patch.object(matmul_ogs, "make_opt_flags", noted):
            untuned.run(*random_tokens(shape, tokens, 0))
    for flags in own:
        tile = {field.name: getattr(flags, field.name, 0) for field in dataclasses.fields(TileConfig)}
        ours = Generation.to_opt_flags(TileConfig(**tile), "sm90")
        pairs.append([str(flags), str(dataclasses.replace(ours, target_kernel_kwargs={}))])
    found = []
    for tile in tiles:
        kernels.clear()
        with presented(launched):
            prepared.with_tiles(TileConfig(*tile), TileConfig(*tile)).run(*random_tokens(shape, 64, 0))
        found.append([spills(launch.assembly) for launch in kernels])
    return {"pairs": pairs, "spills": found, "layouts": layouts}


if __name__ == "__main__":
    json.dump(main(json.load(sys.stdin)), sys.stdout)
