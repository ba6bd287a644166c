"""A quantized model as a checkpoint: which tensors, under which names and in which dtype, and what lies beside them."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awq.algorithm.blocks import storage_dtype
from awq.checkpoint.write import NamedLinear, Written, write_checkpoint
from awq.config import QuantConfig
from awq.linear import QuantLinear
from awq.names import by_stored_names, kept_in_float32, not_converted, of_module, text_prefixes, to_stored
from awq.processes import together
from awq.source import drop_quantization


def save_quantized(
    model: nn.Module,
    folder: str | Path,
    report: dict[str, Any],
    *,
    tokenizer: Any = None,
    processor: Any = None,
    beside: Mapping[str, Path] | None = None,
    shard_size: str | int = "5GB",
    overwrite: bool = False,
    verify: str = "quick",
) -> Written:
    """Write a quantized model as an AWQ `gemm` checkpoint that other engines load, outlier channels in a subfolder.

    beside: files of the source that travel along as they are, by their name in the folder
    """
    config = replace(
        QuantConfig.from_dict(report["recipe"]["config"]),
        modules_to_not_convert=not_converted(model, report["not_converted"], report["linears"]),
    )

    def extras(target: Path) -> None:
        for name, path in (beside or {}).items():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target / name)
        for part in (tokenizer, processor):
            if part is not None:
                part.save_pretrained(target)
        if (generation := getattr(model, "generation_config", None)) is not None:
            # not by save_pretrained, which refuses what old models came with (a temperature without do_sample)
            (target / "generation_config.json").write_text(generation.to_json_string(), encoding="utf-8")

    def write() -> Written:
        return write_checkpoint(
            Path(folder),
            config=_model_config(model),
            quant=config,
            linears=_quantized_linears(model),
            floats=_float_tensors(model),
            report=by_stored_names(model, report),
            extras=extras,
            shard_size=shard_size,
            overwrite=overwrite,
            verify=verify,
        )

    with together() as ranks:
        written = write() if ranks.rank == 0 else None
        path, size, notes = ranks.tell(written and [str(written.path), written.bytes, written.warnings])[0]
        return Written(Path(path), size, tuple(notes))


def _model_config(model: Any) -> dict[str, Any]:
    config = copy.deepcopy(model.config)
    drop_quantization(config)
    config.architectures = [type(model).__name__]
    config.dtype = config.get_text_config().dtype = storage_dtype(model.get_input_embeddings())
    settings: dict[str, Any] = json.loads(config.to_json_string())
    settings.pop("_name_or_path", None)
    return settings


def _quantized_linears(model: nn.Module) -> Iterator[NamedLinear]:
    rename = of_module(to_stored(model))
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            bias = module.bias
            yield rename(name), module.packed, bias if isinstance(bias, Tensor) else None, module.outliers


def _float_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Everything that is not in a QuantLinear, tied tensors once; the language part in the storage dtype."""
    quantized = tuple(name + "." for name, m in model.named_modules() if isinstance(m, QuantLinear))
    dtype, rename, keep = storage_dtype(model.get_input_embeddings()), to_stored(model), kept_in_float32(model)
    text = text_prefixes(model, quantized)
    seen: set[tuple[int, torch.Size]] = set()
    tied = getattr(model, "all_tied_weights_keys", {})  # these go last: the first of two names is stored
    for name, tensor in sorted(model.state_dict().items(), key=lambda item: item[0] in tied):
        key = (tensor.data_ptr(), tensor.shape)
        if name.startswith(quantized) or (name in tied and key in seen):
            continue
        seen.add(key)
        halved = tensor.dtype == torch.float32 and name.startswith(text) and not keep(name)
        yield rename(name), tensor.to(dtype) if halved else tensor
