"""A served layer on the emulated gfx950, with one fault at a time planted in its input or in its kernels.

    python plant_faults.py FINDINGS

Takes the Triton and the triton_kernels that come first on sys.path. test_emulator_faults reads the findings.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import emulate_routing
import torch

from vllm_mxfp4_gfx950 import backends
from vllm_mxfp4_gfx950.backends import reference
from vllm_mxfp4_gfx950.backends.triton import routing as triton_routing
from vllm_mxfp4_gfx950.gfx950.driver import ARCH, Launch, presented
from vllm_mxfp4_gfx950.gfx950.emulator.assembly import Instruction, Program, parse
from vllm_mxfp4_gfx950.gfx950.emulator.execution import execute
from vllm_mxfp4_gfx950.gfx950.emulator.launch import lay_out
from vllm_mxfp4_gfx950.gfx950.emulator.memory import Fault
from vllm_mxfp4_gfx950.gfx950.layer import MATMULS
from vllm_mxfp4_gfx950.gfx950.verification import EmulatedLayer
from vllm_mxfp4_gfx950.moe import MoeWeights
from vllm_mxfp4_gfx950.random_layer import make_shape, random_tokens, random_weights
from vllm_mxfp4_gfx950.tiles import TileConfig
from vllm_mxfp4_gfx950.tolerance import compare

TILES = {
    "matmul_ogs": (TileConfig(16, 128, 256, 1, 4, 2, 0), TileConfig(16, 64, 256, 1, 2, 2, 0)),
    "matmul": (TileConfig(32, 64, 256, 1, 4, 2, 0), TileConfig(32, 64, 256, 1, 4, 2, 0)),
}
"""Of w13 and w2, as the tables have them for few tokens; here so that a new table changes no finding."""

INPUT_LAYER = (320, 288, 3)
WAIT_LAYERS = ((576, 576, 3), (320, 320, 3), (96, 96, 3), (2880, 96, 3))
"""Hidden and intermediate sizes and tokens: 3, 2 and 1 tiles of K, the last never full, and rows so long
that the sum of the experts needs its loop. One tile of K does not; a third comes back to the first's LDS."""

STORE_LAYERS = ((576, 96, 37), (2880, 96, 3))
"""37 tokens fill more than half of a tile's 32 rows."""

ROUTINGS = {
    "few tokens": (7, None),
    "one launch": (29, None),
    "two launches": (100, (-1, 0, 3, -1, 2, 1, -1, -1)),
    "three launches": (150, (-1, 0, 3, -1, 2, 1, -1, -1)),
}
"""Tokens and expert_map, for 8 experts and 2 choices."""

FEW_BLOCKS, BLOCK_SUMS = 8, (8, 16)
"""Of the routing: so few, so that adding up takes several steps."""

SAMPLE = 4
"""Workgroups of each matmul, where only some are executed and compared."""

MATMUL_WORKGROUPS = 2
"""A barrier or a wait that is missing is missing in each of them."""

NEVER = "scratch_load_dword v0, off, off offset:4092"
"""Faults wherever it is executed: these kernels have no scratch memory."""

Execute = Callable[[Launch], object]


def nothing(*_: object) -> None:
    """Spoil nothing."""


class Layer:
    """A random layer, what goes in and what must come out."""

    def __init__(self, hidden: int, intermediate: int, tokens: int) -> None:
        self.shape = make_shape(4, 2, hidden, intermediate)
        self.backend = backends.select_tiled(self.shape, ARCH)
        self.tiles = TILES[self.backend.KERNELS]
        self.x, self.logits = random_tokens(self.shape, tokens, seed=1)
        self.truth, self.plain = reference.truth_and_plain(self.x, self.logits, self.weights(), self.shape)

    def weights(self) -> MoeWeights:
        """The same each time: backends consume them."""
        return random_weights(self.shape, seed=0)

    def serve(
        self,
        on_launch: Execute = execute,
        spoil_weights: Callable[[MoeWeights], None] = nothing,
        spoil_prepared: Callable[[Any, MoeWeights], None] = nothing,
    ) -> dict[str, Any]:
        """Prepare and run, and compare.

        Args:
            on_launch: executes a launch.
            spoil_weights: changes the weights that are prepared.
            spoil_prepared: changes what was prepared, given sound weights.

        Returns:
            the text of a Fault, or "" and how far off the outcome is.
        """
        weights = self.weights()
        spoil_weights(weights)
        with presented(on_launch):
            prepared = self.backend.prepare(weights, self.shape).with_tiles(*self.tiles)
            spoil_prepared(prepared, self.weights())
            try:
                out = prepared.run(self.x, self.logits)
            except Fault as fault:
                return {"fault": str(fault), "miss": "", "frobenius": 0.0}
        found = compare(out, self.truth, self.plain)
        return {"fault": "", "miss": found.miss, "frobenius": found.frobenius}


