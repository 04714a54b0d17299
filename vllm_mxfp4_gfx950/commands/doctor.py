"""Say what is installed here, what serving GPT-OSS needs of it, and which backend would be chosen."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_mxfp4_gfx950 import plugins
from vllm_mxfp4_gfx950.errors import Mxfp4Error, brief

if TYPE_CHECKING:
    from vllm_mxfp4_gfx950.backends import Entry, TiledBackend
    from vllm_mxfp4_gfx950.moe import MoeShape
    from vllm_mxfp4_gfx950.settings import Settings

DISTRIBUTION = "vllm-mxfp4-gfx950"
PLUGIN_GROUP, PLUGIN = "vllm.general_plugins", "mxfp4_triton"
NEVER_REQUIRED = ("torch", "triton", "triton-kernels", "vllm")
"""What an install of ours must not replace."""

ROUTED_EXPERTS = Path("model_executor", "layers", "fused_moe", "routed_experts.py")
"""The file of vLLM that our plugin's layer came with, in 0.24."""

MASKS = {
    "hip": ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"),
    "cuda": ("CUDA_VISIBLE_DEVICES",),
}
"""The variables that hide GPUs, by the platform that torch is built for."""

PRODUCTS = {
    "gfx950": ("mi350", "mi355"),
    "gfx942": ("mi300", "mi308", "mi325"),
    "sm90": ("h100", "h200", "h800", "h20", "hopper"),
}
"""How else people call an arch, to say which one they mean."""

COLUMN = 48
"""A longer text runs over its column's end, so that one line does not stretch them all."""


@dataclass(frozen=True)
class Check:
    """One line of the answer.

    Args:
        ok: False when GPT-OSS cannot be served because of this.
        what: the piece.
        found: what is here.
        needed: what has to be.
        fix: what to do when it is not ok.
    """

    ok: bool
    what: str
    found: str
    needed: str
    fix: str = ""


def run(args: argparse.Namespace) -> int:
    """Print the checks, a line each; the exit code is 1 when one of them failed."""
    with contextlib.redirect_stdout(sys.stderr):  # Some packages print when they are imported.
        checks = examine(args.arch, args.model, args.tp, args.ep)
    if args.json:
        print(json.dumps([dataclasses.asdict(check) for check in checks], indent=1))
    else:
        print(table(checks))
    return 0 if all(check.ok for check in checks) else 1


