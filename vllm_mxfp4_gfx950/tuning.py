"""The kernels' tiles as data: one table an arch, looked up once when a layer is prepared.

A user's table, from `vllm-mxfp4 tune`, stands beside ours, and serves instead for the layers and the Triton
that it was timed with.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import re
import reprlib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.moe import MoeShape

# Loggers below `vllm` print where vLLM's own do.
logger = logging.getLogger("vllm.mxfp4_triton.tuning")
T_co = TypeVar("T_co", covariant=True)
U = TypeVar("U")

OURS = Path(str(resources.files("vllm_mxfp4_gfx950") / "tables"))
KERNELS = ("matmul_ogs", "matmul", "own")
RANKED = (("gfx950", "matmul_ogs"), ("gfx950", "matmul"))
"""Tiles of ours that were ranked by compiling: those of the nearest Triton are better than the package's own,
which spill. All others were timed, and serve with that Triton alone."""

MAX_FILE_BYTES = 1 << 20
FIX = "Correct it, or let `vllm-mxfp4 tune` write the file anew"

BOUNDS: dict[str, range | tuple[int, ...]] = {
    "k": range(32, 2**16 + 1, 32),
    "n": range(32, 2**17 + 1, 32),
    "experts": range(1, 2**12 + 1),
    "global_experts": range(1, 2**12 + 1),
    # No more, as the self-check runs a batch of each rung's first number through float64.
    "tokens": range(2**14 + 1),
    "block_m": (8, 16, 32, 64, 128, 256),
    # No larger, as scales are padded so far: see package.SCALE_ROWS.
    "block_n": (16, 32, 64, 128, 256, 512),
    "block_k": (32, 64, 128, 256),
    "split_k": range(1, 9),
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": range(1, 9),
    "waves_per_eu": range(9),
}
"""What the integers of a row may be. A row for up to 0 tokens says that its kernels serve none."""

HOPPER_MATMUL: dict[str, tuple[int, ...]] = {
    "block_m": (16, 32, 64, 128),
    "block_n": (256,),
    "block_k": (64, 128, 256),
    "num_warps": (8,),
}
"""And those of matmul_ogs on Hopper, whose scales are laid out for 8 warps side by side: with fewer, the
kernel takes one row's scale for another's.

