"""The Triton backend on a real GPU: its numbers, its routing, its graph, and what it takes to load it."""

import gc
import random
import time
from typing import Any

import pytest
import torch
from emulate_routing import logits_of, miss

from vllm_mxfp4_gfx950 import backends, choice, self_check, serving, settings
from vllm_mxfp4_gfx950.arch import OWN_MAX_SCALE
from vllm_mxfp4_gfx950.backends import reference
from vllm_mxfp4_gfx950.backends.triton import routing as triton_routing
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights
from vllm_mxfp4_gfx950.random_layer import make_shape, random_tokens, random_weights
from vllm_mxfp4_gfx950.tiles import Ladder, TileConfig
from vllm_mxfp4_gfx950.tolerance import assert_rows_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
Layer = tuple[MoeShape, MoeWeights, backends.Backend, Any]
TOKENS = (1, 7, 29, 37, 64, 199, 333, 1024)
REFILLED = (1, 64, 1024)
REPEATS = 200
ROUTED = (1, 2, 7, 8, 9, 16, 17, 32, 33, 64, 256, 1500, 5000, 16384)
SIZES = [
    make_shape(32, 4, 2880, 2880),
    make_shape(128, 4, 2880, 2880),
    make_shape(32, 4, 2880, 736),
    make_shape(8, 1, 320, 96),
    make_shape(4, 2, 192, 96),
    make_shape(8, 3, 192, 96),
    make_shape(32, 6, 320, 160),
]


def shape_id(shape: MoeShape) -> str:
    """A readable test id."""
    return f"E{shape.experts}-k{shape.topk}-H{shape.hidden}-I{shape.intermediate}"


def poison() -> None:
    """Leave NaN in the memory that the next allocations will get."""
    for size in (2**12, 2**16, 2**20, 2**24, 2**28):
        del_me = [torch.full((size,), float("nan"), dtype=torch.bfloat16, device="cuda") for _ in range(8)]
        del del_me


@pytest.fixture(scope="module", params=SIZES, ids=shape_id)
def layer(request: pytest.FixtureRequest) -> Layer:
    """A layer with the backend that serves it here, prepared."""
    shape = request.param
    weights = random_weights(shape, seed=shape.experts, device="cuda")
    selection = backends.select(shape, backends.arch_of(torch.device("cuda")), settings.Settings("triton"))
    return shape, weights, selection.backend, selection.backend.prepare(weights.clone(), shape)


@pytest.mark.parametrize("tokens", TOKENS, ids=lambda t: f"T{t}")
def test_run(layer: Layer, tokens: int) -> None:
    """Every row is as close to float64 as the one tolerance asks, whatever memory held before."""
    shape, weights, _, prepared = layer
    x, logits = random_tokens(shape, tokens, seed=tokens, device="cuda", unchosen=shape.experts - 1)
    poison()
    out = prepared.run(x, logits)
    assert_rows_close(out, *reference.truth_and_plain(x, logits, weights, shape))


@pytest.mark.parametrize("tokens", [1, 64, 333, 1024], ids=lambda t: f"T{t}")
def test_all_runs_give_the_same_bits(layer: Layer, tokens: int) -> None:
    """Nothing is summed in an order that varies, and nothing is written over that is still read."""
    shape, _, _, prepared = layer
    x, logits = random_tokens(shape, tokens, seed=tokens, device="cuda")
    first = prepared.run(x, logits)
    assert sum(not torch.equal(first, prepared.run(x, logits)) for _ in range(REPEATS)) == 0


