"""GPT-OSS's layers, by model name or from a config.json."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm_mxfp4_gfx950.errors import Mxfp4Error, brief
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
stands in the model's code only. What a config.json leaves out is for transformers as in gpt-oss-120b's.
"""

CONFIG = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "hidden_act": "silu",
    "initial_context_length": 4096,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
}
"""What all config.json of GPT-OSS have alike, as far as vLLM reads it.

Source: huggingface.co/openai/gpt-oss-20b and gpt-oss-120b, config.json.
"""

ALIASES = {"num_experts": "num_local_experts"}
"""Other names that transformers takes, and what they stand for.

Source: huggingface/transformers 5.19, models/gpt_oss/configuration_gpt_oss.py (attribute_map).
"""

HEADER = 100_000_000
"""Bytes of a safetensors file's header: more is none."""

DIVISIONS = ((1, 1), (2, 1), (4, 1), (8, 1), (4, 4), (8, 8))
"""Tensor-parallel and expert-parallel ranks that the tile table covers."""

TOKENS = tuple(2**i for i in range(14))
"""Token counts of a forward that tile tables are made for."""


def layer_shape(model: str, tp: int = 1, ep: int = 1) -> MoeShape:
    """One layer of a model on one rank, as vLLM divides it.

    Args:
        model: a name in GPT_OSS, or the path of a config.json or of the directory that it is in.
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
    whole = whole_layer(SimpleNamespace(**GPT_OSS[model]) if model in GPT_OSS else read_config(Path(model)))
    sharing = tp if ep == 1 else 1
    return dataclasses.replace(
        whole,
        experts=-(-whole.experts // ep),
        intermediate=-(-whole.intermediate // (sharing * BLOCK)) * BLOCK,
    )


def read_config(path: Path) -> Any:
    """What a GPT-OSS's config.json says of its layers, read as transformers does, which vLLM reads it with.

    Args:
        path: the file, or the directory of a checkpoint.

    Returns:
        the values as attributes, for `moe.whole_layer`.

    Raises:
        Mxfp4Error: there is none, or it is of another model, or transformers does not take it.
    """
    file = path / "config.json" if os.path.isdir(path) else path
    content = read_json(file)
    if content.get("model_type") != "gpt_oss":
        fix = "Give the config.json of a GPT-OSS"
        raise Mxfp4Error(f"model_type in {file}", "gpt_oss", repr(content.get("model_type")), fix)
    check_counts(file, content)
    try:
        from transformers import GptOssConfig  # Nothing else here needs it.
    except ImportError:
        named = {ALIASES.get(name, name): value for name, value in content.items()}
        return SimpleNamespace(**GPT_OSS["gpt-oss-120b"] | named)
    try:
        return GptOssConfig.from_dict(dict(content))
    except Exception as error:  # Its checks raise what they like.
        raise Mxfp4Error(str(file), "what transformers takes", brief(error), "Correct it") from error


def check_counts(file: Path, content: dict[str, Any]) -> None:
    """Raise Mxfp4Error where a config.json gives the number of experts twice, and not the same.

    Args:
        file: beside which the weights may lie.
        content: as `read_json` returns it.
    """
    for alias, name in ALIASES.items():
        both = [content.get(key) for key in (name, alias)]
        if alias not in content or name not in content or both[0] == both[1]:
            continue
        found = experts_in(file.parent)
        wrong = [key for key, count in zip((name, alias), both, strict=True) if count != found]
        fix = f"Delete {wrong[0]}" if len(wrong) == 1 else "Keep one, with the number that the files have"
        got = f"{both[0]} and {both[1]}" + f", and {found} in the files" * (found is not None)
        raise Mxfp4Error(f"{name} and {alias} in {file}", "the same number", got, fix)


def experts_in(folder: Path) -> int | None:
    """How many experts the safetensors in a directory have, by their headers; None where there are none."""
    counts = []
    for file in folder.glob("[!.]*.safetensors"):
        try:
            with file.open("rb") as stream:
                header = json.loads(stream.read(min(HEADER, int.from_bytes(stream.read(8), "little"))))
            for name, entry in header.items():
                match = re.search(r"\.experts\.(?:routed_experts\.)?(?:(\d+)\.)?\w+$", name)
                if match:
                    counts.append(int(match[1]) + 1 if match[1] else entry["shape"][0])
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
    return max(counts, default=None)


def read_json(file: Path) -> dict[str, Any]:
    """The content of a config.json; that of its text_config where the model has other parts too.

    Raises:
        Mxfp4Error: the file is not there, or is something else.
    """
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        rule = f"{', '.join(GPT_OSS)}, or the path of a config.json or of a checkpoint"
        raise Mxfp4Error("--model", rule, f"{file} ({error.strerror})", "Correct the name") from error
    except (ValueError, RecursionError) as error:
        raise Mxfp4Error(str(file), "JSON", str(error), "Correct it") from error
    if isinstance(content, dict):
        content = content.get("text_config", content)
    if not isinstance(content, dict):
        raise Mxfp4Error(str(file), "a GPT-OSS config.json", type(content).__name__, "Correct the path")
    return content
