"""The ways to compute the experts, and the one place that chooses between them.

A backend is known by name here; its file is loaded when it is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

import torch

from vllm_mxfp4_gfx950.arch import ARCHES, arch_named
from vllm_mxfp4_gfx950.backends import aiter_triton, ck, reference
from vllm_mxfp4_gfx950.backends.triton import package
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights
from vllm_mxfp4_gfx950.settings import BACKEND_VAR, STRICT_VAR, Settings
from vllm_mxfp4_gfx950.tables import content
from vllm_mxfp4_gfx950.tiles import Ladder, Plan, TileConfig

if TYPE_CHECKING:
    from vllm_mxfp4_gfx950.backends.triton.routing import Routing


class Layer(Protocol):
    """One MoE layer, prepared: it holds what its kernels read."""

    def run(self, x: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        """bf16[T, H] and [T, global_experts] to bf16[T, H].

        Without waiting for the GPU, so that graphs capture it; the reference alone does wait.
        """

    def tensors(self) -> list[torch.Tensor]:
        """What its kernels read, each once and always in the same order: other weights are written there."""


def overwrite(layer: Layer, other: Layer) -> None:
    """Give a layer the weights of another one of its shape and backend, where its own lie."""
    for held, given in zip(layer.tensors(), other.tensors(), strict=True):
        held.copy_(given)


class Backend(Protocol):
    """A module, a class or an object that computes the experts of MoE layers."""

    NAME: str

    def source(self) -> str:
        """Which package does the work, and where it came from."""

    def prepare(self, weights: MoeWeights, shape: MoeShape, tables: Path | None = None) -> Layer:
        """Bring the weights into the backend's layout. Consumes them: their memory may be reused.

        `tables` is the directory of the user's own tiles, for kernels that take any.
        """


@runtime_checkable
class SteppedLayer(Layer, Protocol):
    """A prepared layer whose kernels differ from batch to batch."""

    def first_batches(self) -> set[int]:
        """The smallest batch of each kernel, but for those of one token."""


@runtime_checkable
class TiledLayer(SteppedLayer, Protocol):
    """A prepared layer with several plans for a batch, whose tiles can be chosen.

    A tile that is None leaves a matmul's to its package.
    """

    SCATTERS: ClassVar[bool]
    """Whether its w2 writes each row to the place of its pair, and not in the order of the rows."""

    @property
    def plans(self) -> Ladder[Plan]:
        """Which plan serves how many tokens."""

    @property
    def pinned(self) -> bool:
        """Whether the user's table says what serves this layer."""

    def route(self, router_logits: torch.Tensor) -> Routing:
        """Choose experts, and sort the choices that live on this rank."""

    def keeps_nan(self, tokens: int) -> bool:
        """Whether a NaN among so many tokens comes out as one, and not as what a minimum made of it."""

    def tiles_at(self, tokens: int) -> tuple[TileConfig | None, TileConfig | None]:
        """The tiles of w13 and of w2 with which it serves so many tokens."""

    def offered(self, tokens: int) -> tuple[Plan, ...]:
        """The plans that can serve so many tokens."""

    def with_plans(self, plans: Ladder[Plan]) -> TiledLayer:
        """The same layer by these plans; for one that it does not have, the package serves."""

    def without(self, *plans: Plan) -> TiledLayer | None:
        """The same layer, the package serving instead of these; None when that is one of them."""

    def with_tiles(self, w13: TileConfig | None, w2: TileConfig | None) -> TiledLayer:
        """The same layer through the package, with these tiles for every batch."""

    def with_own_tiles(self, w13: TileConfig, w2: TileConfig) -> TiledLayer | None:
        """The same layer through our own matmuls for every batch; None where they cannot read it."""


@runtime_checkable
class TiledBackend(Backend, Protocol):
    """A backend of such layers."""

    KERNELS: str
    """What the tile tables call them."""

    def prepare(self, weights: MoeWeights, shape: MoeShape, tables: Path | None = None) -> TiledLayer:
        """As in Backend."""


