"""Whatever a config.json, a table, an environment or a checkpoint says, it is served or refused in our words.

Few examples, the same each time but for constants that Hypothesis finds in the modules that are imported;
`make fuzz` tries others, for ten minutes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import engine
import load_model
import pytest
import tiny_checkpoint
import torch
import transformers
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from run_python import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_checkpoint import TinyGptOss

from vllm_mxfp4_gfx950.models import GPT_OSS, layer_shape
from vllm_mxfp4_gfx950.moe import MoeShape
from vllm_mxfp4_gfx950.settings import (
    BACKEND_VAR,
    BACKENDS,
    SELF_CHECK_VAR,
    SELF_CHECKS,
    STRICT_VAR,
    TABLES_VAR,
    Settings,
    from_environment,
)
from vllm_mxfp4_gfx950.tables import store

TIMES = int(os.environ.get("FUZZ_TIMES", "1"))
"""So many times the examples of `make test`, and then random ones."""

OUR_WORDS = re.compile(r"(?s).*\S must be \S.*; got .*\. \S.*\.")

IN_VLLM = 15 if TIMES == 1 else 6 * TIMES
"""Examples that load a model through vLLM: a tenth of a second each, or nearly one with transformers."""

TABLES = {
    arch: json.loads((ROOT / f"vllm_mxfp4_gfx950/tables/{arch}.json").read_text())
    for arch in ("gfx950", "sm90")
}
FORM = TABLES["sm90"]
TILE = 8
"""Where a row's tile begins."""

ENTRIES = {
    arch: [[*row[:TILE], *table["tiles"][row[TILE]]] for row in table["rows"]]
    for arch, table in TABLES.items()
}
OWN_ROWS = [row for row in ENTRIES["sm90"] if row[0] == "own" and row[5] == 32 and row[7] <= 2]
HOPPER_ROW = ["matmul_ogs", "3.6", "w13", 2880, 5760, 32, 32, 64, 16, 256, 128, 1, 8, 4, 0]
ROWS = {"gfx950": [*ENTRIES["gfx950"][:3], *OWN_ROWS], "sm90": [*OWN_ROWS, HOPPER_ROW]}

MODEL = TinyGptOss(experts=4, topk=2, hidden=64, intermediate=96, layers=1)
PACKAGE = ROOT / "vllm_mxfp4_gfx950"
EXPERTS = "model.layers.0.mlp.experts"
Load = Callable[[], object]


SERVED = 1 if TIMES == 1 else 20
"""Examples that are served, and answered by transformers, too: seconds each."""


def fuzz(examples: int, **strategies: st.SearchStrategy[Any]) -> Callable[[Any], Any]:
    """Call a test with so many examples of its arguments."""
    options = settings(
        max_examples=examples,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    return lambda test: options(given(**strategies)(test))


@contextmanager
def served_or_refused() -> Iterator[None]:
    """Raises what is neither."""
    try:
        yield
        event("served")
    except ValueError as error:
        # What is raised while vLLM reads a config it hands on as a ValueError of its own, with our text.
        if not OUR_WORDS.search(str(error)):
            raise
        event("refused")


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-1, 300).map(lambda n: 32 * n),
    st.floats(),
    st.text(max_size=9),
)
JSON = st.recursive(
    SCALARS,
    lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=9), some, max_size=3),
    max_leaves=9,
)


def spoiled_table(arch: str, cells: list[tuple[int, int, Any]], changed: dict[str, Any]) -> bytes:
    """Some rows of ours with other values in some places."""
    rows = [[*row[:TILE], number] for number, row in enumerate(ROWS[arch])]
    tiles = [list(row[TILE:]) for row in ROWS[arch]]
    for row, column, value in cells:
        if column <= TILE:
            rows[row % len(rows)][column] = value
        else:
            tiles[row % len(rows)][column - TILE - 1] = value
    return json.dumps(FORM | {"arch": arch, "rows": rows, "tiles": tiles} | changed).encode()


# --- what is read without vLLM ----------------------------------------------------------------------

VARIABLES = (BACKEND_VAR, STRICT_VAR, SELF_CHECK_VAR, TABLES_VAR)
VALUES = (*BACKENDS, *SELF_CHECKS, "0", "1", "", "AUTO", " auto", "auto\n", "true", str(ROOT), "x" * 300)


