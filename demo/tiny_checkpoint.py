"""A tiny GPT-OSS with random weights, laid out on disk exactly as openai/gpt-oss-20b is.

    python demo/tiny_checkpoint.py DIRECTORY

writes the default one: a megabyte that every GPT-OSS loader reads, and that says nothing sensible.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vllm_mxfp4_gfx950.models import CONFIG

BLOCK = 32
UNKNOWN, END = "<unk>", "<end>"
E2M1_RMS = 2.926
"""Root mean square of the 16 values of E2M1."""


@dataclass(frozen=True)
class TinyGptOss:
    """What varies between the checkpoints; the rest is GPT-OSS.

    Args:
        hidden: width of the residual stream, a multiple of 32.
        intermediate: width of an expert's SwiGLU, a multiple of 32.
        vocab: tokens, between 16 and 1602.
        sliding_window: tokens that the even layers look back.
        seed: two models of one seed and one shape are the same.
    """

    experts: int = 8
    topk: int = 2
    hidden: int = 128
    intermediate: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    vocab: int = 320
    sliding_window: int = 16
    seed: int = 0


def write(model: TinyGptOss, directory: Path) -> Path:
    """Write config, weights and tokenizer.

    Returns:
        The directory, ready for `vllm serve` or `from_pretrained`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors(model), directory / "model.safetensors", metadata={"format": "pt"})
    _write_json(directory / "config.json", config(model))
    _write_json(
        directory / "generation_config.json", {"do_sample": False, "eos_token_id": 1, "pad_token_id": 1}
    )
    _write_tokenizer(model, directory)
    return directory


