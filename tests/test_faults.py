"""What goes wrong in a layer and in a server, and the table of everything that can: docs/faults.md."""

from __future__ import annotations

import ast
import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import aiter_stand_in
import engine
import plant_preparation
import pytest
import tiny_checkpoint
import torch
from plant_preparation import BATCHES, FAULTS, SHAPES
from run_python import ROOT, once, run_python
from safetensors.torch import load_file, save_file
from test_verification import OF_BACKEND, paths_of
from tiny_checkpoint import TinyGptOss

from vllm_mxfp4_gfx950 import backends, self_check
from vllm_mxfp4_gfx950.backends import ck, reference
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.random_layer import make_shape, random_tokens, random_weights
from vllm_mxfp4_gfx950.settings import Settings
from vllm_mxfp4_gfx950.tolerance import assert_rows_close

TABLE = ROOT / "docs/faults.md"
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ON_GPU = [make_shape(32, 4, 2880, 2880), make_shape(128, 4, 2880, 2880), SHAPES[0]]


# --- the table --------------------------------------------------------------------------------------


def missing_tests(table: str) -> list[str]:
    """What is wrong with the tests that a table names: rows without one, and names of none."""
    found = []
    rows = [line for line in table.splitlines() if line.startswith("| ") and not line.endswith("| tests |")]
    for row in rows:
        fault, *_, tests = (cell.strip() for cell in row.strip("|").split("|"))
        named = re.findall(r"`(test_\w+)\.(test_\w+)`", tests)
        found += [] if named else [f"{fault}: no test"]
        for file, function in named:
            path = ROOT / "tests" / f"{file}.py"
            nodes = ast.parse(path.read_text()).body if path.is_file() else []
            if function not in [node.name for node in nodes if isinstance(node, ast.FunctionDef)]:
                found.append(f"{fault}: no {file}.{function}")
    return found if rows else ["no rows"]


def test_table() -> None:
    """Each row names tests, all of which there are."""
    assert missing_tests(TABLE.read_text()) == []


@pytest.mark.parametrize(
    ("cell", "complaint"),
    [
        ("`test_faults.test_table`", []),
        ("nothing", ["fault: no test"]),
        ("`test_faults.test_nothing`", ["fault: no test_faults.test_nothing"]),
        ("`test_nothing.test_table`", ["fault: no test_nothing.test_table"]),
        ("`test_faults.missing_tests`", ["fault: no test"]),
    ],
)
def test_table_notices(cell: str, complaint: list[str]) -> None:
    """Negative control."""
    table = f"| what | seen | survives | tests |\n|---|---|---|---|\n| fault | a | b | {cell} |\n"
    assert missing_tests(table) == complaint
    assert missing_tests("| what | tests |\n|---|---|\n") == ["no rows"]


def printed() -> str:
    """Every text in the package's source, with … for what it is filled with."""
    texts = []
    for file in sorted((ROOT / "vllm_mxfp4_gfx950").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value.replace("%s", "…"))
    return "\n".join(texts)


def unprinted(table: str, texts: str) -> list[str]:
    """What a table says is seen, and what no text of the package's has, between what it is filled with."""
    found = []
    for line in table.splitlines():
        if line.startswith("| ") and not line.endswith("| tests |"):
            seen = line.strip("|").split("|")[1]
            for quoted in re.findall(r"``(.+?)``|`(.+?)`", seen):
                parts = re.split(r"…| must be |; got |\bgot |: |; |\.$", "".join(quoted))
                found += [part.strip() for part in parts if part.strip() not in texts]
    return found


def test_texts() -> None:
    """What the table says is seen is what the package prints."""
    assert unprinted(TABLE.read_text(), printed()) == []


def test_texts_notice() -> None:
    """Negative control: a word that is another in the code, and texts that are right."""
    table = "| what | seen | survives | tests |\n|---|---|---|---|\n| fault | {} | b | c |\n"
    right = "`the GPU's free memory must be enough to prepare …; got …` or `Self-check of … through …: …`"
    assert unprinted(table.format(right), printed()) == []
    wrong = right.replace("enough", "sufficient")
    assert unprinted(table.format(wrong), printed()) == ["sufficient to prepare"]


# --- in what `prepare` does -------------------------------------------------------------------------

OTHERS = ("triton_ragged", "triton_matmul")
NAMES = ["triton_ogs", *(pytest.param(name, marks=pytest.mark.emulate) for name in OTHERS)]
"""The others by `pytest -m emulate`."""

LAYERS = 2
"""Sound layers of every commit; MANY with `-m emulate`."""

MANY = 200


@pytest.fixture(name="aiter")
def fixture_aiter(monkeypatch: pytest.MonkeyPatch) -> None:
    """aiter's Python over kernels that are stood in for."""
    if not (aiter_stand_in.TREE / "aiter").is_dir():
        pytest.skip(f"needs amd-aiter unpacked in {aiter_stand_in.TREE}")
    for name, module in aiter_stand_in.load().items():
        monkeypatch.setitem(sys.modules, name, module)


