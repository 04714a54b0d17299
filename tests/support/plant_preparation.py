"""Faults in the preparation of a layer, one at a time, under the check that comes before serving.

    python plant_preparation.py LAYERS FINDINGS

looks at the Triton backend whose triton_kernels come first on sys.path, on the emulated gfx950. LAYERS is the
number of sound layers that must raise no alarm. test_self_check reads the findings.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from vllm_mxfp4_gfx950 import backends, self_check
from vllm_mxfp4_gfx950.errors import brief
from vllm_mxfp4_gfx950.gfx950.driver import ARCH, presented
from vllm_mxfp4_gfx950.gfx950.emulator.execution import execute
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights
from vllm_mxfp4_gfx950.random_layer import make_shape, random_tokens, random_weights
from vllm_mxfp4_gfx950.settings import Settings
from vllm_mxfp4_gfx950.tiles import Ladder, TileConfig

BATCHES = self_check.TOKENS[:2]
"""What an emulator has time for: one token, and a few for each expert."""

SHAPES = (make_shape(8, 2, 320, 288), make_shape(4, 2, 288, 96))
"""Few, as each is compiled for; the layers differ in their bytes."""

UNLIMITED = 1e30

Spoil = Callable[[MoeWeights], None]
Run = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def each(change: Callable[[torch.Tensor], torch.Tensor], *names: str) -> Spoil:
    """Change some of a layer's tensors."""

    def spoil(weights: MoeWeights) -> None:
        for name in names:
            tensor = getattr(weights, name)
            tensor.copy_(change(tensor.clone()))

    return spoil


def transposed(scales: torch.Tensor) -> torch.Tensor:
    """[E, N, K/32] with the bytes of [E, K/32, N]."""
    return scales.mT.reshape(scales.shape)


def swapped(rows: torch.Tensor) -> torch.Tensor:
    """Each gate in the place of its up."""
    return rows.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)


def last_block_zero(blocks: torch.Tensor) -> torch.Tensor:
    """Without the last 32 codes along K."""
    blocks[..., -16:] = 0
    return blocks


ALL = tuple(field.name for field in dataclasses.fields(MoeWeights) if field.name != "expert_map")
WEIGHTS: dict[str, Spoil] = {
    "w13-scales-transposed": each(transposed, "w13_scale"),
    "w2-scales-transposed": each(transposed, "w2_scale"),
    "gate-and-up-swapped": each(swapped, "w13", "w13_scale", "w13_bias"),
    "w13-bias-dropped": each(torch.zeros_like, "w13_bias"),
    "w2-bias-dropped": each(torch.zeros_like, "w2_bias"),
    "w2-bias-doubled": each(lambda bias: 2 * bias, "w2_bias"),
    "w13-last-block-skipped": each(last_block_zero, "w13"),
    "w2-last-block-skipped": each(last_block_zero, "w2"),
    "expert-off-by-one": each(lambda tensor: tensor.roll(1, dims=0), *ALL),
}
ACTIVATIONS: dict[str, dict[str, float]] = {"limit-ignored": {"limit": UNLIMITED}, "alpha-1": {"alpha": 1.0}}
FAULTS = (*WEIGHTS, *ACTIVATIONS)


def misses(backend: Any, shape: MoeShape, seed: int, tokens: tuple[int, ...], device: str) -> dict[str, str]:
    """What the check says of a layer with each fault, by its name, and of the sound one, by ""."""
    weights = random_weights(shape, seed, device)

    def check(spoil: Spoil, prepared_as: MoeShape = shape, served_as: MoeShape = shape) -> str:
        spoiled = weights.clone()
        spoil(spoiled)
        return self_check.check(backend.prepare(spoiled, prepared_as), weights, served_as, tokens).miss

    found = {"": check(lambda _: None)}
    found |= {fault: check(spoil) for fault, spoil in WEIGHTS.items()}
    for fault, changed in ACTIVATIONS.items():
        other = dataclasses.replace(shape, **changed)
        # The SwiGLU of ck is compiled in, so there it is the model that has another.
        found[fault] = check(lambda _: None, *((shape, other) if backend.NAME == "ck" else (other, shape)))
    return found


def alarms(
    backend: Any, shapes: Sequence[MoeShape], layers: int, tokens: tuple[int, ...], device: str
) -> list[str]:
    """What the check says of sound layers, each with its own bytes."""
    found = []
    for seed in range(layers):
        shape = shapes[seed % len(shapes)]
        weights = random_weights(shape, seed, device)
        prepared = backend.prepare(weights.clone(), shape)
        miss = self_check.check(prepared, weights, shape, tokens).miss
        found += [f"{shape}, seed {seed}: {miss}"] * bool(miss)
    return found