@dataclass(frozen=True)
class Entry:
    """A backend that can be asked for.

    Args:
        name: its NAME.
        why_not: the reason why it cannot compute a shape on an arch; None when it can.
        load: imports its file. Only when why_not has given None.
    """

    name: str
    why_not: Callable[[MoeShape, str], str | None]
    load: Callable[[], Backend]


GENERATIONS = (("ogs", "matmul_ogs"), ("ragged", "ragged_ogs"), ("matmul", "matmul"))
"""Of triton_kernels: how a backend's name ends, and the backend's file."""

FAMILIES: dict[str, tuple[Entry, ...]] = {
    "triton": tuple(
        Entry(f"triton_{name}", partial(package.why_not_layer, file), partial(package.backend, file))
        for name, file in GENERATIONS
    ),
    "two_fp8": tuple(
        Entry(f"two_fp8_{name}", partial(package.why_not_two_fp8, file), partial(package.two_fp8, file))
        for name, file in GENERATIONS
    ),
    "ck": (Entry(ck.NAME, ck.why_not, lambda: ck),),
    "aiter_triton": (Entry(aiter_triton.NAME, aiter_triton.why_not, lambda: aiter_triton),),
    "reference": (Entry(reference.NAME, reference.why_not, lambda: reference),),
}
"""The backends behind each value of VLLM_MXFP4_BACKEND."""

TIMED = ("triton", "ck", "aiter_triton")
"""The families among which the fastest is sought: those that have layouts of their own."""


@dataclass(frozen=True)
class Selection:
    """The backend that was chosen, and why each better one was not.

    Args:
        backend: it.
        arch: as `arch_of` names it.
        refused: name and reason of each that was tried before it, and of its plans that came out wrong.
    """

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


def families(arch: str, settings: Settings) -> tuple[str, ...]:
    """Of which families a backend may be taken for a model whose layers are not timed yet, best first."""
    any_of_them = settings.backend in ("auto", "fastest")
    return arch_named(arch).families if any_of_them else (settings.backend,)


def select(
    shape: MoeShape, arch: str, settings: Settings, failed: Mapping[str, str] = MappingProxyType({})
) -> Selection:
    """Choose the backend for a model, once, before its weights are loaded.

    Args:
        shape: one layer of the model.
        arch: what `arch_of` said.
        settings: what the user asked for. A backend asked for by name is taken or refused, never
            replaced by another. Before anything is timed, "fastest" means "auto".
        failed: reasons why backends that could run must not, by name.

    Raises:
        Mxfp4Error: no backend can serve it; the text lists each with its reason. Or the user's table for
            this arch is not a table: now, as later that would look like a fault of the backend.
    """
    if settings.tables is not None:
        content(settings.tables, arch)
    refused: list[tuple[str, str]] = []
    for family in families(arch, settings):
        if refused and settings.strict:
            refused.append((family, f"a second choice, and {STRICT_VAR}=1 forbids falling back"))
            continue
        for entry in FAMILIES[family]:
            reason = failed.get(entry.name) or entry.why_not(shape, arch)
            if reason is None:
                return Selection(entry.load(), arch, tuple(refused))
            refused.append((entry.name, reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused)
    raise Mxfp4Error(
        "the machine",
        f"able to run one of the MoE backends for {shape}",
        reasons or f"{arch}, for which there is none (there is for {', '.join(ARCHES)})",
        f"Mend what is named, run `vllm-mxfp4 doctor`, or choose another with {BACKEND_VAR}",
    )


def select_tiled(shape: MoeShape, arch: str, tables: Path | None = None) -> TiledBackend:
    """The backend with tiles to choose that serves a shape on an arch.

    Raises:
        Mxfp4Error: there is none, or the user's table is not a table.
    """
    backend = select(shape, arch, Settings("triton", tables=tables)).backend
    assert isinstance(backend, TiledBackend)  # As all of that family are.
    return backend