Source: triton_kernels in vLLM 0.26, tensor_details/layout_details/hopper_scale.py, matmul_ogs_details/
_matmul_ogs.py, routing.py.
"""

HOPPER_OWN: dict[str, tuple[int, ...]] = {"block_k": (64, 128, 256), "num_warps": (1, 2, 4)}
"""And those of our own matmuls there: a line of the values is 64 columns, and `vllm-mxfp4 tune` found some of
8 warps wrong with Triton 3.6."""


@dataclass(frozen=True)
class TileConfig:
    """How a matmul is cut up, and what the compiler may use for it.

    Args:
        block_m, block_n, block_k: rows, columns and depth of a workgroup's tile.
        split_k: workgroups that share one tile's depth.
        num_warps: waves of a workgroup.
        num_stages: tiles of the depth in flight.
        waves_per_eu: waves that each SIMD must have room for, on Hopper warps of each scheduler, which caps
            the registers; 0 leaves it to the compiler.
    """

    block_m: int
    block_n: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int
    waves_per_eu: int


@dataclass(frozen=True)
class Gemm:
    """One matmul of a layer as the table knows it.

    Args:
        name: "w13" or "w2".
        k, n: depth and columns.
        experts: experts on this rank.
        global_experts: experts of the model; with the tokens, it sets how many rows an expert gets.
    """

    name: str
    k: int
    n: int
    experts: int
    global_experts: int


@dataclass(frozen=True)
class Ladder(Generic[T_co]):
    """What to use for up to how many tokens.

    Args:
        bounds: token counts, ascending.
        rungs: one value a bound; the last one also serves everything above.
    """

    bounds: tuple[int, ...]
    rungs: tuple[T_co, ...]

    def at(self, tokens: int) -> T_co:
        """The value for this many tokens."""
        return self.rungs[min(bisect_left(self.bounds, tokens), len(self.rungs) - 1)]

    def map(self, convert: Callable[[T_co], U]) -> Ladder[U]:
        """The same ladder with converted values."""
        return Ladder(self.bounds, tuple(convert(rung) for rung in self.rungs))

    def merged(self) -> Ladder[T_co]:
        """The same ladder with equal neighbours made one: a rung serves up to its bound."""
        pairs = list(zip(self.bounds, self.rungs, strict=True))
        last = [
            pair
            for pair, later in zip(pairs, [*pairs[1:], None], strict=True)
            if later is None or pair[1] != later[1]
        ]
        return Ladder(tuple(bound for bound, _ in last), tuple(rung for _, rung in last))


Key: TypeAlias = tuple[str, str, Gemm]
"""Kernels, Triton release and matmul."""


def gemms(shape: MoeShape) -> tuple[Gemm, Gemm]:
    """A layer's two matmuls."""
    return (
        Gemm("w13", shape.hidden, 2 * shape.intermediate, shape.experts, shape.global_experts),
        Gemm("w2", shape.intermediate, shape.hidden, shape.experts, shape.global_experts),
    )


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
        Mxfp4Error: as `users`.
    """
    release = release_of(triton)
    if tables is not None:
        found = whose(arch, kernels, triton, gemm, tables)
        _log_once(f"{kernels} tiles for triton {release} are those of {found}", logging.INFO)
        users_own = users(tables, arch).get((kernels, release, gemm))
        if users_own:
            return users_own
    if not _has_tiles(arch, kernels, release):
        return None
    closest = min(sorted(releases(arch, kernels)), key=lambda r: abs(_number(r) - _number(release)))
    candidates = {g: rungs for (kind, r, g), rungs in _ours(arch).items() if (kind, r) == (kernels, closest)}
    nearest = min(
        (g for g in candidates if g.name == gemm.name),
        key=lambda g: sum(
            abs(math.log(a / b)) for a, b in zip(astuple(g)[1:], astuple(gemm)[1:], strict=True)
        ),
    )
    if nearest != gemm or closest != release:
        _log_once(f"no tiles for {gemm} on {arch} with triton {triton}; using those of {nearest}, {closest}")
    return candidates[nearest]


def whose(arch: str, kernels: str, triton: str, gemm: Gemm, tables: Path | None = None) -> str:
    """Who made the tiles that `ladder` finds, in words; it takes the same arguments.

    Raises:
        Mxfp4Error: as `users`.
    """
    release = release_of(triton)
    without = ""
    if tables is not None:
        file = f"{tables / arch}.json"
        if (kernels, release, gemm) in users(tables, arch):
            return file
        without = f" ({file} has none for this layer)"
    return ("this package" if _has_tiles(arch, kernels, release) else "triton_kernels") + without


def _has_tiles(arch: str, kernels: str, release: str) -> bool:
    """Whether our table serves here: for a Triton that it was not made with, only where tiles were ranked."""
    found = releases(arch, kernels)
    return bool(found) and (release in found or (arch, kernels) in RANKED)


def releases(arch: str, kernels: str) -> set[str]:
    """The Triton releases, such as "3.6", that our table of an arch has tiles of these kernels for."""
    return {key[1] for key in _ours(arch) if key[0] == kernels}


def encode(kernels: str, triton: str, gemm: Gemm, tiles: Ladder[TileConfig]) -> list[list[Any]]:
    """Rows of a table's file, in the order of `columns`."""
    key = [kernels, release_of(triton), *astuple(gemm)]
    return [[*key, bound, *astuple(tile)] for bound, tile in zip(tiles.bounds, tiles.rungs, strict=True)]


def columns() -> list[str]:
    """What each value of a row is."""
    names = [field.name for kind in (Gemm, TileConfig) for field in fields(kind)]
    return ["kernels", "triton", *names[:5], "tokens", *names[5:]]


