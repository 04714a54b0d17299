"""Tiles as data: one table an arch, looked up once when a layer is prepared.

A user's table, from `vllm-mxfp4 tune`, stands beside ours, and serves instead for the layers and the Triton
that it was timed with.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import astuple
from importlib import resources
from pathlib import Path

from vllm_mxfp4_gfx950.arch import arch_named
from vllm_mxfp4_gfx950.moe import MoeShape
from vllm_mxfp4_gfx950.tables.store import Content, read
from vllm_mxfp4_gfx950.tiles import Gemm, Ladder, Plan, TileConfig, gemms, release_of

# Loggers below `vllm` print where vLLM's own do.
logger = logging.getLogger("vllm.mxfp4_triton.tables")

OURS = Path(str(resources.files("vllm_mxfp4_gfx950") / "tables"))


def ladder(
    arch: str, kernels: str, triton: str, gemm: Gemm, tables: Path | None = None
) -> Ladder[TileConfig] | None:
    """The tiles of a matmul: the user's, where their table has this very matmul, else ours.

    Args:
        arch: whose table.
        kernels: "matmul_ogs", "matmul", or "own".
        triton: Triton's release, such as "3.6.0"; tables go by its first two numbers.
        gemm: the matmul. Where our table does not have it, the nearest one that it has serves, which is
            logged; the nearest Triton likewise, if the tiles were ranked and not timed.
        tables: the directory of the user's tables, if any.

    Returns:
        None where there are none.

    Raises:
        Mxfp4Error: as `content`.
    """
    release = release_of(triton)
    if tables is not None:
        found = whose(arch, kernels, triton, gemm, tables)
        _log_once(f"{kernels} tiles for triton {release} are those of {found}", logging.INFO)
    directory = _directory(arch, kernels, release, gemm, tables)
    if directory is None:
        return None
    exact = content(directory, arch).tiles.get((kernels, release, gemm))
    if exact is not None:
        return exact
    closest = min(sorted(releases(arch, kernels)), key=lambda r: abs(_number(r) - _number(release)))
    ours = content(OURS, arch).tiles
    candidates = {g: rungs for (kind, r, g), rungs in ours.items() if (kind, r) == (kernels, closest)}
    nearest = min(
        (g for g in candidates if g.name == gemm.name),
        key=lambda g: sum(
            abs(math.log(a / b)) for a, b in zip(astuple(g)[1:], astuple(gemm)[1:], strict=True)
        ),
    )
    _log_once(f"no tiles for {gemm} on {arch} with triton {triton}; using those of {nearest}, {closest}")
    return candidates[nearest]


def plans(arch: str, triton: str, shape: MoeShape, tables: Path | None) -> Ladder[Plan] | None:
    """Which plan serves how many tokens by the user's table; None where it does not say.

    Raises:
        Mxfp4Error: as `content`.
    """
    if tables is None:
        return None
    found = content(tables, arch).plans.get((release_of(triton), gemms(shape)[0]))
    if found is not None:
        _log_once(f"which tiles serve how many tokens is pinned by {tables / arch}.json", logging.INFO)
    return found


def whose(arch: str, kernels: str, triton: str, gemm: Gemm, tables: Path | None = None) -> str:
    """Who made the tiles that `ladder` finds, in words; it takes the same arguments.

    Raises:
        Mxfp4Error: as `content`.
    """
    directory = _directory(arch, kernels, release_of(triton), gemm, tables)
    name = "triton_kernels" if directory is None else "this package"
    if tables is None:
        return name
    file = f"{tables / arch}.json"
    return file if directory == tables else f"{name} ({file} has none for this layer)"


def _directory(arch: str, kernels: str, release: str, gemm: Gemm, tables: Path | None) -> Path | None:
    """Where the table is that serves: the user's has this very matmul, ours this Triton or ranked tiles."""
    if tables is not None and (kernels, release, gemm) in content(tables, arch).tiles:
        return tables
    found = releases(arch, kernels)
    ours = bool(found) and (release in found or kernels in arch_named(arch).ranked)
    return OURS if ours else None


def releases(arch: str, kernels: str) -> set[str]:
    """The Triton releases, such as "3.6", that our table of an arch has tiles of these kernels for."""
    return {release for kind, release, _ in content(OURS, arch).tiles if kind == kernels}


@functools.cache
def content(tables: Path, arch: str) -> Content:
    """What a directory's table of an arch says; nothing where it has none.

    Raises:
        Mxfp4Error: the file is not a table, or a value of it is out of its bounds.
    """
    return read(tables / f"{arch}.json", arch)


def _number(release: str) -> int:
    major, minor = release.split(".")
    return 1000 * int(major) + int(minor)


@functools.cache
def _log_once(text: str, level: int = logging.WARNING) -> None:
    logger.log(level, text)
