"""Weights loaded again: vLLM's own reloading of a served model, without an engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import load_model
import pytest
import tiny_checkpoint
import torch
from safetensors.torch import load_file
from tiny_checkpoint import TinyGptOss

from vllm_mxfp4_gfx950.errors import Mxfp4Error

MODELS = [TinyGptOss(seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="module", name="checkpoints")
def fixture_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """Two models of one shape."""
    folder = tmp_path_factory.mktemp("checkpoints")
    written = [tiny_checkpoint.write(model, folder / str(model.seed)) for model in MODELS]
    with load_model.one_rank(written[0]):
        yield written


def experts(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What each layer's experts make of fp32[T, H], every token to the experts that its numbers say."""
    logits = x[:, : MODELS[0].experts].contiguous()
    layers = [layer.mlp.experts.routed_experts for layer in model.model.layers]
    return torch.stack([layer.quant_method.apply_monolithic(layer, x, logits) for layer in layers])


def expected(folder: Path, x: torch.Tensor) -> torch.Tensor:
    """The same by transformers."""
    model = tiny_checkpoint.transformers_model(folder).float()
    logits = x[:, : MODELS[0].experts]
    values, chosen = logits.topk(MODELS[0].topk)
    with torch.inference_mode():
        return torch.stack([layer.mlp.experts(x, chosen, values.softmax(-1)) for layer in model.model.layers])


def addresses(model: torch.nn.Module) -> list[int]:
    """Where what the experts read lies."""
    methods = [layer.mlp.experts.routed_experts.quant_method for layer in model.model.layers]
    return [tensor.data_ptr() for method in methods for tensor in method.prepared.tensors()]


def reload(model: torch.nn.Module, folder: Path, weights: list[tuple[str, torch.Tensor]]) -> None:
    """As vLLM's `reload_weights` and the updates of its trainers do."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    config = load_model.create_config(folder)
    with set_current_vllm_config(config):
        initialize_layerwise_reload(model)
        model.load_weights(weights)
    # As vLLM 0.26 does: there is no current config then.
    finalize_layerwise_reload(model, config.model_config)


def test_reload(checkpoints: list[Path]) -> None:
    """The experts become the other checkpoint's, at the same addresses, and then the first one's again."""
    x = torch.randn(37, MODELS[0].hidden, generator=torch.Generator().manual_seed(1))
    model = load_model.load(checkpoints[0])
    before = addresses(model)
    truth = [expected(folder, x) for folder in checkpoints]
    assert (truth[0] - truth[1]).abs().max() > 1
    torch.testing.assert_close(experts(model, x), truth[0], rtol=1e-4, atol=1e-4)
    for index in (1, 0):
        reload(model, checkpoints[index], load_model.read(checkpoints[index]))
        torch.testing.assert_close(experts(model, x), truth[index], rtol=1e-4, atol=1e-4)
        assert addresses(model) == before


def test_reload_in_part(checkpoints: list[Path]) -> None:
    """Without any of a layer's experts, it keeps those it has; with some only, it says which are missing."""
    x = torch.randn(7, MODELS[0].hidden, generator=torch.Generator().manual_seed(1))
    model = load_model.load(checkpoints[0])
    weights = load_model.read(checkpoints[1])
    reload(model, checkpoints[1], [(name, tensor) for name, tensor in weights if ".experts." not in name])
    torch.testing.assert_close(experts(model, x), expected(checkpoints[0], x), rtol=1e-4, atol=1e-4)
    part = [each for each in weights if not each[0].endswith("1.mlp.experts.down_proj_bias")]
    with pytest.raises(Mxfp4Error) as error:
        reload(model, checkpoints[1], part)
    assert str(error.value) == (
        "model.layers.1.mlp.experts.down_proj_bias must be in the checkpoint; "
        "got nothing for 8 of this rank's 8 experts. Give all of a layer's experts together."
    )


def test_sinks_stay(checkpoints: list[Path]) -> None:
    """As docs/faults.md says of vLLM before 0.33, its reloading leaves the attention sinks as they were."""
    model = load_model.load(checkpoints[0])
    reload(model, checkpoints[1], load_model.read(checkpoints[1]))
    first, other = (load_file(folder / "model.safetensors") for folder in checkpoints)
    name = "model.layers.0.self_attn.sinks"
    sinks = model.model.layers[0].attn.sinks.bfloat16()
    assert torch.equal(sinks, first[name])
    assert not torch.equal(first[name], other[name])
