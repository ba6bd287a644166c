"""Write a checkpoint folder in the AWQ gemm layout: streamed, read back, and moved into place whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awq.checkpoint.files import REPORT_FILE
from awq.checkpoint.output import check_output, finished_recipe, staged
from awq.checkpoint.read import OUTLIER_FOLDER, index_fits, open_checkpoint
from awq.checkpoint.serving import serving_warnings
from awq.checkpoint.shards import READ_BACK, ShardWriter, parse_size, write_json
from awq.config import QuantConfig
from awq.errors import CheckpointError, ConfigError
from awq.packing import Outliers, PackedInt4, StoredShape, stored_shape

__all__ = [
    "NamedLinear",
    "Written",
    "check_output",
    "check_settings",
    "finished_recipe",
    "linear_tensors",
    "quantization_config",
    "warnings_of",
    "write_checkpoint",
]

# name, weight, bias [out_features] or None, fp16 channels or None
NamedLinear = tuple[str, PackedInt4, Tensor | None, Outliers | None]
Tensors = dict[str, Tensor]
_SYMMETRIC_ZEROS = -0x77777778  # 0x88888888 as int32: eight zero points of 8


@dataclass(frozen=True)
class Written:
    """A finished folder, its size in bytes, and sentences about what other engines cannot do with it."""

    path: Path
    bytes: int
    warnings: tuple[str, ...]


def write_checkpoint(
    folder: str | Path,
    *,
    config: Mapping[str, Any],
    quant: QuantConfig,
    linears: Iterable[NamedLinear],
    floats: Iterable[tuple[str, Tensor]],
    report: Mapping[str, Any],
    extras: Callable[[Path], None] | None = None,
    shard_size: int | str = "5GB",
    overwrite: bool = False,
    verify: str = "quick",
    expected_bytes: int = 0,
) -> Written:
    """Write a folder that vLLM, SGLang and transformers read as AWQ, and return where and how large it is.

    config:         the model's config.json; its quantization_config is replaced
    quant:          with the group size resolved, and modules_to_not_convert as full prefixes
    linears, floats: taken one at a time; a tied lm_head is not among them
    extras:         saves the tokenizer and the like into the folder it is given
    verify:         "quick" reads back one linear and all headers, "full" every tensor, "none" nothing
    expected_bytes: checked against the free space first

    At most one shard is in memory. The folder appears complete or not at all, and its bytes depend on the
    arguments alone. ConfigError, CheckpointError, OutputExistsError or AwqError as the sentence says.
    """
    check_settings(quant, verify)
    shard_bytes = parse_size(shard_size)
    target = check_output(folder, overwrite, expected_bytes)
    with staged(target, overwrite) as stage:
        if extras:
            extras(stage)
        weights = ShardWriter(stage, shard_bytes, verify)
        outliers = ShardWriter(stage / OUTLIER_FOLDER, shard_bytes, verify)
        shapes = {linear[0]: _add_linear(linear, quant, weights, outliers) for linear in linears}
        for name, tensor in floats:
            weights.add(name, tensor)
        weights.finish()
        outliers.finish()
        write_json(stage / "config.json", {**config, "quantization_config": quantization_config(quant)})
        write_json(stage / REPORT_FILE, report)
        if verify != "none":
            open_checkpoint(stage)
        size = sum(path.stat().st_size for path in stage.rglob("*") if path.is_file())
    return Written(target, size, warnings_of(shapes, quant))


def warnings_of(shapes: dict[str, StoredShape], quant: QuantConfig) -> tuple[str, ...]:
    """Sentences about what other engines cannot do with these linears."""
    return (*_clashes(quant, shapes), *serving_warnings(shapes, quant))


def quantization_config(quant: QuantConfig) -> dict[str, Any]:
    """What config.json says, in the spelling that every reader of AWQ folders takes."""
    return {
        "quant_method": "awq",
        "zero_point": quant.zero_point,
        "group_size": quant.group_size,
        "bits": quant.bits,
        "version": "gemm",
        "modules_to_not_convert": list(quant.modules_to_not_convert),
    }


def check_settings(quant: QuantConfig, verify: str) -> None:
    """ConfigError for what cannot be stored, and for an unknown way to verify."""
    if quant.bits != 4:
        raise ConfigError(f"bits={quant.bits} cannot be stored: the AWQ layout holds 4 bits; evaluate it in memory.")
    if quant.group_size is None:
        raise ConfigError("group_size is not resolved: give 16, 32, 64, 128 or -1 to store.")
    if verify not in READ_BACK:
        raise ConfigError(f"verify={verify!r} is unknown: use one of {', '.join(READ_BACK)}.")


def linear_tensors(linear: NamedLinear, quant: QuantConfig) -> tuple[StoredShape, Tensors, Tensors]:
    """What is stored of a linear beside the shape: its own tensors, and those of its fp16 channels, by full name.

    CheckpointError for what no reader could use.
    """
    name, packed, bias, kept = linear
    shape = _check_packed(name, packed, quant)
    tensors = {f"{name}.{part}": getattr(packed, part) for part in ("qweight", "qzeros", "scales")}
    if bias is not None:
        tensors[f"{name}.bias"] = _finite(f"{name}.bias", bias.to(torch.float16), (shape.out_features,))
    if kept is None or not len(kept.index):
        return shape, tensors, {}
    size = (len(kept.index), shape.out_features)
    if not index_fits(kept.index, shape.in_features):
        raise CheckpointError(f"{name} keeps channels that do not ascend within 0..{shape.in_features - 1}.")
    residual = _finite(f"{name}.residual", kept.residual.to(torch.float16), size)
    return shape, tensors, {f"{name}.idx": kept.index.to(torch.int32), f"{name}.residual": residual}


def _add_linear(linear: NamedLinear, quant: QuantConfig, weights: ShardWriter, outliers: ShardWriter) -> StoredShape:
    shape, tensors, kept = linear_tensors(linear, quant)
    for writer, part in ((weights, tensors), (outliers, kept)):
        for name, tensor in part.items():
            writer.add(name, tensor)
    return shape


def _check_packed(name: str, packed: PackedInt4, quant: QuantConfig) -> StoredShape:
    tensors = {"qweight": packed.qweight, "qzeros": packed.qzeros, "scales": packed.scales}
    try:
        shape = stored_shape(tensors, quant.group_size)
    except CheckpointError as error:
        raise CheckpointError(f"{name} cannot be stored: {error}; pack it with this group size.") from None
    _finite(f"{name}.scales", packed.scales, tuple(packed.scales.shape))
    if not quant.zero_point and not (packed.qzeros == _SYMMETRIC_ZEROS).all():
        raise CheckpointError(f"{name} has zero points other than 8, but zero_point is False: store it with True.")
    return shape


def _clashes(quant: QuantConfig, names: Iterable[str]) -> list[str]:
    """Other engines look for the words of modules_to_not_convert anywhere in a name."""
    clashes = ((word, name) for name in names for word in quant.modules_to_not_convert if word in name)
    return [
        f"modules_to_not_convert holds {word!r}, which is also in the quantized {name}: vLLM will not load that one."
        for word, name in list(clashes)[:1]
    ]


def _finite(name: str, tensor: Tensor, size: tuple[int, ...]) -> Tensor:
    if tensor.shape != size:
        raise CheckpointError(f"{name} has shape {list(tensor.shape)} where its linear needs {list(size)}.")
    if not tensor.isfinite().all():
        raise CheckpointError(f"{name} holds NaN or infinity (or more than float16 can) and is not stored.")
    return tensor
