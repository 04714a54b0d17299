"""Time one MoE layer on this device: this package beside others, each checked against float64 first."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from vllm_mxfp4_gfx950 import backends, serving, settings
from vllm_mxfp4_gfx950.backends import reference
from vllm_mxfp4_gfx950.errors import brief
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights
from vllm_mxfp4_gfx950.random_layer import random_tokens, random_weights
from vllm_mxfp4_gfx950.timing import Calls
from vllm_mxfp4_gfx950.tolerance import compare

CALLS = 16
"""Of a layer in one timed piece of work; each has tokens of its own. A backend has two turns, in the order
a, b, c, c, b, a."""

LARGEST = 8192
"""Tokens of the largest batch for which this package chooses what serves."""

INFINITY_CACHE_BYTES = 256 * 2**20
"""Behind the L2 of CDNA 3 and 4, and not counted by torch."""

Layer: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""bf16[T, H] and logits[T, experts] to bf16[T, H]."""

Builder: TypeAlias = Callable[[MoeWeights, MoeShape], Layer]
"""Prepares a layer; the weights may be consumed."""


@dataclass(frozen=True)
class Speeds:
    """What this device reaches in the two things that bound a layer.

    Args:
        copy: bytes a second, read and written by a kernel that copies.
        multiply: FLOPs a second of a large bf16 matmul.
    """

    copy: float
    multiply: float


@dataclass(frozen=True)
class Row:
    """One batch size.

    Args:
        layer: its shape, as text.
        tokens: the batch's size.
        weight_bytes: blocks and scales of the chosen experts, on average over the calls.
        flops: of both matmuls.
        floor_us: that the work takes at the speeds that this device reaches.
        us: of each backend that computed the layer right, every replay's time over its calls.
        host_us: of each of them, that the CPU takes to launch a call outside of a graph; empty on a CPU.
        frobenius: of each of them, its relative error against float64.
        failed: of every other backend, why it has no time.
        seconds: that the row took to measure, compilation included.
    """

    layer: str
    tokens: int
    weight_bytes: float
    flops: float
    floor_us: float
    us: dict[str, list[float]]
    host_us: dict[str, float]
    frobenius: dict[str, float]
    failed: dict[str, str]
    seconds: float


def ours(weights: MoeWeights, shape: MoeShape, captured: int | None = None) -> Layer:
    """This package's, prepared, checked and chosen among as a server here would do."""
    layers = as_served(shape, weights.w13.device, captured)
    return layers.prepare(weights, "another layer" if layers.checked else "the first layer").run


def as_served(shape: MoeShape, device: torch.device, captured: int | None = None) -> serving.ModelLayers:
    """Layers of one model, for which the first one decides what serves."""
    wanted = settings.from_environment()
    return serving.model_layers(shape, backends.arch_of(device), wanted, LARGEST, captured)


def speeds(device: torch.device) -> Speeds:
    """Measure them."""
    gpu = device.type == "cuda"
    # Not Tensor.copy_, whose cudaMemcpy moves 2.7 TB/s on an H200 where a kernel moves 4.25.
    source, target = (torch.zeros(2**28 if gpu else 2**22, device=device) for _ in range(2))
    copy = Calls(lambda _: torch.mul(source, 2.0, out=target), 2, device).microseconds()
    size = 8192 if gpu else 256
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    multiply = Calls(lambda _: matrix @ matrix, 2, device).microseconds()
    moved = source.nbytes + target.nbytes
    return Speeds(1e6 * moved / statistics.median(copy), 1e6 * 2 * size**3 / statistics.median(multiply))


def expert_bytes(shape: MoeShape) -> float:
    """Blocks and scales of one expert."""
    return 3 * shape.hidden * shape.intermediate * (1 / 2 + 1 / 32)


def copies(shape: MoeShape, device: torch.device) -> int:
    """Layers to take in turn, so that a cacheful of others' weights is read before one comes again.

    Returns:
        a divisor of CALLS, so that this holds from replay to replay too.
    """
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    if torch.version.hip:
        cache = max(cache, INFINITY_CACHE_BYTES)
    needed = 2 + cache // (shape.topk * expert_bytes(shape))
    return next((count for count in (2, 4, 8) if count >= needed), CALLS)


def work(shape: MoeShape, batches: list[torch.Tensor]) -> tuple[float, float]:
    """What a call has to do at least.

    Args:
        shape: the layer.
        batches: the logits of each call, all of one size.

    Returns:
        bytes of weights to read, on average over the calls, and FLOPs.
    """
    chosen = [len(set(reference.route(logits, shape.topk)[0].flatten().tolist())) for logits in batches]
    flops = 2 * len(batches[0]) * shape.topk * 3 * shape.hidden * shape.intermediate
    return statistics.mean(chosen) * expert_bytes(shape), flops


def measure(
    shape: MoeShape,
    token_counts: list[int],
    builders: Mapping[str, Builder],
    reached: Speeds,
    device: torch.device,
    captured: int | None = None,
) -> Iterator[Row]:
    """Check and time every backend at every batch size; one that fails does not stop the others.

    The timed work's first call is compared with float64, every row of it, at every batch size.

    Args:
        shape: the layer.
        token_counts: the batch sizes.
        builders: how to prepare the layer for each backend.
        reached: what `speeds` returned.
        device: where to run.
        captured: as `choice.clock` takes it.
    """
    failed: dict[str, str] = {}
    layers: dict[str, list[Layer]] = {}
    for name, build in builders.items():
        try:
            layers[name] = [
                build(random_weights(shape, seed, str(device)), shape)
                for seed in range(copies(shape, device))
            ]
        except Exception as error:  # A compiler, a driver or another's package may raise anything.
            failed[name] = brief(error)
    # A token's output depends on no other token: the largest batch's truth serves them all.
    x, logits = random_tokens(shape, max(token_counts), 0, str(device))
    truth, plain = reference.truth_and_plain(x, logits, random_weights(shape, 0, str(device)), shape)
    for tokens in token_counts:
        began = time.perf_counter()
        batches = [(x[:tokens], logits[:tokens])]
        batches += [random_tokens(shape, tokens, seed, str(device)) for seed in range(1, CALLS)]
        missed = dict(failed)
        frobenius: dict[str, float] = {}
        right: dict[str, Calls] = {}
        for name, turns in layers.items():
            try:
                calls = in_turn(turns, batches, device, captured is None or tokens <= captured)
                calls.first.fill_(float("nan"))  # So that only a replay can make it right.
                found = compare(calls.replay(), truth[:tokens], plain[:tokens])
                if found.miss:
                    missed[name] = found.miss
                else:
                    right[name], frobenius[name] = calls, found.frobenius
            except Exception as error:
                missed[name] = brief(error)
        us: dict[str, list[float]] = {name: [] for name in right}
        for name in [*right, *reversed(right)]:
            us[name] += right[name].microseconds()
        host = {name: calls.launch_us(CALLS) for name, calls in right.items() if device.type == "cuda"}
        weight_bytes, flops = work(shape, [batch[1] for batch in batches])
        least = 1e6 * max(weight_bytes / reached.copy, flops / reached.multiply)
        seconds = time.perf_counter() - began
        yield Row(str(shape), tokens, weight_bytes, flops, least, us, host, frobenius, missed, seconds)


def in_turn(
    layers: list[Layer],
    batches: list[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
    in_graph: bool,
) -> Calls:
    """One call for each batch, the layers taking turns."""
    return Calls(lambda i: layers[i % len(layers)](*batches[i]), len(batches), device, in_graph=in_graph)
