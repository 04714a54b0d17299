"""The real kernels on a CPU: Triton's interpreter, with stand-ins for what it lacks.

One process can hold one triton_kernels, so each backend runs its cases in a process of its own:
`outcomes` starts this file as a script, which computes CASES and saves what came out.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch

from vllm_mxfp4_gfx950 import backends
from vllm_mxfp4_gfx950.backends.triton import package as triton_package
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights
from vllm_mxfp4_gfx950.random_layer import make_shape, random_tokens, random_weights
from vllm_mxfp4_gfx950.tables import store
from vllm_mxfp4_gfx950.tiles import TileConfig

ROOT = Path(__file__).parents[2]
TABLE = store.read(ROOT / "vllm_mxfp4_gfx950/tables/gfx950.json", "gfx950")


@dataclass(frozen=True)
class Case:
    """One layer and one batch.

    Args:
        experts, topk, hidden, intermediate, tokens: sizes.
        placement: which of the model's experts are here: "all", or "linear" or "strided" by rank.
        rank, ranks: of expert parallelism.
        tied: all logits are equal.
        refilled: it was prepared from zeros, and got its weights in the same memory.
        tile: block_m and block_n of both matmuls; None takes the table's.
        broken: what is broken on purpose, so that a test can see itself fail.
    """

    experts: int
    topk: int
    hidden: int
    intermediate: int
    tokens: int
    placement: str = "all"
    rank: int = 0
    ranks: int = 1
    tied: bool = False
    refilled: bool = False
    tile: tuple[int, int] | None = None
    broken: str = ""

    def __str__(self) -> str:
        name = f"E{self.experts}-k{self.topk}-T{self.tokens}-H{self.hidden}-I{self.intermediate}"
        name += "" if self.placement == "all" else f"-{self.placement}{self.rank}of{self.ranks}"
        name += "-{}x{}".format(*self.tile) if self.tile else ""
        return (
            name + "-tied" * self.tied + "-refilled" * self.refilled + f"-{self.broken}" * bool(self.broken)
        )

    def inputs(self) -> tuple[MoeWeights, MoeShape, torch.Tensor, torch.Tensor]:
        """This rank's weights and shape, the activations and the logits; nobody chooses expert 1."""
        whole = make_shape(self.experts, self.topk, self.hidden, self.intermediate)
        weights = random_weights(whole, seed=self.hidden)
        x, logits = random_tokens(whole, self.tokens, seed=self.tokens, unchosen=1)
        if self.tied:
            logits.zero_()
        if self.placement == "all":
            return weights, whole, x, logits
        everyone = torch.arange(self.experts)
        mine = everyone[self.rank :: self.ranks] if self.placement == "strided" else (
            everyone.tensor_split(self.ranks)[self.rank]
        )  # fmt: skip
        expert_map = torch.full((self.experts,), -1, dtype=torch.int32)
        expert_map[mine] = torch.arange(len(mine), dtype=torch.int32)
        tensors = {name: tensor[mine] for name, tensor in vars(weights).items() if tensor is not None}
        shape = MoeShape(
            len(mine), self.experts, self.topk, self.hidden, self.intermediate, whole.alpha, whole.limit
        )
        return MoeWeights(**tensors, expert_map=expert_map), shape, x, logits


def ranks_of(
    ranks: int, placement: str, experts: int, topk: int, tokens: int, *, tied: bool = False
) -> list[Case]:
    """The same layer and batch on each rank of expert parallelism."""
    return [Case(experts, topk, 64, 32, tokens, placement, rank, ranks, tied=tied) for rank in range(ranks)]


