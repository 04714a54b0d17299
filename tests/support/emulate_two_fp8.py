"""Runs the experts by two FP8 addends on the emulated gfx950: cases on stdin, what came out on stdout."""

from typing import Any
from unittest import mock

import torch
from emulated import Launches, answer, layer_of, tokens_of

from vllm_mxfp4_gfx950 import backends, choice, self_check, serving
from vllm_mxfp4_gfx950.backends import reference
from vllm_mxfp4_gfx950.backends.triton import routing, two_fp8
from vllm_mxfp4_gfx950.backends.triton.two_fp8_kernels import scales_in_torch
from vllm_mxfp4_gfx950.gfx950.driver import ARCH, Launch, presented
from vllm_mxfp4_gfx950.gfx950.emulator.execution import execute
from vllm_mxfp4_gfx950.random_layer import make_shape, random_tokens, random_weights
from vllm_mxfp4_gfx950.settings import Settings
from vllm_mxfp4_gfx950.tiles import Ladder, TileConfig
from vllm_mxfp4_gfx950.tolerance import compare

KEPT = -1
"""A token whose row is compared with what it is beside other tokens, one of which is not finite."""


def check_layer(case: dict[str, Any]) -> dict[str, Any]:
    """One layer on one batch of tokens."""
    shape, weights = layer_of(case)
    x, logits = tokens_of(case, shape)
    truth, plain = reference.truth_and_plain(x, logits, weights, shape)
    launches = Launches()
    with presented(execute):
        prepared = backends.select_tiled(shape, ARCH).prepare(weights.clone(), shape)
        by_package = compare(prepared.run(x, logits), truth, plain) if case["against_package"] else None
    tiles = tuple(Ladder((10**6,), (TileConfig(*tile),)) for tile in case["tiles"])
    layer = two_fp8.TwoFp8(shape, prepared.w13, prepared.w2, tiles, prepared.order)
    with presented(launches), mock.patch.object(routing, "FEW_BLOCKS", case["few"]):
        out = layer.run(x, logits)
    others, other_logits = random_tokens(shape, case["tokens"], seed=case["tokens"] + 1)
    others[0, 0], others[KEPT], other_logits[KEPT] = torch.inf, x[KEPT], logits[KEPT]
    with presented(execute):
        beside_others = layer.run(others, other_logits.to(logits))
    reports = launches.reports()
    found = compare(out, truth, plain)
    return {
        "miss": found.miss,
        "layout": all(
            torch.equal(scales_in_torch(weight.scales)[:, : given.shape[1], : given.shape[2]], given)
            for weight, given in ((prepared.w13, weights.w13_scale), (prepared.w2, weights.w2_scale))
        ),
        "frobenius": found.frobenius,
        "package": by_package and by_package.frobenius,
        "kept": bool(torch.equal(beside_others[KEPT], out[KEPT])),
        "spoilt": len(x) > 1 and bool(beside_others[0].isnan().all()),
        "kernels": [one.name for one in launches],
        "misfits": launches.misfits(),
        "mfma": sorted({name for report in reports for name in report.mfma}),
        "conversions": sum(report.fp4_conversions for report in reports),
        "workgroups": [one.grid[0] * one.grid[1] * one.grid[2] for one in launches],
    }


def check_split(bits: torch.Tensor) -> dict[str, Any]:
    """Rows of bf16, by their bits, through the kernel and through its twin: how many bytes differ."""
    x = bits.view(torch.bfloat16)
    got, want = two_fp8.Split.empty(*x.shape, x.device), two_fp8.split_in_torch(x)
    logits = torch.zeros(len(x), 4, dtype=torch.bfloat16)
    with presented(execute):
        routing.route(logits, 2, 4, None, 1, beside=got.beside(x))
    # Of either sign: what underflows may leave a -0.
    nan, zero = ((got.codes & 127 == code) & (want.codes & 127 == code) for code in (127, 0))
    return {
        "codes": int(((got.codes != want.codes) & ~nan & ~zero).sum()),
        "scales": int((got.scales != want.scales).sum()),
        "nan": int(nan.sum()),
    }


def swap(codes: torch.Tensor, scales: torch.Tensor) -> None:
    """The codes of hi and of lo in each other's place."""
    codes.copy_(codes.flip(1))


