"""Random layers: random codes and scales, so that no quantizer is needed and every code occurs."""

import torch

from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights, tensor_shapes

SCALES = (117, 124)
"""Scales are drawn from 2^-10 to 2^-4, about as GPT-OSS has them."""

EXTREME_SCALES = (0, 1, 100)
"""And every 97th is very small. None is very large: one block would drown every other."""


def make_shape(
    experts: int, topk: int, hidden: int, intermediate: int, alpha: float = 1.702, limit: float = 7.0
) -> MoeShape:
    """A layer on one rank, with GPT-OSS's activation unless told otherwise; sizes as in MoeShape."""
    return MoeShape(experts, experts, topk, hidden, intermediate, alpha, limit)


def random_weights(shape: MoeShape, seed: int, device: str = "cpu") -> MoeWeights:
    """Weights of all of a shape's experts.

    Args:
        shape: the sizes.
        seed: fixes every byte, for one kind of device.
        device: where the tensors are made.
    """
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for name, (dtype, size) in tensor_shapes(shape.experts, shape.hidden, shape.intermediate).items():
        if name.endswith("bias"):
            # Values that bf16 has: plain torch in bf16, which tolerances come from, need not round them.
            values = torch.randn(size, generator=generator, device=device)
            tensors[name] = values.bfloat16().to(dtype)
        elif name.endswith("scale"):
            scales = torch.randint(*SCALES, size, generator=generator, device=device, dtype=dtype)
            flat = scales.view(-1)[::97]
            flat.copy_(torch.tensor(EXTREME_SCALES, device=device).repeat(len(flat))[: len(flat)])
            tensors[name] = scales
        else:
            tensors[name] = torch.randint(256, size, generator=generator, device=device, dtype=dtype)
    return MoeWeights(**tensors)


def random_tokens(
    shape: MoeShape, tokens: int, seed: int, device: str = "cpu", *, unchosen: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16[T, H] activations and bf16[T, global_experts] logits, coarse enough that ties occur.

    Args:
        shape: the sizes.
        tokens: T.
        seed: fixes the values, for one kind of device.
        device: where the tensors are made.
        unchosen: an expert that no token may choose.
    """
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(tokens, shape.hidden, generator=generator, device=device).bfloat16()
    logits = torch.randn(tokens, shape.global_experts, generator=generator, device=device)
    # Adding zero turns -0.0 into 0.0: the one pair that torch takes for equal and triton_kernels does not.
    logits = (logits * 16).round() / 16 + 0.0
    if unchosen is not None:
        logits[:, unchosen] = -100
    return x, logits.bfloat16()
