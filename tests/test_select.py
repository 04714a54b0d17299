"""Which backend is chosen, over GPU, installed packages and settings, with the text of every refusal.

Each situation is a real directory in front of an interpreter's sys.path, and that interpreter answers for
every GPU and setting at once.
"""

import functools
import itertools
import json
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from run_python import run_python


@dataclass(frozen=True)
class Case:
    """What `select` is asked."""

    arch: str
    backend: str
    strict: bool
    alpha: float = 1.702


GPUS = ("gfx950", "gfx942", "sm90", "sm100", "gfx1100", "cpu")
BACKENDS = ("auto", "fastest", "triton", "two_fp8", "ck", "aiter_triton", "reference")
ASK = """
import json, sys
from vllm_mxfp4_gfx950.backends import select
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.moe import MoeShape
from vllm_mxfp4_gfx950.settings import Settings

for case in json.loads(sys.argv[1]):
    shape = MoeShape(32, 32, 4, 2880, 2880, case["alpha"], 7.0)
    try:
        answer = str(select(shape, case["arch"], Settings(case["backend"], case["strict"])))
    except Mxfp4Error as error:
        answer = str(error)
    print(json.dumps(answer))
"""

NO_AITER = {"aiter.py": "raise ModuleNotFoundError(\"No module named 'aiter'\", name='aiter')"}
NO_TRITON = {"triton.py": "raise ModuleNotFoundError(\"No module named 'triton'\", name='triton')"}
NO_COPY_IN_VLLM = {"vllm/__init__.py": ""}
IMPOSTOR = {"triton_kernels/__init__.py": "", "triton_kernels/add_vectors.py": ""}
UNKNOWN = {"triton_kernels/__init__.py": "", "triton_kernels/matmul_ogs.py": "def matmul_ogs(): ..."}
ANY_NAME = """
from unittest.mock import MagicMock
def __getattr__(name):
    if name.startswith("__") or name.endswith("MXScaleLayout"):
        raise AttributeError(name)
    return MagicMock()
"""
OLD_LAYOUTS = {"triton_kernels/__init__.py": ""} | {
    f"triton_kernels/{name}.py": ANY_NAME
    for name in (
        "matmul",
        "matmul_ogs",
        "matmul_ogs_details/opt_flags",
        "numerics",
        "reduce",
        "routing",
        "swiglu",
        "tensor",
        "tensor_details/layout",
    )
}
AITER_METADATA = {
    "amd_aiter-0.1.20.dist-info/METADATA": "Metadata-Version: 2.1\nName: amd-aiter\nVersion: 0.1.20\n",
    "aiter/__init__.py": "",
}
# The signatures of ROCm/aiter, aiter/fused_moe.py, as far as they matter here: today's and an early one.
AITER = AITER_METADATA | {
    "aiter/fused_moe.py": "def fused_moe(hidden_states, w1, w2, topk_weight, topk_ids, expert_mask=None, "
    "activation=None, quant_type=None, w1_scale=None, w2_scale=None, bias1=None, bias2=None, "
    "gate_mode='separated', quant_dtype_a=None): ..."
}
OLD_AITER = AITER_METADATA | {
    "aiter/fused_moe.py": "def fused_moe(hidden_states, w1, w2, topk_weight, topk_ids, expert_mask=None, "
    "activation=None, quant_type=None, w1_scale=None, w2_scale=None): ..."
}
OGS, RAGGED, MATMUL = "vllm-0.33.0", "sglang-kernel", "tokenspeed-triton-kernels"

SITUATIONS: dict[str, tuple[dict[str, str], str]] = {
    "nothing": (NO_COPY_IN_VLLM | NO_AITER, ""),
    "impostor": (NO_COPY_IN_VLLM | NO_AITER | IMPOSTOR, ""),
    "impostor-ogs": (NO_AITER | IMPOSTOR, OGS),
    "unknown": (NO_COPY_IN_VLLM | NO_AITER | UNKNOWN, ""),
    "old-layouts": (NO_COPY_IN_VLLM | NO_AITER | OLD_LAYOUTS, ""),
    "ogs": (NO_AITER, OGS),
    "ogs-no-triton": (NO_AITER | NO_TRITON, OGS),
    "ogs-aiter": (AITER, OGS),
    "ragged": (NO_COPY_IN_VLLM | NO_AITER, RAGGED),
    "matmul": (NO_COPY_IN_VLLM | NO_AITER, MATMUL),
    "aiter": (NO_COPY_IN_VLLM | AITER, ""),
    "old-aiter": (NO_COPY_IN_VLLM | OLD_AITER, ""),
}
"""Files to write, and a genuine package of .venv/packages to put behind them."""

NEED_TRITON = ("old-layouts", "ogs", "ogs-aiter", "ragged", "matmul")
ALL = tuple(SITUATIONS)
WITHOUT_AITER = tuple(name for name, (files, _) in SITUATIONS.items() if NO_AITER.items() <= files.items())
WITH_AITER = tuple(name for name in ALL if name not in WITHOUT_AITER)
NO_KERNELS = ("nothing", "aiter", "old-aiter")


