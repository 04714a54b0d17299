"""The reference backend, against a loop of Python floats and against transformers' GPT-OSS."""

import itertools
import math
from dataclasses import replace
from typing import Any

import engine
import pytest
import torch
from run_python import ROOT, run_python

from vllm_mxfp4_gfx950.backends import reference
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights
from vllm_mxfp4_gfx950.mxfp4 import dequantize
from vllm_mxfp4_gfx950.random_layer import make_shape, random_tokens, random_weights
from vllm_mxfp4_gfx950.tolerance import assert_rows_close, compare

TOKENS = [1, 37, 199]
UNCHOSEN = 3
EXACT = 1e-12
"""Relative; float64 sums in another order."""

SHAPE = make_shape(8, 2, 64, 96)
# Random layers seldom reach 7, so one of the shapes clamps early; its alpha is no default either.
SHAPES = [SHAPE, make_shape(8, 4, 96, 32, alpha=0.7, limit=0.5)]


def shape_id(shape: MoeShape) -> str:  # noqa: D103
    return f"E{shape.experts}-k{shape.topk}-H{shape.hidden}-I{shape.intermediate}"


def run(weights: MoeWeights, shape: MoeShape, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """What the backend answers."""
    return reference.prepare(weights, shape).run(x, logits)


def run_double(weights: MoeWeights, shape: MoeShape, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The same in float64, where only the order of a sum makes a difference."""
    return run(weights, shape, x.double(), logits.double())


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order of float64 sums."""
    assert got.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=EXACT, atol=EXACT * float(expected.abs().max()))


def dot(a: list[float], b: list[float]) -> float:  # noqa: D103
    return sum(x * y for x, y in zip(a, b, strict=True))


def slow_layer(weights: MoeWeights, shape: MoeShape, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The layer, one Python float at a time, as its definition reads."""
    w13 = dequantize(weights.w13, weights.w13_scale, torch.float64).tolist()
    w2 = dequantize(weights.w2, weights.w2_scale, torch.float64).tolist()
    w13_bias, w2_bias = weights.w13_bias.tolist(), weights.w2_bias.tolist()
    outputs = []
    for token, scores in zip(x.tolist(), logits.tolist(), strict=True):
        chosen = sorted(range(shape.experts), key=lambda e: (-scores[e], e))[: shape.topk]
        odds = [math.exp(scores[e] - scores[chosen[0]]) for e in chosen]
        output = [0.0] * shape.hidden
        for e, odd in zip(chosen, odds, strict=True):
            rows = [dot(token, w13[e][n]) + w13_bias[e][n] for n in range(2 * shape.intermediate)]
            middle = []
            for unclamped_gate, unclamped_up in zip(rows[0::2], rows[1::2], strict=True):
                gate = min(unclamped_gate, shape.limit)
                up = max(-shape.limit, min(unclamped_up, shape.limit))
                middle.append(gate / (1 + math.exp(-shape.alpha * gate)) * (up + 1))
            for n in range(shape.hidden):
                output[n] += odd / sum(odds) * (dot(middle, w2[e][n]) + w2_bias[e][n])
        outputs.append(output)
    return torch.tensor(outputs, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("topk", [1, 3, 4])
def test_route_of_nan(topk: int, dtype: torch.dtype) -> None:
    """Either sign, and infinities: the values that torch.topk chooses, of NaN the first, and NaN weights."""
    plain = torch.tensor([-math.inf, 2, math.inf, -1, 0.5, 3]).to(dtype)
    for places in itertools.product((0, 1, -1), repeat=6):
        signs = torch.tensor(places, dtype=dtype)
        logits = plain.where(signs == 0, torch.copysign(torch.tensor(math.nan, dtype=dtype), signs))[None]
        ids, weights = reference.route(logits, topk)
        assert torch.equal(logits.gather(1, ids).nan_to_num(99), logits.topk(topk)[0].nan_to_num(99))
        nan = logits.isnan()[0].nonzero()[:topk, 0].tolist()
        assert ids[0, : len(nan)].tolist() == nan
        assert weights.isnan().all() or not nan


@pytest.mark.parametrize("tokens", TOKENS, ids="T{}".format)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_run_equals_slow_loop(shape: MoeShape, tokens: int) -> None:
    """Routing with ties, an expert that nobody chose, both matmuls, the clamped SwiGLU and the sum."""
    weights = random_weights(shape, seed=1)
    x, logits = random_tokens(shape, tokens, seed=2, unchosen=UNCHOSEN)
    expected = slow_layer(weights, shape, x, logits)
    assert_same(run_double(weights, shape, x, logits), expected)


@pytest.mark.parametrize("tokens", TOKENS, ids="T{}".format)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_run_equals_transformers(shape: MoeShape, tokens: int) -> None:
    """Router and experts of transformers' GptOss, on weights that transformers dequantized."""
    pytest.importorskip("transformers", reason="needs transformers")
    from transformers import GptOssConfig
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, GptOssTopKRouter

    config = GptOssConfig(
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.topk,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        swiglu_alpha=shape.alpha,
        swiglu_limit=shape.limit,
    )
    weights = random_weights(shape, seed=3)
    x, _ = random_tokens(shape, tokens, seed=4)
    router, experts = GptOssTopKRouter(config).double(), GptOssExperts(config).double()
    torch.manual_seed(5)
    torch.nn.init.normal_(router.weight)
    torch.nn.init.normal_(router.bias)

    def unpack(blocks: torch.Tensor, scales: torch.Tensor) -> torch.nn.Parameter:
        blocks = blocks.unflatten(-1, (-1, 16))
        return torch.nn.Parameter(convert_moe_packed_tensors(blocks, scales, dtype=torch.float64))

    experts.gate_up_proj = unpack(weights.w13, weights.w13_scale)
    experts.down_proj = unpack(weights.w2, weights.w2_scale)
    experts.gate_up_proj_bias.data = weights.w13_bias.double()
    experts.down_proj_bias.data = weights.w2_bias.double()
    with torch.no_grad():
        logits, scores, indices = router(x.double())
        expected = experts(x.double(), indices, scores)
    assert_same(run_double(weights, shape, x, logits), expected)


@pytest.mark.parametrize("tokens", TOKENS, ids="T{}".format)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_run_rounds_no_more_than_allowed(dtype: torch.dtype, tokens: int) -> None:
    """In the dtypes that are served, by the rule for kernels."""
    weights = random_weights(SHAPE, seed=1)
    x, logits = random_tokens(SHAPE, tokens, seed=2, unchosen=UNCHOSEN)
    got = run(weights, SHAPE, x.to(dtype), logits.to(dtype))
    assert got.dtype == dtype
    assert_rows_close(got, *reference.truth_and_plain(x, logits, weights, SHAPE))


@pytest.mark.parametrize("tokens", TOKENS, ids="T{}".format)
def test_run_rounds_only_where_kernels_do(tokens: int) -> None:
    """In bf16, only the rows between the two matmuls and the result are rounded; float64 rounds alike."""
    weights = random_weights(SHAPE, seed=1)
    x, logits = random_tokens(SHAPE, tokens, seed=2)
    exact = reference.experts(x, *reference.route(logits, SHAPE.topk), weights, SHAPE, torch.float64)
    got = run(weights, SHAPE, x, logits)
    assert (got == exact).double().mean() > 0.99


def swapped_nibbles(weights: MoeWeights) -> MoeWeights:  # noqa: D103
    return replace(weights, w13=weights.w13 << 4 | weights.w13 >> 4)


def scales_of_another_row(weights: MoeWeights) -> MoeWeights:  # noqa: D103
    return replace(weights, w2_scale=weights.w2_scale.roll(1, dims=1))


def gate_and_up_apart(weights: MoeWeights) -> MoeWeights:  # noqa: D103
    return replace(weights, w13_bias=torch.cat((weights.w13_bias[:, ::2], weights.w13_bias[:, 1::2]), dim=1))


def no_last_bias(weights: MoeWeights) -> MoeWeights:  # noqa: D103
    return replace(weights, w2_bias=torch.zeros_like(weights.w2_bias))


def one_wrong_row(weights: MoeWeights) -> MoeWeights:
    """A single output column of a single expert."""
    w2_bias = weights.w2_bias.clone()
    w2_bias[0, 0] += 1
    return replace(weights, w2_bias=w2_bias)


@pytest.mark.parametrize(
    "damage",
    [swapped_nibbles, scales_of_another_row, gate_and_up_apart, no_last_bias, one_wrong_row],
)
def test_rule_notices(damage: Any) -> None:
    """Negative control: the rule for kernels refuses each of these layers."""
    weights = random_weights(SHAPE, seed=1)
    x, logits = random_tokens(SHAPE, 37, seed=2)
    with pytest.raises(AssertionError, match="row"):
        assert_rows_close(
            run(damage(weights), SHAPE, x, logits), *reference.truth_and_plain(x, logits, weights, SHAPE)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("logits", "ids"),
    [
        ([1, 1, 1, 1, 1], [0, 1, 2]),
        ([0, 2, 1, 2, 1], [1, 3, 2]),
        ([-1, -1, -2, -1, -1], [0, 1, 3]),
        ([0.0, -0.0, -1, 0.0, 5], [4, 0, 1]),
        ([0, 1, 2, 3, 4], [4, 3, 2]),
    ],
    ids=str,
)
def test_route(logits: list[float], ids: list[int], dtype: torch.dtype) -> None:
    """The best first, ties to the lower index, softmax over the chosen only, in the logits' dtype."""
    got_ids, got_weights = reference.route(torch.tensor([logits], dtype=dtype), 3)
    assert got_ids.tolist() == [ids]
    odds = [math.exp(logits[expert]) for expert in ids]
    assert got_weights.dtype == dtype
    ulp = torch.finfo(dtype).eps
    assert got_weights.tolist()[0] == pytest.approx([odd / sum(odds) for odd in odds], rel=ulp)


@pytest.mark.parametrize("tokens", TOKENS, ids="T{}".format)
def test_expert_map_ranks_sum_to_the_whole(tokens: int) -> None:
    """Two ranks with the experts dealt out unevenly, their local order not the model's."""
    weights = random_weights(SHAPE, seed=6)
    x, logits = random_tokens(SHAPE, tokens, seed=7)
    parts = []
    for local in ([6, 0, 3], [1, 2, 4, 5, 7]):
        expert_map = torch.full((SHAPE.experts,), -1, dtype=torch.int32)
        expert_map[local] = torch.arange(len(local), dtype=torch.int32)
        tensors = {name: t[local] for name, t in vars(weights).items() if t is not None}
        shape = replace(SHAPE, experts=len(local))
        parts.append(run_double(MoeWeights(**tensors, expert_map=expert_map), shape, x, logits))
    assert all(part.abs().sum(dim=1).count_nonzero() for part in parts)
    assert_same(parts[0] + parts[1], run_double(weights, SHAPE, x, logits))


@pytest.mark.parametrize("tokens", TOKENS, ids="T{}".format)
def test_tensor_parallel_ranks_sum_to_the_whole(tokens: int) -> None:
    """Two ranks with unequal shares of the intermediate size, the last bias on the first of them."""
    weights = random_weights(SHAPE, seed=8)
    x, logits = random_tokens(SHAPE, tokens, seed=9)
    parts = []
    for start, stop in ((0, 64), (64, 96)):
        part = MoeWeights(
            w13=weights.w13[:, 2 * start : 2 * stop],
            w13_scale=weights.w13_scale[:, 2 * start : 2 * stop],
            w13_bias=weights.w13_bias[:, 2 * start : 2 * stop],
            w2=weights.w2[:, :, start // 2 : stop // 2],
            w2_scale=weights.w2_scale[:, :, start // 32 : stop // 32],
            w2_bias=weights.w2_bias if start == 0 else torch.zeros_like(weights.w2_bias),
        )
        parts.append(run_double(part, replace(SHAPE, intermediate=stop - start), x, logits))
    assert_same(parts[0] + parts[1], run_double(weights, SHAPE, x, logits))


def test_unchosen_expert_adds_nothing() -> None:
    """Its weights are NaN; a layer that multiplied them by zero would answer NaN."""
    weights = random_weights(SHAPE, seed=10)
    x, logits = random_tokens(SHAPE, 37, seed=11, unchosen=UNCHOSEN)
    expected = run(weights, SHAPE, x, logits)
    weights.w13_scale[UNCHOSEN] = 0xFF
    weights.w2_bias[UNCHOSEN] = math.nan
    assert torch.equal(run(weights, SHAPE, x, logits), expected)
    logits[5, UNCHOSEN] = 100
    assert run(weights, SHAPE, x, logits).isnan().all(dim=1).nonzero().tolist() == [[5]]


def test_operator_can_be_compiled() -> None:
    """What torch asks of an operator that vLLM's compiler traces through without looking inside."""
    weights = random_weights(SHAPE, seed=12)
    x, logits = random_tokens(SHAPE, 3, seed=13)
    sizes = (SHAPE.topk, SHAPE.alpha, SHAPE.limit)
    torch.library.opcheck(torch.ops.vllm_mxfp4.reference_moe, (x, logits, *vars(weights).values(), *sizes))


@pytest.mark.parametrize(("spoilt", "what"), [(0, ""), (1, "of the truth "), (2, "of plain bf16 ")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tolerance_refuses_what_is_not_finite(spoilt: int, what: str, value: float) -> None:
    """Also in what it is compared with: NaN would make every comparison false."""
    three = [torch.ones(2, 4), torch.ones(2, 4, dtype=torch.float64), torch.full((2, 4), 1.01)]
    assert compare(*three).miss == ""
    three[spoilt][1, 2] = value
    assert compare(*three).miss == f"1 elements {what}are not finite"


def test_with_avx2_alone() -> None:
    """The rest of this file, as torch and oneDNN compute on such a CPU."""
    command = ["-m", "pytest", "-p", "no:cacheprovider", "-k", "not avx2", __file__]
    result = run_python(command, cwd=ROOT, **engine.AVX2)
    assert result.returncode == 0, result.stdout
