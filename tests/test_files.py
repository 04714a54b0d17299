"""The look at a checkpoint before it is loaded, held against what vLLM's own loader makes of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine
import load_model
import pytest
import tiny_checkpoint
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import TinyGptOss

from vllm_mxfp4_gfx950 import files
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.moe import whole_layer

pytestmark = pytest.mark.engine

Tensors = dict[str, torch.Tensor]

MODEL = TinyGptOss(experts=4, topk=2, hidden=64, intermediate=96, layers=2)
SOUND = tiny_checkpoint.tensors(MODEL)
LAYER = "model.layers.1"
EXPERTS = f"{LAYER}.mlp.experts"
INDEX = "model.safetensors.index.json"
TENSORS = {
    "router": f"{LAYER}.mlp.router.weight",
    "sinks": f"{LAYER}.self_attn.sinks",
    "norm": "model.norm.weight",
    "embedding": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "expert": f"{EXPERTS}.down_proj_blocks",
    "bias": f"{EXPERTS}.gate_up_proj_bias",
    "key": f"{LAYER}.self_attn.k_proj.weight",
}


@pytest.fixture(scope="module", autouse=True, name="base")
def fixture_base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A sound checkpoint."""
    folder = tiny_checkpoint.write(MODEL, tmp_path_factory.mktemp("checkpoint") / "base")
    with load_model.one_rank(folder):
        yield folder


@pytest.fixture(scope="module", name="sound")
def fixture_sound(base: Path) -> Tensors:
    """The parameters of the sound checkpoint in vLLM."""
    found = load_model.parameters(base)
    assert not any((value == 0xFF).all() for value in found.values())
    return found


@pytest.fixture(name="folder")
def fixture_folder(base: Path, tmp_path: Path) -> Path:
    """The sound checkpoint without its weights."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def save(file: Path, tensors: Tensors) -> None:
    """Write a safetensors file."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, file, metadata={"format": "pt"})


def write_index(folder: Path, weight_map: dict[str, str], name: str = INDEX) -> None:
    """Write an index."""
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def shard(folder: Path, tensors: Tensors, name: str = "model", index: bool = True) -> None:
    """Write three files, and the index that lists them."""
    names, weight_map = sorted(tensors), {}
    for i in range(3):
        file = f"{name}-{i + 1:05}-of-00003.safetensors"
        save(folder / file, {key: tensors[key] for key in names[i::3]})
        weight_map |= dict.fromkeys(names[i::3], file)
    if index:
        write_index(folder, weight_map, f"{name}.safetensors.index.json")


def without(name: str) -> Tensors:
    """The sound tensors but one."""
    return {key: tensor for key, tensor in SOUND.items() if key != name}


def other(name: str) -> Tensors:
    """One tensor, as another model has it."""
    return {name: SOUND[name].flip(0)}


def file_of(folder: Path, name: str) -> Path:
    """The file that the index has for a tensor."""
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


Layout = Callable[[Path, str], object]


def single(folder: Path, name: str) -> None:
    """All in one file."""
    save(folder / "model.safetensors", SOUND)


def single_without(folder: Path, name: str) -> None:
    """One file, and a tensor missing."""
    save(folder / "model.safetensors", without(name))


def single_by_another_name(folder: Path, name: str) -> None:
    """One file that is not called model."""
    save(folder / "weights.safetensors", SOUND)


def single_in_part(folder: Path, name: str) -> None:
    """An interrupted download."""
    single(folder, name)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def single_as_pointer(folder: Path, name: str) -> None:
    """Cloned without git-lfs."""
    (folder / "model.safetensors").write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 4792272488\n"
    )


def indexed(folder: Path, name: str) -> None:
    """As GPT-OSS is published."""
    shard(folder, SOUND)


def indexed_without(folder: Path, name: str) -> None:
    """A tensor that the index does not know either."""
    shard(folder, without(name))


def indexed_absent_file(folder: Path, name: str) -> None:
    """A file that the index lists is not there."""
    shard(folder, SOUND)
    file_of(folder, name).unlink()


def indexed_file_without(folder: Path, name: str) -> None:
    """The index has a tensor in a file that lacks it."""
    shard(folder, SOUND)
    file = file_of(folder, name)
    save(file, {key: tensor for key, tensor in load_file(file).items() if key != name})


def indexed_in_part(folder: Path, name: str) -> None:
    """One file's download was interrupted."""
    shard(folder, SOUND)
    file = file_of(folder, name)
    file.write_bytes(file.read_bytes()[:-100])