def refused(*backends: str) -> str:
    """The error, but for the layer's sizes, which the test fills in."""
    return (
        "the machine must be able to run one of the MoE backends for {shape}; got "
        + "; ".join(backends)
        + ". Mend what is named, run `vllm-mxfp4 doctor`, or choose another with VLLM_MXFP4_BACKEND."
    )


OTHER_LAYERS = {
    Case("gfx950", "ck", False, alpha=1.5): (
        "E=32 topk=4 H=2880 I=2880 alpha=1.5 limit=7",
        refused("ck: its SwiGLU has alpha 1.702 and limit 7, not 1.5 and 7"),
    ),
}
"""Layers that a backend does not compute, whatever is installed."""

CASES = [*itertools.starmap(Case, itertools.product(GPUS, BACKENDS, (False, True))), *OTHER_LAYERS]


def rows() -> dict[tuple[tuple[str, ...], tuple[str, ...], str, str], str]:
    """Situations, GPUs, backend and strict ("01" for either) to what `select` says."""
    kernels = "triton_kernels in {kernels}"
    not_installed = "triton_kernels is not installed, and there is no vLLM that vendors it"
    impostor = (
        f"{kernels} has neither matmul_ogs nor matmul, so it is not OpenAI's "
        "(the triton-kernels on PyPI is an unrelated package; pip uninstall triton-kernels)"
    )
    no_ragged = f"triton_ragged: {kernels} is of the matmul_ogs generation and has no ragged_ogs"
    no_matmul = f"triton_matmul: {kernels} is of the matmul_ogs generation and has no matmul"
    is_ragged = f"triton_ogs: {kernels} is of the ragged_ogs generation and has no matmul_ogs"
    is_matmul = (
        f"triton_ogs: {kernels} is of the matmul generation and has no matmul_ogs",
        f"triton_ragged: {kernels} is of the matmul generation and has no ragged_ogs",
    )
    no_layout = (
        f"triton_ogs: {kernels} has no CDNA4MXScaleLayout or GFX950MXScaleLayout",
        no_ragged,
        f"triton_matmul: {kernels} has no CDNA4MXScaleLayout or GFX950MXScaleLayout",
    )
    no_triton = f"triton_ogs: {kernels} does not import here: No module named 'triton'"
    unknown = (
        f"triton_ogs: {kernels} does not import here: cannot import name 'FnSpecs' from "
        "'triton_kernels.matmul_ogs' ({kernels}/matmul_ogs.py)"
    )
    wrong_gpu = "it runs on gfx950, gfx942, sm90, not on {arch}"
    no_aiter = "ck: aiter does not import here: No module named 'aiter'"
    old_aiter = (
        "ck: fused_moe of aiter 0.1.20 in {aiter} takes no bias1, bias2; install amd-aiter 0.1.14 or later"
    )
    no_gemm, later = (
        "aiter_triton: aiter's moe_gemm_a16w4 does not import here: No module named",
        "0.1.14 or later",
    )
    second_choice = "ck: a second choice, and VLLM_MXFP4_STRICT=1 forbids falling back"
    uses_ogs = f"triton_ogs on {{arch}} ({kernels}, triton {{triton}})"
    uses_ragged = f"triton_ragged on {{arch}} ({kernels}, triton {{triton}}); not {is_ragged}"
    uses_matmul = f"triton_matmul on {{arch}} ({kernels}, triton {{triton}}); not {'; not '.join(is_matmul)}"
    uses_ck = "ck on gfx950 (aiter 0.1.20 in {aiter})"
    generations = ("triton_ogs", "triton_ragged", "triton_matmul")
    no_kernels = tuple(f"{name}: {not_installed}" for name in generations)
    impostors = tuple(f"{name}: {impostor}" for name in generations)
    gfx950, others = ("gfx950",), ("gfx942", "sm90")
    table = {
        (ALL, GPUS, "reference", "01"): "reference on {arch} (torch {torch})",
        (ALL, ("cpu",), "auto", "01"): "reference on cpu (torch {torch})",
        (ALL, ("sm100", "gfx1100"), "auto", "01"): refused(
            "{arch}, for which there is none (there is for gfx950, gfx942, sm90, cpu)"
        ),
        (ALL, ("sm100", "gfx1100", "cpu"), "triton", "01"): refused(
            *(f"{name}: {wrong_gpu}" for name in generations)
        ),
        (ALL, GPUS[1:], "aiter_triton", "01"): refused("aiter_triton: it runs on gfx950, not on {arch}"),
        (WITH_AITER, gfx950, "aiter_triton", "01"): refused(
            f"{no_gemm} 'aiter.ops'; install amd-aiter {later}"
        ),
        (WITHOUT_AITER, gfx950, "aiter_triton", "01"): refused(
            f"{no_gemm} 'aiter'; install amd-aiter {later}"
        ),
        (ALL, GPUS[1:], "ck", "01"): refused("ck: it runs on gfx950, not on {arch}"),
        (("aiter", "ogs-aiter"), gfx950, "ck", "01"): uses_ck,
        (("old-aiter",), gfx950, "ck", "01"): refused(old_aiter),
        (WITHOUT_AITER, gfx950, "ck", "01"): refused(no_aiter),
        (("old-layouts",), others, "auto", "01"): uses_ogs,
        (("old-layouts",), others, "triton", "01"): uses_ogs,
        (("old-layouts",), gfx950, "triton", "01"): refused(*no_layout),
        (("old-layouts",), gfx950, "auto", "0"): refused(*no_layout, no_aiter),
        (("old-layouts",), gfx950, "auto", "1"): refused(*no_layout, second_choice),
        (("ogs", "ogs-aiter"), gfx950 + others, "auto", "01"): uses_ogs,
        (("ogs", "ogs-aiter"), gfx950 + others, "triton", "01"): uses_ogs,
        (("ragged",), gfx950 + others, "auto", "01"): uses_ragged,
        (("ragged",), gfx950 + others, "triton", "01"): uses_ragged,
        (("matmul",), gfx950 + others, "auto", "01"): uses_matmul,
        (("matmul",), gfx950 + others, "triton", "01"): uses_matmul,
        (("aiter",), gfx950, "auto", "0"): f"{uses_ck}; not {'; not '.join(no_kernels)}",
        (("aiter",), gfx950, "auto", "1"): refused(*no_kernels, second_choice),
        (("old-aiter",), gfx950, "auto", "0"): refused(*no_kernels, old_aiter),
        (("old-aiter",), gfx950, "auto", "1"): refused(*no_kernels, second_choice),
        (("nothing",), gfx950, "auto", "0"): refused(*no_kernels, no_aiter),
        (("nothing",), gfx950, "auto", "1"): refused(*no_kernels, second_choice),
        (NO_KERNELS, others, "auto", "01"): refused(*no_kernels),
        (NO_KERNELS, gfx950 + others, "triton", "01"): refused(*no_kernels),
    }
    for situations, reasons in (
        (("impostor", "impostor-ogs"), impostors),
        (("unknown",), (unknown, no_ragged, no_matmul)),
        (("ogs-no-triton",), (no_triton, no_ragged, no_matmul)),
    ):
        table |= {
            (situations, gfx950, "auto", "0"): refused(*reasons, no_aiter),
            (situations, gfx950, "auto", "1"): refused(*reasons, second_choice),
            (situations, others, "auto", "01"): refused(*reasons),
            (situations, gfx950 + others, "triton", "01"): refused(*reasons),
        }
    not_of = "its matrix instructions are those of gfx950, not of {arch}"
    in_front = {name: name.replace("triton", "two_fp8") for name in generations}
    table[ALL, GPUS[1:], "two_fp8", "01"] = refused(*(f"{name}: {not_of}" for name in in_front.values()))
    # They stand in front of triton_kernels, and need what it needs.
    table |= {
        (situations, gfx950, "two_fp8", strict): functools.reduce(
            lambda said, names: said.replace(*names), in_front.items(), text
        )
        for (situations, gpus, backend, strict), text in table.items()
        if backend == "triton" and "gfx950" in gpus
    }
    # Before anything is timed.
    return table | {
        (situations, gpus, "fastest", strict): text
        for (situations, gpus, backend, strict), text in table.items()
        if backend == "auto"
    }


