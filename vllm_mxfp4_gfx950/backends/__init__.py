"""The ways to compute the experts, and the one place that chooses between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch

from vllm_mxfp4_gfx950 import tuning
from vllm_mxfp4_gfx950.backends import ck, reference
from vllm_mxfp4_gfx950.backends.triton import matmul, matmul_ogs
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights
from vllm_mxfp4_gfx950.settings import BACKEND_VAR, STRICT_VAR, Settings


class Backend(Protocol):
    """A module that computes the experts of one MoE layer."""

    NAME: str

    def why_not(self, shape: MoeShape, arch: str) -> str | None:
        """The reason why it cannot compute this shape on this arch; None when it can."""

    def source(self) -> str:
        """Which package does the work, and where it came from. Only asked when why_not is None."""

    def prepare(self, weights: MoeWeights, shape: MoeShape, tables: Path | None = None) -> Any:
        """Bring the weights into the backend's layout. Consumes them: their memory may be reused.

        `tables` is the directory of the user's own tiles, for kernels that take any.
        """

    def run(self, prepared: Any, x: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        """bf16[T, H] and [T, global_experts] to bf16[T, H].

        Without waiting for the GPU, so that graphs capture it; the reference alone does wait.
        """

    def without_decode(self, prepared: Any) -> Any | None:
        """The same layer without kernels of its own for few tokens; None where it has none."""


FAMILIES: dict[str, tuple[Backend, ...]] = {
    "triton": (matmul_ogs, matmul),
    "ck": (ck,),
    "reference": (reference,),
}
"""The backends behind each value of VLLM_MXFP4_BACKEND."""

ORDER: dict[str, tuple[str, ...]] = {
    "gfx950": ("triton", "ck"),
    "gfx942": ("triton",),
    "sm90": ("triton",),
    "cpu": ("reference",),
}
"""What "auto" tries on each arch, best first."""


@dataclass(frozen=True)
class Selection:
    """The backend that was chosen, and why each better one was not."""

    backend: Backend
    arch: str
    refused: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        passed_over = "".join(f"; not {name}: {reason}" for name, reason in self.refused)
        return f"{self.backend.NAME} on {self.arch} ({self.backend.source()}){passed_over}"


def arch_of(device: torch.device) -> str:
    """The name of a device's instruction set: "gfx950", "sm90", "cpu"."""
    if device.type == "cpu":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm{properties.major}{properties.minor}"


def select(
    shape: MoeShape, arch: str, settings: Settings, failed: Mapping[str, str] = MappingProxyType({})
) -> Selection:
    """Choose the backend for a model, once, before its weights are loaded.

    Args:
        shape: one layer of the model.
        arch: what `arch_of` said.
        settings: what the user asked for. A backend asked for by name is taken or refused, never
            replaced by another.
        failed: reasons why backends that could run must not, by name.

    Raises:
        Mxfp4Error: no backend can serve it; the text lists each with its reason. Or the user's table for
            this arch is not a table: now, as later that would look like a fault of the backend.
    """
    if settings.tables is not None:
        tuning.users(settings.tables, arch)
    wanted = ORDER.get(arch, ()) if settings.backend == "auto" else (settings.backend,)
    refused: list[tuple[str, str]] = []
    for family in wanted:
        if refused and settings.strict:
            refused.append((family, f"a second choice, and {STRICT_VAR}=1 forbids falling back"))
            continue
        for backend in FAMILIES[family]:
            reason = failed.get(backend.NAME) or backend.why_not(shape, arch)
            if reason is None:
                return Selection(backend, arch, tuple(refused))
            refused.append((backend.NAME, reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused)
    raise Mxfp4Error(
        "the machine",
        f"able to run one of the MoE backends for {shape}",
        reasons or f"{arch}, for which there is none (there is for {', '.join(ORDER)})",
        f"Mend what is named, run `vllm-mxfp4 doctor`, or choose another with {BACKEND_VAR}",
    )