class Routed:
    """Tokens that are routed, and every field of what must come out."""

    def __init__(self, name: str) -> None:
        tokens, expert_map = ROUTINGS[name]
        self.logits = random_tokens(make_shape(8, 2, 64, 32), tokens, seed=1)[1]
        here = None if expert_map is None else torch.tensor(expert_map, dtype=torch.int32)
        self.experts = 8 if here is None else int((here >= 0).sum())
        self.order = triton_routing.order_of(here)
        self.twin = triton_routing.route_in_torch(self.logits, 2, self.experts, self.order, sizes=5)

    def serve(self, on_launch: Execute = execute) -> dict[str, Any]:
        """Route and compare; as `Layer.serve`."""
        with presented(on_launch):
            try:
                routing = triton_routing.route(self.logits, 2, self.experts, self.order, sizes=5)
            except Fault as fault:
                return {"fault": str(fault), "miss": "", "frobenius": 0.0}
        return {"fault": "", "miss": emulate_routing.miss(routing, self.twin), "frobenius": 0.0}


def stage_of(launch: Launch) -> str:
    """A kernel's name, which is the same for all tiles."""
    if launch.name.startswith(MATMULS):
        return "w13" if "_swiglu" in launch.name else "w2"
    return launch.name


# --- what goes in -----------------------------------------------------------------------------------


def reorder_w13(order: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[MoeWeights], None]:
    """Rows of w13 in another order."""

    def spoil(weights: MoeWeights) -> None:
        for tensor in (weights.w13, weights.w13_scale, weights.w13_bias):
            tensor.copy_(order(tensor))

    return spoil


def roll_scales(name: str) -> Callable[[MoeWeights], None]:
    """Every block of values gets its neighbour's scale."""

    def spoil(weights: MoeWeights) -> None:
        scales = getattr(weights, f"{name}_scale")
        scales.copy_(scales.roll(1, dims=2))

    return spoil


def end_codes_early(name: str, codes: int) -> Callable[[MoeWeights], None]:
    """The last codes along K are zero; a byte holds two, the later in its upper half."""

    def spoil(weights: MoeWeights) -> None:
        blocks = getattr(weights, name)
        whole = blocks.shape[-1] - codes // 2
        blocks[..., whole:] = 0
        if codes % 2:
            blocks[..., whole - 1] &= 0x0F

    return spoil


def scale_bytes(prepared: Any, name: str) -> torch.Tensor:
    """A weight's scales as the kernels read them: uint8[E, N / 32, K], 32 rows in each of the second axis."""
    memory: torch.Tensor = getattr(prepared, name).scales
    return memory


def leave_unswizzled(name: str) -> Callable[[Any, MoeWeights], None]:
    """The scales stay in the checkpoint's order."""

    def spoil(prepared: Any, weights: MoeWeights) -> None:
        memory, plain = scale_bytes(prepared, name), getattr(weights, f"{name}_scale")
        rows, groups = memory.shape[1] * 32, memory.shape[2] // 32
        padding = (0, groups - plain.shape[2], 0, rows - plain.shape[1])
        memory.copy_(torch.nn.functional.pad(plain, padding).view(memory.shape))

    return spoil


def swizzle_otherwise(name: str) -> Callable[[Any, MoeWeights], None]:
    """The four scales of each dword, two rows' and two blocks', with rows and blocks exchanged."""

    def spoil(prepared: Any, weights: MoeWeights) -> None:
        memory = scale_bytes(prepared, name)
        memory.copy_(memory.unflatten(2, (-1, 2, 2)).mT.flatten(2))

    return spoil


def launch_with_k(stage: str, more: int) -> Execute:
    """A matmul's kernel gets another K."""

    def on_launch(launch: Launch) -> None:
        if stage_of(launch) == stage:
            arguments = list(launch.arguments)
            arguments[list(launch.signature).index("K")] += more
            launch = dataclasses.replace(launch, arguments=tuple(arguments))
        execute(launch)

    return on_launch


INPUTS: dict[str, dict[str, Any]] = {
    "gate-and-up-swapped": {
        "spoil_weights": reorder_w13(lambda rows: rows.unflatten(1, (-1, 2)).flip(2).flatten(1, 2))
    },
    "gate-and-up-in-halves": {
        "spoil_weights": reorder_w13(lambda rows: rows.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2))
    },
    **{
        f"{name}-{fault}": keywords
        for name in ("w13", "w2")
        for fault, keywords in {
            "scales-not-swizzled": {"spoil_prepared": leave_unswizzled(name)},
            "scales-swizzled-otherwise": {"spoil_prepared": swizzle_otherwise(name)},
            "scales-one-block-on": {"spoil_weights": roll_scales(name)},
            "codes-one-short": {"spoil_weights": end_codes_early(name, 1)},
            "codes-one-block-short": {"spoil_weights": end_codes_early(name, 32)},
            "K-one-too-many": {"on_launch": launch_with_k(name, 1)},
            "K-half-a-block-short": {"on_launch": launch_with_k(name, -16)},
            "K-one-block-short": {"on_launch": launch_with_k(name, -32)},
        }.items()
    },
}
"""What `serve` is given, by fault. K's tail is masked in vectors, so one less than K changes nothing."""


