"""Our own routing, as gfx950 would run it: every field bit for bit, and no more than two launches."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from subprocess import CompletedProcess

import pytest
from run_python import SUPPORT, run_python
from test_verification import EVERY, IN_CI, ids, paths_of


@dataclass(frozen=True)
class Case:
    """Tokens and experts.

    Args:
        tokens: T.
        global_experts, topk: of the model.
        expert_map: as in MoeWeights.
        dtype: of the logits.
        smallest, sizes: of the tiles.
        groups: of blocks of tokens at most, where it is not MAX_GROUPS.
        spoil: what is not as it should be: the experts' "order", or the "smallest" tile.
    """

    tokens: int
    global_experts: int
    topk: int
    expert_map: tuple[int, ...] | None = None
    dtype: str = "bfloat16"
    smallest: int = 16
    sizes: int = 5
    groups: int | None = None
    spoil: str = ""

    def __str__(self) -> str:
        name = f"E{self.global_experts}-k{self.topk}-T{self.tokens}-{self.dtype}"
        name += f"-tile{self.smallest}" + (f"-groups{self.groups}" if self.groups else "")
        return name + ("-map" if self.expert_map else "") + (f"-spoilt-{self.spoil}" if self.spoil else "")


OUT_OF_ORDER = (-1, 0, 3, -1, 2, 1, -1, -1)
OUT_OF_TWO = tuple(i // 2 if i % 2 else -1 for i in range(32))
SOME = tuple(i // 8 if i % 8 == 3 else -1 for i in range(128))
CASES = [
    Case(1, 32, 4),
    Case(3, 8, 2, OUT_OF_ORDER),
    Case(5, 4, 2),
    Case(6, 8, 1),
    Case(6, 128, 4),
    Case(7, 128, 4, SOME, smallest=8, sizes=1),
    Case(27, 32, 4, OUT_OF_TWO),
    Case(37, 128, 4),
    Case(64, 32, 4),
    Case(65, 128, 4),
    Case(100, 8, 1, OUT_OF_ORDER),
    Case(130, 128, 4, SOME),
    Case(64, 128, 4, SOME, "float32"),
    Case(65, 128, 4, None, "float32"),
    Case(700, 8, 4),
    Case(2, 32, 4, smallest=8, sizes=1),
    Case(37, 128, 4, SOME, smallest=8, sizes=1),
    Case(150, 32, 4, smallest=64, sizes=1),
    Case(150, 32, 4, groups=4),
    Case(1100, 8, 2, smallest=8, sizes=1, groups=40),
    Case(199, 128, 4, SOME, "float32", groups=3),
    Case(97, 8, 2, OUT_OF_ORDER, smallest=8, sizes=1, groups=1),
    Case(1, 128, 4, None, "float32"),
    Case(8, 32, 4, None, "float32", smallest=8, sizes=1),
    Case(29, 128, 4, SOME, "float32"),
    Case(16, 32, 4),
    Case(17, 128, 4, smallest=8, sizes=1),
    Case(32, 128, 4),
    Case(33, 32, 4),
    Case(1, 4, 2, smallest=8, sizes=1),
    Case(3, 8, 2, OUT_OF_ORDER, spoil="order"),
    Case(37, 8, 2, OUT_OF_ORDER, spoil="order"),
    Case(40, 8, 2, smallest=8, sizes=1, spoil="smallest"),
]

MISSES = {"": "", "order": "other count", "smallest": "other block_start 0"}


def launches(tokens: int, topk: int, dtype: str) -> list[str]:
    """The kernels that route so many tokens by logits of a dtype."""
    if tokens <= 8 and topk > 1 and dtype == "bfloat16":
        return ["few"]
    return ["place"] if tokens <= 32 else ["count", "place"]


@functools.cache
def emulated(triton: str, kernels: str) -> CompletedProcess[str]:
    """Execute the cases in a process that has this Triton."""
    script, cases = SUPPORT / "emulate_routing.py", json.dumps([asdict(case) for case in CASES])
    return run_python([str(script)], path=paths_of(triton, kernels), stdin=cases, timeout=600)


def assert_right(pair: tuple[str, str], case: Case) -> None:
    """Exact, one launch or two that fit, and a spoilt one noticed."""
    result = emulated(*pair)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)[CASES.index(case)]
    assert found["kernels"] == launches(case.tokens, case.topk, case.dtype)
    assert found["misfits"] == []
    assert found["unaligned"] == []
    assert found["miss"] == MISSES[case.spoil]


@pytest.mark.compile
@pytest.mark.parametrize("case", CASES, ids=ids)
@pytest.mark.parametrize("pair", IN_CI, ids=ids)
def test_route(pair: tuple[str, str], case: Case) -> None:
    """Compiled for gfx950 and executed."""
    assert_right(pair, case)


@pytest.mark.emulate
@pytest.mark.parametrize("case", CASES, ids=ids)
@pytest.mark.parametrize("pair", EVERY, ids=ids)
def test_every_triton(pair: tuple[str, str], case: Case) -> None:
    """The same with every Triton."""
    assert_right(pair, case)


@pytest.mark.compile
def test_other_logits() -> None:
    """An fp16 would lose the bits that a bf16 leaves to the expert, so it does not compile."""
    route = "triton_routing.route(torch.zeros({}, 8, dtype=torch.{}), 2, 8, None, 1)"
    script = (
        "import torch; from vllm_mxfp4_gfx950.backends.triton import routing as triton_routing\n"
        "from vllm_mxfp4_gfx950.gfx950.driver import presented\n"
        f"with presented(lambda _: None): {route}"
    )
    for tokens in (3, 40):
        sound = run_python(["-c", script.format(tokens, "bfloat16")], path=paths_of(*IN_CI[0]))
        assert sound.returncode == 0, sound.stderr
        refused = run_python(["-c", script.format(tokens, "float16")], path=paths_of(*IN_CI[0]))
        assert "static_assert(Logits.dtype.element_ty == tl.bfloat16)" in refused.stderr