@fuzz(
    200 * TIMES,
    environment=st.dictionaries(
        st.sampled_from(VARIABLES) | st.text(), st.sampled_from(VALUES) | st.text(), max_size=4
    ),
)
def test_environment(environment: dict[str, str]) -> None:
    """A value that is not on its list is never taken for another."""
    with served_or_refused():
        found = from_environment(environment)
        assert found == Settings(
            environment.get(BACKEND_VAR, "auto"),
            environment.get(STRICT_VAR, "0") == "1",
            environment.get(SELF_CHECK_VAR, "first"),
            Path(environment[TABLES_VAR]) if TABLES_VAR in environment else None,
        )
        assert found.tables is None or found.tables.is_dir()
        assert found.backend in BACKENDS
        assert found.self_check in SELF_CHECKS


@pytest.fixture(scope="module", name="file")
def fixture_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a config.json is written."""
    return tmp_path_factory.mktemp("fuzz") / "config.json"


SOUND = GPT_OSS["gpt-oss-20b"] | {"model_type": "gpt_oss"}
FIELDS = (*SOUND, "num_experts", "text_config")


@fuzz(
    300 * TIMES,
    content=st.binary(max_size=99)
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3).map(
        lambda changed: json.dumps(SOUND | changed).encode()
    ),
    installed=st.booleans(),
    tp=st.integers(-1, 9),
    expert_parallel=st.booleans(),
)
def test_config_of_a_command(
    file: Path, content: bytes, installed: bool, tp: int, expert_parallel: bool
) -> None:
    """The path of a config.json given to --model, where transformers is installed and where it is not."""
    file.write_bytes(content)
    with served_or_refused(), pytest.MonkeyPatch.context() as patch:
        if not installed:
            patch.setitem(sys.modules, "transformers", None)
        assert isinstance(layer_shape(str(file), tp, tp if expert_parallel else 1), MoeShape)


CELLS = st.tuples(st.integers(0, 9), st.integers(0, len(HOPPER_ROW)), SCALARS | st.integers(-1, 600))


@fuzz(
    300 * TIMES,
    arch=st.sampled_from(sorted(TABLES)),
    content=st.binary(max_size=99) | JSON.map(lambda value: json.dumps(value).encode()) | st.none(),
    cells=st.lists(CELLS, max_size=3),
    changed=st.dictionaries(st.sampled_from([*FORM, "measured", "x"]), JSON, max_size=1),
)
def test_table(
    file: Path, arch: str, content: bytes | None, cells: list[tuple[int, int, Any]], changed: dict[str, Any]
) -> None:
    """A user's table: whatever it says, every number of tokens gets a tile that the kernels can take."""
    file.write_bytes(spoiled_table(arch, cells, changed) if content is None else content)
    with served_or_refused():
        for (kernels, _, gemm), rungs in store.read(file, arch).tiles.items():
            for tokens in (1, 64, 65, 2**20):
                tile = rungs.at(tokens)
                for value in dataclasses.astuple(tile)[:3]:
                    assert value in (8, 16, 32, 64, 128, 256, 512)
                assert 1 <= tile.split_k <= 8
                assert tile.num_warps in (1, 2, 4, 8, 16)
                assert tile.block_m >= 16 or kernels == "own"
                assert (tile.num_warps == 8) == (kernels == "matmul_ogs") or arch != "sm90"
                assert tile.split_k == 1 or (kernels, gemm.name) != ("own", "w13")


# --- what vLLM reads, and hands to the plugin -------------------------------------------------------