def table(checks: list[Check]) -> str:
    """Aligned columns: ok or FAIL, what, found, needed, fix."""
    rows = [
        ("ok" if c.ok else "FAIL", c.what, " ".join(c.found.split()), c.needed, "" if c.ok else c.fix)
        for c in checks
    ]
    widths = [min(COLUMN, max(map(len, column))) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def examine(arch: str | None = None, model: str | None = None, tp: int = 1, ep: int = 1) -> list[Check]:
    """Every check, in the order in which faults should be mended.

    Args:
        arch: the GPU to answer for, also as rocminfo prints it; None for those that torch sees.
        model: as `models.layer_shape` takes it; None for both of GPT-OSS.
        tp, ep: likewise.
    """
    return [
        *guarded("torch", check_torch),
        *guarded("dependencies", check_dependencies),
        *guarded("vllm", check_vllm),
        *guarded("plugin", check_plugin),
        *guarded("other plugins", check_other_plugins),
        *guarded("backends", lambda: check_backends(arch, model, tp, ep)),
    ]


def guarded(what: str, check: Callable[[], list[Check]]) -> list[Check]:
    """A check's answer, or what a missing or broken package raised."""
    try:
        return check()
    except Mxfp4Error:
        raise  # What was asked for is wrong, not what is here.
    except Exception as error:
        return [Check(False, what, brief(error), "to be found without an error", "Install it again")]


def refusal(what: str, error: Mxfp4Error) -> Check:
    """The line of something that a server would refuse with this error."""
    return Check(False, what, f"{error.name}: {error.value}", error.rule, error.fix)


def directory_of(package: str) -> Path | None:
    """Where a package would be imported from."""
    spec = util.find_spec(package)
    places = (spec.submodule_search_locations or [str(spec.origin)]) if spec else []
    return next(map(Path, places), None)


def installed(package: str) -> str:
    """Which distribution a package is of and where it lies, found without importing it."""
    directory = directory_of(package)
    if directory is None:
        return "not installed"
    for name in metadata.packages_distributions().get(package, ()):
        distribution = metadata.distribution(name)
        if Path(str(distribution.locate_file(package))).resolve() == directory.resolve():
            return f"{name} {distribution.version} in {directory}"
    return f"in {directory}"


def check_torch() -> list[Check]:
    """Torch, and the GPU platform that it was built for."""
    torch = importlib.import_module("torch")
    platforms = {"hip": torch.version.hip, "cuda": torch.version.cuda}
    built_for = [f"{name} {version}" for name, version in platforms.items() if version] or ["cpu only"]
    return [Check(True, "torch", f"{torch.__version__}, {built_for[0]}", "the build that vllm needs")]


def check_dependencies() -> list[Check]:
    """What installing this package pulls in."""
    required = [r for r in metadata.requires(DISTRIBUTION) or () if "extra ==" not in r]
    names = {re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower() for requirement in required}
    found = ", ".join(required) or "none"
    rule = f"none of {', '.join(NEVER_REQUIRED)}"
    fix = f"Install {DISTRIBUTION} with --no-deps, and report this"
    return [Check(names.isdisjoint(NEVER_REQUIRED), "dependencies", found, rule, fix)]


def check_vllm() -> list[Check]:
    """The host, looked at without importing it, which takes seconds."""
    directory = directory_of("vllm")
    ok = directory is not None and (directory / ROUTED_EXPERTS).is_file()
    return [Check(ok, "vllm", installed("vllm"), "0.24 or later", "Install vLLM 0.24 or later")]


def check_plugin() -> list[Check]:
    """Whether vLLM would find this package and load it."""
    points = metadata.entry_points(group=PLUGIN_GROUP, name=PLUGIN)
    found = ", ".join(point.value for point in points) or "not registered"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None:
        found += f", VLLM_PLUGINS={allowed}"
    ok = bool(points) and (allowed is None or PLUGIN in allowed.split(","))
    fix = f"Unset VLLM_PLUGINS or add {PLUGIN} to it" if points else "pip install this package's checkout"
    return [Check(ok, "plugin", found, f"{PLUGIN} in {PLUGIN_GROUP}", fix)]


def check_other_plugins() -> list[Check]:
    """Whether another plugin puts a model of its own in the place of vLLM's GPT-OSS."""
    replacing = plugins.replacing_model()
    found, fix = replacing or "none known to replace it", plugins.how_to_turn_off(plugins.ATOM)
    return [Check(not replacing, "other plugins", found, "vLLM's own GPT-OSS", "" if not replacing else fix)]


def check_backends(arch: str | None, model: str | None, tp: int, ep: int) -> list[Check]:
    """The GPUs, the settings, each backend and its package, and what each model would run on.

    Raises:
        Mxfp4Error: there is no such model, or its ranks do not fit.
    """
    from vllm_mxfp4_gfx950 import backends
    from vllm_mxfp4_gfx950.arch import arch_named
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
    tried: tuple[str, ...] = ()
    if asked and not served:
        tried = arch_named(first).families if asked.backend == "auto" else (asked.backend,)
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


def platform() -> str:
    """What torch is built for: "hip", "cuda" or "cpu"."""
    torch = importlib.import_module("torch")
    return "hip" if torch.version.hip else "cuda" if torch.version.cuda else "cpu"


def masks_set() -> dict[str, str]:
    """The variables that may hide GPUs from this platform, as they are set."""
    found = {name: os.environ[name] for name in MASKS.get(platform(), ()) if name in os.environ}
    # To HIP a blank one of its own is none.
    blank_hides = ("ROCR_VISIBLE_DEVICES",) if platform() == "hip" else found
    return {name: value for name, value in found.items() if value or name in blank_hides}


def visible() -> list[str]:
    """The arch of each GPU that torch sees; "cpu" alone where it is built for none."""
    import torch

    from vllm_mxfp4_gfx950.backends import arch_of

    if platform() == "cpu":
        return [arch_of(torch.device("cpu"))]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [arch_of(torch.device("cuda", index)) for index in range(count)]


def check_masks(must_show: bool) -> list[Check]:
    """What hides GPUs from this process, or makes vLLM stop.

    Args:
        must_show: whether a GPU has to be left.

    Source: vLLM 0.33, platforms/rocm.py, _sync_hip_cuda_env_vars.
    """
    if platform() == "cpu":
        return []
    masks = masks_set()
    found = " ".join(f"{name}={value}" for name, value in masks.items()) or "none"
    hip, cuda = masks.get("HIP_VISIBLE_DEVICES"), masks.get("CUDA_VISIBLE_DEVICES")
    fix = ""
    if platform() == "hip" and hip and cuda and hip != cuda:
        fix = "Set one of HIP_VISIBLE_DEVICES and CUDA_VISIBLE_DEVICES alone: vLLM stops where they differ"
    elif masks and must_show and not visible():
        fix = f"Unset {' and '.join(masks)}"
        if "ROCR_VISIBLE_DEVICES" in masks and len(masks) > 1:
            fix += ": the GPUs that ROCR_VISIBLE_DEVICES leaves are counted from 0 again"
    return [Check(not fix, "masks", found, "none that hides all GPUs or contradicts another", fix)]


def no_gpu() -> Check:
    """The line of a build for GPUs that sees none."""
    fix = "Give the container the GPU (/dev/kfd and /dev/dri on ROCm), or ask with --arch"
    if masks_set():
        fix = f"Mend the masks. If that is not it: {fix[0].lower()}{fix[1:]}"
    return Check(False, "GPU", "torch is built for one and sees none", "a visible GPU", fix)


def check_gpus(arches: list[str], asked: str | None, tp: int, served: bool) -> Check:
    """The GPUs, of which a server takes the first, or one for each rank.

    Args:
        arches: of all of them.
        asked: what the user wrote for an arch; None where these are what torch sees.
        tp: ranks.
        served: whether the model is served on the first one.
    """
    from vllm_mxfp4_gfx950 import settings
    from vllm_mxfp4_gfx950.arch import ARCHES

    others = [arch for arch in arches[:tp] if arch not in ARCHES and arch != arches[0]]
    ok = (arches[0] in ARCHES or served) and not others
    if len({*arches}) == 1:
        found = arches[0] if len(arches) == 1 else f"{len(arches)} x {arches[0]}"
    else:
        found = ", ".join(f"{index}: {arch}" for index, arch in enumerate(arches))
    right = [index for index, arch in enumerate(arches) if arch in ARCHES]
    fix = f"Run on one of these, or slowly with {settings.BACKEND_VAR}=reference and --enforce-eager"
    if asked:
        fix = hint(asked) or fix
    elif right:
        default = "HIP_VISIBLE_DEVICES" if platform() == "hip" else "CUDA_VISIBLE_DEVICES"
        mask = next((name for name in masks_set() if name != "ROCR_VISIBLE_DEVICES"), default)
        numbers = os.environ.get(mask) or ",".join(map(str, range(len(arches))))
        shown = ",".join(numbers.split(",")[index] for index in right)
        fix = f"{mask}={shown}, as a server takes the first GPUs that it sees"
    return Check(ok, "GPU", found, f"one of {', '.join(ARCHES)}", "" if ok else fix)


def hint(arch: str) -> str:
    """Which arch the user may have meant; "" where that cannot be told."""
    from vllm_mxfp4_gfx950.arch import ARCHES

    word = re.sub(r"[^a-z0-9]", "", arch.lower())
    for name, products in PRODUCTS.items():
        if any(product in word for product in products):
            return f"Write --arch {name}, which {arch} is"
    return f"Write --arch {word}" if word in ARCHES else ""


def check_settings(arch: str) -> tuple[list[Check], Settings | None]:
    """Our variables, and the user's tiles; None for the settings where a server would refuse one."""
    from vllm_mxfp4_gfx950 import settings, tables

    try:
        asked = settings.from_environment()
    except Mxfp4Error as error:
        return [refusal("settings", error)], None
    found = (
        f"{settings.BACKEND_VAR}={asked.backend}, {settings.STRICT_VAR}={int(asked.strict)}, "
        f"{settings.SELF_CHECK_VAR}={asked.self_check}, {settings.TABLES_VAR}={asked.tables or 'unset'}"
    )
    checks = [Check(True, "settings", found, "values that exist")]
    if asked.tables:
        try:
            matmuls = len(tables.users(asked.tables, arch))
        except Mxfp4Error as error:
            return [*checks, refusal("tables", error)], None
        found = f"{matmuls} matmuls in {asked.tables / arch}.json" if matmuls else f"none for {arch}"
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


def model_name(model: str) -> str:
    """A model as `models.layer_shape` takes it."""
    return model.removeprefix("openai/")


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
    from vllm_mxfp4_gfx950 import checkpoint, files
    from vllm_mxfp4_gfx950.models import read_config

    config = read_config(directory)
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    try:
        if method is None:
            files.check_not_mxfp4(directory)
        checkpoint.check_method(method)
        read = files.check_directory(directory, config, whole)
    except Mxfp4Error as error:
        return [refusal("checkpoint", error)]
    size = sum(file.stat().st_size for file in read)
    found, rule = f"{len(read)} safetensors files, {size / 1e9:.3f} GB", "a whole GPT-OSS in MXFP4"
    fix = f"Download the model's *.safetensors into {directory}"
    return [Check(bool(read), "checkpoint", found, rule, fix)]
