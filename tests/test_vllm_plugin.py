"""The adapter in other releases of vLLM, whose own Python loads a model through it and runs its experts."""

import shutil
from pathlib import Path

import engine  # noqa: F401  (puts the demo on sys.path)
import load_model
import pytest
import tiny_checkpoint
import torch
from run_python import SUPPORT, run_python
from tiny_checkpoint import TinyGptOss

from vllm_mxfp4_gfx950.diagnosis import interface

SCRIPT = SUPPORT / "load_in_vllm.py"


@pytest.mark.engine
@pytest.mark.parametrize("release", [pytest.param("0.26.0", marks=pytest.mark.load), "0.33.0"])
def test_load_in(release: str, packages: Path, tmp_path: Path) -> None:
    """It registers, overrides what the release's base classes ask for, and gives transformers' numbers.

    And so it does with another checkpoint, loaded after the first.
    """
    checkpoints = [tiny_checkpoint.write(TinyGptOss(seed=seed), tmp_path / str(seed)) for seed in (0, 1)]
    # vLLM takes the platform from its distribution's version, and would look for a GPU without this one.
    distribution = tmp_path / "distribution"
    metadata = distribution / f"vllm-{release}+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}+cpu\n")
    x = torch.randn(37, TinyGptOss().hidden, generator=torch.Generator().manual_seed(1))
    torch.save(x, tmp_path / "x")

    tree = packages / f"vllm-{release}"
    result = run_python(
        [str(SCRIPT), *map(str, checkpoints), str(tmp_path / "x"), str(tmp_path / "y")],
        path=[distribution, tree],
        HF_HUB_OFFLINE="1",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split()[-1] == str(tree / "vllm" / "__init__.py")
    expected = torch.stack([expected_of(checkpoint, x) for checkpoint in checkpoints])
    torch.testing.assert_close(torch.load(tmp_path / "y"), expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def expected_of(checkpoint: Path, x: torch.Tensor) -> torch.Tensor:
    """What transformers' MoE blocks make of fp32[T, H] activations: fp32[layers, T, H]."""
    model = tiny_checkpoint.transformers_model(checkpoint).float()
    return torch.stack([layer.mlp(x[None])[0][0] for layer in model.model.layers])


def test_what_is_imported(packages: Path) -> None:
    """What the releases at hand lack of what the adapter imports; another one beside them is asked too."""
    releases = sorted(packages.glob("vllm-*/vllm"))
    assert len(releases) > 1
    for release in releases:
        assert interface.missing(release) == [], release.parent.name


def test_what_is_missing(packages: Path, tmp_path: Path) -> None:
    """Negative control: a name that a release has under another one, and a module that is gone."""
    shutil.copytree(packages / "vllm-0.33.0/vllm/model_executor/layers", tmp_path / "model_executor/layers")
    linear = tmp_path / "model_executor/layers/linear.py"
    linear.write_text(linear.read_text().replace("class LinearBase(", "class LinearLayer("))
    found = interface.missing(tmp_path)
    assert "vllm.model_executor.layers.linear.LinearBase" in found
    assert "vllm.config.VllmConfig" in found
    assert not any("fused_moe" in name for name in found)


@pytest.mark.parametrize(("sizes", "ranks", "captured"), [([1, 8], 1, 8), ([], 1, 0), ([1, 8], 2, 16)])
def test_batches_of_an_engine(sizes: list[int], ranks: int, captured: int, tmp_path: Path) -> None:
    """The largest, and the largest that has a graph, of all ranks that bring their tokens together."""
    checkpoint = tiny_checkpoint.write(TinyGptOss(), tmp_path / "tiny")
    with load_model.one_rank(checkpoint):
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.utils import initialize_model

        config = load_model.create_config(checkpoint, max_num_batched_tokens=96, max_num_seqs=16)
        config.compilation_config.cudagraph_capture_sizes = sizes
        config.parallel_config.data_parallel_size = ranks
        with set_current_vllm_config(config):
            model = initialize_model(config)
    layers = model.model.layers[0].mlp.experts.routed_experts.quant_method.layers
    assert (layers.largest, layers.captured) == (96 * ranks, captured)
