"""The module paths that scripts written for AutoAWQ import, such as `awq.modules.linear`.

They are no files here: each is a module made on `import awq` whose names load their home on first use.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_QUANT_LINEAR = ("awq.linear", "QuantLinear")
_AUTO = {"AutoAWQForCausalLM": ("awq", "AutoAWQForCausalLM")}
_GEMM = {"WQLinear_GEMM": _QUANT_LINEAR}
_GEMV = {"WQLinear_GEMV": _QUANT_LINEAR}
_GEMV_FAST = {"WQLinear_GEMVFast": _QUANT_LINEAR}
_HELPERS = "awq.compat.helpers"

# Old module -> name -> (module, name) here. A parent stands before its children.
_OLD_MODULES: dict[str, dict[str, tuple[str, str]]] = {
    "awq.evaluation": {"evaluate_perplexity": (_HELPERS, "evaluate_perplexity")},
    "awq.models": _AUTO,
    "awq.models.auto": _AUTO,
    "awq.models.base": {"BaseAWQForCausalLM": ("awq.model", "AwqModel")},
    "awq.modules": {},
    "awq.modules.linear": _GEMM | _GEMV | _GEMV_FAST,
    "awq.modules.linear.gemm": _GEMM,
    "awq.modules.linear.gemv": _GEMV,
    "awq.modules.linear.gemv_fast": _GEMV_FAST,
    "awq.quantize": {},
    "awq.quantize.quantizer": {"AwqQuantizer": (_HELPERS, "AwqQuantizer")},
    "awq.utils": {},
    "awq.utils.packing_utils": {
        "dequantize_gemm": (_HELPERS, "dequantize_gemm"),
        "reverse_awq_order": (_HELPERS, "reverse_awq_order"),
        "unpack_awq": (_HELPERS, "unpack_awq"),
    },
    "awq.utils.utils": {"get_best_device": (_HELPERS, "get_best_device")},
}


class OldModule(ModuleType):
    """A module of AutoAWQ's as a table of names; `__path__` is empty, so that it has no other submodules."""

    def __init__(self, name: str, homes: dict[str, tuple[str, str]]) -> None:
        super().__init__(name, f"Names of AutoAWQ's {name}, for scripts that import them.")
        self.__spec__ = ModuleSpec(name, None, is_package=True)
        self.__path__: list[str] = []
        self._homes = homes

    def __getattr__(self, name: str) -> Any:
        if name not in self._homes:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        module, attribute = self._homes[name]
        return getattr(importlib.import_module(module), attribute)

    def __dir__(self) -> list[str]:
        return sorted(self._homes)


def register() -> None:
    """Make the old modules importable, as `import a.b.c` and as attributes of their parents."""
    for name, homes in _OLD_MODULES.items():
        module = sys.modules[name] = OldModule(name, homes)
        parent, _, leaf = name.rpartition(".")
        setattr(sys.modules[parent], leaf, module)