# --- the kernels' code ------------------------------------------------------------------------------


@dataclasses.dataclass
class Planted:
    """One fault in a kernel's code.

    Args:
        kernel: see `stage_of`.
        line: its number in the assembly.
        text: the instruction that stood there.
        instead: the instruction that stands there now.
        what: "barrier", "vmcnt", "lgkmcnt" or "store".
        idle: whether what stood there is proved to have nothing to do; see `idle_waits`.
        reached: whether that line was ever executed.
        found: how the fault was found; "" when it was not.
    """

    kernel: str
    line: int
    text: str
    instead: str
    what: str
    idle: bool
    reached: bool = False
    found: str = ""

    def edit(self, launch: Launch, text: str | None = None) -> Launch:
        """The launch with the fault, or with another instruction in its place."""
        lines = launch.assembly.splitlines()
        assert self.text in lines[self.line - 1]
        lines[self.line - 1] = f"\t{text or self.instead}"
        return dataclasses.replace(launch, assembly="\n".join(lines))


def instead_of(instruction: Instruction) -> Iterator[tuple[str, str]]:
    """What a fault is about, and the instruction that makes it.

    A wait until nothing is outstanding is dropped; one until N are becomes one until N + 1, which leaves less
    outstanding than dropping it would.
    """
    text = instruction.text
    if instruction.mnemonic == "s_barrier":
        yield "barrier", "s_nop 0"
    elif instruction.mnemonic == "s_waitcnt":
        counters = re.findall(r"(\w+)\((\d+)\)", text)
        for name, _ in counters:
            kept = [(n, int(c) + (n == name)) for n, c in counters if n != name or int(c)]
            yield name, f"s_waitcnt {' '.join(f'{n}({c})' for n, c in kept)}" if kept else "s_nop 0"
    elif re.match(r"(buffer|global)_store", text):
        offset = int(instruction.modifiers.get("offset", "0"))
        yield "store", f"{re.sub(r' offset:[0-9]+', '', text)} offset:{offset + 4}"


def idle_waits(program: Program) -> set[int]:
    """Lines of waits to which no path brings an LDS instruction or a scalar load that was not waited for.

    Triton puts a wait before each of its barriers, also where LLVM has just put one.
    """
    instructions = program.instructions
    may_be_outstanding: dict[int, bool] = {}
    todo = [(program.entry, False)]
    while todo:
        index, outstanding = todo.pop()
        if may_be_outstanding.get(index) in (True, outstanding):
            continue
        may_be_outstanding[index] = outstanding
        instruction = instructions[index]
        if instruction.mnemonic.startswith(("ds_", "s_load")):
            outstanding = True
        elif "lgkmcnt(0)" in instruction.text:
            outstanding = False
        if "branch" in instruction.mnemonic:
            todo.append((program.labels[instruction.operands[0]], outstanding))
        if instruction.mnemonic not in ("s_branch", "s_endpgm"):
            todo.append((index + 1, outstanding))
    return {
        instruction.line
        for index, instruction in enumerate(instructions)
        if "lgkmcnt(0)" in instruction.text and not may_be_outstanding.get(index, True)
    }


class Planter:
    """Knows the code of each kernel, and all faults that can be planted in it.

    Args:
        routing: whether it is for the kernels that route, whose result is then compared as such, or for those
            of a layer.
    """

    def __init__(self, *, routing: bool = False) -> None:
        self.routing = routing
        self.assembly: dict[str, str] = {}
        self.planted: dict[str, list[Planted]] = {}

    def open(self, launch: Launch, stores: bool) -> list[Planted]:
        """The faults of this kind in a kernel that have not been found; none if a launch has other code."""
        stage = stage_of(launch)
        if (stage in ("few", "count", "add_up", "place")) != self.routing:
            return []
        if stage not in self.planted:
            program = parse(launch.name, launch.assembly)
            idle = idle_waits(program)
            self.assembly[stage] = launch.assembly
            self.planted[stage] = [
                Planted(
                    stage,
                    instruction.line,
                    instruction.text,
                    instead,
                    what,
                    idle=what == "lgkmcnt" and instruction.line in idle,
                )
                for instruction in program.instructions[program.entry :]
                for what, instead in instead_of(instruction)
            ]
        if launch.assembly != self.assembly[stage]:
            return []
        return [each for each in self.planted[stage] if (each.what == "store") == stores and not each.found]


