"""A plugin of SGLang: dummy weights by which tokens choose experts of their own, the same in each server.

SGLang itself leaves the experts' bytes zero, and makes norms and router so small that all tokens are routed
alike. serve_in_sglang.py installs this.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch

DONE = "dummy weights by which tokens choose experts of their own"
"""What a server prints once it has them."""

NORMAL = ("embed_tokens.weight", "router.weight", "lm_head.weight", "qkv_proj.weight", "o_proj.weight")
"""How the names of parameters end that are drawn from a normal distribution."""

SCALES = (118, 122)
"""The least exponent byte of a scale, and the first one that is too large."""


def fill(original: Callable[..., None], model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
    """Give a model its dummy weights, each seeded by its name, so that their order does not matter.

    Args:
        original: SGLang's own `initialize_dummy_weights`, which goes first.
        model: on the device that it is served from.
        args, kwargs: more for `original`.
    """
    original(model, *args, **kwargs)
    for name, parameter in model.named_parameters():
        data = parameter.data
        generator = torch.Generator(device=data.device).manual_seed(zlib.crc32(name.encode()))
        where: dict[str, Any] = {"generator": generator, "device": data.device}
        if name.endswith("norm.weight"):
            data.fill_(1)
        elif name.endswith("weight_bias"):
            data.zero_()  # SGLang's values hang on the dtype, and this package's biases are float32.
        elif name.endswith(NORMAL):
            size = 1.0 if "embed" in name else data.shape[1] ** -0.5
            data.copy_(torch.randn(data.shape, dtype=torch.bfloat16, **where) * size)
        elif name.endswith("weight_scale"):
            data.copy_(torch.randint(*SCALES, data.shape, dtype=torch.uint8, **where))
        elif data.dtype == torch.uint8:
            for expert in data:
                expert.copy_(torch.randint(0, 256, expert.shape, dtype=torch.uint8, **where))
    print(DONE, flush=True)


def register() -> None:
    """Hook SGLang's own; SGLang calls this in each of its processes."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = "sglang.srt.model_loader.weight_utils.initialize_dummy_weights"
    HookRegistry.register(target, fill, HookType.AROUND)