LAYERS = [
    Case(4, 2, 288, 96, 1),  # an odd number of blocks, and the last tiles along K and N are not full
    Case(4, 2, 288, 96, 37),
    Case(4, 1, 96, 32, 37),
    Case(5, 4, 64, 160, 1),
    Case(4, 2, 256, 128, 5),  # nothing to pad along K
    Case(33, 4, 64, 32, 5),  # two words in each row of the routing's bit matrix
    Case(8, 4, 96, 32, 199),
]
RANKS = [
    *ranks_of(2, "linear", experts=8, topk=2, tokens=37),
    *ranks_of(3, "strided", experts=8, topk=4, tokens=1),
    *ranks_of(2, "strided", experts=8, topk=1, tokens=5),
    *ranks_of(2, "linear", experts=40, topk=4, tokens=5),  # 20 experts stay: a part of a word
    *ranks_of(2, "strided", experts=64, topk=4, tokens=5),  # 32 experts stay: a whole word
    *ranks_of(2, "strided", experts=8, topk=4, tokens=5, tied=True),
    *ranks_of(2, "strided", experts=8, topk=3, tokens=37),
    *ranks_of(2, "linear", experts=8, topk=6, tokens=5),
    Case(8, 4, 64, 32, 5, "strided", 1, 2, refilled=True),
]
TABLE_TILES = sorted({(tile.block_m, tile.block_n) for rungs in TABLE.tiles.values() for tile in rungs.rungs})
TILED = [Case(4, 2, 288, 160, 37, tile=tile) for tile in TABLE_TILES]
"""Every tile of gfx950's table computes, with tails along K and N."""
BROKEN = [
    Case(4, 2, 96, 32, 5, broken="scales not swizzled"),
    Case(4, 2, 96, 32, 5, broken="gate and up swapped"),
    Case(4, 2, 96, 32, 5, broken="gammas dropped"),
    Case(4, 2, 96, 32, 5, "strided", 0, 2, broken="expert_map of another rank"),
]
UNPADDED = Case(8, 4, 96, 32, 199, broken="scales not padded")
CASES = [*LAYERS, *RANKS, *TILED, *BROKEN, UNPADDED]


def outcomes(backend: str, package: Path) -> dict[str, Any]:
    """Compute all CASES with a backend.

    Args:
        backend: "triton_ogs", "triton_ragged" or "triton_matmul".
        package: a directory for sys.path with a genuine triton_kernels of its generation.

    Returns:
        for each case by name, what `_outcome` returned, or the traceback as a str.
    """
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "outcomes.pt"
        subprocess.run(
            [sys.executable, __file__, backend, str(out)],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(map(str, (ROOT, Path(__file__).parent, package))),
                "TRITON_INTERPRET": "1",
                "PYTHONWARNINGS": "ignore",
            },
            check=True,
        )
        results: dict[str, Any] = torch.load(out)
    return results


