"""What a folder says of its own quantization, in the spelling of any AWQ tool since 2023."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from awq.checkpoint.files import read_json
from awq.errors import CheckpointError

# Where the settings are, newest habit first; vLLM looks for the same names.
_LEGACY_FILES = ("quant_config.json", "quantize_config.json")
_MOST_NAMES = 1 << 16  # each is looked for in the names of all linears
# The version only names a layout, and old tools wrote a wrong one: the tensors decide. `exllama` and `ipex`
# were kernels over the gemm layout.
_READABLE = ("gemm", "gemv", "gemv_fast", "gemvfast", "llm_awq", "exllama", "ipex", "auto")


@dataclass(frozen=True)
class StoredQuant:
    """The settings of a stored checkpoint.

    group_size: -1 for whole rows
    layout:     gemm, gemv or gemv_fast, as the tensors show it
    """

    bits: int
    group_size: int
    zero_point: bool
    layout: str
    modules_to_not_convert: tuple[str, ...]


def find_settings(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """`quantization_config` of config.json, else the legacy file, as bits, group_size, zero_point and so on.

    CheckpointError when there is none, or it is not 4-bit AWQ of a readable version.
    """
    found = config.get("quantization_config") or next(filter(None, (read_json(folder, f) for f in _LEGACY_FILES)), None)
    if found is None:
        raise CheckpointError(
            f"{folder} is not quantized: config.json has no quantization_config; quantize it with `awq quantize`."
        )
    if not isinstance(found, dict):
        raise CheckpointError(f"quantization_config in {folder} is not a JSON object: copy config.json again.")
    _check_method(folder, found)
    _check_version(folder, found)
    return {
        "bits": _bits(folder, found),
        "group_size": _group_size(folder, found),
        "zero_point": bool(found.get("zero_point", True)),
        "modules_to_not_convert": _names(folder, found.get("modules_to_not_convert")),
    }


def _check_method(folder: Path, found: dict[str, Any]) -> None:
    # AutoGPTQ's quantize_config.json names no method, but always an order of activations.
    unnamed = "gptq" if "desc_act" in found else "awq"
    method = str(found.get("quant_method", unnamed)).lower()
    if method not in ("awq", "llm-awq"):
        raise CheckpointError(f"{folder} was quantized with {method}: only AWQ is read here; quantize the float model.")


def _check_version(folder: Path, found: dict[str, Any]) -> None:
    version = str(found.get("version") or found.get("format") or "gemm").lower().replace("-", "_")
    if version not in _READABLE:
        raise CheckpointError(
            f"{folder} is stored in the layout {version!r}, which is not read: gemm, gemv, gemv_fast and llm-awq are; "
            "quantize the float model again."
        )


def _bits(folder: Path, found: dict[str, Any]) -> int:
    bits = found.get("bits", found.get("w_bit", 4))
    if bits != 4:
        raise CheckpointError(f"{folder} stores {bits!r}-bit weights: only 4-bit AWQ is read; quantize it to 4 bits.")
    return 4


def _group_size(folder: Path, found: dict[str, Any]) -> int | None:
    size = found.get("group_size", found.get("q_group_size"))
    if size is None or (isinstance(size, int) and not isinstance(size, bool) and (size == -1 or size > 0)):
        return size
    raise CheckpointError(f"{folder} has group_size {size!r}: it must be a positive number or -1; correct config.json.")


def _names(folder: Path, names: object) -> tuple[str, ...]:
    names = [names] if isinstance(names, str) else names or []
    if isinstance(names, list) and len(names) <= _MOST_NAMES and all(isinstance(name, str) for name in names):
        return tuple(names)
    raise CheckpointError(f"modules_to_not_convert in {folder} is not a list of names: correct config.json.")
