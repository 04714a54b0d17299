"""The small trained model of accuracy/, for tests that serve it otherwise than it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from run_python import ROOT
from safetensors.torch import load_file, save_file

CHECKPOINT = ROOT / "accuracy/model"


def changed(directory: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """The model with its experts' tensors changed."""
    shutil.copytree(CHECKPOINT, directory)
    tensors = {
        name: change(name, tensor).contiguous() if ".experts." in name else tensor
        for name, tensor in load_file(CHECKPOINT / "model.safetensors").items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