def indexed_pointer(folder: Path, name: str) -> None:
    """One file was not fetched by git-lfs."""
    shard(folder, SOUND)
    file_of(folder, name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 9\n")


def indexed_links(folder: Path, name: str) -> None:
    """As a hub's cache has them."""
    shard(folder, SOUND)
    for file in folder.glob("*.safetensors"):
        shutil.move(file, folder.parent / file.name)
        file.symlink_to(f"../{file.name}")


def indexed_dangling_link(folder: Path, name: str) -> None:
    """A hub's cache that has lost a file."""
    indexed_links(folder, name)
    (folder.parent / file_of(folder, name).name).unlink()


def unlisted(folder: Path, name: str) -> None:
    """A tensor in a file that the index does not list."""
    shard(folder, without(name))
    save(folder / "extra.safetensors", {name: SOUND[name]})


def unlisted_stale(folder: Path, name: str) -> None:
    """A file of another model is left over."""
    shard(folder, SOUND)
    save(folder / "model-00001-of-00002.safetensors", other(name))


def unlisted_in_part(folder: Path, name: str) -> None:
    """What is left over is broken, too."""
    shard(folder, SOUND)
    save(folder / "old.safetensors", other(name))
    (folder / "old.safetensors").write_bytes((folder / "old.safetensors").read_bytes()[:-1])


def both(folder: Path, name: str) -> None:
    """One file, and three with an index."""
    shard(folder, SOUND)
    single(folder, name)


def both_and_in_single_only(folder: Path, name: str) -> None:
    """A tensor in the one file, which the index does not list."""
    shard(folder, without(name))
    single(folder, name)


def not_indexed(folder: Path, name: str) -> None:
    """Three files without an index."""
    shard(folder, SOUND, index=False)


def not_indexed_twice(folder: Path, name: str) -> None:
    """A tensor stands in two files."""
    single(folder, name)
    save(folder / "again.safetensors", {name: SOUND[name]})


def not_indexed_stale(folder: Path, name: str) -> None:
    """A tensor stands in two files that differ."""
    single(folder, name)
    save(folder / "old.safetensors", other(name))


def dot_file(folder: Path, name: str) -> None:
    """What a Mac leaves beside a file."""
    single(folder, name)
    (folder / "._model.safetensors").write_bytes(bytes.fromhex("0005160700020000") + bytes(200))


def dot_file_in_part(folder: Path, name: str) -> None:
    """What a download leaves beside a file."""
    shard(folder, SOUND)
    (folder / ".model-00001-of-00003.safetensors.partial.safetensors").write_bytes(b"\x00" * 1000)


def dot_file_only(folder: Path, name: str) -> None:
    """A tensor in a hidden file."""
    save(folder / "model.safetensors", without(name))
    save(folder / ".model.safetensors", {name: SOUND[name]})


def consolidated(folder: Path, name: str) -> None:
    """The name that Mistral's files have."""
    save(folder / "consolidated.safetensors", SOUND)


def consolidated_beside_stale(folder: Path, name: str) -> None:
    """Of these vLLM reads the consolidated one."""
    save(folder / "consolidated.safetensors", SOUND)
    save(folder / "model.safetensors", SOUND | other(name))


def consolidated_without(folder: Path, name: str) -> None:
    """A tensor in the other one only."""
    save(folder / "consolidated.safetensors", without(name))
    single(folder, name)


def consolidated_indexed(folder: Path, name: str) -> None:
    """Consolidated files have an index of their own."""
    shard(folder, SOUND, "consolidated")
    save(folder / "consolidated.old.safetensors", other(name))


def adapter_beside_indexed(folder: Path, name: str) -> None:
    """An adapter that the index does not list."""
    shard(folder, SOUND)
    save(folder / "adapter_model.safetensors", {f"base_model.model.{name}.lora_A.weight": torch.zeros(8, 64)})


def adapter_beside_single(folder: Path, name: str) -> None:
    """An adapter, which vLLM reads where there is no index."""
    single(folder, name)
    save(folder / "adapter_model.safetensors", {f"base_model.model.{name}.lora_A.weight": torch.zeros(8, 64)})


def pickle_beside(folder: Path, name: str) -> None:
    """A pickle, which vLLM does not open then."""
    single(folder, name)
    torch.save(other(name), folder / "pytorch_model.bin")


def no_file(folder: Path, name: str) -> None:
    """No weights at all."""


WITHOUT = r".*/\*\.safetensors must be the whole checkpoint; got 4\d tensors without {name}\. Download the .*"
CUT_OFF = r".*/model.*\.safetensors must be a whole safetensors file; got .*\. Download it anew: .*"
POINTER = r".*/model.*\.safetensors must be a safetensors file; got a git-lfs pointer to it\. Run `git lfs .*"
LISTED = r"which model\.safetensors\.index\.json does not list\. Add them to weight_map in .*"
BESIDE = r"which is not read beside {file}\. Move these away, or put into them what .* has\."
ONLY_IN = r"{name} must be in a file that is read; got "
LAYOUTS: dict[Layout, str | None] = {
    single: None,
    single_without: WITHOUT,
    single_by_another_name: None,
    single_in_part: CUT_OFF,
    single_as_pointer: POINTER,
    indexed: None,
    indexed_without: WITHOUT,
    indexed_absent_file: r".*\.index\.json must be a list of files that are there; "
    r"got model-0000\d-of-00003\.safetensors, absent\. Download what is absent into .*",
    indexed_file_without: WITHOUT,
    indexed_in_part: CUT_OFF,
    indexed_pointer: POINTER,
    indexed_links: None,
    indexed_dangling_link: r".*/model-0000\d-of-00003\.safetensors must be a safetensors file; "
    r"got a link to \.\./model-0000\d-of-00003\.safetensors, which is not there\. Put that back, .*",
    unlisted: ONLY_IN + rf"extra\.safetensors, {LISTED}",
    unlisted_stale: None,
    unlisted_in_part: None,
    both: None,
    both_and_in_single_only: ONLY_IN + rf"model\.safetensors, {LISTED}",
    not_indexed: None,
    not_indexed_twice: None,
    not_indexed_stale: r"{name} must be given once; got {name} in .*/model\.safetensors "
    r"and {name} in .*/old\.safetensors, which differ\. Move away what is not this model's\.",
    dot_file: None,
    dot_file_in_part: None,
    dot_file_only: ONLY_IN + r"\.model\.safetensors, " + BESIDE.replace("{file}", r"model\.safetensors"),
    consolidated: None,
    consolidated_beside_stale: None,
    consolidated_without: ONLY_IN
    + r"model\.safetensors, "
    + BESIDE.replace("{file}", r"consolidated\.safetensors"),
    consolidated_indexed: None,
    adapter_beside_indexed: None,
    adapter_beside_single: r"base_.*/adapter_model\.safetensors must be a tensor that the model takes; "
    r"got F32 \[8, 64\]: .*\. If adapter_model\.safetensors is not the model's, move it away: .*",
    pickle_beside: None,
    no_file: r".* must be a checkpoint in safetensors; got Cannot find any .*\. Download it in that format\.",
}
"""How files may lie, and the refusal; None where vLLM's loader makes the sound model of them."""


def without_vllm(folder: Path) -> bool:
    """Whether a checkpoint is sound by the published names."""
    config = json.loads((folder / "config.json").read_text())
    try:
        read = SimpleNamespace(**config)
        return bool(files.check_directory(folder, read, whole_layer(read)))
    except Mxfp4Error:
        return False


def refusal(folder: Path, **arguments: object) -> str | None:
    """What the check says of a checkpoint."""
    try:
        load_model.check(folder, **arguments)
    except ValueError as error:  # What is raised while vLLM reads a config it hands on as one of its own.
        return str(error)
    return None


def loads(folder: Path, sound: Tensors) -> bool:
    """Whether vLLM's loader alone makes the sound model of a checkpoint, bit for bit."""
    try:
        found = load_model.parameters(folder)
    except Exception:
        return False
    return found.keys() == sound.keys() and all(torch.equal(found[name], sound[name]) for name in sound)


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_layout(layout: Layout, tensor: str, folder: Path, sound: Tensors) -> None:
    """A checkpoint is accepted exactly if vLLM's loader makes the sound model of it."""
    name, text = TENSORS[tensor], LAYOUTS[layout]
    layout(folder, name)
    said = refusal(folder)
    assert (said is None) == loads(folder, sound)
    if layout not in (not_indexed_stale, adapter_beside_single):  # Which only vLLM's own loading shows.
        assert without_vllm(folder) == (said is None)
    if text is None:
        assert said is None
    else:
        assert said is not None
        assert re.fullmatch(text.replace("{name}", re.escape(name)), said)


# --- the same cause, and the fix that it gets --------------------------------------------------------


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a config.json."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def rename(folder: Path, *substitutions: tuple[str, str]) -> None:
    """Rename the tensors of a checkpoint in one file."""
    tensors = load_file(folder / "model.safetensors")
    for pattern, new in substitutions:
        tensors = {re.sub(pattern, new, name): tensor for name, tensor in tensors.items()}
    save(folder / "model.safetensors", tensors)


def add(file: Path, tensors: Tensors) -> None:
    """Add tensors to a file."""
    save(file, load_file(file) | tensors)


def double_names(folder: Path) -> None:
    """As transformers 5.4 saved them."""
    rename(folder, ("_scales$", "_blocks_scales"), ("_blocks$", "_blocks_blocks"))


def tie(folder: Path) -> None:
    """Leave out the head, which is the embedding."""
    save(folder / "model.safetensors", without("lm_head.weight"))
    change_config(folder, lambda config: config.update(tie_word_embeddings=True))


def dequantize(folder: Path) -> None:
    """Make the weights bf16, and leave config.json as it is."""
    tiny_checkpoint.write_dequantized(folder, folder.with_name("dequantized"))
    shutil.copy(folder.with_name("dequantized") / "model.safetensors", folder)


def list_extra(folder: Path) -> None:
    """List in the index what extra.safetensors has."""
    index = json.loads((folder / INDEX).read_text())
    names = load_file(folder / "extra.safetensors")
    write_index(folder, index["weight_map"] | dict.fromkeys(names, "extra.safetensors"))


@dataclass(frozen=True)
class Cause:
    """What was done to a checkpoint in one file.

    Args:
        spoil: does it.
        text: the refusal.
        follow: what its fix asks for.
        flag: the value of --quantization behind that.
    """

    spoil: Callable[[Path], object]
    text: str
    follow: Callable[[Path], object]
    flag: str | None = engine.FLAG


NAME = TENSORS["sinks"]
CAUSES = {
    "doubled": Cause(
        double_names,
        r"model\..*_blocks_(blocks|scales) must be named \*_blocks or \*_scales; "
        r"got 8 names with _blocks twice, as a release of transformers saved them\. "
        r"Rename \*_blocks_blocks to \*_blocks and \*_blocks_scales to \*_scales, in the index too\.",
        lambda folder: rename(folder, ("_blocks_scales$", "_scales"), ("_blocks_blocks$", "_blocks")),
    ),
    "prefix": Cause(
        lambda folder: rename(folder, ("^", "base_model.model.")),
        r"the tensors' names must be GPT-OSS's, such as model\.norm\.weight; "
        r"got base_model\.model\. before each of them\. "
        r"Rename them without base_model\.model\., in the index too\.",
        lambda folder: rename(folder, (r"^base_model\.model\.", "")),
    ),
    "tied": Cause(
        tie,
        r"lm_head\.weight must be in the checkpoint, as the served model has a head of its own; "
        r"got none, but tie_word_embeddings in config\.json\. "
        r"Save a copy of model\.embed_tokens\.weight by that name\.",
        lambda folder: add(
            folder / "model.safetensors", {"lm_head.weight": SOUND["model.embed_tokens.weight"].clone()}
        ),
    ),
    "dequantized": Cause(
        dequantize,
        r"model\..*\.experts\..*_proj must be MXFP4, as quantization_config in config\.json says; "
        r"got BF16 \[4, .*\], which is not quantized\. "
        r"Remove quantization_config from config\.json and serve without --quantization mxfp4-triton\.",
        lambda folder: change_config(folder, lambda config: config.pop("quantization_config")),
        flag=None,
    ),
    "no-quantization-config": Cause(
        lambda folder: change_config(folder, lambda config: config.pop("quantization_config")),
        r"quantization_config in .*/config\.json must be there; got none, though "
        r"model\.safetensors holds MXFP4\. "
        r'Restore it: "quantization_config": {"quant_method": "mxfp4"}\.',
        lambda folder: change_config(
            folder, lambda config: config.update(quantization_config={"quant_method": "mxfp4"})
        ),
    ),
    "unlisted": Cause(
        lambda folder: unlisted(folder, NAME),
        ".*" + LISTED,
        list_extra,
    ),
    "hidden": Cause(
        lambda folder: dot_file_only(folder, NAME),
        r".* or put into them what \.model\.safetensors has\.",
        lambda folder: add(folder / "model.safetensors", load_file(folder / ".model.safetensors")),
    ),
    "consolidated": Cause(
        lambda folder: consolidated_without(folder, NAME),
        r".*consolidated\.safetensors\. Move these away, .*",
        lambda folder: (folder / "consolidated.safetensors").unlink(),
    ),
    "stale": Cause(
        lambda folder: not_indexed_stale(folder, NAME),
        r".*Move away what is not this model's\.",
        lambda folder: (folder / "old.safetensors").unlink(),
    ),
    "adapter": Cause(
        lambda folder: adapter_beside_single(folder, NAME),
        r".*If adapter_model\.safetensors is not the model's, move it away: .*",
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
    ),
    "absent-file": Cause(
        lambda folder: (shard(folder, SOUND), (folder / "model-00002-of-00003.safetensors").unlink()),
        r".*got model-00002-of-00003\.safetensors, absent\. Download what is absent into .*",
        lambda folder: shard(folder, SOUND),
    ),
}


@pytest.mark.parametrize("cause", CAUSES.values(), ids=CAUSES)
def test_cause(cause: Cause, folder: Path) -> None:
    """The true cause is said before anything is loaded, and what is said to do makes the model load."""
    single(folder, NAME)
    cause.spoil(folder)
    said = refusal(folder)
    assert said is not None
    assert re.search(cause.text, said)
    cause.follow(folder)
    # In another directory, as vLLM remembers what is in one.
    load_model.load(shutil.copytree(folder, folder.with_name("followed")), quantization=cause.flag)


# --- names that vLLM's loader takes ------------------------------------------------------------------


def fuse(tensors: Tensors) -> Tensors:
    """Queries, keys and values in one tensor."""
    rest = {name: tensor for name, tensor in tensors.items() if not re.search(r"\.[qkv]_proj\.", name)}
    return rest | {
        f"model.layers.{layer}.self_attn.qkv_proj.{part}": torch.cat(
            [tensors[f"model.layers.{layer}.self_attn.{name}_proj.{part}"] for name in "qkv"]
        )
        for layer in range(MODEL.layers)
        for part in ("weight", "bias")
    }


def split(tensors: Tensors) -> Tensors:
    """Each expert by itself."""
    found = {}
    for name, tensor in tensors.items():
        layer, experts, part = name.partition(".experts.")
        if experts:
            found |= {f"{layer}.experts.{i}.{part}": expert for i, expert in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


def give_vllm_names(tensors: Tensors) -> Tensors:
    """As vLLM calls its parameters."""
    for old, new in ((".self_attn.", ".attn."), ("embed_tokens", "embedding")):
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    return tensors


@pytest.mark.parametrize(
    "change",
    [
        fuse,
        split,
        give_vllm_names,
        lambda tensors: tensors | {"model.rotary_emb.inv_freq": torch.ones(16)},
        lambda tensors: tensors | {f"{LAYER}.self_attn.extra": torch.ones(16)},
    ],
    ids=["fused", "per-expert", "vllm", "inv-freq", "ignored"],
)
def test_names(change: Callable[[Tensors], Tensors], folder: Path, sound: Tensors) -> None:
    """Whatever vLLM makes the sound model of is accepted; with any tensor less it is not."""
    tensors = change(SOUND)
    save(folder / "model.safetensors", tensors)
    assert refusal(folder) is None
    assert loads(folder, sound)
    assert without_vllm(folder)
    needed = [name for name in tensors if LAYER in name or "layers" not in name]
    for name in needed[:: 1 + len(needed) // 9]:
        save(folder / "model.safetensors", {key: value for key, value in tensors.items() if key != name})
        needless = "model.rotary_emb.inv_freq", f"{LAYER}.self_attn.extra"
        assert (refusal(folder) is None) == (name in needless) == loads(folder, sound) == without_vllm(folder)


CLASSIFIER = {
    "architectures": ["GptOssForSequenceClassification"],
    "num_labels": 3,
    "id2label": {str(i): str(i) for i in range(3)},
    "label2id": {str(i): i for i in range(3)},
}


def test_pooling(folder: Path) -> None:
    """Models with another head, or none."""
    score = {"score.weight": torch.randn(3, MODEL.hidden).bfloat16()}
    save(folder / "model.safetensors", without("lm_head.weight"))
    assert "tensors without lm_head.weight" in str(refusal(folder))
    assert refusal(folder, runner="pooling", convert="embed") is None
    change_config(folder, lambda config: config.update(CLASSIFIER))
    assert "tensors without score.weight" in str(refusal(folder, runner="pooling"))
    save(folder / "model.safetensors", without("lm_head.weight") | score)
    assert refusal(folder, runner="pooling") is None
