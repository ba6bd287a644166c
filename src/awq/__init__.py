"""4-bit AWQ quantization of language models: quantize, save, load, generate and measure."""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from awq.compat import register

if TYPE_CHECKING:
    from awq.config import QuantConfig
    from awq.errors import AwqError, KernelNotSupportedError
    from awq.hardware import detect
    from awq.kernels import select_kernel_version
    from awq.model import AutoAWQForCausalLM
    from awq.pipeline.recipe import quantize_model
    from awq.storage.load import load_dequantized, load_quantized
    from awq.storage.save import save_quantized

__all__ = [
    "AutoAWQForCausalLM",
    "AwqError",
    "KernelNotSupportedError",
    "QuantConfig",
    "__version__",
    "detect",
    "load_dequantized",
    "load_quantized",
    "quantize_model",
    "save_quantized",
    "select_kernel_version",
]

# Where each public name lives. Loaded on first use, so that `import awq` and `awq --help` need no torch.
_HOMES = {
    "AutoAWQForCausalLM": "awq.model",
    "AwqError": "awq.errors",
    "KernelNotSupportedError": "awq.errors",
    "QuantConfig": "awq.config",
    "detect": "awq.hardware",
    "load_dequantized": "awq.storage.load",
    "load_quantized": "awq.storage.load",
    "quantize_model": "awq.pipeline.recipe",
    "save_quantized": "awq.storage.save",
    "select_kernel_version": "awq.kernels",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _installed("awq-int4") or "0+source"  # a checkout that is not installed
    elif name in _HOMES:
        if name == "AutoAWQForCausalLM":
            _warn_of_autoawq()
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _warn_of_autoawq() -> None:
    """Two distributions with one import name overwrite each other's files."""
    if version := _installed("autoawq"):
        warnings.warn(
            f"autoawq {version} is installed too, with the same import name: uninstall it, then reinstall awq-int4.",
            stacklevel=3,
        )


def _installed(distribution: str) -> str | None:
    from importlib import metadata  # slow to import, and rarely asked

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


register()
