"""Stand-ins for what SGLang imports and this environment does not have; GPT-OSS's layers use none of it.

orjson, torchvision and gguf are for files of other kinds, IPython is for notebooks. SGLang's own compiler of
C++ kernels looks for its sources, which are no Python and so not unpacked.
"""

import importlib
import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

GGUF_TYPES = (
    "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K "
    "IQ1_M IQ1_S IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_XS IQ4_NL"
)

STAND_INS: dict[str, dict[str, object]] = {
    "orjson": {"loads": json.loads, "dumps": lambda value: json.dumps(value).encode()},
    "torchvision": {},
    "torchvision.transforms": {"InterpolationMode": type("InterpolationMode", (), {})},
    "torchvision.transforms.functional": {"InterpolationMode": type("InterpolationMode", (), {})},
    "IPython": {},
    "IPython.display": {"HTML": str, "display": print},
    "gguf": {"GGMLQuantizationType": type("GGMLQuantizationType", (), {n: n for n in GGUF_TYPES.split()})},
    "torchvision.io": {"decode_jpeg": None},
    "sglang.jit_kernel.utils.compile": {"KERNEL_PATH": None, "load_jit": None, "make_cpp_args": None},
    "sglang.kernels.jit.utils.compile.paths": {
        "KERNEL_PATH": None,
        "DEFAULT_INCLUDE": [],
        "DEFAULT_CFLAGS": [],
        "DEFAULT_LDFLAGS": [],
    },
}


def install() -> None:
    """Put them where imports look first, and have transformers take what SGLang registers with it.

    SGLang 0.5.16 registers configs that transformers has had since. And there is no vLLM: SGLang would import
    its kernels where it finds it, and does not need it.
    """
    sys.modules["vllm"] = None  # type: ignore[assignment]
    # It looks for torchvision, which is not there.
    importlib.import_module("transformers.models.llama.modeling_llama")
    register = CONFIG_MAPPING.register
    CONFIG_MAPPING.register = lambda key, value, exist_ok=False: register(key, value, exist_ok=True)
    for name, attributes in STAND_INS.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__path__ = []
        vars(module).update(attributes)
        sys.modules[name] = module
