"""A table's file: read, checked and written.

{
 "arch": whose it is,
 "provenance": where rows come from, by kernels and Triton release,
 "tile": the names of a tile's integers,
 "tiles": every tile once,
 "columns": the names of a row's values, the last of which is a place in "tiles",
 "rows": one for each matmul and number of tokens,
 "measured": what `vllm-mxfp4 tune` has timed so far: such rows, each with the layer's microseconds
 "plans": what serves up to how many tokens of a layer, by `vllm-mxfp4 tune`: see PLAN_COLUMNS
}

Only this file knows rows: `read` gives ladders, and `write` takes them.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from vllm_mxfp4_gfx950.arch import Integers, arch_named, own_warps
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.tiles import KERNELS, PLANS, Gemm, Key, Ladder, Plan, TileConfig

K = TypeVar("K")
V = TypeVar("V")

MAX_FILE_BYTES = 1 << 20
FIX = "Correct it, or delete it and let `vllm-mxfp4 tune` write it anew"

ROW_BOUNDS: dict[str, Integers] = {
    "k": range(32, 2**16 + 1, 32),
    "n": range(32, 2**17 + 1, 32),
    "experts": range(1, 2**12 + 1),
    "global_experts": range(1, 2**12 + 1),
    # No more, as the self-check runs a batch of each rung's first number through float64.
    "tokens": range(1, 2**14 + 1),
}
"""What the integers of a row may be, beside its tile's."""

COLUMNS = ["kernels", "triton", *(each.name for each in fields(Gemm)), "tokens", "tile"]
TILE_COLUMNS = [each.name for each in fields(TileConfig)]

PLAN_COLUMNS = ["triton", "k", "n", "experts", "global_experts", "tokens", "plan"]
"""What each value of a plan's row is; the sizes are those of the layer's w13."""

Measured: TypeAlias = dict[int, tuple[TileConfig, float]]
"""A matmul's tile by tokens, and the layer's microseconds with it."""

PlanKey: TypeAlias = tuple[str, Gemm]
"""Triton release, and the layer's w13."""


@dataclass
class Content:
    """What a table says.

    Args:
        provenance: where tiles come from, by kernels and Triton release.
        tiles: those that serve.
        measured: what `vllm-mxfp4 tune` has timed so far.
        plans: what serves up to how many tokens of a layer.
    """

    provenance: dict[str, dict[str, Any]] = field(default_factory=dict)
    tiles: dict[Key, Ladder[TileConfig]] = field(default_factory=dict)
    measured: dict[Key, Measured] = field(default_factory=dict)
    plans: dict[PlanKey, Ladder[Plan]] = field(default_factory=dict)


