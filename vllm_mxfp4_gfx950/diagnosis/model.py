"""What a model would run on here, asked as a server asks."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_mxfp4_gfx950.diagnosis import Check, refusal
from vllm_mxfp4_gfx950.diagnosis.environment import installed
from vllm_mxfp4_gfx950.diagnosis.machine import check_gpus, check_masks, no_gpu, visible
from vllm_mxfp4_gfx950.errors import Mxfp4Error, brief

if TYPE_CHECKING:
    from vllm_mxfp4_gfx950.backends import Entry, TiledBackend
    from vllm_mxfp4_gfx950.moe import MoeShape
    from vllm_mxfp4_gfx950.settings import Settings


def check_backends(arch: str | None, model: str | None, tp: int, ep: int) -> list[Check]:
    """The GPUs, the settings, each backend and its package, and what each model would run on.

    Raises:
        Mxfp4Error: there is no such model, or its ranks do not fit.
    """
    from vllm_mxfp4_gfx950 import backends
    from vllm_mxfp4_gfx950.models import GPT_OSS, layer_shape

    masks = check_masks(arch is None)
    arches = [arch.partition(":")[0]] if arch else visible()
    if not arches:
        return [*masks, no_gpu()]
    first = arches[0]
    steering, asked = check_settings(first)
    models = [check_model(name, first, asked, tp, ep) for name in ([model] if model else GPT_OSS)]
    served = all(line.ok for _, lines in models for line in lines)
    chosen = {name for name, _ in models}
    tried = backends.families(first, asked) if asked and not served else ()
    usual = layer_shape("gpt-oss-20b")
    try:
        shape = layer_shape(model_name(model), tp, ep) if model else usual
    except Mxfp4Error:
        shape = usual  # Its own line says what is wrong with the model.
    return [
        *masks,
        check_gpus(arches, arch, tp, served),
        *steering,
        Check(True, "triton", installed("triton"), "for the triton backends"),
        *(
            check_backend(entry, shape, first, entry.name in chosen, family in tried, family)
            for family, members in backends.FAMILIES.items()
            for entry in members
        ),
        *(line for _, lines in models for line in lines),
    ]


def model_name(model: str) -> str:
    """What `layer_shape` takes of a model as the user wrote it, who may have named its owner."""
    return model.removeprefix("openai/")


def check_settings(arch: str) -> tuple[list[Check], Settings | None]:
    """Our variables, and the user's tiles; None for the settings where a server would refuse one."""
    from vllm_mxfp4_gfx950 import settings, tables

    try:
        asked = settings.from_environment()
    except Mxfp4Error as error:
        return [refusal("settings", error)], None
    found = (
        f"{settings.BACKEND_VAR}={asked.backend}, {settings.STRICT_VAR}={int(asked.strict)}, "
        f"{settings.SELF_CHECK_VAR}={asked.self_check}, {settings.TABLES_VAR}={asked.tables or 'unset'}, "
        f"{settings.TIME_AT_LOAD_VAR}={asked.time_at_load:d}"
    )
    checks = [Check(True, "settings", found, "values that exist")]
    if asked.tables:
        try:
            content = tables.content(asked.tables, arch)
        except Mxfp4Error as error:
            return [*checks, refusal("tables", error)], None
        found = f"none for {arch}"
        if content.tiles or content.plans:
            matmuls, layers = (
                f"tiles of {len(content.tiles)} matmuls",
                f"plans of {len(content.plans)} layers",
            )
            found = f"{matmuls} and {layers} in {asked.tables / arch}.json"
        checks.append(Check(True, "tables", found, f"none, or a table of {arch}"))
    return checks, asked