def check_layout(outcome: dict[str, Any], case: Case) -> None:
    """Hold w13 in kernel layout against the checkpoint, bit for bit.

    Source: triton_kernels, tensor_details/layout_details/cdna4_scale.py, its reshapes and permutation
    written as the place of each scale.
    """
    weights, _, _, _ = case.inputs()
    assert outcome["w13_in_place"]
    assert outcome["biases_in_place"]
    assert torch.equal(outcome["w13"].mT, weights.w13)
    plain, swizzled = weights.w13_scale, outcome["w13_scale"].mT
    n, k = torch.meshgrid(
        torch.arange(swizzled.shape[1] * 32), torch.arange(swizzled.shape[2] // 32), indexing="ij"
    )
    place = (k // 8 * 4 + k % 4) * 64 + n % 16 * 4 + k // 4 % 2 * 2 + n // 16 % 2
    back = swizzled[:, n // 32, place]
    rows, groups = plain.shape[1:]
    assert torch.equal(back[:, :rows, :groups], plain)
    assert not back[:, rows:].any()
    assert not back[:, :, groups:].any()


def main(backend_name: str, out: str) -> None:
    """The worker: compute all cases, in a process whose Triton interprets."""
    torch.set_num_threads(1)
    # Memory that is allocated and not written holds NaN, or the largest integer.
    torch.use_deterministic_algorithms(True)

    stand_in_for_a_gpu()
    stand_in_for_the_interpreter()
    stand_in_for_specialize(triton_package)
    (entry,) = (each for each in backends.FAMILIES["triton"] if each.name == backend_name)
    results: dict[str, Any] = {}
    for case in CASES:
        try:
            results[str(case)] = _outcome(entry, case)
        except Exception:
            results[str(case)] = traceback.format_exc()
    torch.save(results, out)


def _outcome(entry: backends.Entry, case: Case) -> dict[str, Any]:
    weights, shape, x, logits = case.inputs()
    reason = entry.why_not(shape, "gfx950")
    assert reason is None, reason
    from vllm_mxfp4_gfx950.backends.triton import routing

    scale_rows, route = triton_package.SCALE_ROWS, routing.route
    Specialized.tiles.clear()
    if case.broken == "gate and up swapped":
        for tensor in (weights.w13, weights.w13_scale, weights.w13_bias):
            tensor.copy_(tensor.unflatten(1, (-1, 2)).flip(2).flatten(1, 2))
    if case.broken == "expert_map of another rank":
        assert weights.expert_map is not None
        weights.expert_map.copy_(weights.expert_map.roll(1))
    if case.broken == "scales not padded":
        triton_package.SCALE_ROWS = 32

    def route_without_weights(*args: Any) -> Any:
        routed = route(*args)
        routed.weights.fill_(1)
        return routed

    if case.broken == "gammas dropped":
        routing.route = route_without_weights
    scales = {"w13": weights.w13_scale.clone(), "w2": weights.w2_scale.clone()}
    try:
        prepared: Any = entry.load().prepare(weights, shape)
        if case.refilled:
            blank = case.inputs()[0]
            for tensor in (tensor for tensor in vars(blank).values() if tensor is not None):
                tensor.zero_()
            fresh, prepared = prepared, entry.load().prepare(blank, shape)
            backends.overwrite(prepared, fresh)
        if case.tile:
            tile = TileConfig(*case.tile, 256, 1, 4, 2, 0)
            prepared = prepared.with_tiles(tile, tile)
        if case.broken == "scales not swizzled":
            for name, plain in scales.items():
                _unswizzle(getattr(prepared, name).scales, plain)
        return {
            "w13": prepared.w13.values.mT,
            "w13_in_place": prepared.w13.values.data_ptr() == weights.w13.data_ptr(),
            "biases_in_place": prepared.w13.bias is weights.w13_bias and prepared.w2.bias is weights.w2_bias,
            "w13_scale": prepared.w13.scales.mT,
            "out": prepared.run(x, logits),
            "tiles": Specialized.tiles[:2],
        }
    finally:
        triton_package.SCALE_ROWS, routing.route = scale_rows, route


def _unswizzle(memory: torch.Tensor, plain: torch.Tensor) -> None:
    """Put the scales back in checkpoint order, in the memory of the swizzled ones."""
    rows, groups = memory.shape[1] * 32, memory.shape[2] // 32
    padding = (0, groups - plain.shape[2], 0, rows - plain.shape[1])
    memory.copy_(torch.nn.functional.pad(plain, padding).view(memory.shape))


# Stand-ins. They last as long as the worker's process.


def stand_in_for_a_gpu() -> None:
    """A gfx950, as far as anyone asks on the host."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    stand_in = SimpleNamespace(
        get_current_target=lambda: GPUTarget("hip", "gfx950", 64), get_current_device=lambda: 0
    )
    driver.set_active(stand_in)
    torch.cuda.get_device_capability = lambda *_: (9, 5)
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(multi_processor_count=16)


def stand_in_for_the_interpreter() -> None:
    """What the interpreter of Triton 3.8 does otherwise than a GPU, and a check of every address."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    # Compiled kernels do not check for integer overflow either.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)

    convert = interpreter._convert_float

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        # It truncates to bf16, and where it rounds it loses the carry into the exponent.
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(data)).bfloat16()
            return rounded.view(torch.int16).numpy().view(np.uint16)
        return convert(data, source, target, rounding)

    interpreter._convert_float = convert_float

    rewrite = interpreter.FunctionRewriter.rewrite_ast

    def rewrite_ast(self: Any) -> Any:
        # A compiled kernel may use a module's constexpr as a number.
        for name, value in list(self.fn.__globals__.items()):
            if isinstance(value, tl.constexpr):
                self.fn.__globals__[name] = value.value
        return rewrite(self)

    interpreter.FunctionRewriter.rewrite_ast = rewrite_ast

    call = interpreter.InterpretedFunction.__call__

    def call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A compiled kernel may call `.to` on a constant that a function returned.
        result = call(self, *args, **kwargs)
        if not isinstance(result, tuple):
            return result
        return tuple(interpreter._implicit_cvt(part) if type(part) is int else part for part in result)

    interpreter.InterpretedFunction.__call__ = call_device_function

    launch = interpreter.InterpretedFunction.run
    memory = {}

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A compiled kernel takes whatever has a data_ptr, such as triton_kernels' own Tensor.
        plain = [arg.storage.data if hasattr(arg, "shape_max") else arg for arg in args]
        named = {name: arg.storage.data if hasattr(arg, "shape_max") else arg for name, arg in kwargs.items()}
        spans = sorted(
            {
                (tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
                for arg in (*plain, *named.values())
                for tensor in (arg if isinstance(arg, tuple) else (arg,))
                if isinstance(tensor, torch.Tensor)
            }
        )
        memory["starts"] = np.array([start for start, _ in spans], dtype=np.uint64)
        memory["ends"] = np.array([start + size for start, size in spans], dtype=np.uint64)
        return launch(self, *plain, **named)

    interpreter.InterpretedFunction.run = run

    def check(pointers: Any, mask: Any) -> None:
        mask = mask.data.astype(bool)
        addresses = np.broadcast_to(pointers.data, mask.shape)[mask]
        span = np.searchsorted(memory["starts"], addresses, side="right") - 1
        if (span < 0).any() or (addresses >= memory["ends"][span]).any():
            raise IndexError("an address outside of every tensor that the kernel was given")

    load = interpreter.InterpreterBuilder.create_masked_load
    store = interpreter.InterpreterBuilder.create_masked_store

    def masked_load(self: Any, pointers: Any, mask: Any, *args: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *args)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *args)

    interpreter.InterpreterBuilder.create_masked_load = masked_load
    interpreter.InterpreterBuilder.create_masked_store = masked_store


def stand_in_for_specialize(triton_package: ModuleType) -> None:
    """triton_kernels writes the fused activation into a kernel's source, which only compiles."""
    triton_package.load("specialize").specialize = Specialized
    if triton_package.locate() and (triton_package.locate() / "matmul_ogs.py").is_file():
        triton_package.load("matmul_ogs").specialize = Specialized


class Specialized:
    """A kernel some of whose arguments are fixed, and some tuples of which come in parts.

    Attributes:
        tiles: block_m, block_n and block_k of each matmul that was launched.
    """

    tiles: ClassVar[list[tuple[int, ...]]] = []

    def __init__(
        self,
        kernel: Any,
        _module: Any,
        constants: dict[str, Any],
        tuples: dict[str, tuple[str, ...]],
        **_: Any,
    ) -> None:
        self.kernel, self.constants, self.tuples = kernel, constants, tuples
        self.names = [
            part for name in kernel.arg_names if name not in constants for part in tuples.get(name, (name,))
        ]

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> Any:
            values = {**dict(zip(self.names, args, strict=False)), **kwargs, **self.constants}
            for name, parts in self.tuples.items():
                values[name] = tuple(values.pop(part) for part in parts)
            if "BLOCK_K" in values:
                self.tiles.append(tuple(values[f"BLOCK_{axis}"] for axis in "MNK"))
            return self.kernel[grid](**values)

        return launch


if __name__ == "__main__":
    main(*sys.argv[1:])
