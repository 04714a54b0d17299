"""The checkpoint that stands for GPT-OSS in the demo and in the engine's tests."""

from pathlib import Path

import engine  # noqa: F401  (puts the demo on sys.path)
import pytest
import tiny_checkpoint
import torch
from safetensors.torch import load_file
from tiny_checkpoint import TinyGptOss
from transformers import AutoTokenizer, GptOssForCausalLM

from vllm_mxfp4_gfx950.mxfp4 import dequantize

MODEL = TinyGptOss(experts=6, topk=2, hidden=96, intermediate=160, layers=2, heads=6, kv_heads=2, vocab=100)
GATE_UP, DOWN = (f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))


@pytest.fixture(scope="module", name="checkpoint")
def fixture_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MODEL on disk."""
    return tiny_checkpoint.write(MODEL, tmp_path_factory.mktemp("mxfp4"))


def test_layout(checkpoint: Path) -> None:
    """A layer has the tensors of openai/gpt-oss-20b, with its own sizes."""
    tensors = load_file(checkpoint / "model.safetensors")
    prefix = "model.layers.1."
    layer = {
        name.removeprefix(prefix): (tensor.dtype, tuple(tensor.shape))
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    bf16, u8 = torch.bfloat16, torch.uint8
    assert layer == {
        "input_layernorm.weight": (bf16, (96,)),
        "mlp.experts.down_proj_bias": (bf16, (6, 96)),
        "mlp.experts.down_proj_blocks": (u8, (6, 96, 5, 16)),
        "mlp.experts.down_proj_scales": (u8, (6, 96, 5)),
        "mlp.experts.gate_up_proj_bias": (bf16, (6, 320)),
        "mlp.experts.gate_up_proj_blocks": (u8, (6, 320, 3, 16)),
        "mlp.experts.gate_up_proj_scales": (u8, (6, 320, 3)),
        "mlp.router.bias": (bf16, (6,)),
        "mlp.router.weight": (bf16, (6, 96)),
        "post_attention_layernorm.weight": (bf16, (96,)),
        "self_attn.k_proj.bias": (bf16, (64,)),
        "self_attn.k_proj.weight": (bf16, (64, 96)),
        "self_attn.o_proj.bias": (bf16, (96,)),
        "self_attn.o_proj.weight": (bf16, (96, 192)),
        "self_attn.q_proj.bias": (bf16, (192,)),
        "self_attn.q_proj.weight": (bf16, (192, 96)),
        "self_attn.sinks": (bf16, (6,)),
        "self_attn.v_proj.bias": (bf16, (64,)),
        "self_attn.v_proj.weight": (bf16, (64, 96)),
    }
    assert {name for name in tensors if not name.startswith("model.layers.")} == {
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
    }


@pytest.mark.parametrize("name", [GATE_UP, DOWN])
def test_every_code_and_the_ends_of_the_scales(name: str, checkpoint: Path) -> None:
    """All 16 codes in both nibbles, the smallest and the largest finite scale, and no NaN."""
    tensors = load_file(checkpoint / "model.safetensors")
    blocks, scales = tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
    assert len((blocks & 0xF).unique()) == len((blocks >> 4).unique()) == 16
    assert (scales.min(), scales.max()) == (0, 0xFE)


@pytest.mark.parametrize("name", [GATE_UP, DOWN])
def test_transformers_dequantizes_as_we_do(name: str, checkpoint: Path) -> None:
    """Bit for bit, so that the truth of the engine's tests is the same model."""
    tensors = load_file(checkpoint / "model.safetensors")
    ours = dequantize(tensors[f"{name}_blocks"].flatten(2), tensors[f"{name}_scales"], torch.bfloat16)
    theirs = tiny_checkpoint.transformers_model(checkpoint).get_parameter(name)
    assert torch.equal(ours.mT, theirs)


def test_dequantized_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    """It says nothing of quantization, and transformers reads the same model from it."""
    directory = tiny_checkpoint.write_dequantized(checkpoint, tmp_path / "bf16")
    model = GptOssForCausalLM.from_pretrained(directory)
    assert not hasattr(model.config, "quantization_config")
    expected = tiny_checkpoint.transformers_model(checkpoint).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_seed() -> None:
    """One seed, one model; another seed, another."""
    first, again, other = (tiny_checkpoint.tensors(TinyGptOss(seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_tokenizer(checkpoint: Path) -> None:
    """Every token of the vocabulary is a word of its own, and chats have a template."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert len(tokenizer) == MODEL.vocab
    words = tokenizer.decode(range(2, MODEL.vocab))
    assert tokenizer.encode(words) == list(range(2, MODEL.vocab))
    chat = [{"role": "user", "content": words.split()[0]}]
    assert tokenizer.apply_chat_template(chat, tokenize=False).split() == [words.split()[0]]
