"""Launching a kernel: its arguments as they lie in memory, and its waves as hardware starts them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_mxfp4_gfx950.gfx950.driver import WAVE, Launch
from vllm_mxfp4_gfx950.gfx950.emulator.assembly import Program
from vllm_mxfp4_gfx950.gfx950.emulator.memory import Fault, Region
from vllm_mxfp4_gfx950.gfx950.emulator.operands import Registers
from vllm_mxfp4_gfx950.gfx950.emulator.waves import Waves

USER_SGPRS = ("dispatch_ptr", "queue_ptr", "kernarg_segment_ptr", "dispatch_id")
"""Pairs of scalar registers that a kernel may ask for, in the order in which it gets them."""


def lay_out(program: Program, launch: Launch) -> tuple[NDArray[np.uint8], list[Region]]:
    """The kernel arguments as they lie in memory, and the tensors they point to.

    Source: Triton passes a signature's arguments that are not constants, in order, then pointers to two
    scratch memories, which these kernels do not use.
    """
    size = max((offset + size for offset, size, _ in program.arguments), default=0)
    raw = np.zeros(max(8, size), np.uint8)
    values = launch.values()
    if len(values) + 2 != len(program.arguments):
        raise Fault(
            f"{launch.name} takes {len(program.arguments)} arguments; got {len(values)} and 2 of scratch"
        )
    regions: list[Region] = []
    for (offset, width, kind), (name, value) in zip(program.arguments, values, strict=False):
        tensor = plain_tensor(value)
        if (kind == "global_buffer") != (tensor is not None or value is None):
            raise Fault(f"{launch.name}: argument {name} is {kind}; got {type(value).__name__}")
        if tensor is not None:
            bits = tensor.data_ptr().to_bytes(width, "little")
            if tensor.numel():
                regions.append(tensor_region(name, tensor))
        elif isinstance(value, float):
            bits = np.array(value, f"f{width}").tobytes()
        else:
            bits = (int(value or 0) % 2 ** (8 * width)).to_bytes(width, "little")
        raw[offset : offset + width] = np.frombuffer(bits, np.uint8)
    regions.append(Region("kernel arguments", raw.ctypes.data, raw))
    return raw, without_overlap(regions)


def plain_tensor(value: Any) -> torch.Tensor | None:
    """The tensor of an argument: triton_kernels passes its own, and Triton wraps those of another type."""
    while hasattr(value, "data_ptr") and not isinstance(value, torch.Tensor):
        value = value.storage.data if hasattr(value, "storage") else value.base
    return value if isinstance(value, torch.Tensor) else None


def tensor_region(name: str, tensor: torch.Tensor) -> Region:
    """A tensor's whole storage: triton_kernels clears more of an allocation than the view that it passes."""
    storage = tensor.untyped_storage()
    flat = torch.empty(0, dtype=torch.uint8).set_(storage)
    return Region(name, storage.data_ptr(), flat.numpy())


def without_overlap(regions: list[Region]) -> list[Region]:
    """Regions that share bytes, as one."""
    merged: list[Region] = []
    for region in sorted(regions, key=lambda each: (each.start, -each.data.size)):
        last = merged[-1] if merged else None
        if last is None or region.start >= last.start + last.data.size:
            merged.append(region)
            continue
        size = max(last.data.size, region.start + region.data.size - last.start)
        data = np.lib.stride_tricks.as_strided(last.data, (size,), (1,))
        name = last.name if region.name in last.name.split("+") else f"{last.name}+{region.name}"
        merged[-1] = Region(name, last.start, data)
    return merged


def start(program: Program, arguments: NDArray[np.uint8], ids: NDArray[Any], waves: int) -> Waves:
    """Waves at the kernel's entry, with the registers that hardware sets.

    Args:
        program: the kernel.
        arguments: uint8[n], the kernel arguments.
        ids: int64[3, workgroups], their coordinates.
        waves: of a workgroup.

    Source: LLVM, AMDGPUUsage, "Initial Kernel Execution State" and "Preloaded Kernel Arguments".
    """
    descriptor, notes = program.descriptor, program.notes
    count = ids.shape[1]
    vector = Registers.of(program).vector
    workgroup = np.repeat(np.arange(count), waves)
    wave = np.tile(np.arange(waves, dtype=np.uint8), count)
    group = Waves(vector, -(-notes["private_segment_fixed_size"] // 4), workgroup, wave)
    group.write_v(0, (wave[:, None].astype(np.uint32) * WAVE + np.arange(WAVE, dtype=np.uint32)))
    at = 0
    for name in USER_SGPRS:
        if descriptor.get(f"user_sgpr_{name}"):
            if name == "kernarg_segment_ptr":
                group.write_pair(at, np.asarray(arguments.ctypes.data, np.uint64))
            at += 2
    words = arguments[: len(arguments) // 4 * 4].view(np.uint32)
    offset = descriptor["user_sgpr_kernarg_preload_offset"]
    for word in words[offset : offset + descriptor["user_sgpr_kernarg_preload_length"]]:
        group.write_s(at, word)
        at += 1
    at = descriptor["user_sgpr_count"]
    for axis, name in enumerate("xyz"):
        if descriptor[f"system_sgpr_workgroup_id_{name}"]:
            group.write_s(at, ids[axis][workgroup].astype(np.uint32))
            at += 1
    return group
