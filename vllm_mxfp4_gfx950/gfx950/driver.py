"""A stand-in Triton driver that presents a gfx950 to the runtime and compiles instead of launching."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver as triton_driver

ARCH = "gfx950"
COMPUTE_UNITS = 256
LDS_BYTES = 160 * 1024
WAVE = 64
MAX_THREADS = 1024
DEVICE = 950
"""A device number that no real GPU has, so that Triton's per-device caches stay apart."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch, which Triton left to the stand-in.

    Args:
        name: the kernel's name.
        assembly: its gfx950 assembly, with the compiler's resource comments.
        lds_bytes: LDS that Triton allots to a workgroup at launch.
        grid: workgroups in x, y and z.
        arguments: the values that the kernel's parameters were bound to, constants included.
        signature: Triton's type of each parameter, by name: "constexpr" for constants, tuples for tuples.
    """

    name: str
    assembly: str
    lds_bytes: int
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    signature: dict[str, Any] = field(default_factory=dict)

    def values(self) -> list[tuple[str, Any]]:
        """Name and value of each parameter that is not a constant, those inside tuples one by one."""

        def flat(name: str, kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
            if isinstance(kind, tuple):
                for index, inner in enumerate(zip(kind, value, strict=True)):
                    yield from flat(f"{name}.{index}", *inner)
            elif kind != "constexpr":
                yield name, value

        pairs = zip(self.signature.items(), self.arguments, strict=True)
        return [found for (name, kind), value in pairs for found in flat(name, kind, value)]


class _Utils:
    """What Triton asks of a driver's compiled utility module."""

    def __init__(self) -> None:
        self.loading: dict[str, str] = {}

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": LDS_BYTES,
            "max_num_regs": 512,
            "multiprocessor_count": COMPUTE_UNITS,
            "warpSize": WAVE,
        }

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        # The handle that Triton keeps for a loaded function is its assembly.
        path = next(path for file, path in self.loading.items() if file.endswith(".amdgcn"))
        return None, (name, Path(path).read_text(), shared), 0, 0, MAX_THREADS


class _Driver(DriverBase):  # type: ignore[misc]
    def __init__(self, on_launch: Callable[[Launch], None]) -> None:
        super().__init__()
        self.utils = _Utils()
        self.launcher_cls = lambda source, metadata: partial(self._launch, source.signature)
        self._on_launch = on_launch

    def _launch(
        self, signature: dict[str, Any], x: int, y: int, z: int, stream: int, function: Any, *rest: Any
    ) -> None:
        # Before the arguments: packed metadata, launch metadata, and the two hooks.
        name, assembly, lds_bytes = function
        self._on_launch(Launch(name, assembly, lds_bytes, (x, y, z), rest[4:], dict(signature)))

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("hip", ARCH, WAVE)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs here, so nothing can be timed")

    def get_current_device(self) -> int:
        return DEVICE

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def presented(on_launch: Callable[[Launch], None]) -> Iterator[None]:
    """Inside, Triton compiles for gfx950 and calls back where it would launch.

    What was active before is active again afterwards. Tensors stay on the CPU, and a launch writes
    nothing unless the callback does.

    Args:
        on_launch: called for each launch, with the compiled kernel.
    """
    driver = _Driver(on_launch)

    def note_files(module: Any, function: Any, name: str, files: dict[str, str], key: str) -> None:
        driver.utils.loading = files

    properties = SimpleNamespace(multi_processor_count=COMPUTE_UNITS)
    before = triton_driver._active
    triton_driver.set_active(driver)
    try:
        with (
            mock.patch.object(knobs.runtime, "kernel_load_start_hook", note_files),
            # triton_kernels asks torch for the number of compute units and for CUDA's capability.
            mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
            mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 5)),
        ):
            yield
    finally:
        triton_driver._active = before
