"""The ck backend, with aiter's own Python over kernels that are stood in for."""

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import aiter_stand_in
import pytest
import torch
from aiter_stand_in import TREE, Rejected
from run_python import run_python

from vllm_mxfp4_gfx950 import backends
from vllm_mxfp4_gfx950.backends import ck, reference
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights
from vllm_mxfp4_gfx950.random_layer import make_shape, random_tokens, random_weights
from vllm_mxfp4_gfx950.tolerance import assert_rows_close

pytestmark = pytest.mark.skipif(not (TREE / "aiter").is_dir(), reason=f"needs amd-aiter unpacked in {TREE}")

TOKENS = [1, 37, 199, 300]
LARGE = 300
"""Tokens from which on some aiters quantize activations."""

UNPADDED = make_shape(4, 2, 256, 256)
SMALL = make_shape(8, 2, 320, 96)
SHAPES = [UNPADDED, SMALL, make_shape(4, 4, 64, 32)]
SLICES = [2880, 736, 384]
"""Of GPT-OSS's intermediate size, by tensor parallelism of 1, 4 and 8."""

GENERATIONS = {
    "0.1.7": (),
    "0.1.14": ("splitk", "gate_mode"),
    "5439": ("splitk", "gate_mode", "quant_dtype_a"),
}
"""Parameters of fused_moe beyond those of the package, by the release or the pull request that has them."""

RAISED = str(ck.EVERY_BATCH)
"""The bound that why_not asks for."""


def shape_id(shape: MoeShape) -> str:  # noqa: D103
    return f"E{shape.experts}-k{shape.topk}-H{shape.hidden}-I{shape.intermediate}"