@pytest.mark.parametrize("tokens", [1, 64, 1024], ids=lambda t: f"T{t}")
def test_run_is_captured_in_a_graph(layer: Layer, tokens: int) -> None:
    """A replayed graph computes with what its inputs then hold."""
    shape, weights, _, prepared = layer
    x, logits = random_tokens(shape, tokens, seed=tokens, device="cuda")
    prepared.run(x, logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = prepared.run(x, logits)
    x2, logits2 = random_tokens(shape, tokens, seed=tokens + 1, device="cuda")
    x.copy_(x2)
    logits.copy_(logits2)
    out.fill_(float("nan"))
    graph.replay()
    assert_rows_close(out, *reference.truth_and_plain(x, logits, weights, shape))


def test_graphs_read_other_weights(layer: Layer) -> None:
    """Twenty times other weights: graphs captured before compute with them, and no memory is lost."""
    shape = layer[0]
    arch = backends.arch_of(torch.device("cuda"))
    serve = serving.ModelLayers(shape, arch, settings.Settings("triton"), max(REFILLED))
    prepared = serve.prepare(random_weights(shape, seed=0, device="cuda"), "layers.0")
    graphs = []
    for tokens in REFILLED:
        x, logits = random_tokens(shape, tokens, seed=tokens, device="cuda")
        prepared.run(x, logits)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = prepared.run(x, logits)
        graphs.append((graph, x, logits, out))
    held = []
    for seed in range(1, 21):
        graph, x, logits, out = graphs[seed % len(graphs)]
        weights = random_weights(shape, seed=seed, device="cuda")
        expected = reference.truth_and_plain(x, logits, weights, shape)
        graph.replay()
        with pytest.raises(AssertionError):  # Negative control: it has the weights of before.
            assert_rows_close(out, *expected)
        serve.refill(prepared, weights, "layers.0")
        out.fill_(float("nan"))
        graph.replay()
        assert_rows_close(out, *expected)
        del weights, expected
        gc.collect()
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    print(f"{held[0] >> 20} MiB after the first, {held[-1] >> 20} MiB after the last")
    assert held[-1] <= held[0]


@pytest.mark.parametrize("tokens", [32768, 131072], ids=lambda t: f"T{t}")
def test_run_of_gathered_tokens(layer: Layer, tokens: int) -> None:
    """What eight data-parallel ranks bring together; of the rows the first, the last and some between."""
    shape, weights, _, prepared = layer
    x, logits = random_tokens(shape, tokens, seed=tokens, device="cuda")
    rows = torch.arange(0, tokens, tokens // 64, device="cuda")
    rows[-1] = tokens - 1
    out = prepared.run(x, logits)[rows]
    assert_rows_close(out, *reference.truth_and_plain(x[rows], logits[rows], weights, shape))


def test_run_does_not_wait_for_the_gpu(layer: Layer) -> None:
    """No host synchronization; and the check itself notices one."""
    shape, _, _, prepared = layer
    x, logits = random_tokens(shape, 64, seed=0, device="cuda")
    prepared.run(x, logits)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        prepared.run(x, logits)
        with pytest.raises(RuntimeError, match="synchroniz"):
            int(x[0, 0])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tokens", ROUTED, ids=lambda t: f"T{t}")
def test_route_is_exact(layer: Layer, tokens: int) -> None:
    """As matmul_ogs gets it."""
    shape, _, backend, prepared = layer
    if backend.NAME != "triton_ogs":
        pytest.skip("needs triton_kernels with matmul_ogs")
    _, logits = random_tokens(shape, tokens, seed=tokens, device="cuda")
    twin = triton_routing.route_in_torch(logits, shape.topk, shape.experts, None, prepared.sizes)
    assert miss(prepared.route(logits), twin) == ""


@pytest.mark.parametrize("tokens", ROUTED, ids=lambda t: f"T{t}")
def test_own_route_is_exact(layer: Layer, tokens: int) -> None:
    """As our own matmuls get it: small tiles."""
    shape, _, _, prepared = layer
    _, logits = random_tokens(shape, tokens, seed=tokens, device="cuda")
    block = prepared.own.tiles[0].at(tokens).block_m
    given = logits, shape.topk, shape.experts, None, 1
    routing = triton_routing.route(*given, smallest=block, overlaps=True)
    assert miss(routing, triton_routing.route_in_torch(*given, smallest=block)) == ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 18, 40], ids=lambda t: f"T{t}")
@pytest.mark.parametrize(("topk", "experts"), [(1, 8), (3, 7), (4, 128), (5, 32), (6, 300), (32, 40)])
def test_route_at_its_edges(topk: int, experts: int, tokens: int, dtype: torch.dtype) -> None:
    """NaN of either sign, infinities, zeros, ties, and numbers of choices that are no powers of two."""
    logits = logits_of(tokens, experts, dtype)
    routing = triton_routing.route(logits.cuda(), topk, experts, None, 5)
    on_the_host = triton_routing.Routing(**{name: field.cpu() for name, field in vars(routing).items()})
    assert miss(on_the_host, triton_routing.route_in_torch(logits, topk, experts, None, 5)) == ""


def test_own_declines_what_it_cannot_scale(layer: Layer) -> None:
    """A scale whose bf16 would overflow: matmul_ogs serves, and the layer is right."""
    shape, _, backend, _ = layer
    weights = random_weights(shape, seed=1, device="cuda")
    weights.w2_scale[0, 0, 0] = OWN_MAX_SCALE + 1
    prepared = backend.prepare(weights.clone(), shape)
    assert prepared.own is None
    x, logits = random_tokens(shape, 7, seed=7, device="cuda")
    assert_rows_close(prepared.run(x, logits), *reference.truth_and_plain(x, logits, weights, shape))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("tokens", [1, 37, 333], ids=lambda t: f"T{t}")