def read(file: Path, arch: str) -> Content:
    """What a table says; nothing where there is no such file.

    Args:
        file: the table.
        arch: whose it must be.

    Raises:
        Mxfp4Error: the file is not a table, or a value of it is out of its bounds.
    """
    try:
        if not file.exists():
            return Content()
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
    wanted = ["arch", "columns", "provenance", "rows", "tile", "tiles"]
    _require(isinstance(content, dict), f"{file}", "an object", content)
    found = sorted(content)
    is_table = {*wanted} <= {*found} <= {*wanted, "measured", "plans"}
    _require(is_table, f"{file}", f"of {', '.join(wanted)}", found)
    _require(content["arch"] == arch, f"{file}: arch", arch, content["arch"])
    provenance = content["provenance"]
    _require(isinstance(provenance, dict), f"{file}: provenance", "an object", provenance)
    for name, entry in provenance.items():
        at = f"{file}: provenance[{reprlib.repr(name)}]"
        _require(isinstance(entry, dict), at, "an object", entry)
        commands = entry.get("commands", [])
        _require(isinstance(commands, list), f"{at}.commands", "a list", commands)
    for name, names in (("tile", TILE_COLUMNS), ("columns", COLUMNS)):
        _require(content[name] == names, f"{file}: {name}", ", ".join(names), content[name])
    tiles = content["tiles"]
    _require(isinstance(tiles, list), f"{file}: tiles", "a list", tiles)
    width = len(TILE_COLUMNS)
    for index, tile in enumerate(tiles):
        is_tile = isinstance(tile, list) and len(tile) == width
        _require(is_tile, f"{file}: tiles[{index}]", f"{width} values", tile)

    def parsed(name: str, parse: Callable[[Any, str], tuple[K, int, V]]) -> dict[K, dict[int, V]]:
        rows = content.get(name, [])
        _require(isinstance(rows, list), f"{file}: {name}", "a list", rows)
        found: dict[K, dict[int, V]] = {}
        for index, row in enumerate(rows):
            at = f"{file}: {name}[{index}]"
            key, tokens, value = parse(row, at)
            rungs = found.setdefault(key, {})
            _require(tokens not in rungs, at, "the only one for its tokens", row)
            rungs[tokens] = value
        return found

    served = parsed("rows", partial(_tile, len(COLUMNS), tiles, arch))
    _check_own(served, file)
    return Content(
        provenance,
        {key: Ladder.of(rungs) for key, rungs in served.items()},
        parsed("measured", partial(_timed, tiles, arch)),
        {key: Ladder.of(rungs) for key, rungs in parsed("plans", _plan).items()},
    )


def _require(ok: object, name: str, rule: str, got: object) -> None:
    if not ok:
        raise Mxfp4Error(name, rule, reprlib.repr(got), FIX)


def _tile(width: int, tiles: list[list[Any]], arch: str, row: Any, at: str) -> tuple[Key, int, TileConfig]:
    """A row's matmul, tokens and tile."""
    _require(isinstance(row, list) and len(row) == width, at, f"{width} values", row)
    values = dict(zip(COLUMNS, row, strict=False))
    number = values["tile"]
    _require(type(number) is int and 0 <= number < len(tiles), f"{at}.tile", "a place in tiles", number)
    values |= zip(TILE_COLUMNS, tiles[number], strict=True)
    for name, some in (("kernels", KERNELS), ("name", ("w13", "w2"))):
        _require(values[name] in some, f"{at}.{name}", _one_of(some), values[name])
    _check_release(values["triton"], at)
    bounds = ROW_BOUNDS | arch_named(arch).takes(values["kernels"])
    if values["kernels"] == "own" and values["name"] == "w13":
        bounds["split_k"] = (1,)  # The SwiGLU needs whole sums.
    _check_integers(values, bounds, at)
    tile = TileConfig(*tiles[number])
    most = own_warps(tile) if values["kernels"] == "own" else tile.num_warps
    rule = f"at most {most} with block_m {tile.block_m} and block_k {tile.block_k}"
    _require(tile.num_warps <= most, f"{at}.num_warps", rule, tile.num_warps)
    return (values["kernels"], values["triton"], Gemm(*row[2:7])), values["tokens"], tile


def _timed(tiles: list[list[Any]], arch: str, row: Any, at: str) -> tuple[Key, int, tuple[TileConfig, float]]:
    """A row's matmul, tokens, and tile and time."""
    key, tokens, tile = _tile(len(COLUMNS) + 1, tiles, arch, row, at)
    us = row[-1]
    _require(type(us) is float and 0 < us < math.inf, f"{at}.us", "a time above 0.0", us)
    return key, tokens, (tile, us)


def _plan(row: Any, at: str) -> tuple[PlanKey, int, Plan]:
    """A row's layer, tokens and plan."""
    is_row = isinstance(row, list) and len(row) == len(PLAN_COLUMNS)
    _require(is_row, at, f"of {', '.join(PLAN_COLUMNS)}", row)
    values = dict(zip(PLAN_COLUMNS, row, strict=True))
    _check_release(values["triton"], at)
    _check_integers(values, ROW_BOUNDS, at)
    _require(values["plan"] in PLANS, f"{at}.plan", _one_of(PLANS), values["plan"])
    return (values["triton"], Gemm("w13", *row[1:5])), values["tokens"], values["plan"]