def expected(situation: str, case: Case, **places: str) -> str:
    """What the one row for a case says."""
    if case in OTHER_LAYERS:
        shape, text = OTHER_LAYERS[case]
        return text.format(shape=shape)
    (text,) = (
        text
        for (situations, gpus, backend, strict), text in rows().items()
        if situation in situations
        and case.arch in gpus
        and case.backend == backend
        and str(int(case.strict)) in strict
    )
    shape = "E=32 topk=4 H=2880 I=2880 alpha=1.702 limit=7"
    return text.format(arch=case.arch, shape=shape, torch=torch.__version__, **places)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_select(situation: str, tmp_path: Path, packages: Path) -> None:
    """Every GPU and every setting, with one set of installed packages."""
    triton = metadata.version("triton") if find_spec("triton") else ""
    if situation in NEED_TRITON and not triton:
        pytest.skip("needs triton")
    files, package = SITUATIONS[situation]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    process = run_python(
        ["-c", ASK, json.dumps([asdict(case) for case in CASES])], [tmp_path, packages / (package or "none")]
    )
    assert process.returncode == 0, process.stderr
    kernels = tmp_path / "triton_kernels"
    if not kernels.is_dir():
        vendored = "vllm/third_party/triton_kernels"
        kernels = packages / package / (vendored if package == OGS else "triton_kernels")
    places = {"kernels": str(kernels), "aiter": str(tmp_path / "aiter"), "triton": triton}
    got = dict(zip(CASES, map(json.loads, process.stdout.splitlines()), strict=True))
    assert got == {case: expected(situation, case, **places) for case in CASES}