def test_ranks_of_experts_add_up(ranks: int, tokens: int) -> None:
    """Each rank computes its own experts only, and all together make the layer."""
    whole = make_shape(16, 4, 320, 160)
    weights = random_weights(whole, seed=ranks, device="cuda")
    x, logits = random_tokens(whole, tokens, seed=tokens, device="cuda")
    total = torch.zeros(tokens, whole.hidden, dtype=torch.float64, device="cuda")
    arch = backends.arch_of(torch.device("cuda"))
    for rank in range(ranks):
        # Strided placement: neither contiguous nor even.
        mine = torch.arange(rank, whole.experts, ranks, device="cuda")
        expert_map = torch.full((whole.experts,), -1, dtype=torch.int32, device="cuda")
        expert_map[mine] = torch.arange(len(mine), dtype=torch.int32, device="cuda")
        tensors = {name: t[mine] for name, t in vars(weights).items() if t is not None}
        part = MoeWeights(**tensors, expert_map=expert_map)
        shape = MoeShape(len(mine), whole.experts, 4, whole.hidden, whole.intermediate, 1.702, 7.0)
        backend = backends.select(shape, arch, settings.Settings("triton")).backend
        prepared = backend.prepare(part.clone(), shape)
        poison()
        out = prepared.run(x, logits)
        assert_rows_close(out, *reference.truth_and_plain(x, logits, part, shape))
        total += out.double()
    truth, plain = reference.truth_and_plain(x, logits, weights, whole)
    assert_rows_close(total, truth, plain)


@pytest.mark.parametrize("experts", [32, 128], ids=lambda e: f"E{e}")
def test_prepare_takes_little_memory_and_time(experts: int) -> None:
    """At most one layer's bytes beside the layer, and a quarter of a second."""
    shape = make_shape(experts, 4, 2880, 2880)
    backend = backends.select(
        shape, backends.arch_of(torch.device("cuda")), settings.Settings("triton")
    ).backend
    seconds = []
    for seed in range(4):
        weights = random_weights(shape, seed, device="cuda")
        layer_bytes = sum(t.nbytes for t in vars(weights).values() if t is not None)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        backend.prepare(weights, shape)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        extra = torch.cuda.max_memory_allocated() - before
        print(f"E={experts}: {extra >> 20} MiB beside {layer_bytes >> 20} MiB, {seconds[-1]:.3f} s")
        assert extra <= layer_bytes
    assert min(seconds) <= 0.25


@pytest.fixture(scope="module", name="captured", params=[8192, 512])
def fixture_captured(request: pytest.FixtureRequest) -> int:
    """The most tokens of a batch that has a graph."""
    return int(request.param)


@pytest.fixture(scope="module", name="chosen")
def fixture_chosen(captured: int, layer: Layer) -> choice.Choice:
    """What the timing finds, once its kernels are compiled."""
    shape, _, _, prepared = layer
    if shape.intermediate < 2880:
        pytest.skip("as the larger ones, which take longest")

    def choose() -> choice.Choice:
        return choice.choose(prepared, 8192, choice.clock(shape, torch.device("cuda"), captured), captured)

    for _ in range(2):  # Each looks where its own times lead it, and compiles what it meets there.
        choose()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    found = choose()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == before
    print(found)
    return found


def test_choice_takes_a_second(chosen: choice.Choice) -> None:
    """At most, for all batches."""
    assert len(chosen.us) <= choice.BATCHES
    assert chosen.seconds < 1


def test_choice_is_right(layer: Layer, chosen: choice.Choice) -> None:
    """What was chosen passes the check."""
    shape, weights, _, prepared = layer
    assert self_check.check(prepared.with_plans(chosen.plans), weights, shape).miss == ""


def test_choice_at_other_batches(layer: Layer, captured: int, chosen: choice.Choice) -> None:
    """At twenty with a graph that were not timed, it takes at most 3% longer than the fastest plan."""
    shape, _, _, prepared = layer
    drawn = random.Random(0)
    cost = choice.clock(shape, torch.device("cuda"))
    others: set[int] = set()
    while len(others) < 20:
        others |= {round(captured ** drawn.random())} - chosen.us.keys()
    ratios = {}
    for tokens in sorted(others):
        plans = {plan: prepared.with_plans(Ladder((1,), (plan,))) for plan in prepared.offered(tokens)}
        us = {plan: min(cost(each, tokens) for _ in range(4)) for plan, each in plans.items()}
        ratios[tokens] = us[chosen.plans.at(tokens)] / min(us.values())
    print(f"{len(ratios)} batches, the worst at {max(ratios.values()):.3f}: {ratios}")
    assert max(ratios.values()) <= 1.03


def test_slow_table_serves_nothing(layer: Layer) -> None:
    """Planted: tiles that are right and slow are given up for the package's own."""
    shape, _, backend, prepared = layer
    if backend.NAME != "triton_ogs" or shape.intermediate < 2880:
        pytest.skip("needs a layer of GPT-OSS on triton_kernels with matmul_ogs")
    slow = TileConfig(16, 256, 64, 1, 8, 1, 0)
    planted = prepared.with_tiles(slow, slow)
    found = choice.choose(planted, 4096, choice.clock(shape, torch.device("cuda")))
    assert found.plans.at(4096) == "package"
    assert found.us[4096]["table"] > 1.2 * found.us[4096]["package"]
    assert found.plans.at(1) == "own"
