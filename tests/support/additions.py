"""What operators serve beside a tiny GPT-OSS: an adapter of LoRA, and a draft for speculative decoding."""

from __future__ import annotations

import json
from pathlib import Path

import engine  # noqa: F401  (puts the demo on sys.path)
import tiny_checkpoint
import torch
from safetensors.torch import save_file
from tiny_checkpoint import TinyGptOss

RANK, ALPHA = 8, 16
SEED = 3
"""Of an adapter whose tokens do not hang on rounding."""
SEEN = 64
"""Sequences of as many tokens that the draft is fitted to."""

SHARP = 10.0
"""The draft's queries and keys, so that each token attends to itself alone."""


def write_adapter(model: TinyGptOss, directory: Path) -> dict[str, torch.Tensor]:
    """Write a LoRA of the attention's matmuls in PEFT's format.

    Returns:
        What it adds to the model's weights, by transformers' names: fp32[out, in].
    """
    generator = torch.Generator().manual_seed(SEED)
    q_size, kv_size = model.heads * model.head_dim, model.kv_heads * model.head_dim
    sizes = {
        "q_proj": (q_size, model.hidden),
        "k_proj": (kv_size, model.hidden),
        "v_proj": (kv_size, model.hidden),
        "o_proj": (model.hidden, q_size),
    }
    tensors, added = {}, {}
    for layer in range(model.layers):
        for name, (rows, columns) in sizes.items():
            a = torch.randn(RANK, columns, generator=generator) / columns**0.5
            b = torch.randn(rows, RANK, generator=generator) / RANK**0.5 / 2
            full = f"model.layers.{layer}.self_attn.{name}"
            tensors |= {f"base_model.model.{full}.lora_{k}.weight": v for k, v in (("A", a), ("B", b))}
            added[f"{full}.weight"] = ALPHA / RANK * b @ a
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(sizes)}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return added


@torch.inference_mode()
def write_draft(model: TinyGptOss, checkpoint: Path, directory: Path) -> Path:
    """Write an EAGLE3 draft that guesses the next token from the last one alone.

    Its attention hands each token's embedding through one matrix, which is fitted by least squares to the
    model's last hidden state; its other parts add nothing.

    Args:
        model: has as many values in its keys as it is wide.
        checkpoint: the model's.
        directory: where to write.
    """
    hidden = model.hidden
    target = tiny_checkpoint.transformers_model(checkpoint).float()
    tokens = torch.randint(model.vocab, (SEEN, SEEN), generator=torch.Generator().manual_seed(5))
    states = target.model(tokens).last_hidden_state
    embedded = target.model.embed_tokens(tokens)
    embedded = embedded * embedded.square().mean(-1, keepdim=True).rsqrt()
    fitted = torch.linalg.lstsq(embedded.flatten(0, 1), states.flatten(0, 1)).solution.mT
    layer, rows = "layers.0", 2 * hidden
    tensors = {
        "embed_tokens.weight": target.model.embed_tokens.weight,
        "lm_head.weight": target.lm_head.weight,
        "norm.weight": torch.ones(hidden),
        "fc.weight": torch.zeros(hidden, 3 * hidden),
        **{
            f"{layer}.{name}.weight": torch.ones(hidden)
            for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")
        },
        **{f"{layer}.self_attn.{name}_proj.weight": torch.zeros(hidden, rows) for name in "qk"},
        **{f"{layer}.self_attn.{name}_proj.bias": torch.full((hidden,), SHARP) for name in "qk"},
        f"{layer}.self_attn.v_proj.weight": torch.nn.functional.pad(fitted, (0, hidden)),
        f"{layer}.self_attn.o_proj.weight": torch.eye(hidden),
        **{f"{layer}.self_attn.{name}_proj.bias": torch.zeros(hidden) for name in "vo"},
        **{f"{layer}.mlp.{name}_proj.weight": torch.zeros(32, hidden) for name in ("gate", "up")},
        f"{layer}.mlp.down_proj.weight": torch.zeros(hidden, 32),
    }
    directory.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors"
    )
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "attention_bias": True,
        "draft_vocab_size": model.vocab,
        "eagle_aux_hidden_state_layer_ids": [0, 1, 2],
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": 32,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": model.heads,
        "num_hidden_layers": 1,
        "num_key_value_heads": model.kv_heads,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": model.vocab,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory
