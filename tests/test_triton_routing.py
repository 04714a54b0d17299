"""Our own routing, as gfx950 would run it: every field bit for bit, and no more than three launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from run_python import run_python
from test_verification import EVERY, IN_CI, emulated, ids, paths_of

from vllm_mxfp4_gfx950.backends.triton import package as triton_package
from vllm_mxfp4_gfx950.backends.triton import routing as triton_routing
from vllm_mxfp4_gfx950.random_layer import make_shape


@dataclass(frozen=True)
class Case:
    """Tokens and experts.

    Args:
        tokens: T.
        global_experts, topk: of the model.
        expert_map: as in MoeWeights.
        dtype: of the logits.
        smallest, sizes: of the tiles.
        few: FEW_BLOCKS, where it is another; then 4 blocks are added up at once.
        spoil: what is not as it should be: the experts' "order", or the "smallest" tile.
    """

    tokens: int
    global_experts: int
    topk: int
    expert_map: tuple[int, ...] | None = None
    dtype: str = "bfloat16"
    smallest: int = 16
    sizes: int = 5
    few: int | None = None
    spoil: str = ""

    def __str__(self) -> str:
        name = f"E{self.global_experts}-k{self.topk}-T{self.tokens}-{self.dtype}"
        name += f"-tile{self.smallest}" + (f"-few{self.few}" if self.few else "")
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
    Case(65, 8, 2, OUT_OF_ORDER, few=1),
    Case(100, 8, 1, OUT_OF_ORDER),
    Case(130, 128, 4, SOME),
    Case(64, 128, 4, SOME, "float32"),
    Case(65, 128, 4, None, "float32"),
    Case(700, 8, 4),
    Case(2, 32, 4, smallest=8, sizes=1),
    Case(37, 128, 4, SOME, smallest=8, sizes=1),
    Case(150, 32, 4, smallest=64, sizes=1),
    Case(150, 32, 4, few=8),
    Case(1100, 8, 2, smallest=8, sizes=1),
    Case(8200, 8, 2, smallest=64, sizes=1),
    Case(199, 128, 4, SOME, "float32", few=2),
    Case(97, 8, 2, OUT_OF_ORDER, smallest=8, sizes=1, few=1),
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
    Case(1, 32, 6),
    Case(3, 8, 3, OUT_OF_ORDER),
    Case(5, 5, 5),
    Case(7, 128, 6, SOME, smallest=8, sizes=1),
    Case(27, 32, 3, OUT_OF_TWO),
    Case(18, 7, 6, None, "float32"),
    Case(65, 128, 6),
    Case(130, 128, 5, SOME, "float32", few=2),
    Case(7, 8, 3, OUT_OF_ORDER, spoil="order"),
]
SMALL = [case for case in CASES if case.tokens <= 65]
"""What every commit executes."""

WIDE = [
    Case(2, 300, 4),
    Case(3, 64, 32),
]
"""More experts or choices than GPT-OSS has: scalar registers spill."""

WIDEST = [
    *WIDE,
    Case(8, 384, 8),
    Case(40, 512, 10),
    Case(20, 1024, 6),
    Case(40, 64, 32, None, "float32"),
    Case(40, 512, 10, few=1),
    Case(40, 64, 32, few=1),
]

MISSES = {"": "", "order": "other gather", "smallest": "other block_start 0"}


def launches(tokens: int, topk: int, dtype: str, few: int = triton_routing.FEW_BLOCKS) -> list[str]:
    """The kernels that route so many tokens by logits of a dtype."""
    if tokens <= 8 and topk > 1 and dtype == "bfloat16":
        return ["few"]
    if tokens <= 32:
        return ["place"]
    return ["count", "place"] if tokens <= 16 * few else ["count", "add_up", "place"]


EXAMPLE = {
    "gather": [0, 4, 1, 2, 5, -1],
    "scatter": [0, 2, 3, -1, 1, 4],
    "count": [2, 3],
    "start": [0, 2, 5],
    "block_start": [[0, 1, 3], [0, 1, 2]],
    "schedule": [[0, 1, 1 << 16 | 1, -1], [0, 1, -1, -1]],
}
"""What the routing's description draws, and the same in tiles of 4 rows."""