@functools.cache
def _ours(arch: str) -> dict[Key, Ladder[TileConfig]]:
    file = OURS / f"{arch}.json"
    return parse(read(file, arch)["rows"]) if file.is_file() else {}


@functools.cache
def users(tables: Path, arch: str) -> dict[Key, Ladder[TileConfig]]:
    """The ladders of a user's table; none where the directory has no table for this arch.

    Raises:
        Mxfp4Error: the file is not a table, or a value of it is out of its bounds.
    """
    file = tables / f"{arch}.json"
    return parse(read(file, arch)["rows"]) if file.exists() else {}


def read(file: Path, arch: str) -> dict[str, Any]:
    """A table as data: "provenance", "rows" and "measured", which is empty unless `vllm-mxfp4 tune` wrote it.

    Args:
        file: the table.
        arch: whose it must be.

    Raises:
        Mxfp4Error: the file is not a table, or a value of it is out of its bounds.
    """
    try:
        _require(file.is_file(), f"{file}", "a file", "something else")
        with file.open("rb") as opened:
            text = opened.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise Mxfp4Error(f"{file}", "readable", str(error), "Let this user read it") from error
    _require(len(text) <= MAX_FILE_BYTES, f"{file}", f"at most {MAX_FILE_BYTES} bytes", "more")
    try:
        content: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Mxfp4Error(f"{file}", "JSON", str(error), FIX) from error
    wanted = ["arch", "columns", "provenance", "rows"]
    _require(isinstance(content, dict), f"{file}", "an object", content)
    found = sorted(content)
    _require(found in (wanted, sorted([*wanted, "measured"])), f"{file}", f"of {', '.join(wanted)}", found)
    _require(content["arch"] == arch, f"{file}: arch", arch, content["arch"])
    provenance = content["provenance"]
    _require(isinstance(provenance, dict), f"{file}: provenance", "an object", provenance)
    for name, entry in provenance.items():
        at = f"{file}: provenance[{reprlib.repr(name)}]"
        _require(isinstance(entry, dict), at, "an object", entry)
        commands = entry.get("commands", [])
        _require(isinstance(commands, list), f"{at}.commands", "a list", commands)
    width = len(columns())
    _require(content["columns"] == columns(), f"{file}: columns", ", ".join(columns()), content["columns"])
    for name, extra in (("rows", 0), ("measured", 1)):
        rows = content.setdefault(name, [])
        _require(isinstance(rows, list), f"{file}: {name}", "a list", rows)
        for index, row in enumerate(rows):
            at = f"{file}: {name}[{index}]"
            _require(isinstance(row, list) and len(row) == width + extra, at, f"{width + extra} values", row)
            _check_row(arch, row[:width], at)
            for us in row[width:]:
                _require(type(us) is float and 0 < us < math.inf, f"{at}.us", "a time above 0.0", us)
    _check_ladders(content["rows"], f"{file}")
    return content


def _require(ok: object, name: str, rule: str, got: object) -> None:
    if not ok:
        raise Mxfp4Error(name, rule, reprlib.repr(got), FIX)


def _check_row(arch: str, row: list[Any], at: str) -> None:
    values = dict(zip(columns(), row, strict=True))
    for name, some in (("kernels", KERNELS), ("name", ("w13", "w2"))):
        _require(values[name] in some, f"{at}.{name}", _one_of(some), values[name])
    release = values["triton"]
    is_release = isinstance(release, str) and re.fullmatch(r"[0-9]{1,3}\.[0-9]{1,3}", release)
    _require(is_release, f"{at}.triton", "the first two numbers of a release, such as 3.6", release)
    bounds = dict(BOUNDS)
    if (arch, values["kernels"]) == ("sm90", "matmul_ogs"):
        bounds |= HOPPER_MATMUL
    if (arch, values["kernels"]) == ("sm90", "own"):
        bounds |= HOPPER_OWN
    if values["kernels"] != "own":
        bounds["tokens"] = bounds["tokens"][1:]
        # Routing schedules no tiles of fewer rows.
        bounds["block_m"] = tuple(rows for rows in bounds["block_m"] if rows >= 16)
    elif values["name"] == "w13":
        bounds["split_k"] = (1,)  # The SwiGLU needs whole sums.
    for name, integers in bounds.items():
        value = values[name]
        # True == 1 and 8.0 == 8, but neither is an integer.
        _require(type(value) is int and value in integers, f"{at}.{name}", _one_of(integers), value)


