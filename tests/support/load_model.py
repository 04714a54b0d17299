"""vLLM's own loading of a checkpoint, in this process and without an engine: a tenth of a second each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import engine
import pytest
import torch

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@contextmanager
def one_rank(checkpoint: Path) -> Iterator[None]:
    """What vLLM's loading needs around it; a sound checkpoint is needed to begin."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in engine.ENVIRONMENT.items():
            environment.setenv(name, value)
        from vllm.config import set_current_vllm_config
        from vllm.distributed import (
            cleanup_dist_env_and_memory,
            ensure_model_parallel_initialized,
            init_distributed_environment,
        )

        before = torch.get_num_threads(), torch.get_default_dtype()
        with set_current_vllm_config(create_config(checkpoint)):
            init_distributed_environment(1, 0, f"file://{checkpoint}.store", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
        yield
        cleanup_dist_env_and_memory()
        torch.set_num_threads(before[0])
        torch.set_default_dtype(before[1])


def create_config(checkpoint: Path, **arguments: Any) -> VllmConfig:
    """What vLLM makes of a checkpoint and of its flags."""
    from vllm.engine.arg_utils import EngineArgs

    usual = {"quantization": engine.FLAG, "dtype": "float32", "max_model_len": 256, "use_tqdm_on_load": False}
    return EngineArgs(str(checkpoint), **(usual | arguments)).create_engine_config()


def load(checkpoint: Path, **arguments: Any) -> torch.nn.Module:
    """The model as far as vLLM loads and prepares it before it serves."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading

    config = create_config(checkpoint, **arguments)
    with set_current_vllm_config(config):
        model = initialize_model(config)
        get_model_loader(config.load_config).load_weights(model, config.model_config)
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))
    return model


def check(checkpoint: Path, **arguments: Any) -> None:
    """The plugin's look at a checkpoint before it is loaded."""
    from vllm.config import set_current_vllm_config

    from vllm_mxfp4_gfx950 import vllm_plugin

    config = create_config(checkpoint, **arguments)
    with set_current_vllm_config(config):
        vllm_plugin.check_checkpoint(config)


def parameters(checkpoint: Path, unwritten: int = 0xFF, **arguments: Any) -> dict[str, torch.Tensor]:
    """What vLLM's loader alone makes of a checkpoint.

    Args:
        checkpoint: a directory.
        unwritten: each byte before it is loaded.
        arguments: of vLLM's engine.

    Returns:
        Each parameter's bytes by its name.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model

    config = create_config(checkpoint, **arguments)
    config.quant_config.checked = True  # Without the plugin's own look.
    with set_current_vllm_config(config):
        model = initialize_model(config)
        content = {name: value.data.reshape(-1).view(torch.uint8) for name, value in model.named_parameters()}
        for value in content.values():
            value.fill_(unwritten)
        get_model_loader(config.load_config).load_weights(model, config.model_config)
    return content


def read(checkpoint: Path) -> list[tuple[str, torch.Tensor]]:
    """The tensors that vLLM's loader reads, in its order."""
    from vllm.model_executor.model_loader import get_model_loader

    config = create_config(checkpoint)
    loader = get_model_loader(config.load_config)
    return list(loader.get_all_weights(config.model_config, torch.nn.Module()))


def files(checkpoint: Path) -> set[str]:
    """The files of a checkpoint that vLLM's loader reads."""
    from vllm_mxfp4_gfx950 import vllm_checks

    return {file.name for file in vllm_checks.files_to_load(create_config(checkpoint))}