@once
def plant(name: str, layers: int) -> dict[str, Any]:
    """What plant_preparation finds in a Triton backend."""
    with NamedTemporaryFile("r") as out:
        command = [plant_preparation.__file__, str(layers), out.name]
        result = run_python(command, path=paths_of(*OF_BACKEND[name]))
        assert result.returncode == 0, result.stderr
        found: dict[str, Any] = json.load(out)
    assert found["backend"] == name
    return found


def check_planted(misses: dict[str, str]) -> None:
    """Every fault was caught, and the sound layer passed."""
    assert misses[""] == ""
    assert set(misses) == {"", *FAULTS}
    for fault in FAULTS:
        assert re.match(r"\d+ tokens: (row \d+ errs by|\d+ elements are not finite)", misses[fault]), fault


@pytest.mark.compile
@pytest.mark.parametrize("name", NAMES)
def test_planted_fault(name: str) -> None:
    """Each is caught, none where none is."""
    planted = plant(name, LAYERS)
    check_planted(planted["misses"])
    assert planted["alarms"] == []


def test_planted_fault_in_ck(aiter: None) -> None:
    """Likewise."""
    check_planted(plant_preparation.misses(ck, SHAPES[0], 0, BATCHES, "cpu"))
    assert plant_preparation.alarms(ck, SHAPES, LAYERS, BATCHES, "cpu") == []


@pytest.mark.compile
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (
            "overflow",
            r"OutOfResources: out of resource: shared memory, Required: \d+, Hardware limit: 163840",
        ),
        ("compiler", "CompilationError: at .* power of 2"),
    ],
)
def test_first_launch(name: str, fault: str, text: str) -> None:
    """A table's tile that does not compile or fit, for few tokens or for more: the package's own tiles serve.

    With triton_matmul these fail here, too, and another backend serves.
    """
    for place, tokens in (("first", 1), ("last", 65)):
        found = plant(name, LAYERS)["launches"][f"{fault}-{place}"]
        assert re.match(f"{tokens} tokens: {text}", found["miss"])
        serves = "reference" if name == "triton_matmul" else name
        assert (found["serves"], found["left"]) == (serves, "")


@pytest.mark.emulate
@pytest.mark.parametrize("name", OF_BACKEND)
def test_no_false_alarm(name: str) -> None:
    """In many sound layers."""
    assert plant(name, MANY)["alarms"] == []


@pytest.mark.emulate
def test_no_false_alarm_in_ck(aiter: None) -> None:
    """Likewise."""
    assert plant_preparation.alarms(ck, SHAPES, MANY, BATCHES, "cpu") == []


@pytest.mark.gpu
@NEEDS_GPU
def test_planted_fault_on_a_gpu() -> None:
    """Each is caught in the backend that serves here, our own matmuls included, and sound layers pass."""
    arch = backends.arch_of(torch.device("cuda"))
    shapes = (make_shape(32, 4, 2880, 2880), make_shape(8, 2, 320, 288), make_shape(32, 4, 2880, 736))
    serving = backends.select(shapes[0], arch, Settings()).backend
    for shape in shapes:
        check_planted(plant_preparation.misses(serving, shape, 0, (), "cuda"))
    assert plant_preparation.alarms(serving, shapes, MANY, (), "cuda") == []