def _check_ladders(rows: list[list[Any]], file: str) -> None:
    """No rung twice; and for our own matmuls as many rows to a tile of w2 as to one of w13."""
    found: dict[Key, dict[int, int]] = {}
    for index, (kernels, triton, *rest) in enumerate(rows):
        rungs = found.setdefault((kernels, triton, Gemm(*rest[:5])), {})
        _require(rest[5] not in rungs, f"{file}: rows[{index}]", "the only one for its tokens", rows[index])
        rungs[rest[5]] = rest[6]
    sides: dict[str, dict[tuple[str | float, ...], dict[int, int]]] = {"w13": {}, "w2": {}}
    for (kernels, triton, gemm), rungs in found.items():
        if kernels == "own":
            hidden, inner = (gemm.k, gemm.n / 2) if gemm.name == "w13" else (gemm.n, gemm.k)
            sides[gemm.name][triton, gemm.experts, gemm.global_experts, hidden, inner] = rungs
    rule = "of w13 and w2 alike in tokens and block_m"
    _require(sides["w13"] == sides["w2"], f"{file}: the rows of own", rule, "others")


def _one_of(some: range | tuple[object, ...]) -> str:
    if isinstance(some, range):
        steps = f" in steps of {some.step}" if some.step > 1 else ""
        return f"an integer from {some[0]} to {some[-1]}{steps}"
    return f"one of {', '.join(map(str, some))}" if len(some) > 1 else f"{some[0]}"


def write(
    file: Path,
    arch: str,
    provenance: dict[str, Any],
    rows: Sequence[list[Any]],
    measured: Sequence[list[Any]] = (),
) -> None:
    """Write a table whole, or leave the old one: it may be read at any time.

    Args:
        file: the table.
        arch: whose it is.
        provenance: where rows come from, by kernels and Triton release.
        rows: as `encode` gives them.
        measured: what `vllm-mxfp4 tune` has timed so far: such rows, each with the layer's microseconds.
    """
    text = json.dumps({"arch": arch, "provenance": provenance, "columns": columns()}, indent=1)[:-2]
    for name, some in (("rows", rows), ("measured", measured)):
        if some or name == "rows":
            lines = (json.dumps(row) for row in sorted(some, key=lambda row: [str(v).rjust(12) for v in row]))
            text += f',\n "{name}": [\n  ' + ",\n  ".join(lines) + "\n ]"
    part = file.with_suffix(".part")
    part.write_text(text + "\n}\n")
    part.replace(file)


def parse(rows: list[list[Any]]) -> dict[Key, Ladder[TileConfig]]:
    """The ladders of a table's rows."""
    found: dict[Key, list[tuple[int, TileConfig]]] = {}
    for kernels, triton, *rest in rows:
        found.setdefault((kernels, triton, Gemm(*rest[:5])), []).append((rest[5], TileConfig(*rest[6:])))
    return {
        key: Ladder(*map(tuple, zip(*sorted(rungs, key=lambda rung: rung[0]), strict=True)))
        for key, rungs in found.items()
    }


def release_of(triton: str) -> str:
    """The first two numbers of a Triton version, by which tables go."""
    return ".".join(triton.split(".")[:2])


def _number(release: str) -> int:
    major, minor = release.split(".")
    return 1000 * int(major) + int(minor)


@functools.cache
def _log_once(text: str, level: int = logging.WARNING) -> None:
    logger.log(level, text)
