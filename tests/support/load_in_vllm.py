"""Load a model through the plugin, in whichever vLLM comes first on sys.path: test_vllm_plugin runs this.

    python load_in_vllm.py CHECKPOINT OTHER ACTIVATIONS OUTPUTS

Reads fp32[T, H] activations and writes what vLLM's MoE blocks make of them, fp32[2, layers, T, H]: with one
checkpoint, and with the other after it was loaded into the same model. From the flag on this is all vLLM's
Python, and none of its compiled code, which its releases have for GPUs only.
"""

import sys

import torch
from overrides import check_overrides

CHECKPOINT, OTHER, ACTIVATIONS, OUTPUTS = sys.argv[1:]


def main() -> None:
    """Load and run."""
    import vllm
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading

    from vllm_mxfp4_gfx950 import vllm_plugin

    vllm_plugin.register()
    vllm_plugin.register()  # vLLM may call it again.
    check_overrides(vllm_plugin.Mxfp4TritonConfig, QuantizationConfig)
    check_overrides(vllm_plugin.Mxfp4TritonMoEMethod, FusedMoEMethodBase)

    arguments = EngineArgs(CHECKPOINT, quantization="mxfp4-triton", dtype="float32", max_model_len=256)
    config = arguments.create_engine_config()
    assert type(config.quant_config) is vllm_plugin.Mxfp4TritonConfig
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{OUTPUTS}.store", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        # The three steps of vLLM's load_model, which from 0.33 also asks for a GPU between them.
        torch.set_default_dtype(torch.float32)
        model = initialize_model(config)
        loader = get_model_loader(config.load_config)
        loader.load_weights(model, config.model_config)
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))
        x, outputs = torch.load(ACTIVATIONS), []
        for checkpoint in (CHECKPOINT, OTHER):
            if checkpoint == OTHER:
                config.model_config.model = OTHER
                initialize_layerwise_reload(model)
                model.load_weights(loader.get_all_weights(config.model_config, model))
                finalize_layerwise_reload(model, config.model_config)
            with torch.inference_mode(), set_forward_context(None, config):
                outputs.append(torch.stack([layer.mlp(x) for layer in model.model.layers]))
        torch.save(torch.stack(outputs), OUTPUTS)
    print(vllm.__file__)


if __name__ == "__main__":
    main()