def test_changed_call_of_aiter(aiter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter that why_not cannot know of is found by the first call."""
    module = sys.modules["aiter.fused_moe"]
    sound = module.fused_moe

    @functools.wraps(sound)
    def fused_moe(*arguments: Any, block_scale: Any, **options: Any) -> Any:
        return sound(*arguments, **options)

    shape, weights = SHAPES[0], random_weights(SHAPES[0], seed=0)
    assert self_check.check(ck.prepare(weights.clone(), shape), weights, shape, BATCHES).miss == ""
    monkeypatch.setattr(module, "fused_moe", fused_moe)
    assert ck.why_not(shape, "gfx950") is None
    miss = self_check.check(ck.prepare(weights.clone(), shape), weights, shape, BATCHES).miss
    assert re.match(r"1 tokens: TypeError: .* missing 1 required keyword-only argument: 'block_scale'", miss)


@pytest.mark.gpu
@NEEDS_GPU
def test_no_memory_on_a_gpu() -> None:
    """There is room for the layer, and none to prepare it; with more, it is prepared."""
    serving = pytest.importorskip("vllm_mxfp4_gfx950.serving")
    shape = ON_GPU[1]
    arch = backends.arch_of(torch.device("cuda"))
    weights = random_weights(shape, 0, "cuda")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**24) / total)
    try:
        with pytest.raises(Mxfp4Error, match="the GPU's free memory must be enough to prepare"):
            serving.ModelLayers(shape, arch, Settings(), 64).prepare(weights, "layers.0")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    serving.ModelLayers(shape, arch, Settings(), 64).prepare(weights, "layers.0")


# --- activations that are not finite, and none at all -----------------------------------------------


@pytest.mark.compile
@pytest.mark.parametrize("name", NAMES)
def test_poisoned_row(name: str) -> None:
    """On the emulated gfx950: the other rows keep every bit, a NaN stays one, and no tokens give none."""
    found = plant(name, LAYERS)["poisoned"]
    assert len(found) == 12
    assert not any(found.values()), found


def nudged(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What a small leak would make."""
    return out + x.isnan().any() * out[0].abs().max() / 16


def poisoned_on_the_cpu(run: plant_preparation.Run) -> dict[str, str]:
    """Within a step of bf16: torch's matmul rounds a row otherwise where its expert gets others beside it."""
    return plant_preparation.poisoned(run, SHAPES[0], "cpu", step=2**-7)


@pytest.mark.parametrize("backend", [reference, ck], ids=lambda backend: backend.NAME)
def test_poisoned_row_on_the_cpu(aiter: None, backend: Any) -> None:
    """Likewise."""
    prepared = backend.prepare(random_weights(SHAPES[0], seed=0), SHAPES[0])
    found = poisoned_on_the_cpu(prepared.run)
    assert not any(found.values()), found


@pytest.mark.parametrize(
    ("spoil", "case", "text"),
    [
        (lambda out, x: out + x.sum(), "nan in x", "1600 elements of other rows differ"),
        (nudged, "nan in x", "1600 elements of other rows differ"),
        (lambda out, x: out.nan_to_num(), "nan in x and logits", "the row itself has numbers"),
        (lambda out, x: out[:, :-1], "no tokens", "[0, 319] of no tokens"),
    ],
    ids=["leak", "nudge", "swallowed", "shape"],
)
def test_poisoned_row_notices(spoil: Callable[..., torch.Tensor], case: str, text: str) -> None:
    """Negative control."""
    prepared = reference.prepare(random_weights(SHAPES[0], seed=0), SHAPES[0])
    run = lambda x, logits: spoil(prepared.run(x, logits), x)  # noqa: E731
    assert poisoned_on_the_cpu(run)[case] == text


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("tokens", [6, 600])
@pytest.mark.parametrize("shape", ON_GPU, ids=str)
def test_poisoned_row_on_a_gpu(shape: Any, tokens: int) -> None:
    """Likewise, through our own matmuls and through matmul_ogs."""
    backend = backends.select(shape, backends.arch_of(torch.device("cuda")), Settings()).backend
    prepared = backend.prepare(random_weights(shape, 0, "cuda"), shape)
    found = plant_preparation.poisoned(prepared.run, shape, "cuda", tokens)
    torch.cuda.synchronize()
    assert not any(found.values()), found


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize(("captured", "tokens"), [(8, 5), (64, 37), (512, 300), (1024, 600)])
@pytest.mark.parametrize("shape", ON_GPU, ids=str)
def test_graph_at_another_size(shape: Any, captured: int, tokens: int) -> None:
    """A graph replayed for fewer tokens than it was captured with: what lies behind them does not matter."""
    backend = backends.select(shape, backends.arch_of(torch.device("cuda")), Settings()).backend
    weights = random_weights(shape, 0, "cuda")
    prepared = backend.prepare(weights.clone(), shape)
    x, logits = random_tokens(shape, captured, seed=1, device="cuda")
    prepared.run(x, logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = prepared.run(x, logits)
    for seed, behind in enumerate((0.0, float("nan"), float("inf"))):
        x2, logits2 = random_tokens(shape, tokens, seed=seed, device="cuda")
        for whole, part in ((x, x2), (logits, logits2)):
            whole[:tokens] = part
            whole[tokens:] = behind
        out.fill_(float("nan"))
        graph.replay()
        assert_rows_close(out[:tokens], *reference.truth_and_plain(x2, logits2, weights, shape))


@pytest.mark.engine
def test_nan_in_a_request(tmp_path: Path) -> None:
    """A token whose embedding is NaN: its own request shows it in every logprob, the others are as ever."""
    checkpoint = tiny_checkpoint.write(TinyGptOss(), tmp_path)
    bad, *good = [3, 5, 6], [3, 4, 6], [7, 8, 9, 10]

    def served(prompts: list[list[int]]) -> engine.Served:
        return engine.serve(checkpoint, prompts, 6, quantization=engine.FLAG, dtype="float32")

    sound = served([bad, *good])
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.embed_tokens.weight"][5] = float("nan")
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    spoiled = served([bad, *good])
    assert spoiled.token_ids[1:] == sound.token_ids[1:]
    for found, finite in (
        (sound.logprobs, True),
        (spoiled.logprobs[1:], True),
        (spoiled.logprobs[:1], False),
    ):
        values = torch.tensor([list(step.values()) for answer in found for step in answer])
        assert bool(values.isfinite().all()) == finite
        assert bool(values.isnan().all()) != finite
    assert spoiled.token_ids[0] == [0] * 6
