"""GPT-OSS's layers by model name, for the commands that need no checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.moe import MoeShape, whole_layer
from vllm_mxfp4_gfx950.mxfp4 import BLOCK

GPT_OSS: dict[str, dict[str, Any]] = {
    name: {
        "num_local_experts": experts,
        "num_experts_per_tok": 4,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    }
    for name, experts in (("gpt-oss-20b", 32), ("gpt-oss-120b", 128))
}
"""The sizes in openai/gpt-oss-20b's and openai/gpt-oss-120b's config.json, and the SwiGLU's alpha, which
stands in the model's code only.
"""

DIVISIONS = ((1, 1), (2, 1), (4, 1), (8, 1), (4, 4), (8, 8))
"""Tensor-parallel and expert-parallel ranks that the tile table covers."""

TOKENS = tuple(2**i for i in range(14))
"""Token counts of a forward that tile tables are made for."""


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that `layer_shape` takes."""
    parser.add_argument("--model", default="gpt-oss-20b", help=f"{', '.join(GPT_OSS)}, or a config.json")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--ep", type=int, default=1, help="expert-parallel ranks, which hold experts whole")


def layer_shape(model: str, tp: int = 1, ep: int = 1) -> MoeShape:
    """One layer of a model on one rank, as vLLM divides it.

    Args:
        model: a name in GPT_OSS, or the path of a config.json.
        tp: ranks that share each expert, in whole blocks; the first rank's share.
        ep: ranks that share out the experts instead, and then hold them whole.

    Raises:
        Mxfp4Error: the model is unknown, or its sizes cannot be served.
    """
    for name, ranks in (("--tp", tp), ("--ep", ep)):
        if ranks < 1:
            raise Mxfp4Error(name, "at least 1", ranks, "Correct it")
    if ep not in (1, tp):
        raise Mxfp4Error("--ep", f"1 or the tensor-parallel ranks, {tp}, as in vLLM", ep, "Correct it")
    config = GPT_OSS.get(model) or _read(Path(model))
    whole = whole_layer(SimpleNamespace(**config))
    sharing = tp if ep == 1 else 1
    return dataclasses.replace(
        whole,
        experts=-(-whole.experts // ep),
        intermediate=-(-whole.intermediate // (sharing * BLOCK)) * BLOCK,
    )


def _read(file: Path) -> dict[str, Any]:
    """A config.json that has what a layer needs."""
    try:
        config: dict[str, Any] = json.loads(file.read_text())
    except OSError as error:
        rule = f"{', '.join(GPT_OSS)} or the path of a config.json"
        raise Mxfp4Error("--model", rule, f"{file} ({error.strerror})", "Correct the name") from error
    except (ValueError, RecursionError) as error:
        raise Mxfp4Error(str(file), "JSON", str(error), "Correct it") from error
    if not isinstance(config, dict):
        raise Mxfp4Error(str(file), "a GPT-OSS config.json", type(config).__name__, "Correct the path")
    missing = [n for n in GPT_OSS["gpt-oss-20b"] if n not in config and not n.startswith("swiglu")]
    if missing:
        raise Mxfp4Error(str(file), "a GPT-OSS config.json", f"no {', '.join(missing)}", "Correct the path")
    return config