def check_backend(entry: Entry, shape: MoeShape, arch: str, chosen: bool, missed: bool, family: str) -> Check:
    """One backend: whether it works here, by which package, and whether that matters.

    Args:
        entry: that is asked.
        shape: the layer, of the model or of GPT-OSS-20B.
        arch: of the GPU.
        chosen: whether a model runs through it.
        missed: whether a model that is not served might run through it.
        family: what the user calls it.
    """
    from vllm_mxfp4_gfx950.backends.triton import package
    from vllm_mxfp4_gfx950.models import layer_shape

    works, found = state_of(entry, shape, arch)
    if chosen or not missed:
        return Check(True, entry.name, found, "chosen" if chosen else "not needed here")
    fix = "Install the aiter that vLLM's build for this GPU names"
    if family in ("triton", "two_fp8"):
        fix = package.remedy()
    if not works and state_of(entry, layer_shape("gpt-oss-20b"), arch)[0]:
        fix = "Nothing is to be mended here: it is this model's sizes"
    return Check(works, entry.name, found, "one that works", fix)


def state_of(entry: Entry, shape: MoeShape, arch: str) -> tuple[bool, str]:
    """Whether a backend works on this arch; and why not, or which package does the work.

    It is asked about gfx950 too, so that a package's own faults show wherever one looks.
    """
    try:
        here, package = (entry.why_not(shape, a) for a in (arch, "gfx950"))
        texts = dict.fromkeys((here, package or entry.load().source()))
    except Exception as error:
        return False, brief(error)
    return here is None, "; ".join(filter(None, texts))


def check_model(model: str, arch: str, asked: Settings | None, tp: int, ep: int) -> tuple[str, list[Check]]:
    """What a model would run on, asked as a server asks.

    Args:
        model: as the user wrote it.
        arch: of the GPU.
        asked: the settings; None where they are wrong.
        tp, ep: ranks.

    Returns:
        the backend's name, or "", and the lines.

    Raises:
        Mxfp4Error: there is no such model, or its ranks do not fit.
    """
    from vllm_mxfp4_gfx950 import backends
    from vllm_mxfp4_gfx950.models import layer_shape

    name = model_name(model)
    try:
        whole, shape = layer_shape(name), layer_shape(name, tp, ep)
    except Mxfp4Error as error:
        if error.name in ("--model", "--tp", "--ep"):
            raise
        return "", [refusal(model, error)]
    lines = check_checkpoint(Path(model), whole) if Path(model).is_dir() else []
    rule = f"a backend for {shape}"
    if asked is None:
        return "", [*lines, Check(False, model, "not asked", rule, "Mend the settings first")]
    try:
        chosen = backends.select(shape, arch, asked).backend
    except Exception as error:  # An import meets whatever packages there are.
        found = str(error.value) if isinstance(error, Mxfp4Error) else brief(error)
        return "", [*lines, Check(False, model, found, rule, "See above")]
    found = chosen.NAME
    if isinstance(chosen, backends.TiledBackend):
        found += f", tiles of {tiles_of(chosen, shape, arch, asked)}"
    elif arch != "cpu" and asked.backend == "reference":
        found += ", with --enforce-eager alone"
    return chosen.NAME, [*lines, Check(True, model, found, rule)]


def tiles_of(backend: TiledBackend, shape: MoeShape, arch: str, asked: Settings) -> str:
    """Whose tiles serve a layer."""
    from vllm_mxfp4_gfx950 import tables
    from vllm_mxfp4_gfx950.tiles import gemms

    triton = importlib.import_module("triton").__version__
    whose = (tables.whose(arch, backend.KERNELS, triton, gemm, asked.tables) for gemm in gemms(shape))
    return " and ".join(dict.fromkeys(whose))


def check_checkpoint(directory: Path, whole: MoeShape) -> list[Check]:
    """A checkpoint's files, by what can be read of them without loading."""
    from vllm_mxfp4_gfx950 import files
    from vllm_mxfp4_gfx950.models import read_config

    config = read_config(directory)
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    try:
        files.check_method(directory, method)
        read = files.check_directory(directory, config, whole)
    except Mxfp4Error as error:
        return [refusal("checkpoint", error)]
    size = sum(file.stat().st_size for file in read)
    files_read = f"{len(read)} safetensors file{'s' * (len(read) != 1)}"
    found, rule = f"{files_read}, {size / 1e9:.3f} GB", "a whole GPT-OSS in MXFP4"
    fix = f"Download the model's *.safetensors into {directory}"
    return [Check(bool(read), "checkpoint", found, rule, fix)]
