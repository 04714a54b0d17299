"""Layers on the emulated gfx950, through the code that serves, with Tritons of each generation."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, astuple, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from run_python import ROOT, SUPPORT, once, run_python

from vllm_mxfp4_gfx950.gfx950.verification import MAX_FROBENIUS
from vllm_mxfp4_gfx950.tables import store

PACKAGES, TRITONS = ROOT / ".venv/packages", ROOT / ".venv/triton"
KERNELS = {
    "matmul_ogs": PACKAGES / "vllm-0.33.0/vllm/third_party",
    "ragged_ogs": PACKAGES / "sglang-kernel",
    "matmul": PACKAGES / "tokenspeed-triton-kernels",
}
BACKENDS = {"matmul_ogs": "triton_ogs", "ragged_ogs": "triton_ragged", "matmul": "triton_matmul"}
IN_CI = [("3.6.0", "matmul_ogs"), ("3.6.0", "ragged_ogs"), ("3.8.0", "matmul")]
SERVED = [IN_CI[0], *(pytest.param(pair, marks=pytest.mark.emulate) for pair in IN_CI[1:])]
"""The same, but for the first by `pytest -m emulate`."""
OF_BACKEND = {BACKENDS[kernels]: (triton, kernels) for triton, kernels in IN_CI}
EVERY = [
    *(
        (release, kernels)
        for kernels in ("matmul_ogs", "ragged_ogs")
        for release in ("3.5.1", "3.6.0", "3.7.1", "3.8.0", "3.9.0")
    ),
    *((release, "matmul") for release in ("3.8.0", "3.9.0")),
]


@dataclass(frozen=True)
class LayerCase:
    """A layer and its tokens.

    Args:
        shape: experts, global_experts, topk, hidden, intermediate.
        tokens: T.
    """

    shape: tuple[int, int, int, int, int]
    tokens: int

    def __str__(self) -> str:
        experts, _, topk, hidden, intermediate = self.shape
        return f"E{experts}-k{topk}-T{self.tokens}-H{hidden}-I{intermediate}"


@dataclass(frozen=True)
class Case(LayerCase):
    """One that `verify` is to check.

    Args:
        tile: as TileConfig, for w13, and for w2 where it may be split so; None for those of the table.
        unchosen: an expert that no token chooses.
        expert_map: as in MoeWeights.
        sample: workgroups of each matmul to execute; None for all.
    """

    tile: tuple[int, ...] | None = None
    unchosen: int | None = None
    expert_map: tuple[int, ...] | None = None
    sample: int | None = None

    def __str__(self) -> str:
        experts, of, *_ = self.shape
        name = super().__str__() + (f"-of{of}" if of != experts else "")
        name += "-tile" + "x".join(map(str, self.tile)) if self.tile else ""
        name += "-unchosen" if self.unchosen is not None else ""
        return name + (f"-sample{self.sample}" if self.sample else "")


FULL = Case((32, 32, 4, 2880, 2880), 1)
SPLIT = (16, 64, 256, 2, 4, 1, 0)
FEW = [
    Case((4, 4, 1, 256, 320), 1),
    Case((8, 8, 2, 320, 256), 3),
    Case((4, 4, 4, 320, 320), 16),
    Case((8, 8, 2, 256, 256), 64, unchosen=3),
    Case((32, 32, 4, 320, 256), 256),
    Case((4, 4, 2, 2880, 320), 3),
    Case((4, 4, 2, 2880, 320), 3, tile=SPLIT),
    Case((4, 8, 2, 320, 320), 16, expert_map=(-1, 0, 1, -1, -1, 2, 3, -1)),
    Case((8, 8, 3, 256, 256), 5),
    Case((4, 8, 6, 256, 256), 20, expert_map=(-1, 0, 1, -1, -1, 2, 3, -1)),
    FULL,
    Case((32, 32, 4, 2880, 2880), 1024, sample=16),
]
"""What CI executes."""

MANY = [
    *FEW,
    *(
        Case((experts, experts, topk, hidden, intermediate), tokens)
        for tokens, (experts, topk), (hidden, intermediate) in itertools.product(
            (1, 3, 16, 64, 256),
            ((4, 1), (8, 2), (32, 4)),
            ((256, 320), (320, 256), (320, 2880), (2880, 320)),
        )
    ),
    *(Case((8, 8, 2, 320, 256), tokens, tile=SPLIT) for tokens in (1, 3, 16, 64, 256)),
    *(Case((8, 8, 2, 320, 256), tokens, unchosen=0) for tokens in (1, 3, 16, 64, 256)),
    *(
        Case((4, 8, 2, 320, 320), tokens, expert_map=(-1, 0, 1, -1, -1, 2, 3, -1))
        for tokens in (1, 3, 64, 256)
    ),
]
"""What `pytest -m emulate` executes with every Triton."""


def tiles_of(triton: str, kernels: str) -> list[Case]:
    """A layer for each tile that the table has for a Triton, with blocks enough for any pipeline."""
    table = store.read(ROOT / "vllm_mxfp4_gfx950/tables/gfx950.json", "gfx950")
    release = triton.rpartition(".")[0]
    ladders = [rungs.rungs for key, rungs in table.tiles.items() if key[:2] == (kernels, release)]
    tiles = sorted({astuple(tile) for rungs in ladders for tile in rungs})
    return [Case((4, 4, 2, 832, 576), 64, tile=tile) for tile in tiles]


def paths_of(triton: str, kernels: str) -> list[Path]:
    """What comes first on sys.path for a Triton and its kernels; the installed Triton needs nothing."""
    return present([*triton_path(triton), KERNELS[kernels]])


def triton_path(triton: str) -> list[Path]:
    """What comes first on sys.path for a Triton."""
    return present([TRITONS / triton] if triton != version("triton") else [])


def present(paths: list[Path]) -> list[Path]:
    """The same, where all of them are there."""
    for path in paths:
        if not path.is_dir():
            pytest.skip(f"needs {path.relative_to(ROOT)}: make test-emulated")
    return paths


@once
def emulated(script: str, triton: str, kernels: str, cases: tuple[Any, ...]) -> Any:
    """What a script makes of cases, in a process that has this Triton and these kernels."""
    stdin = json.dumps([asdict(case) for case in cases])
    result = run_python([str(SUPPORT / script)], path=paths_of(triton, kernels), stdin=stdin)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def ids(values: Any) -> str:
    """Readable names of parameters."""
    return "-".join(values) if isinstance(values, tuple) else str(values)


def assert_right(pair: tuple[str, str], cases: list[Case], case: Case) -> None:
    """Routing exact, and every stage within DESIGN.md's rule and 4e-3."""
    found, kernels = emulated("emulate_layers.py", *pair, tuple(cases))[cases.index(case)], pair[1]
    assert found["backend"] == BACKENDS[kernels]
    checks = {check["stage"]: check for check in found["checks"]}
    assert list(checks) == ["routing", "w13", "w2", *(["layer"] if case.sample is None else [])]
    for stage, check in checks.items():
        assert check["miss"] == "", stage
    # A split K leaves partial sums, and only matmul_ogs splits w2.
    split = case.tile is not None and case.tile[3] > 1
    partial = {"routing", "w13", *(["w2"] if kernels == "matmul_ogs" else [])} if split else {"routing"}
    for stage, check in checks.items():
        if stage in partial:
            assert (check["frobenius"], check["row"]) == (None, None)
        else:
            assert 0 < check["frobenius"] <= MAX_FROBENIUS
            assert 0 < check["row"] <= 1
    for stage in ("w13", "w2"):
        counts = checks[stage]["counts"]
        assert counts["mnemonics"]["v_mfma_f32_16x16x32_bf16"] == counts["instructions"]["matrix"] > 0
        assert counts["instructions"]["fp4"] > 0
        assert counts["instructions"]["scratch"] == 0
        executed, workgroups = checks[stage]["executed"], checks[stage]["workgroups"]
        assert executed == (workgroups if case.sample is None else case.sample)


