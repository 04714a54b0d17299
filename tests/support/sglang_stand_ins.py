"""Stand-ins for what SGLang imports and this environment does not have; GPT-OSS's layers use none of it.

sgl_kernel has SGLang's compiled kernels, which it imports where there is a GPU. orjson, torchvision and gguf
are for files of other kinds, IPython is for notebooks. SGLang's own compiler of C++ kernels looks for its
sources, which are no Python and so not unpacked.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import NoReturn

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


class Absent(ModuleType):
    """A name of sgl_kernel: it can be imported and looked into, and not called."""

    def __getattr__(self, name: str) -> Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}")

    def __call__(self, *_: object, **__: object) -> NoReturn:
        """Not here."""
        raise NotImplementedError(f"{self.__name__} is a stand-in")


class Kernels(MetaPathFinder, Loader):
    """Finds sgl_kernel and all modules below it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec of each of them, and of nothing else."""
        below = fullname.partition(".")[0] == "sgl_kernel"
        return ModuleSpec(fullname, self, is_package=True) if below else None

    def create_module(self, spec: ModuleSpec) -> Absent:
        """A module without anything."""
        return Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """None: it stays so."""


def install() -> None:
    """Put them where imports look first, and have transformers take what SGLang registers with it.

    SGLang 0.5.16 registers configs that transformers has had since. And there is no vLLM: SGLang would import
    its kernels where it finds it, and does not need it.
    """
    sys.modules["vllm"] = None  # type: ignore[assignment]
    sys.meta_path.append(Kernels())
    # It looks for torchvision, which is not there.
    importlib.import_module("transformers.models.llama.modeling_llama")
    register = CONFIG_MAPPING.register
    CONFIG_MAPPING.register = lambda key, value, exist_ok=False: register(key, value, exist_ok=True)
    missing = {name for name in STAND_INS if "." not in name and find_spec(name) is None}
    for name, attributes in STAND_INS.items():
        if name.partition(".")[0] not in {*missing, "sglang"}:
            continue
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__path__ = []
        vars(module).update(attributes)
        sys.modules[name] = module
