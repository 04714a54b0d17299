"""The SGLang adapter's opt-in: with VLLM_MXFP4_SGLANG=1, GPT-OSS's layers are built with our experts."""

from __future__ import annotations

import importlib

from vllm_mxfp4_gfx950 import settings
from vllm_mxfp4_gfx950.errors import brief


def register() -> None:
    """Hook GPT-OSS's layers where the user asked for it; SGLang calls this in each of its processes.

    Raises:
        SystemExit: it was asked for and cannot be done. SGLang would log an exception of a plugin, and serve
            GPT-OSS by its own method.
    """
    try:
        if settings.for_sglang():
            importlib.import_module("vllm_mxfp4_gfx950.sglang_layer").hook()
    except Exception as error:  # An import meets whatever SGLang there is.
        raise SystemExit(f"{settings.SGLANG_VAR}: {brief(error)}") from error
