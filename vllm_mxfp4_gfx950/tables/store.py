"""A table's file: read, checked and written.

{
 "arch": whose it is,
 "provenance": where rows come from, by kernels and Triton release,
 "tile": the names of a tile's integers,
 "tiles": every tile once,
 "columns": the names of a row's values, the last of which is a place in "tiles",
 "rows": one for each matmul and number of tokens,
 "measured": what `vllm-mxfp4 tune` has timed so far: such rows, each with the layer's microseconds
 "plans": what serves up to how many tokens of a layer, by `vllm-mxfp4 tune --quick`: see `tiles.PLAN_COLUMNS`
}
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_mxfp4_gfx950.arch import Integers, arch_named
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.tiles import KERNELS, PLAN_COLUMNS, PLANS, Gemm, Key, TileConfig, columns

MAX_FILE_BYTES = 1 << 20
FIX = "Correct it, or let `vllm-mxfp4 tune` write the file anew"

ROW_BOUNDS: dict[str, Integers] = {
    "k": range(32, 2**16 + 1, 32),
    "n": range(32, 2**17 + 1, 32),
    "experts": range(1, 2**12 + 1),
    "global_experts": range(1, 2**12 + 1),
    # No more, as the self-check runs a batch of each rung's first number through float64.
    "tokens": range(2**14 + 1),
}
"""What the integers of a row may be, beside its tile's. A row for up to 0 tokens: its kernels serve none."""

TILE = 8
"""Where a row's tile begins."""


def read_any(file: Path, arch: str) -> dict[str, Any]:
    """As `read`; where there is no such file, a table that has nothing."""
    if file.exists():
        return read(file, arch)
    return {"provenance": {}, "rows": [], "measured": [], "plans": []}


def read(file: Path, arch: str) -> dict[str, Any]:
    """A table as data: "provenance", "rows", and "measured" and "plans", which only `vllm-mxfp4 tune` writes.

    Args:
        file: the table.
        arch: whose it must be.

    Returns:
        rows in the order of `tiles.columns`, each with its tile's integers.

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
    for name, names in (("tile", columns()[TILE:]), ("columns", [*columns()[:TILE], "tile"])):
        _require(content[name] == names, f"{file}: {name}", ", ".join(names), content[name])
    tiles = content["tiles"]
    _require(isinstance(tiles, list), f"{file}: tiles", "a list", tiles)
    for index, tile in enumerate(tiles):
        width = len(columns()) - TILE
        is_tile = isinstance(tile, list) and len(tile) == width
        _require(is_tile, f"{file}: tiles[{index}]", f"{width} values", tile)
    for name, extra in (("rows", 0), ("measured", 1)):
        rows = content.setdefault(name, [])
        _require(isinstance(rows, list), f"{file}: {name}", "a list", rows)
        content[name] = [_row(row, extra, tiles, arch, f"{file}: {name}[{i}]") for i, row in enumerate(rows)]
    _check_ladders(content["rows"], f"{file}")
    plans = content.setdefault("plans", [])
    _require(isinstance(plans, list), f"{file}: plans", "a list", plans)
    seen = set()
    for index, row in enumerate(plans):
        _check_plan(row, f"{file}: plans[{index}]")
        key = tuple(row[:-1])
        _require(key not in seen, f"{file}: plans[{index}]", "the only one for its tokens", row)
        seen.add(key)
    return content


def _require(ok: object, name: str, rule: str, got: object) -> None:
    if not ok:
        raise Mxfp4Error(name, rule, reprlib.repr(got), FIX)


def _row(row: Any, extra: int, tiles: list[list[Any]], arch: str, at: str) -> list[Any]:
    """A row with its tile in place of the tile's number."""
    width = TILE + 1 + extra
    _require(isinstance(row, list) and len(row) == width, at, f"{width} values", row)
    number = row[TILE]
    _require(type(number) is int and 0 <= number < len(tiles), f"{at}.tile", "a place in tiles", number)
    whole: list[Any] = [*row[:TILE], *tiles[number]]
    _check_row(arch, whole, at)
    for us in row[TILE + 1 :]:
        _require(type(us) is float and 0 < us < math.inf, f"{at}.us", "a time above 0.0", us)
    return [*whole, *row[TILE + 1 :]]