def _check_release(release: Any, at: str) -> None:
    is_release = isinstance(release, str) and re.fullmatch(r"[0-9]{1,3}\.[0-9]{1,3}", release)
    _require(is_release, f"{at}.triton", "the first two numbers of a release, such as 3.6", release)


def _check_integers(values: dict[str, Any], bounds: dict[str, Integers], at: str) -> None:
    for name, integers in bounds.items():
        value = values[name]
        # True == 1 and 8.0 == 8, but neither is an integer.
        _require(type(value) is int and value in integers, f"{at}.{name}", _one_of(integers), value)


def _check_own(served: dict[Key, dict[int, TileConfig]], file: Path) -> None:
    """As many rows to a tile of w2 as to one of w13, for our own matmuls."""
    sides: dict[str, dict[tuple[str | float, ...], dict[int, int]]] = {"w13": {}, "w2": {}}
    for (kernels, triton, gemm), rungs in served.items():
        if kernels == "own":
            hidden, inner = (gemm.k, gemm.n / 2) if gemm.name == "w13" else (gemm.n, gemm.k)
            rows = {tokens: tile.block_m for tokens, tile in rungs.items()}
            sides[gemm.name][triton, gemm.experts, gemm.global_experts, hidden, inner] = rows
    rule = "of w13 and w2 alike in tokens and block_m"
    _require(sides["w13"] == sides["w2"], f"{file}: the rows of own", rule, "others")


def _one_of(some: Integers | tuple[str, ...]) -> str:
    if isinstance(some, range):
        steps = f" in steps of {some.step}" if some.step > 1 else ""
        return f"an integer from {some[0]} to {some[-1]}{steps}"
    return f"one of {', '.join(map(str, some))}" if len(some) > 1 else f"{some[0]}"


def write(file: Path, arch: str, content: Content) -> None:
    """Write a table whole, or leave the old one: it may be read at any time."""
    every = [tile for rungs in content.tiles.values() for tile in rungs.rungs]
    every += [tile for times in content.measured.values() for tile, _ in times.values()]
    tiles = sorted({astuple(tile) for tile in every})

    def row(key: Key, tokens: int, tile: TileConfig, *us: float) -> list[Any]:
        kernels, triton, gemm = key
        return [kernels, triton, *astuple(gemm), tokens, tiles.index(astuple(tile)), *us]

    def ordered(rows: list[list[Any]]) -> list[list[Any]]:
        return sorted(rows, key=lambda row: [str(value).rjust(12) for value in row])

    rows = [row(key, *rung) for key, rungs in content.tiles.items() for rung in rungs.pairs()]
    measured = [row(key, n, *found) for key, times in content.measured.items() for n, found in times.items()]
    plans = [
        [triton, *astuple(w13)[1:], *rung]
        for (triton, w13), rungs in content.plans.items()
        for rung in rungs.pairs()
    ]

    def lines(some: Sequence[Any]) -> str:
        return "[\n  " + ",\n  ".join(map(json.dumps, some)) + "\n ]" if some else "[]"

    parts = {
        "arch": json.dumps(arch),
        "provenance": json.dumps(content.provenance, indent=1).replace("\n", "\n "),
        "tile": json.dumps(TILE_COLUMNS),
        "tiles": lines(tiles),
        "columns": json.dumps(COLUMNS),
        "rows": lines(ordered(rows)),
    }
    if measured:
        parts["measured"] = lines(ordered(measured))
    if plans:
        parts["plans"] = lines(plans)
    part = file.with_suffix(".part")
    part.write_text("{\n " + ",\n ".join(f'"{name}": {text}' for name, text in parts.items()) + "\n}\n")
    part.replace(file)