@pytest.fixture(scope="module", name="checkpoint")
def fixture_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-OSS, to be spoiled."""
    return tiny_checkpoint.write(MODEL, tmp_path_factory.mktemp("fuzz") / "checkpoint")


@pytest.fixture(scope="module", name="load")
def fixture_load(checkpoint: Path) -> Iterator[Load]:
    """Load the checkpoint as vLLM does, up to the point where it would serve."""
    with load_model.one_rank(checkpoint):
        yield lambda: load_model.load(checkpoint)


SIZES = st.sampled_from([-32, -1, 0, 1, 2, 3, 4, 5, 8, 31, 33, 64, 96, 128, 4096, 2**16, 2**20, 2**40, 2**63])
FACTORS = st.floats() | st.sampled_from([1.702, 7.0, 0.0, -7.0])
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(
            ("num_local_experts", "num_experts_per_tok", "hidden_size", "intermediate_size"), SIZES
        ),
        **dict.fromkeys(("swiglu_alpha", "swiglu_limit"), FACTORS),
        "num_hidden_layers": st.integers(1, 3),
        "quantization_config": st.fixed_dictionaries(
            {}, optional={"quant_method": st.sampled_from(["mxfp4", "gpt_oss_mxfp4", "fp8", "awq", ""])}
        ),
        "model_type": st.just("llama"),
        "auto_map": st.dictionaries(st.sampled_from(["AutoConfig", "AutoModel"]), st.just("code.Class")),
        "torch_dtype": st.just("float16"),
    },
)


@pytest.mark.engine
@fuzz(IN_VLLM, changes=CHANGES)
@example(changes={"intermediate_size": 160})
def test_config_in_vllm(load: Load, checkpoint: Path, changes: dict[str, Any]) -> None:
    """Every field that the plugin reads, as far as transformers takes it."""
    write_sound(checkpoint)
    file = checkpoint / "config.json"
    sound = tiny_checkpoint.config(MODEL)
    del sound["layer_types"]  # Which would have to have as many layers.
    file.write_text(json.dumps(sound | changes))
    try:
        transformers.AutoConfig.from_pretrained(checkpoint)
    except Exception:
        event("refused by transformers")
    else:
        with served_or_refused():
            load()
            for name in ("swiglu_alpha", "swiglu_limit"):
                assert 0 < changes.get(name, 1.0) < math.inf


DTYPES = (
    "BOOL",
    "U8",
    "I8",
    "F8_E4M3",
    "F8_E8M0",
    "F4",
    "I16",
    "U16",
    "BF16",
    "F16",
    "F32",
    "F64",
    "I64",
    "X",
)
ENTRIES = (
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(DTYPES),
            "shape": st.lists(st.integers(0, 2**64) | st.sampled_from([1, 4, 64, 96]), max_size=5),
            "data_offsets": st.lists(st.integers(0, 2**64), max_size=3),
        },
    )
    | JSON
)


@pytest.mark.engine
@fuzz(
    IN_VLLM,
    name=st.sampled_from(sorted(tiny_checkpoint.tensors(MODEL))),
    entry=ENTRIES,
    bytes_=st.none() | st.tuples(st.integers(0, 2**12), st.binary(max_size=9)),
    end=st.none() | st.integers(0, 2**14),
)
def test_header(
    load: Load, checkpoint: Path, name: str, entry: Any, bytes_: tuple[int, bytes] | None, end: int | None
) -> None:
    """A header with another entry, with some bytes overwritten, or with the file cut off."""
    write_sound(checkpoint)
    file = checkpoint / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[name] = {**header.get(name, {}), **entry} if isinstance(entry, dict) else entry
    text = json.dumps(header).encode()
    spoiled = bytearray(len(text).to_bytes(8, "little") + text + content[8 + length :])
    if bytes_:
        spoiled[bytes_[0] : bytes_[0] + len(bytes_[1])] = bytes_[1]
    file.write_bytes(spoiled[:end])
    with served_or_refused():
        try:
            load()
        except Exception as error:
            raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
            if OUR_WORDS.search(str(error)) or raised_in.is_relative_to(PACKAGE):
                raise
            # What is not an expert's tensor vLLM loads, or refuses in words of its own.
            sound = {key: list(value.shape) for key, value in tiny_checkpoint.tensors(MODEL).items()}
            with safe_open(file, "pt") as tensors:
                found = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
            if all(sound.get(key) == shape for key, shape in found.items() if not key.startswith(EXPERTS)):
                raise
            event("refused by vLLM")


TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "absent": lambda tensor: None,
    "float32": lambda tensor: tensor.float(),
    "int8": lambda tensor: tensor.to(torch.int8),
    "float8": lambda tensor: tensor.to(torch.float8_e5m2),
    "transposed": lambda tensor: tensor.mT,
    "flat": lambda tensor: tensor.flatten(),
    "short": lambda tensor: tensor[..., :-1],
    "no experts": lambda tensor: tensor[:0],
    "one expert": lambda tensor: tensor[:1],
    "another axis": lambda tensor: tensor[None],
    "0xFF": lambda tensor: torch.full_like(tensor.view(torch.uint8), 0xFF).view(tensor.dtype),
    "0": torch.zeros_like,
}


@pytest.mark.engine
@fuzz(
    IN_VLLM,
    spoiled=st.dictionaries(
        st.sampled_from(["gate_up_proj", "down_proj"]).flatmap(
            lambda name: st.sampled_from(
                [f"{EXPERTS}.{name}_{part}" for part in ("blocks", "scales", "bias")]
            )
        ),
        st.sampled_from(sorted(TENSORS)),
        max_size=3,
    ),
    extra=st.none() | SIZES,
)
def test_tensors(load: Load, checkpoint: Path, spoiled: dict[str, str], extra: int | None) -> None:
    """The experts' tensors, in whole files."""
    write_sound(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    for name, how in spoiled.items():
        changed = TENSORS[how](tensors.pop(name))
        if changed is not None:
            tensors[name] = changed.contiguous()
    if extra is not None:
        tensors[f"{EXPERTS}.0.w13_weight"] = torch.zeros(abs(extra) % 97, 3)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with served_or_refused():
        load()


FILES = (
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "extra.safetensors",
    ".model.safetensors",
    "consolidated.safetensors",
)
WHOLE = sorted(tiny_checkpoint.tensors(MODEL))
LAYOUTS: tuple[dict[str, list[str]], ...] = (
    {FILES[0]: WHOLE},
    {FILES[1]: WHOLE[::2], FILES[2]: WHOLE[1::2]},
    {FILES[5]: WHOLE},
    {FILES[0]: WHOLE, FILES[1]: WHOLE[::2], FILES[2]: WHOLE[1::2]},
)
RENAMED = {
    "prefix": ("^", "base_model.model."),
    "doubled": ("_blocks$", "_blocks_blocks"),
    "vllm": ("self_attn", "attn"),
    "none": ("^", ""),
}


@dataclasses.dataclass
class Layout:
    """Files of a checkpoint before they are written.

    Args:
        files: the tensors of each, by their names; another model's where there is a minus before it.
        index: the files that it lists; None where there is none.
        broken: what is left of a file.
    """

    files: dict[str, list[str]]
    index: set[str] | None
    broken: dict[str, str]

    def change(self, how: str, file: str, name: str) -> None:
        """Do one thing to it."""
        tensors = self.files.get(file, [])
        if how in ("copy", "move", "stale"):
            if how == "move":
                self.files = {key: [n for n in names if n != name] for key, names in self.files.items()}
            kept = [n for n in self.files.get(file, []) if n.removeprefix("-") != name]
            self.files[file] = [*kept, f"-{name}" if how == "stale" else name]
        elif how == "drop":
            self.files[file] = [n for n in tensors if n.removeprefix("-") != name]
        elif how == "delete":
            self.files.pop(file, None)
        elif how in ("cut", "pointer", "dangling", "link"):
            self.broken[file] = how
        elif how == "list":
            self.index = {*(self.index or ()), file}
        elif self.index is not None:
            self.index = self.index - {file} or None

    def write(self, folder: Path, renamed: str) -> None:
        """Write it."""
        sound, pattern = tiny_checkpoint.tensors(MODEL), RENAMED[renamed]
        weight_map = {}
        for file, names in self.files.items():
            tensors = {
                re.sub(*pattern, name.removeprefix("-")): sound[name]
                if name in sound
                else sound[name[1:]].flip(0)
                for name in names
            }
            weight_map |= dict.fromkeys(tensors, file) if file in (self.index or ()) else {}
            save_file(tensors, folder / file, metadata={"format": "pt"})
        for file, how in self.broken.items():
            path = folder / file
            content = path.read_bytes() if path.exists() else b"nothing"
            path.unlink(missing_ok=True)
            if how in ("link", "dangling"):
                path.symlink_to(f"{file}.blob")
                if how == "link":
                    (folder / f"{file}.blob").write_bytes(content)
            else:
                pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 9\n"
                path.write_bytes(pointer if how == "pointer" else content[:-5])
        if self.index is not None:
            weight_map |= {f"of {file}": file for file in self.index - self.files.keys()}
            text = json.dumps({"metadata": {}, "weight_map": weight_map})
            (folder / "model.safetensors.index.json").write_text(text)


def sound_in_vllm(folder: Path) -> bool:
    """Whether vLLM's loader alone fills the whole model from a checkpoint, with the same in any order."""
    try:
        one, other = (load_model.parameters(folder, unwritten) for unwritten in (0xFF, 0x5A))
        tensors = load_model.read(folder)
    except Exception:
        return False
    by_name = dict(tensors)
    return all(torch.equal(one[name], other[name]) for name in one) and all(
        torch.equal(tensor, by_name[name]) for name, tensor in tensors
    )


CHANGED = (
    "copy",
    "move",
    "stale",
    "drop",
    "delete",
    "cut",
    "pointer",
    "dangling",
    "link",
    "list",
    "unlist",
)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """One of LAYOUTS after some changes."""
    start = draw(st.sampled_from(LAYOUTS))
    layout = Layout(dict(start), set(start) - {FILES[0]} if draw(st.booleans()) else None, {})
    change = st.tuples(st.sampled_from(CHANGED), st.sampled_from(FILES), st.sampled_from(WHOLE))
    for how, file, name in draw(st.lists(change, max_size=3)):
        layout.change(how, file, name)
    return layout


@contextmanager
def written(checkpoint: Path, layout: Layout, renamed: str) -> Iterator[Path]:
    """A new folder each time, as vLLM remembers what is in one."""
    with TemporaryDirectory(dir=checkpoint.parent) as name:
        folder = Path(name) / "checkpoint"
        shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        layout.write(folder, renamed)
        yield folder


@pytest.mark.engine
@fuzz(IN_VLLM, layout=layouts(), renamed=st.sampled_from(["none", "none", "none", *RENAMED]))
def test_layout(load: Load, checkpoint: Path, layout: Layout, renamed: str) -> None:
    """Files and names: accepted exactly if vLLM's loader fills the model, as transformers' does."""
    write_sound(checkpoint)
    with written(checkpoint, layout, renamed) as folder:
        try:
            load_model.check(folder)
        except ValueError as error:
            if not OUR_WORDS.search(str(error)) or sound_in_vllm(folder):
                raise
            event("refused")
            return
        assert sound_in_vllm(folder)
        event("served")
        if renamed == "none":
            compare_with_transformers(folder, layout)


@pytest.mark.load
@pytest.mark.engine
@fuzz(SERVED, layout=layouts())
def test_layout_served(load: Load, checkpoint: Path, layout: Layout) -> None:
    """The same through an engine: its tokens are those of transformers, or none."""
    write_sound(checkpoint)
    prompts = [[5, 17, 100], [*range(2, 40)]]
    with written(checkpoint, layout, "none") as folder:
        try:
            served = engine.serve(folder, prompts, 16, quantization=engine.FLAG, dtype="float32")
        except ValueError as error:
            if not OUR_WORDS.search(str(error)) or sound_in_vllm(folder):
                raise
            event("refused")
            return
        event("served")
        read = compare_with_transformers(folder, layout)
        sequences = [[*prompt, *answer] for prompt, answer in zip(prompts, served.token_ids, strict=True)]
        truth = tiny_checkpoint.transformers_logprobs(read, sequences)
        for prompt, answer, logprobs in zip(prompts, served.token_ids, truth, strict=True):
            steps = logprobs[len(prompt) - 1 : -1]
            chosen = steps[range(len(answer)), answer]
            torch.testing.assert_close(chosen, steps.amax(1), rtol=0, atol=1e-3)


def compare_with_transformers(folder: Path, layout: Layout) -> Path:
    """Transformers must read from a checkpoint what vLLM does, where both take the same files.

    Returns:
        What vLLM reads, in one file.
    """
    read = folder.with_name("read")
    shutil.copytree(folder, read, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(dict(load_model.read(folder)), read / "model.safetensors", metadata={"format": "pt"})
    if load_model.files(folder) != ({FILES[0]} if (folder / FILES[0]).exists() else layout.index):
        return read
    found, expected = (tiny_checkpoint.transformers_model(path).state_dict() for path in (folder, read))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    event("as transformers reads it")
    return read


def write_sound(checkpoint: Path) -> None:
    """The checkpoint as it was."""
    tiny_checkpoint.write(MODEL, checkpoint)
