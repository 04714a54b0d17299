"""The environment variables of this package, read and validated in one place."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_mxfp4_gfx950.errors import Mxfp4Error

FLAG = "mxfp4-triton"
"""The value of vLLM's `--quantization`."""

BACKEND_VAR = "VLLM_MXFP4_BACKEND"
STRICT_VAR = "VLLM_MXFP4_STRICT"
SELF_CHECK_VAR = "VLLM_MXFP4_SELF_CHECK"
TABLES_VAR = "VLLM_MXFP4_TABLES"
TIME_AT_LOAD_VAR = "VLLM_MXFP4_TIME_AT_LOAD"
SGLANG_VAR = "VLLM_MXFP4_SGLANG"
VARIABLES = (BACKEND_VAR, STRICT_VAR, SELF_CHECK_VAR, TABLES_VAR, TIME_AT_LOAD_VAR, SGLANG_VAR)
BACKENDS = ("auto", "fastest", "triton", "two_fp8", "ck", "aiter_triton", "reference")
SELF_CHECKS = ("first", "all", "off")
ALIKE = 0.9
"""Names that are alike by so much, as difflib measures it, are one name and its misspelling. vLLM's own names
with FP4 in them reach 0.6, as VLLM_MXFP4_EMULATION_DEQUANT_AT_LOAD."""


@dataclass(frozen=True)
class Settings:
    """What the user asked for.

    Args:
        backend: one of BACKENDS; "auto" takes the first that works on the GPU at hand,
            "fastest" the one whose first layer takes the least time.
        strict: under "auto", fail rather than fall back to a second choice.
        self_check: one of SELF_CHECKS; which layers are compared with float64 before they serve.
        tables: a directory of the user's own tile tables, as `vllm-mxfp4 tune` writes them.
        time_at_load: let the kernels that are the fastest on this GPU serve, where `tables` does not say.
    """

    backend: str = "auto"
    strict: bool = False
    self_check: str = "first"
    tables: Path | None = None
    time_at_load: bool = True


def from_environment(environment: Mapping[str, str] | None = None) -> Settings:
    """Read VARIABLES.

    Args:
        environment: variables by name; None reads the process's own.

    Raises:
        Mxfp4Error: a variable holds a value that is not on its list, or no directory; or one is set whose
            name is nearly one of ours, which would steer nothing.
    """
    variables = os.environ if environment is None else environment
    check_names(variables)
    return Settings(
        backend=_one_of(variables, BACKEND_VAR, BACKENDS),
        strict=_one_of(variables, STRICT_VAR, ("0", "1")) == "1",
        self_check=_one_of(variables, SELF_CHECK_VAR, SELF_CHECKS),
        tables=_directory(variables, TABLES_VAR),
        time_at_load=_one_of(variables, TIME_AT_LOAD_VAR, ("1", "0")) == "1",
    )


def for_sglang(environment: Mapping[str, str] | None = None) -> bool:
    """Whether SGLang is to compute GPT-OSS's experts by this package: VLLM_MXFP4_SGLANG.

    Args:
        environment: variables by name; None reads the process's own.

    Raises:
        Mxfp4Error: it holds another value than 0 and 1, or one is set whose name is nearly its.
    """
    variables = os.environ if environment is None else environment
    check_names(name for name in variables if misspelt(name) == SGLANG_VAR)
    return _one_of(variables, SGLANG_VAR, ("0", "1")) == "1"


def check_names(names: Iterable[str]) -> None:
    """Raise Mxfp4Error where a variable is nearly one of ours."""
    for name in names:
        meant = misspelt(name)
        if meant:
            fix = f"Rename it to {meant}, or unset it"
            raise Mxfp4Error(name, f"one of {', '.join(VARIABLES)}", "another name", fix)


def misspelt(name: str) -> str:
    """The variable of ours that a name was meant to be; "" where it is one, or another's."""
    if name in VARIABLES:
        return ""
    written = (name.upper(), f"VLLM_{name.upper()}")
    return next((v for w in written for v in difflib.get_close_matches(w, VARIABLES, 1, ALIKE)), "")


def _directory(variables: Mapping[str, str], name: str) -> Path | None:
    """The directory that a variable names; None where it is not set."""
    value = variables.get(name)
    if value is None:
        return None
    # A blank one would be the directory where the server happens to run; Path.is_dir raises on a long one.
    if not value or not os.path.isdir(value):
        fix = f"Set {name} to what `vllm-mxfp4 tune --out` was given, or unset it"
        raise Mxfp4Error(name, "a directory that exists", repr(value), fix)
    return Path(value)


def _one_of(variables: Mapping[str, str], name: str, allowed: tuple[str, ...]) -> str:
    """The variable's value, or the first one allowed where it is not set."""
    value = variables.get(name, allowed[0])
    if value not in allowed:
        fix = f"Set {name} to one of these or unset it"
        raise Mxfp4Error(name, "one of " + ", ".join(allowed), repr(value), fix)
    return value
