"""A checkpoint's files: which of them are whole, and what a model's own loader would take from them."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_mxfp4_gfx950.checkpoint import EXPERT, FIELDS, OTHER_MODEL, TENSORS, check_expert
from vllm_mxfp4_gfx950.errors import Mxfp4Error, brief
from vllm_mxfp4_gfx950.moe import MoeShape
from vllm_mxfp4_gfx950.settings import FLAG

INDEX = "model.safetensors.index.json"
POINTER = b"version https://git-lfs.github.com/spec/"

METHODS = ("mxfp4", "gpt_oss_mxfp4")
"""What GPT-OSS calls its format, and what vLLM renames it to while it reads the config."""

ANEW = "Download it anew: without --force-download, `hf download` keeps a file that is there"

Header = dict[str, tuple[str, list[int]]]
"""Dtype and shape of a file's tensors by their names, as safetensors names them."""


def check_method(folder: Path, quant_method: str | None) -> None:
    """Raise Mxfp4Error unless a checkpoint says that it is MXFP4.

    Args:
        folder: the checkpoint's, where it is on this machine.
        quant_method: of quantization_config in its config.json; None where that is not there.
    """
    if quant_method is None:
        check_not_mxfp4(folder)
    if quant_method not in METHODS:
        raise Mxfp4Error(
            "quantization_config.quant_method",
            f"mxfp4 for --quantization {FLAG}",
            quant_method,
            "Serve this checkpoint without the flag, or use one of GPT-OSS's MXFP4 checkpoints",
        )


def check_not_mxfp4(folder: Path) -> None:
    """Raise Mxfp4Error for a checkpoint of experts in MXFP4: its config.json has no quantization_config."""
    for file in sorted(folder.glob("[!.]*.safetensors")):
        names: Iterable[str] = ()
        with suppress(Mxfp4Error):
            names = read_header(file)
        if any(name.endswith(f".experts.{TENSORS['w13']}") for name in names):
            raise Mxfp4Error(
                f"quantization_config in {folder}/config.json",
                "there",
                f"none, though {file.name} holds MXFP4",
                'Restore it: "quantization_config": {"quant_method": "mxfp4"}',
            )


def read_header(file: Path) -> Header:
    """The tensors of a safetensors file.

    Raises:
        Mxfp4Error: it is not there, stands for another file, or is cut off.
    """
    if file.is_symlink() and not file.exists():
        got = f"a link to {file.readlink()}, which is not there"
        fix = "Put that back, or download the file again"
        raise Mxfp4Error(str(file), "a safetensors file", got, fix)
    try:
        with file.open("rb") as content:
            pointer = content.read(len(POINTER)) == POINTER
        if pointer:
            fix = f"Run `git lfs install` and `git lfs pull` in {file.parent}, or download it another way"
            raise Mxfp4Error(str(file), "a safetensors file", "a git-lfs pointer to it", fix)
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except SafetensorError as error:
        raise Mxfp4Error(str(file), "a whole safetensors file", str(error), ANEW) from error
    except OSError as error:
        raise Mxfp4Error(str(file), "a file that can be read", brief(error), "Correct that") from error


def index_of(files: Iterable[Path]) -> Path | None:
    """The index by which these files were chosen."""
    file = next(iter(files))
    # vLLM has an index of their own for files that are called so.
    name = "consolidated.safetensors.index.json" if file.name.startswith("consolidated") else INDEX
    return file.with_name(name) if file.with_name(name).is_file() else None