def plant_waits(planter: Planter, layer: Layer | Routed) -> dict[str, Any]:
    """Execute each launch without each of its barriers and waits, and then as it is."""

    def on_launch(launch: Launch) -> None:
        _, regions = lay_out(parse(launch.name, launch.assembly), launch)
        before = [region.data.copy() for region in regions]
        x, y, z = launch.grid
        some = range(min(x * y * z, MATMUL_WORKGROUPS)) if stage_of(launch) in ("w13", "w2") else None

        def fault(changed: Launch) -> str:
            text = ""
            try:
                execute(changed, some)
            except Fault as fault:
                text = str(fault)
            for region, data in zip(regions, before, strict=True):
                region.data[:] = data
            return text

        for planted in planter.open(launch, stores=False):
            planted.found = fault(planted.edit(launch))
            planted.reached |= bool(planted.found) or NEVER in fault(planted.edit(launch, NEVER))
        execute(launch)

    return layer.serve(on_launch)


def plant_stores(planter: Planter, layer: Layer | Routed) -> dict[str, Any]:
    """Serve with each store four bytes off."""
    launches: list[Launch] = []

    def keep(launch: Launch) -> None:
        launches.append(launch)
        execute(launch)

    sound = layer.serve(keep)
    for planted in [each for launch in launches for each in planter.open(launch, stores=True)]:

        def on_launch(launch: Launch, planted: Planted = planted) -> None:
            same = launch.assembly == planter.assembly[planted.kernel]
            execute(planted.edit(launch) if same else launch)

        result = layer.serve(on_launch)
        planted.found = result["fault"] or result["miss"]
    return sound


def drop_stores(layer: Layer) -> list[dict[str, str]]:
    """Check a sample of each matmul without each of its stores."""
    launches: dict[str, Launch] = {}

    def note(launch: Launch) -> Launch:
        launches[stage_of(launch)] = launch
        return launch

    def check(edit: Callable[[Launch], Launch]) -> str:
        emulated = EmulatedLayer(layer.weights(), layer.shape, edit)
        emulated.prepared = emulated.prepared.with_tiles(*layer.tiles)
        return "".join(each.miss for each in emulated.check(layer.x, layer.logits, SAMPLE))

    found = [{"text": "", "found": check(note)}]
    for stage in ("w13", "w2"):
        launch = launches[stage]
        for instruction in parse(launch.name, launch.assembly).instructions:
            if not re.match(r"(buffer|global)_store", instruction.text):
                continue
            lines = launch.assembly.splitlines()
            lines[instruction.line - 1] = "\ts_nop 0"
            spoiled = "\n".join(lines)

            def edit(launch: Launch, stage: str = stage, spoiled: str = spoiled) -> Launch:
                return dataclasses.replace(launch, assembly=spoiled) if stage_of(launch) == stage else launch

            found.append({"text": instruction.text, "found": check(edit)})
    return found


def faults_of(waits: Planter, stores: Planter) -> list[dict[str, Any]]:
    """All that they planted, each of its own kind."""
    return [
        dataclasses.asdict(each)
        for planter, kind in ((waits, False), (stores, True))
        for stage in planter.planted.values()
        for each in stage
        if (each.what == "store") == kind
    ]


def main(findings: str) -> None:
    """Plant everything, one fault at a time."""
    torch.set_num_threads(1)
    # Memory that is allocated and not written holds NaN, or the largest integer.
    torch.use_deterministic_algorithms(True)
    triton_routing.FEW_BLOCKS, triton_routing.BLOCK_SUMS = FEW_BLOCKS, BLOCK_SUMS

    layer = Layer(*INPUT_LAYER)
    inputs = {name: layer.serve(**keywords) for name, keywords in INPUTS.items()}
    sound = {str(INPUT_LAYER): layer.serve()}
    waits, stores = Planter(), Planter()
    for sizes in WAIT_LAYERS:
        sound[f"{sizes}-waits"] = plant_waits(waits, Layer(*sizes))
    for sizes in STORE_LAYERS:
        sound[f"{sizes}-stores"] = plant_stores(stores, Layer(*sizes))
    sampled = drop_stores(Layer(*STORE_LAYERS[0]))
    planted = faults_of(waits, stores)
    for name in ROUTINGS:
        waits, stores = Planter(routing=True), Planter(routing=True)
        sound[f"{name}-waits"] = plant_waits(waits, Routed(name))
        sound[f"{name}-stores"] = plant_stores(stores, Routed(name))
        planted += [each | {"kernel": f"{each['kernel']}, {name}"} for each in faults_of(waits, stores)]
    Path(findings).write_text(
        json.dumps({"sound": sound, "inputs": inputs, "planted": planted, "sampled": sampled}, indent=1)
    )


if __name__ == "__main__":
    main(sys.argv[1])