def drop(codes: torch.Tensor, scales: torch.Tensor) -> None:
    """No lo."""
    codes[:, 1] = 0


def shift(codes: torch.Tensor, scales: torch.Tensor) -> None:
    """The scale of lo off by one."""
    scales[:, 1] += 1


def neighbour(codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Each block with the scale of the one before it."""
    scales.copy_(scales.roll(1, dims=2))


def lose_nan(codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Zero for a NaN."""
    codes[codes & 127 == 127] = 0


FAULTS = {"": None, **{fault.__name__: fault for fault in (swap, drop, shift, neighbour, lose_nan)}}
PLACES = {"tokens": ("_and_split", ("Codes", "Scales")), "rows": ("two_fp8_matmul", ("Y", "YScales"))}
"""Where rows are split: the end of the kernel's name, and its parameters."""


def check_fault(fault: str, place: str) -> dict[str, Any]:
    """What the self-check says of a layer whose split rows have a fault, and whether it falls back."""
    shape = make_shape(4, 2, 288, 96)
    end, parameters = PLACES[place]

    def launch(one: Launch) -> None:
        execute(one)
        named = dict(one.values())
        rows = [named.get(parameter) for parameter in parameters]
        change = FAULTS[fault]
        if change and one.name.endswith(end) and rows[1] is not None:
            change(*rows)

    outcomes: dict[str, str] = {}
    self_check.TOKENS = (1, 8)
    settings = Settings("two_fp8")
    selection = backends.select(shape, ARCH, settings)
    with presented(launch), mock.patch.object(self_check, "sizes", return_value=self_check.TOKENS):
        chosen, _ = self_check.prepare(
            selection, random_weights(shape, seed=0), shape, settings,
            lambda name, outcome: outcomes.update({name: outcome.miss}),
        )  # fmt: skip
    return {
        "misses": list(outcomes.values()),
        "refused": dict(chosen.refused),
        "backend": selection.backend.NAME,
    }


def stand_in_clock(*_: Any) -> choice.Cost:
    """Times as they might be, as time on an emulator says nothing."""
    return lambda layer, tokens: {"two_fp8": 10.0 * tokens, "table": 25.0 + tokens, "package": 90.0}[
        layer.plans.at(tokens)
    ]


def check_choice(fault: str) -> dict[str, Any]:
    """What a server on gfx950 would choose for a layer of two_fp8, a table's tiles and the package's own."""
    shape = make_shape(4, 2, 288, 96)
    layers = serving.ModelLayers(shape, ARCH, Settings("triton"), 4)

    def launch(one: Launch) -> None:
        execute(one)
        if fault and one.name.endswith("_and_split"):
            drop(*(dict(one.values())[name] for name in PLACES["tokens"][1]))

    on_a_gpu = mock.patch.multiple(torch.cuda, is_available=lambda: True, empty_cache=lambda: None)
    some = mock.patch.object(self_check, "sizes", return_value=(1, 4))
    with presented(launch), some, on_a_gpu, mock.patch.object(choice, "clock", stand_in_clock):
        layer: Any = layers.prepare(random_weights(shape, seed=0), "layers.0")
    assert layers.choice is not None
    return {
        "us": {str(tokens): us for tokens, us in layers.choice.us.items()},
        "chosen": [layers.choice.plans.at(tokens) for tokens in (1, 4)],
        "served": [layer.plans.at(tokens) for tokens in (1, 4)],
        "line": str(layers),
    }


def every_bf16() -> torch.Tensor:
    """int16[2, 65536], in the order of the bits and in another."""
    words = torch.arange(1 << 16)
    other = torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0))
    return torch.stack([words, other]).to(torch.int16)


def check(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Layers, the split of all bf16, planted faults, and the choice at load."""
    layers = [check_layer(case) for case in cases]
    faults = {place: {fault: check_fault(fault, place) for fault in FAULTS} for place in PLACES}
    return {
        "layers": layers,
        "split": check_split(every_bf16()),
        "faults": faults,
        "choices": {fault: check_choice(fault) for fault in ("", "drop")},
    }


if __name__ == "__main__":
    answer(check)