def check_index(folder: Path) -> None:
    """Raise Mxfp4Error for an index that is none, or that lists files which are not there."""
    for index in sorted(folder.glob("[!.]*.safetensors.index.json")):
        try:
            listed = {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Mxfp4Error(str(index), "an index of safetensors files", brief(error), ANEW) from error
        absent = sorted(name for name in listed if not (folder / name).is_file())
        if absent:
            fix = f"Download what is absent into {folder}"
            raise Mxfp4Error(str(index), "a list of files that are there", f"{listing(absent)}, absent", fix)


class Loading(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, what is written to tensors is noted and not written.

    Then a model's own loading tells what it takes from where, and no more than headers is read: safetensors
    maps the rest.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tensor: tuple[Path, str] | None = None
        # By storage; and there by offset, shape and strides, where that was written from.
        self.written: dict[int, dict[tuple[Any, ...], set[tuple[Path, str]]]] = defaultdict(dict)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        copied = func is torch.ops.aten.copy_.default
        if not copied and func not in (
            torch.ops.aten.zero_.default,
            torch.ops.aten.fill_.Scalar,
            torch.ops.aten.fill_.Tensor,
        ):
            return func(*args, **(kwargs or {}))
        target = args[0]
        part = target.storage_offset(), tuple(target.shape), target.stride()
        sources = self.written[storage_of(target)].setdefault(part, set())
        if copied:
            args[1].expand(target.shape)  # Raises what the copy would raise.
            if self.tensor is not None:
                sources.add(self.tensor)
        return target

    def tensors(self, files: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor]]:
        """The files' tensors, one after another."""
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    self.tensor = file, name
                    yield name, tensors.get_tensor(name)

    def absent(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """The parameters that were not written in whole, and how many of their values were."""
        values = {
            name: sum(math.prod(shape) for _, shape, _ in self.written[storage_of(parameter)])
            for name, parameter in parameters.items()
        }
        return {name: count for name, count in values.items() if count < parameters[name].numel()}

    def check_once(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Raise Mxfp4Error where two different tensors were written to the same place."""
        for parameter in parameters.values():
            parts = self.written[storage_of(parameter)]
            groups = [sorted(sources) for sources in parts.values()]
            if sum(math.prod(shape) for _, shape, _ in parts) > parameter.numel():
                groups = [sorted(set().union(*parts.values()))]
            for one, other in (pair for group in groups for pair in itertools.pairwise(group)):
                if not same_bytes(one, other):
                    got = " and ".join(f"{name} in {file}" for file, name in (one, other))
                    fix = "Move away what is not this model's"
                    raise Mxfp4Error(one[1], "given once", f"{got}, which differ", fix)


def storage_of(tensor: torch.Tensor) -> int:
    """What tensors have in common that share their values."""
    return int(tensor.untyped_storage()._cdata)


def same_bytes(*places: tuple[Path, str]) -> bool:
    """Whether tensors of files are the same."""
    found = []
    for file, name in places:
        with safe_open(file, framework="pt") as tensors:
            found.append(tensors.get_tensor(name))
    one, other = found
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    )


def check_files(
    files: list[Path], model: Any, names: Callable[[str], list[str]], tied: bool, layers: int, shape: MoeShape
) -> None:
    """Raise Mxfp4Error unless these files give a model all that it needs, before any of it is loaded.

    vLLM starts a quantized model without the tensors that it misses. So its own loading is followed here.

    Args:
        files: those that the framework reads, in one directory.
        model: one like the one that will be served: with `named_parameters` and `load_weights`.
        names: what a parameter of the model is made of in a checkpoint.
        tied: whether config.json ties the head to the embedding.
        layers: of the model.
        shape: one of them, whole.
    """
    headers = {file: read_header(file) for file in files}
    for header in headers.values():
        for name, (dtype, size) in header.items():
            check_expert(name, dtype, size, layers, shape)
    loading = Loading()
    try:
        with loading:
            model.load_weights(loading.tensors(files))
    except Exception as error:
        check_names(headers)
        if isinstance(error, Mxfp4Error) or loading.tensor is None:
            raise
        file, name = loading.tensor
        dtype, size = headers[file][name]
        fix = OTHER_MODEL
        if len(files) > 1 and not index_of(files):
            fix = f"If {file.name} is not the model's, move it away: all files are read where {INDEX} is not"
        raise Mxfp4Error(
            f"{name} in {file}",
            "a tensor that the model takes",
            f"{dtype} {size}: {brief(error).split('. ')[0]}",
            fix,
        ) from error
    parameters = dict(model.named_parameters())
    absent = loading.absent(parameters)
    if absent:
        check_names(headers)
        check_unlisted(headers, model, loading, names)
        there = {name for header in headers.values() for name in header}
        parts = [sorted({*names(parameter)} - there) or [f"all of {parameter}"] for parameter in absent]
        refuse_absent(headers, sorted(name for part in parts for name in part), tied)
    loading.check_once(parameters)


def check_names(headers: Mapping[Path, Header]) -> None:
    """Raise Mxfp4Error for names by which it is known what was done to a checkpoint."""
    tensors = {name: entry for header in headers.values() for name, entry in header.items()}
    doubled = [name for name in tensors if name.endswith(("_blocks_blocks", "_blocks_scales"))]
    if doubled:
        raise Mxfp4Error(
            doubled[0],
            "named *_blocks or *_scales",
            f"{len(doubled)} names with _blocks twice, as a release of transformers saved them",
            "Rename *_blocks_blocks to *_blocks and *_blocks_scales to *_scales, in the index too",
        )
    prefixes = {
        match[1] for match in (re.match(r"(.+?)model\.layers\.\d", name) for name in tensors) if match
    }
    for prefix in prefixes:
        if all(name.startswith(prefix) for name in tensors):
            raise Mxfp4Error(
                "the tensors' names",
                "GPT-OSS's, such as model.norm.weight",
                f"{prefix} before each of them",
                f"Rename them without {prefix}, in the index too",
            )
    floats = [
        name for name in tensors if re.search(r"\.experts\.(.*\.)?(gate_up|down)_proj(\.weight)?$", name)
    ]
    blocks = [name for name in tensors if name.endswith("_blocks")]
    if floats and not blocks:
        dtype, size = tensors[floats[0]]
        raise Mxfp4Error(
            floats[0],
            "MXFP4, as quantization_config in config.json says",
            f"{dtype} {size}, which is not quantized",
            f"Remove quantization_config from config.json and serve without --quantization {FLAG}",
        )


def check_unlisted(
    headers: Mapping[Path, Header], model: Any, loading: Loading, names: Callable[[str], list[str]]
) -> None:
    """Raise Mxfp4Error where a file that is not read has what is absent."""
    files = list(headers)
    there = {name for header in headers.values() for name in header}
    parameters = dict(model.named_parameters())
    for file in sorted({*files[0].parent.glob("*.safetensors")} - {*files}):
        before, header = loading.absent(parameters), Header()
        with suppress(Exception), loading:
            header = read_header(file)
            model.load_weights(loading.tensors([file]))
        after = loading.absent(parameters)
        found = [name for parameter in before.keys() - after.keys() for name in names(parameter)]
        if found:
            found = [name for name in found if name in header.keys() - there] or found
            if index := index_of(files):
                got, fix = f"{index.name} does not list", f"Add them to weight_map in {index}"
            else:
                got = f"is not read beside {listing([file.name for file in files])}"
                fix = f"Move these away, or put into them what {file.name} has"
            raise Mxfp4Error(
                listing(sorted(found)), "in a file that is read", f"{file.name}, which {got}", fix
            )


def refuse_absent(headers: Mapping[Path, Header], absent: list[str], tied: bool) -> None:
    """Raise Mxfp4Error for tensors that a checkpoint does not have."""
    if tied and absent == ["lm_head.weight"]:
        raise Mxfp4Error(
            absent[0],
            "in the checkpoint, as the served model has a head of its own",
            "none, but tie_word_embeddings in config.json",
            "Save a copy of model.embed_tokens.weight by that name",
        )
    folder = next(iter(headers)).parent
    raise Mxfp4Error(
        f"{folder}/*.safetensors",
        "the whole checkpoint",
        f"{sum(map(len, headers.values()))} tensors without {listing(absent)}",
        "Download the files that are missing, the index too; if none is, config.json is another model's",
    )


def check_directory(folder: Path, config: Any, shape: MoeShape) -> list[Path]:
    """`check_files` by the published names, where there is no framework to ask.

    Args:
        folder: the checkpoint.
        config: its config.json, as `models.read_config` gives it.
        shape: one of its layers, whole.

    Returns:
        The files that vLLM would read.

    Raises:
        Mxfp4Error: they are not all there and whole, or do not have all that a model needs.
    """
    check_index(folder)
    files = [*folder.glob("consolidated*.safetensors")] or [*folder.glob("[!.]*.safetensors")]
    if files and (index := index_of(files)):
        listed = json.loads(index.read_text())["weight_map"].values()
        files = [file for file in files if file.name in listed]
    headers = {file: read_header(file) for file in sorted(files)}
    layers = config.num_hidden_layers
    there: set[str] = set()
    for header in headers.values():
        for name, (dtype, size) in header.items():
            check_expert(name, dtype, size, layers, shape)
            there |= published_names(name)
    absent = []
    headless = "ForCausalLM" not in str(getattr(config, "architectures", None))
    for name in needed_tensors(layers, headless=headless):
        before, _, behind = name.rpartition(".")
        if name not in there and not {f"{before}.{i}.{behind}" for i in range(shape.experts)} <= there:
            absent.append(name)
    if absent and headers:
        check_names(headers)
        refuse_absent(headers, sorted(absent), bool(getattr(config, "tie_word_embeddings", False)))
    return list(headers)


def published_names(name: str) -> set[str]:
    """What GPT-OSS's own checkpoint calls the content of a tensor that vLLM takes by another name."""
    name = name.replace(".attn.", ".self_attn.").replace("model.embedding.", "model.embed_tokens.")
    expert = EXPERT.fullmatch(name)
    if expert and (field := FIELDS.get(expert[3])):
        return {".".join(filter(None, ("model.layers", expert[1], "mlp.experts", expert[2], TENSORS[field])))}
    return {name.replace(".qkv_proj.", f".{part}_proj.") for part in "qkv"}


def needed_tensors(layers: int, headless: bool) -> set[str]:
    """The tensors of GPT-OSS's own checkpoint."""
    linear = ("mlp.router", *(f"self_attn.{name}_proj" for name in "qkvo"))
    in_layer = [f"{name}.{part}" for name in linear for part in ("weight", "bias")]
    in_layer += ["self_attn.sinks", "input_layernorm.weight", "post_attention_layernorm.weight"]
    in_layer += [f"mlp.experts.{name}" for name in TENSORS.values()]
    outside = {"model.embed_tokens.weight", "model.norm.weight", *([] if headless else ["lm_head.weight"])}
    return outside | {f"model.layers.{index}.{name}" for index in range(layers) for name in in_layer}


def listing(names: list[str]) -> str:
    """The first three of them."""
    return f"{', '.join(names[:3])}{' and more' if names[3:] else ''}"