def write_dequantized(checkpoint: Path, directory: Path) -> Path:
    """Write a model of `write` again without quantization, as transformers dequantizes it."""
    shutil.copytree(checkpoint, directory)
    content = json.loads((checkpoint / "config.json").read_text())
    del content["quantization_config"]
    _write_json(directory / "config.json", content)
    # Not save_pretrained: transformers 5.19 garbles the experts' names when it saves them.
    weights = {
        name: weight.contiguous() for name, weight in transformers_model(checkpoint).state_dict().items()
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def transformers_model(checkpoint: Path, architecture: str = "GptOssForCausalLM") -> torch.nn.Module:
    """Transformers' GptOss in bf16: a truth that shares no code with this project, dequantizer included."""
    import transformers
    from transformers import Mxfp4Config, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return getattr(transformers, architecture).from_pretrained(
        checkpoint, quantization_config=Mxfp4Config(dequantize=True), attn_implementation="eager"
    )


@torch.inference_mode()
def transformers_logprobs(
    checkpoint: Path, sequences: list[list[int]], added: dict[str, torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """What transformers, in fp32, predicts after each token of each sequence.

    Args:
        checkpoint: a directory.
        sequences: token ids.
        added: to the parameters of these names, as a merged adapter would.

    Returns:
        For each sequence, fp32[tokens, vocab]: row i is the distribution of token i + 1.
    """
    # Not from_pretrained(dtype=torch.float32): that leaves the experts in bf16 and computes nonsense.
    model = transformers_model(checkpoint).float()
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        if name.endswith("_proj_bias"):  # Biases of experts, which may be more exact than bf16.
            model.get_parameter(name).copy_(tensor)
    for name, tensor in (added or {}).items():
        model.get_parameter(name).add_(tensor)
    return [model(torch.tensor([sequence])).logits[0].log_softmax(-1) for sequence in sequences]


def config(model: TinyGptOss) -> dict[str, object]:
    """The content of config.json.

    Source: huggingface.co/openai/gpt-oss-20b, config.json.
    """
    content = {
        **CONFIG,
        "attention_dropout": 0.0,
        "eos_token_id": 1,
        "experts_per_token": model.topk,
        "head_dim": model.head_dim,
        "hidden_size": model.hidden,
        "initializer_range": 0.02,
        "intermediate_size": model.intermediate,
        "layer_types": [("sliding_attention", "full_attention")[i % 2] for i in range(model.layers)],
        "num_attention_heads": model.heads,
        "num_experts_per_tok": model.topk,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.kv_heads,
        "num_local_experts": model.experts,
        "output_router_logits": False,
        "pad_token_id": 1,
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "router_aux_loss_coef": 0.9,
        "sliding_window": model.sliding_window,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": model.vocab,
    }
    return dict(sorted(content.items()))


def tensors(model: TinyGptOss) -> dict[str, torch.Tensor]:
    """The content of model.safetensors, by name.

    Every layer adds about as much to the residual stream as it finds there, so that a mistake in one
    expert shows in the logits; and the logits are wide enough that rounding hardly ever decides which
    token comes first.
    """
    generator = torch.Generator().manual_seed(model.seed)

    def normal(*shape: int, std: float, mean: float = 0.0) -> torch.Tensor:
        return (mean + std * torch.randn(shape, generator=generator)).bfloat16()

    def linear(name: str, rows: int, columns: int, gain: float) -> dict[str, torch.Tensor]:
        weight = normal(rows, columns, std=gain / math.sqrt(columns))
        return {f"{name}.weight": weight, f"{name}.bias": normal(rows, std=0.2)}

    hidden, experts, intermediate = model.hidden, model.experts, model.intermediate
    q_size, kv_size = model.heads * model.head_dim, model.kv_heads * model.head_dim
    out = {"model.embed_tokens.weight": normal(model.vocab, hidden, std=1.0)}
    for index in range(model.layers):
        layer, mlp = f"model.layers.{index}", f"model.layers.{index}.mlp"
        out |= linear(f"{layer}.self_attn.q_proj", q_size, hidden, gain=1.5)
        out |= linear(f"{layer}.self_attn.k_proj", kv_size, hidden, gain=1.5)
        out |= linear(f"{layer}.self_attn.v_proj", kv_size, hidden, gain=1.0)
        out |= linear(f"{layer}.self_attn.o_proj", hidden, q_size, gain=1.5)
        out |= linear(f"{mlp}.router", experts, hidden, gain=2.0)
        out[f"{layer}.self_attn.sinks"] = normal(model.heads, std=1.0)
        for name in ("input_layernorm", "post_attention_layernorm"):
            out[f"{layer}.{name}.weight"] = normal(hidden, std=0.1, mean=1.0)
        for name, rows, columns, gain in (
            ("gate_up_proj", 2 * intermediate, hidden, 2.0),
            ("down_proj", hidden, intermediate, 0.5),
        ):
            blocks, scales = _mxfp4(generator, (experts, rows, columns), gain)
            out[f"{mlp}.experts.{name}_blocks"] = blocks
            out[f"{mlp}.experts.{name}_scales"] = scales
            out[f"{mlp}.experts.{name}_bias"] = normal(experts, rows, std=0.2)
    out["model.norm.weight"] = normal(hidden, std=0.1, mean=1.0)
    out["lm_head.weight"] = normal(model.vocab, hidden, std=4 / math.sqrt(hidden))
    return out


def _mxfp4(
    generator: torch.Generator, shape: tuple[int, int, int], gain: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random blocks and scales: all 16 codes, and in one row of each expert the ends of E8M0.

    Returns:
        blocks: uint8[E, rows, columns / 32, 16].
        scales: uint8[E, rows, columns / 32].
    """
    experts, rows, columns = shape
    blocks = torch.randint(256, (experts, rows, columns // BLOCK, 16), generator=generator, dtype=torch.uint8)
    middle = 127 + round(math.log2(gain / (E2M1_RMS * math.sqrt(columns))))
    scales = torch.randint(middle - 1, middle + 2, blocks.shape[:-1], generator=generator, dtype=torch.uint8)
    # 2^-127, and 2^127 where all values are zero, can stand in a checkpoint and change nothing.
    scales[:, 0, 0] = 0
    scales[:, 1, 0] = 0xFE
    blocks[:, 1, 0] = 0
    return blocks, scales


def _write_tokenizer(model: TinyGptOss, directory: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    syllables = [a + b for a, b in itertools.product("bdklmnrstv", "aiou")]
    words = (a + b for a, b in itertools.product(syllables, syllables))
    vocabulary = [UNKNOWN, END, *itertools.islice(words, model.vocab - 2)]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([UNKNOWN, END])
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": UNKNOWN,
            "eos_token": END,
            "pad_token": END,
        },
    )
    (directory / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    print(write(TinyGptOss(), parser.parse_args().directory))
