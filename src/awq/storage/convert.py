"""Rewrite a checkpoint of any AWQ layout as a gemm folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from awq.checkpoint.files import REPORT_FILE, inside
from awq.checkpoint.output import check_output
from awq.checkpoint.read import Checkpoint, open_checkpoint
from awq.checkpoint.write import NamedLinear, Written, write_checkpoint
from awq.config import GROUP_SIZES, QuantConfig
from awq.errors import CheckpointError

# Tokenizer, chat template, generation settings and licence travel along; code and pickles do not.
_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_REPLACED = ("config.json", "quant_config.json", "quantize_config.json", REPORT_FILE)


def convert_checkpoint(
    source: str | Path, target: str | Path, overwrite: bool = False, shard_size: str | int = "5GB"
) -> Written:
    """Write the AWQ folder `source` (gemm, gemv, gemv_fast, llm-awq, old configurations) to `target` as gemm.

    Codes, zeros and scales are the same; scaled activations, fp16 channels and other tensors are kept.
    CheckpointError when the source is damaged or has groups that are not stored.
    """
    check_output(target, overwrite)
    checkpoint = open_checkpoint(source)
    written = write_checkpoint(
        target,
        config=checkpoint.config,
        quant=_config(checkpoint),
        linears=_linears(checkpoint),
        floats=_floats(checkpoint),
        report=checkpoint.report or {"converted_from": checkpoint.quant.layout},
        extras=lambda folder: _copy_files(checkpoint.path, folder),
        shard_size=shard_size,
        overwrite=overwrite,
    )
    if code := sorted(path.name for path in checkpoint.path.glob("*.py")):
        warning = f"{', '.join(code)} of {checkpoint.path} was not copied: code is never taken along."
        return replace(written, warnings=(*written.warnings, warning))
    return written


def _config(checkpoint: Checkpoint) -> QuantConfig:
    quant, size = checkpoint.quant, checkpoint.quant.group_size
    if size not in GROUP_SIZES and all(checkpoint.shape(name).in_features == size for name in checkpoint.linears):
        size = -1
    if size not in GROUP_SIZES:
        raise CheckpointError(
            f"{checkpoint.path} has groups of {size}, which are not stored: quantize the float model."
        )
    names = tuple(_full_prefixes(quant.modules_to_not_convert, checkpoint.float_names))
    return QuantConfig(group_size=size, zero_point=quant.zero_point, modules_to_not_convert=names, outlier_ratio=0.0)


def _full_prefixes(words: Iterable[str], float_names: Iterable[str]) -> list[str]:
    """The modules with a float weight whose name holds one of the words."""
    modules = [name.removesuffix(".weight") for name in float_names if name.endswith(".weight")]
    return [module for module in modules if any(word in module for word in words)]


def _linears(checkpoint: Checkpoint) -> Iterator[NamedLinear]:
    for name in checkpoint.linears:
        yield name, checkpoint.packed(name), checkpoint.bias(name), checkpoint.outliers(name)


def _floats(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    for module, scales in checkpoint.act_scales.items():
        yield f"{module}.scales", scales
    for name in checkpoint.float_names:
        yield name, checkpoint.tensor(name)


def _copy_files(source: Path, folder: Path) -> None:
    for path in sorted([*source.glob("*"), *source.glob("*/*.jinja")]):
        named = path.suffix in _COPIED and path.name not in _REPLACED and not path.name.endswith(".index.json")
        if path.is_file() and (named or path.name.startswith(("LICENSE", "NOTICE"))):
            place = folder / path.relative_to(source)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(inside(source, str(path.relative_to(source))), place)