def test_example() -> None:
    """The twin gives what the drawing shows, wherever the rank's two experts stand among the model's."""
    logits = torch.tensor([[1.0, 2, 0], [0, 1, 2], [1, 2, 0]])
    for places in ([0, 1, 2], [1, 2, 0], [2, 1, 0]):
        expert_map = torch.tensor([0, 1, -1])[places]
        order = triton_routing.order_of(expert_map)
        twin = triton_routing.route_in_torch(logits[:, places], 2, 2, order, 2, smallest=2)
        assert {name: getattr(twin, name).tolist() for name in EXAMPLE} == EXAMPLE
        likely = torch.tensor([1.0, 2]).softmax(0)
        assert torch.equal(twin.weights[:5], likely[[0, 0, 1, 0, 1]])


@pytest.mark.parametrize("kernels", ["matmul_ogs", "matmul"])
def test_sizes(monkeypatch: pytest.MonkeyPatch, kernels: str) -> None:
    """Any topk and number of experts up to those that were executed; more are refused."""
    monkeypatch.setattr(triton_package, "why_not", lambda *arguments: "the next question")
    for experts, topk in ((8, 3), (5, 5), (512, 32)):
        reason = triton_package.why_not_layer(kernels, make_shape(experts, topk, 320, 288), "gfx950")
        assert reason == "the next question"
    for experts, topk in ((513, 4), (64, 33)):
        reason = triton_package.why_not_layer(kernels, make_shape(experts, topk, 320, 288), "gfx950")
        assert reason == (f"routing takes up to 512 experts and a topk of up to 32, not {experts} and {topk}")


def routed(pair: tuple[str, str], cases: list[Case]) -> dict[Case, dict[str, Any]]:
    """What came out of each case."""
    return dict(zip(cases, emulated("emulate_routing.py", *pair, tuple(cases)), strict=True))


def assert_right(pair: tuple[str, str], cases: list[Case], case: Case) -> None:
    """Exact, up to three launches that fit, and a spoilt one noticed."""
    found = routed(pair, cases)[case]
    few = case.few or triton_routing.FEW_BLOCKS
    assert found["kernels"] == launches(case.tokens, case.topk, case.dtype, few)
    assert found["overflows"] == []
    assert found["spills"] == [] or case.topk > 4 or case.global_experts > 128
    assert found["unaligned"] == []
    assert found["miss"] == MISSES[case.spoil]


@pytest.mark.compile
@pytest.mark.parametrize("case", [*SMALL, *WIDE], ids=ids)
@pytest.mark.parametrize("pair", IN_CI[:1], ids=ids)
def test_route(pair: tuple[str, str], case: Case) -> None:
    """Compiled for gfx950 and executed."""
    assert_right(pair, [*SMALL, *WIDE], case)


@pytest.mark.compile
@pytest.mark.parametrize("pair", IN_CI[:1], ids=ids)
def test_spills_are_executed(pair: tuple[str, str]) -> None:
    """With many experts or choices scalar registers spill, so that exact results say something of it."""
    found = routed(pair, [*SMALL, *WIDE])
    assert all(found[case]["spills"] for case in WIDE)


@pytest.mark.emulate
@pytest.mark.parametrize("case", [*CASES, *WIDEST], ids=ids)
@pytest.mark.parametrize("pair", EVERY, ids=ids)
def test_every_triton(pair: tuple[str, str], case: Case) -> None:
    """The same with every Triton."""
    assert_right(pair, [*CASES, *WIDEST], case)


@pytest.mark.compile
def test_other_topk_on_hopper() -> None:
    """Numbers of choices that are no powers of two compile for sm90, too, without a spill."""
    script = (
        "import torch\n"
        "from compile_hopper_matmul import presented, spills\n"
        "from vllm_mxfp4_gfx950.backends.triton import routing as triton_routing\n"
        "launches = []\n"
        "for topk, order in ((3, None), (6, torch.arange(8, dtype=torch.int32))):\n"
        "    for tokens in (3, 20, 40):\n"
        "        with presented(launches.append):\n"
        "            logits = torch.zeros(tokens, 8, dtype=torch.bfloat16)\n"
        "            triton_routing.route(logits, topk, 8 if order is None else 4, order, 5, overlaps=True)\n"
        "print(*(f'{one.name}:{spills(one.assembly)}' for one in launches))\n"
    )
    result = run_python(["-c", script], path=paths_of(*IN_CI[0]))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["few:0", "place:0", "count:0", "place:0"] * 2


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