@pytest.fixture(autouse=True)
def aiter(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """aiter.fused_moe, importable, with no bound set."""
    modules = aiter_stand_in.load()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv(ck.BOUND_VAR, raising=False)
    return modules["aiter.fused_moe"]


@pytest.fixture
def generation(aiter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Turn the aiter at hand into that of another time."""

    def turn(*parameters: str) -> None:
        if parameters:
            monkeypatch.setattr(aiter, "fused_moe", aiter_stand_in.later(aiter.fused_moe, *parameters))

    return turn


def check(prepared: ck.Prepared, weights: MoeWeights, shape: MoeShape, tokens: int, **options: Any) -> None:
    """Run a layer and hold it against float64."""
    x, logits = random_tokens(shape, tokens, seed=tokens, **options)
    out = prepared.run(x, logits)
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous()
    assert_rows_close(out, *reference.truth_and_plain(x, logits, weights, shape))


def rank_of(weights: MoeWeights, shape: MoeShape, mine: list[int]) -> tuple[MoeWeights, MoeShape]:
    """The share of a rank on which these experts live, in this order."""
    expert_map = torch.full((shape.experts,), -1, dtype=torch.int32)
    expert_map[mine] = torch.arange(len(mine), dtype=torch.int32)
    tensors = {name: tensor[mine] for name, tensor in vars(weights).items() if tensor is not None}
    return MoeWeights(**tensors, expert_map=expert_map), replace(shape, experts=len(mine))


@pytest.mark.parametrize("tokens", TOKENS, ids=lambda tokens: f"T{tokens}")
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_run(shape: MoeShape, tokens: int) -> None:
    """The layer, one expert of which nobody chooses."""
    weights = random_weights(shape, seed=1)
    check(ck.prepare(weights, shape), weights, shape, tokens, unchosen=shape.experts - 1)


@pytest.mark.parametrize("intermediate", SLICES)
def test_run_at_the_sizes_of_gpt_oss(intermediate: int) -> None:
    """Of which none is a whole number of tiles."""
    shape = make_shape(1, 1, 2880, intermediate)
    weights = random_weights(shape, seed=2)
    check(ck.prepare(weights, shape), weights, shape, 5)


@pytest.mark.parametrize("tokens", TOKENS, ids=lambda tokens: f"T{tokens}")
@pytest.mark.parametrize("parameters", GENERATIONS.values(), ids=GENERATIONS)
def test_run_with_each_generation(
    generation: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    parameters: tuple[str, ...],
    tokens: int,
) -> None:
    """Taken by why_not and right in each batch; where there is a bound to set, it is set."""
    generation(*parameters)
    if parameters and "quant_dtype_a" not in parameters:
        monkeypatch.setenv(ck.BOUND_VAR, RAISED)
    assert ck.why_not(SMALL, "gfx950") is None
    weights = random_weights(SMALL, seed=3)
    check(ck.prepare(weights, SMALL), weights, SMALL, tokens)


@pytest.mark.parametrize("tokens", TOKENS, ids=lambda tokens: f"T{tokens}")
def test_ranks_of_experts_add_up(tokens: int) -> None:
    """Experts on two ranks, on one of them not in the model's order."""
    weights = random_weights(SMALL, seed=4)
    x, logits = random_tokens(SMALL, tokens, seed=tokens)
    total = torch.zeros(x.shape, dtype=torch.float64)
    for mine in ([6, 1, 3], [0, 2, 4, 5, 7]):
        part, shape = rank_of(weights, SMALL, mine)
        out = ck.prepare(part, shape).run(x, logits)
        assert_rows_close(out, *reference.truth_and_plain(x, logits, part, shape))
        total += out.double()
    assert_rows_close(total, *reference.truth_and_plain(x, logits, weights, SMALL))


def test_other_weights_in_place() -> None:
    """`tensors` lists all that differs between two layers: written over, one is the other."""
    held, fresh = (rank_of(random_weights(SMALL, seed=seed), SMALL, [6, 1, 3]) for seed in (5, 6))
    prepared, other = (ck.prepare(part.clone(), shape) for part, shape in (held, fresh))
    backends.overwrite(prepared, other)
    check(prepared, *fresh, 37)
    with pytest.raises(AssertionError):
        check(prepared, *held, 37)


def test_route_is_that_of_the_reference(aiter: ModuleType) -> None:
    """Ties included, and whatever the dtype of the logits."""
    weights = random_weights(SMALL, seed=5)
    prepared = ck.prepare(weights, SMALL)
    seen = []

    def fused_moe(
        x: torch.Tensor, w1: object, w2: object, *routing: torch.Tensor, **_: object
    ) -> torch.Tensor:
        seen.append(routing)
        return x

    x, logits = random_tokens(SMALL, 199, seed=5)
    for scores in (logits, logits.float()):
        replace(prepared, fused_moe=fused_moe).run(x, scores)
        topk_weights, topk_ids = seen.pop()
        ids, expected = reference.route(scores, SMALL.topk)
        assert topk_ids.dtype == torch.int32
        assert torch.equal(topk_ids, ids.int())
        assert topk_weights.dtype == torch.float32
        assert torch.equal(topk_weights, expected.float())


# Negative controls: what prepare and run take care of, left undone.


arrange = ck._arrange


def broken_rows(order: list[int], parts: int, rows: int, *rest: Any) -> torch.Tensor:
    """_arrange without the de-interleaving of gate and up."""
    return arrange(order, 1, parts * rows, *rest)


@pytest.mark.parametrize("left", ["rows", "blocks", "scales"])
def test_layout_notices(monkeypatch: pytest.MonkeyPatch, left: str) -> None:
    """Interleaved rows, or blocks or scales not shuffled: numbers, but wrong ones."""
    weights = random_weights(UNPADDED, seed=6)
    check(ck.prepare(weights, UNPADDED), weights, UNPADDED, 37)
    shuffle = aiter_stand_in.load()["aiter.ops.shuffle"]
    if left == "rows":
        monkeypatch.setattr(ck, "_arrange", broken_rows)
    else:
        name = {"blocks": "shuffle_weight_a16w4", "scales": "shuffle_scale_a16w4"}[left]
        monkeypatch.setattr(shuffle, name, lambda tensor, *_: tensor)
    with pytest.raises(AssertionError, match="errs by"):
        check(ck.prepare(weights, UNPADDED), weights, UNPADDED, 37)


def test_biases_stay_as_they_are() -> None:
    """Each fp32 value, also of those that bf16 has not."""
    weights = random_weights(SMALL, seed=1)
    for bias in (weights.w13_bias, weights.w2_bias):
        bias.add_(torch.randn(bias.shape), alpha=2**-12)
    options = ck.prepare(weights, SMALL).options
    for name, loaded in (("bias1", weights.w13_bias), ("bias2", weights.w2_bias)):
        kept = options[name][options[name] != 0]
        assert torch.equal(kept.sort().values, loaded[loaded != 0].sort().values)


@pytest.mark.parametrize("bias", ["bias1", "bias2"])
def test_bf16_bias_is_rejected(bias: str) -> None:
    """The kernels read it as fp32, whatever it is."""
    weights = random_weights(SMALL, seed=7)
    prepared = ck.prepare(weights, SMALL)
    options = {**prepared.options, bias: prepared.options[bias].bfloat16()}
    with pytest.raises(Rejected, match="bias's dtype"):
        check(replace(prepared, options=options), weights, SMALL, 37)


@pytest.mark.parametrize("wrong", ["topk_ids", "topk_weights"])
def test_wrong_dtype_of_the_routing_is_rejected(wrong: str) -> None:
    """int64 ids, bf16 weights."""
    weights = random_weights(SMALL, seed=8)
    prepared = ck.prepare(weights, SMALL)

    def fused_moe(*args: torch.Tensor, **options: object) -> torch.Tensor:
        *rest, topk_weights, topk_ids = args
        if wrong == "topk_ids":
            return prepared.fused_moe(*rest, topk_weights, topk_ids.long(), **options)
        return prepared.fused_moe(*rest, topk_weights.bfloat16(), topk_ids, **options)

    with pytest.raises(Rejected, match=f"{wrong}'s dtype"):
        check(replace(prepared, fused_moe=fused_moe), weights, SMALL, 37)


def test_mask_over_local_experts_is_rejected() -> None:
    """The ids are those of the whole model."""
    part, shape = rank_of(random_weights(SMALL, seed=9), SMALL, [1, 3, 6])
    prepared = ck.prepare(part, shape)
    options = {**prepared.options, "expert_mask": torch.ones(3, dtype=torch.int32)}
    with pytest.raises(Rejected, match="topk_ids within num_experts"):
        check(replace(prepared, options=options), part, shape, 37)


def test_experts_out_of_order_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask cannot say which of the experts here is which."""
    part, shape = rank_of(random_weights(SMALL, seed=10), SMALL, [6, 1, 3])
    monkeypatch.setattr(ck, "_arrange", lambda order, *rest: arrange(sorted(order), *rest))
    with pytest.raises(AssertionError, match="errs by"):
        check(ck.prepare(part, shape), part, shape, 37)


def test_part_of_a_tile_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the weights by aiter's shuffle, of the activations by the kernels."""
    weights = random_weights(SMALL, seed=11)
    prepared = ck.prepare(weights, SMALL)
    with monkeypatch.context() as unpadding:
        unpadding.setattr(ck, "pad", lambda x, padding: x)
        with pytest.raises(Rejected, match="XQ's shape"):
            check(prepared, weights, SMALL, 37)
    monkeypatch.setattr(ck, "TILE", 128)
    with pytest.raises(RuntimeError, match="is invalid for input of size"):
        ck.prepare(weights, SMALL)


def test_packed_bytes_are_rejected() -> None:
    """Without the view as FP4, the activations would be quantized."""
    weights = random_weights(SMALL, seed=12)
    prepared = ck.prepare(weights, SMALL)
    with pytest.raises(Rejected, match="quantizer"):
        check(replace(prepared, w13=prepared.w13.view(torch.uint8)), weights, SMALL, 37)


def test_a_view_loses_the_mark(generation: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """is_shuffled belongs to the tensor object that was marked."""
    generation(*GENERATIONS["0.1.14"])
    weights = random_weights(SMALL, seed=13)
    prepared = ck.prepare(weights, SMALL)
    with pytest.raises(Rejected, match=r"w2\.is_shuffled"):
        check(replace(prepared, w2=prepared.w2.view(prepared.w2.shape)), weights, SMALL, 37)


@pytest.mark.parametrize(
    ("mode", "complaint"), [("gate_mode", "gate_mode must be"), ("quant_dtype_a", "errs by")]
)
def test_modes_matter(generation: Callable[..., None], mode: str, complaint: str) -> None:
    """Each is left out in turn, in a large batch."""
    generation(*GENERATIONS["5439"])
    weights = random_weights(SMALL, seed=14)
    prepared = ck.prepare(weights, SMALL)
    check(prepared, weights, SMALL, LARGE)
    options = {name: option for name, option in prepared.options.items() if name != mode}
    with pytest.raises((Rejected, AssertionError), match=complaint):
        check(replace(prepared, options=options), weights, SMALL, LARGE)


def test_bound_matters(generation: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where aiter has a bound, a large batch that reaches it is too inexact."""
    generation(*GENERATIONS["0.1.14"])
    weights = random_weights(SMALL, seed=15)
    prepared = ck.prepare(weights, SMALL)
    check(prepared, weights, SMALL, 199)
    with pytest.raises(AssertionError, match="errs by"):
        check(prepared, weights, SMALL, LARGE)
    monkeypatch.setenv(ck.BOUND_VAR, RAISED)
    check(prepared, weights, SMALL, LARGE)


# What is refused, and with which words.


def test_why_not_takes_gpt_oss() -> None:
    """All experts and half of them."""
    for experts in (32, 16):
        assert ck.why_not(MoeShape(experts, 32, 4, 2880, 2880, 1.702, 7.0), "gfx950") is None


@pytest.mark.parametrize("arch", ["gfx942", "gfx1250", "sm90", "cpu"])
def test_why_not_on_other_arches(arch: str) -> None:  # noqa: D103
    assert ck.why_not(SMALL, arch) == f"it runs on gfx950, not on {arch}"


def test_why_not_other_swiglus() -> None:
    """They are constants of the kernels."""
    refused = ck.why_not(make_shape(8, 2, 64, 64, alpha=1.0), "gfx950")
    assert refused == "its SwiGLU has alpha 1.702 and limit 7, not 1 and 7"
    assert "limit 7, not 1.702 and 5" in str(ck.why_not(make_shape(8, 2, 64, 64, limit=5.0), "gfx950"))


def test_why_not_without_aiter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not installed."""
    monkeypatch.setitem(sys.modules, "aiter", None)
    monkeypatch.delitem(sys.modules, "aiter.fused_moe")
    assert str(ck.why_not(SMALL, "gfx950")).startswith("aiter does not import here: ")


@pytest.mark.skipif(torch.version.hip is not None, reason="needs a machine without ROCm")
def test_why_not_without_rocm() -> None:
    """The real package, nothing stood in for, stops at its import: a reason, and no crash."""
    code = (
        "import sys\n"
        "from vllm_mxfp4_gfx950.backends import ck\n"
        "from vllm_mxfp4_gfx950.moe import MoeShape\n"
        "assert 'aiter' not in sys.modules\n"
        "print(ck.why_not(MoeShape(8, 8, 2, 64, 64, 1.702, 7.0), 'gfx950'))\n"
    )
    process = run_python(["-c", code], (TREE,))
    assert process.returncode == 0, process.stderr
    assert process.stdout == "aiter does not import here: ROCm version file not found\n"


def test_why_not_without_a_parameter(aiter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """An aiter from before the biases."""
    monkeypatch.setattr(
        aiter,
        "fused_moe",
        lambda hidden_states, w1, w2, topk_weight, topk_ids, expert_mask, activation, quant_type,
        w1_scale, w2_scale: None,
    )  # fmt: skip
    refused = str(ck.why_not(SMALL, "gfx950"))
    assert refused.startswith("fused_moe of aiter ")
    assert refused.endswith(" takes no bias1, bias2; install amd-aiter 0.1.14 or later")


def test_why_not_with_a_fixed_bound(generation: Callable[..., None]) -> None:
    """0.1.9 to 0.1.13."""
    generation("splitk")
    assert str(ck.why_not(SMALL, "gfx950")).endswith(
        "makes activations fp8 in large batches and cannot be told not to; install amd-aiter 0.1.14 or later"
    )


@pytest.mark.parametrize("bound", [None, "256", "999999", "-1", "many"])
def test_why_not_with_a_low_bound(
    generation: Callable[..., None], monkeypatch: pytest.MonkeyPatch, bound: str | None
) -> None:
    """The reason is also the remedy."""
    generation(*GENERATIONS["0.1.14"])
    if bound is not None:
        monkeypatch.setenv(ck.BOUND_VAR, bound)
    assert str(ck.why_not(SMALL, "gfx950")).endswith(
        f"makes activations fp8 in batches of {bound or 256} tokens or more (AITER_BF16_FP8_MOE_BOUND); "
        "export AITER_BF16_FP8_MOE_BOUND=1000000"
    )


def test_source_says_where() -> None:  # noqa: D103
    assert str(TREE / "aiter") in ck.source()