@pytest.mark.compile
@pytest.mark.parametrize("case", FEW, ids=ids)
@pytest.mark.parametrize("pair", SERVED, ids=ids)
def test_layer(pair: tuple[str, str], case: Case) -> None:
    """Routing, w13 with SwiGLU, w2 and the sum over a token's experts, on gfx950's instructions."""
    assert_right(pair, FEW, case)


@pytest.mark.compile
@pytest.mark.parametrize("case", [FEW[3], FEW[7]], ids=ids)
def test_layer_of_ragged_tensors(case: Case) -> None:
    """Two of them with the generation of triton_kernels between those two."""
    assert_right(IN_CI[1], [FEW[3], FEW[7]], case)


@pytest.mark.compile
@pytest.mark.parametrize("pair", SERVED, ids=ids)
def test_weights_are_read_once(pair: tuple[str, str]) -> None:
    """One token of GPT-OSS-20B: its four experts' blocks exactly, and their scales up to K's whole tiles."""
    checks = emulated("emulate_layers.py", *pair, tuple(FEW))[FEW.index(FULL)]["checks"]
    for check, rows in zip(checks[1:3], (5760, 2880), strict=True):
        read = check["counts"]["bytes_read"]
        assert read["W+WPtr"] == 4 * rows * 2880 // 2
        assert read["WMxScale"] == 4 * rows * 3072 // 32


@pytest.mark.emulate
@pytest.mark.parametrize(
    ("pair", "case"), [(pair, case) for pair in EVERY for case in tiles_of(*pair)], ids=ids
)
def test_every_tile(pair: tuple[str, str], case: Case) -> None:
    """Every tile that serves, with its Triton."""
    assert_right(pair, tiles_of(*pair), case)


@pytest.mark.emulate
@pytest.mark.parametrize("case", MANY, ids=ids)
@pytest.mark.parametrize("pair", EVERY, ids=ids)
def test_every_layer(pair: tuple[str, str], case: Case) -> None:
    """The same with every Triton, on many more sizes."""
    assert_right(pair, MANY, case)