def _check_row(arch: str, row: list[Any], at: str) -> None:
    values = dict(zip(columns(), row, strict=True))
    for name, some in (("kernels", KERNELS), ("name", ("w13", "w2"))):
        _require(values[name] in some, f"{at}.{name}", _one_of(some), values[name])
    _check_release(values["triton"], at)
    bounds = ROW_BOUNDS | arch_named(arch).takes(values["kernels"])
    if values["kernels"] != "own":
        bounds["tokens"] = ROW_BOUNDS["tokens"][1:]
    elif values["name"] == "w13":
        bounds["split_k"] = (1,)  # The SwiGLU needs whole sums.
    _check_integers(values, bounds, at)
    tile = TileConfig(*row[TILE:])
    most = arch_named(arch).own_warps(tile) if values["kernels"] == "own" else tile.num_warps
    rule = f"at most {most} with block_m {tile.block_m} and block_k {tile.block_k}"
    _require(tile.num_warps <= most, f"{at}.num_warps", rule, tile.num_warps)


def _check_release(release: Any, at: str) -> None:
    is_release = isinstance(release, str) and re.fullmatch(r"[0-9]{1,3}\.[0-9]{1,3}", release)
    _require(is_release, f"{at}.triton", "the first two numbers of a release, such as 3.6", release)


def _check_integers(values: dict[str, Any], bounds: dict[str, Integers], at: str) -> None:
    for name, integers in bounds.items():
        value = values[name]
        # True == 1 and 8.0 == 8, but neither is an integer.
        _require(type(value) is int and value in integers, f"{at}.{name}", _one_of(integers), value)


def _check_plan(row: Any, at: str) -> None:
    is_row = isinstance(row, list) and len(row) == len(PLAN_COLUMNS)
    _require(is_row, at, f"of {', '.join(PLAN_COLUMNS)}", row)
    values = dict(zip(PLAN_COLUMNS, row, strict=True))
    _check_release(values["triton"], at)
    _check_integers(values, ROW_BOUNDS | {"tokens": ROW_BOUNDS["tokens"][1:]}, at)
    _require(values["plan"] in PLANS, f"{at}.plan", _one_of(PLANS), values["plan"])


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


def _one_of(some: Integers | tuple[str, ...]) -> str:
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
    plans: Sequence[list[Any]] = (),
) -> None:
    """Write a table whole, or leave the old one: it may be read at any time.

    Args:
        file: the table.
        arch: whose it is.
        provenance: where rows come from, by kernels and Triton release.
        rows: in the order of `tiles.columns`.
        measured: what `vllm-mxfp4 tune` has timed so far: such rows, each with the layer's microseconds.
        plans: in the order of `tiles.PLAN_COLUMNS`.
    """
    end = len(columns())
    tiles = sorted({tuple(row[TILE:end]) for row in (*rows, *measured)})

    def numbered(some: Sequence[list[Any]]) -> list[list[Any]]:
        ordered = sorted(some, key=lambda row: [str(value).rjust(12) for value in row])
        return [[*row[:TILE], tiles.index(tuple(row[TILE:end])), *row[end:]] for row in ordered]

    def lines(some: Sequence[Any]) -> str:
        return "[\n  " + ",\n  ".join(map(json.dumps, some)) + "\n ]" if some else "[]"

    parts = {
        "arch": json.dumps(arch),
        "provenance": json.dumps(provenance, indent=1).replace("\n", "\n "),
        "tile": json.dumps(columns()[TILE:]),
        "tiles": lines(tiles),
        "columns": json.dumps([*columns()[:TILE], "tile"]),
        "rows": lines(numbered(rows)),
    }
    if measured:
        parts["measured"] = lines(numbered(measured))
    if plans:
        parts["plans"] = lines(plans)
    part = file.with_suffix(".part")
    part.write_text("{\n " + ",\n ".join(f'"{name}": {text}' for name, text in parts.items()) + "\n}\n")
    part.replace(file)