def poisoned(run: Run, shape: MoeShape, device: str, tokens: int = 6, step: float = 0.0) -> dict[str, str]:
    """Rows beside one that is not finite, as a batch of a graph also has behind its end, and no rows at all.

    Args:
        run: x and logits to the layer's output.
        shape: the layer's.
        device: where it runs.
        tokens: of the batch.
        step: by how much an element of the other rows may change, over their largest; 0 for not in a bit.

    Returns:
        by case, "" where the others are what they are without it, and a NaN stays one.
    """
    x, logits = random_tokens(shape, tokens, seed=3)
    x, logits = x.to(device), logits.to(device)
    sound, found = run(x, logits), {}
    others = torch.arange(tokens) != 2

    def seen(out: torch.Tensor, *, stays: bool) -> str:
        near = out[others].isclose(sound[others], rtol=0, atol=step * float(sound[others].abs().max()))
        wrong = int((~near).sum())
        text = f"{wrong} elements of other rows differ" if wrong else ""
        return text + ("the row itself has numbers" if stays and out[2].isfinite().any() else "")

    for name, value in {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}.items():
        for what in ("x", "logits", "x and logits"):
            changed = {"x": x.clone(), "logits": logits.clone()}
            for part in what.split(" and "):
                changed[part][2] = value
            found[f"{name} in {what}"] = seen(
                run(changed["x"], changed["logits"]), stays=name == "nan" and what != "x"
            )
    # A NaN of either sign is above all numbers.
    for name, bits in {"nan": 0x7FC0, "-nan": -0x40}.items():
        some = logits.clone()
        some.view(torch.int16)[2, 1] = bits
        found[f"{name} in a logit"] = seen(run(x, some), stays=True)
    try:
        size = list(run(x[:0], logits[:0]).shape)
        found["no tokens"] = "" if size == [0, shape.hidden] else f"{size} of no tokens"
    except Exception as error:
        found["no tokens"] = brief(error)
    return found


FITS = TileConfig(16, 64, 256, 1, 4, 1, 0)
TILES = {
    "overflow": TileConfig(256, 256, 256, 1, 8, 2, 0),
    "compiler": TileConfig(16, 48, 256, 1, 4, 1, 0),
}
"""A tile that needs more LDS than there is, and one that Triton does not compile."""


def launches(backend: Any) -> dict[str, Any]:
    """A table with a bad tile for up to 64 tokens, or for more: what is said, and what serves then."""
    shape, found = SHAPES[0], {}
    self_check.TOKENS = BATCHES
    reference = backends.FAMILIES["reference"]
    for name, tile in TILES.items():
        for place, rungs in {"first": (tile, FITS), "last": (FITS, tile)}.items():
            tiles = Ladder((64, 128), rungs)

            def prepare(*arguments: Any, tiles: Any = tiles) -> Any:
                layer: Any = backend.prepare(*arguments)
                flags = tiles.map(partial(type(layer).to_opt_flags, arch=ARCH))
                return dataclasses.replace(layer, tiles=(tiles, tiles), flags=(flags, flags))

            broken = SimpleNamespace(NAME=backend.NAME, source=backend.source, prepare=prepare)
            entry = backends.Entry(backend.NAME, lambda *_: None, lambda broken=broken: broken)
            backends.FAMILIES = {"triton": (entry,), "ck": reference}
            weights = random_weights(shape, seed=0)
            outcomes: dict[str, str] = {}
            chosen, prepared = self_check.prepare(
                backends.select(shape, ARCH, Settings()), weights, shape, Settings(),
                lambda name, outcome, outcomes=outcomes: outcomes.update({name: outcome.miss}),
            )  # fmt: skip
            found[f"{name}-{place}"] = {
                "miss": outcomes[backend.NAME],
                "serves": chosen.backend.NAME,
                "left": self_check.check(prepared, weights, shape, BATCHES).miss,
            }
    return found


def main(layers: str, findings: str) -> None:
    """Everything, on the emulator."""
    torch.set_num_threads(1)
    # Memory that is allocated and not written holds NaN, or the largest integer.
    torch.use_deterministic_algorithms(True)
    backend: Any = backends.select(SHAPES[0], ARCH, Settings(backend="triton")).backend
    with presented(execute):
        prepared = backend.prepare(random_weights(SHAPES[0], seed=0), SHAPES[0])
        found = {
            "backend": backend.NAME,
            "misses": misses(backend, SHAPES[0], 0, BATCHES, "cpu"),
            "alarms": alarms(backend, SHAPES, int(layers), BATCHES, "cpu"),
            "poisoned": poisoned(prepared.run, SHAPES[0], "cpu"),
            "launches": launches(backend),
        }
    Path(findings).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
