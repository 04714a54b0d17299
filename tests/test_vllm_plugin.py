"""The adapter in other releases of vLLM, whose own Python loads a model through it and runs its experts."""

from pathlib import Path

import engine  # noqa: F401  (puts the demo on sys.path)
import pytest
import tiny_checkpoint
import torch
from run_python import SUPPORT, run_python
from tiny_checkpoint import TinyGptOss

SCRIPT = SUPPORT / "load_in_vllm.py"


@pytest.mark.engine
@pytest.mark.parametrize("release", ["0.26.0", "0.33.0"])
def test_load_in(release: str, packages: Path, tmp_path: Path) -> None:
    """It registers, overrides what the release's base classes ask for, and gives transformers' numbers."""
    checkpoint = tiny_checkpoint.write(TinyGptOss(), tmp_path / "checkpoint")
    # vLLM takes the platform from its distribution's version, and would look for a GPU without this one.
    distribution = tmp_path / "distribution"
    metadata = distribution / f"vllm-{release}+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}+cpu\n")
    x = torch.randn(37, TinyGptOss().hidden, generator=torch.Generator().manual_seed(1))
    torch.save(x, tmp_path / "x")

    tree = packages / f"vllm-{release}"
    result = run_python(
        [str(SCRIPT), str(checkpoint), str(tmp_path / "x"), str(tmp_path / "y")],
        path=[distribution, tree],
        HF_HUB_OFFLINE="1",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split()[-1] == str(tree / "vllm" / "__init__.py")
    model = tiny_checkpoint.transformers_model(checkpoint).float()
    with torch.inference_mode():
        expected = torch.stack([layer.mlp(x[None])[0][0] for layer in model.model.layers])
    torch.testing.assert_close(torch.load(tmp_path / "y"), expected, rtol=1e-4, atol=1e-4)
