"""A quantized model as a checkpoint: which tensors, under which names and in which dtype, and what lies beside them."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from awq.algorithm.blocks import storage_dtype
from awq.algorithm.ranks import here
from awq.checkpoint.write import NamedLinear, Written, write_checkpoint
from awq.config import QuantConfig
from awq.linear import QuantLinear
from awq.pretrained.source import drop_quantization
from awq.processes import together
from awq.storage.names import by_stored_names, kept_in_float32, not_converted, of_module, text_prefixes, to_stored


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
    quantized = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    state = model.state_dict()
    floats = stored_floats(model, quantized)

    def write() -> Written:
        return write_checkpoint(
            folder,
            config=model_config(model),
            quant=stored_settings(model, report),
            linears=_quantized_linears(model),
            floats=((float_.stored, state[name].to(float_.dtype)) for name, float_ in floats.items()),
            report=by_stored_names(model, report),
            extras=extras_of(model, (tokenizer, processor), beside or {}),
            shard_size=shard_size,
            overwrite=overwrite,
            verify=verify,
        )

    with together():
        return by_the_first(write)


def by_the_first(write: Callable[[], Written]) -> Written:
    """What one of several processes, the first, writes for all."""
    written = write() if here().rank == 0 else None
    path, size, notes = here().tell(written and [str(written.path), written.bytes, written.warnings])[0]
    return Written(Path(path), size, tuple(notes))


class Float(NamedTuple):
    """A tensor that is not in a quantized linear: the name and dtype that it is stored under."""

    stored: str
    dtype: torch.dtype


def stored_settings(model: nn.Module, report: dict[str, Any]) -> QuantConfig:
    """The settings of a report, with what stays float as other engines look for it."""
    config = QuantConfig.from_dict(report["recipe"]["config"])
    return config.with_kept(not_converted(model, report["not_converted"], report["linears"]))


def extras_of(model: Any, savers: Collection[Any], beside: Mapping[str, Path]) -> Callable[[Path], None]:
    """What writes the files beside the weights into a folder: tokenizer, processor, generation settings, copies."""

    def extras(target: Path) -> None:
        for name, path in beside.items():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target / name)
        for part in savers:
            if part is not None:
                part.save_pretrained(target)
        if (generation := getattr(model, "generation_config", None)) is not None:
            # not by save_pretrained, which refuses what old models came with (a temperature without do_sample)
            (target / "generation_config.json").write_text(generation.to_json_string(), encoding="utf-8")

    return extras


def model_config(model: Any) -> dict[str, Any]:
    """config.json, but for the quantization."""
    config = copy.deepcopy(model.config)
    drop_quantization(config)
    config.architectures = [type(model).__name__]
    config.dtype = config.get_text_config().dtype = storage_dtype(model.get_input_embeddings())
    settings: dict[str, Any] = json.loads(config.to_json_string())
    settings.pop("_name_or_path", None)
    return settings


def stored_floats(model: Any, quantized: Collection[str]) -> dict[str, Float]:
    """By name in the model, everything outside of `quantized`, tied tensors once; the language part in the storage
    dtype. The model may be on the meta device.
    """
    within = tuple(f"{name}." for name in quantized)
    dtype, rename, keep = storage_dtype(model.get_input_embeddings()), to_stored(model), kept_in_float32(model)
    text = text_prefixes(model, quantized)
    seen: set[tuple[int, torch.Size]] = set()
    floats = {}
    tied = getattr(model, "all_tied_weights_keys", {})  # these go last: the first of two names is stored
    for name, tensor in sorted(model.state_dict(keep_vars=True).items(), key=lambda item: item[0] in tied):
        key = (id(tensor) if tensor.is_meta else tensor.data_ptr(), tensor.shape)
        if name.startswith(within) or (name in tied and key in seen):
            continue
        seen.add(key)
        halved = tensor.dtype == torch.float32 and name.startswith(text) and not keep(name)
        floats[name] = Float(rename(name), dtype if halved else tensor.dtype)
    return floats


def _quantized_linears(model: nn.Module) -> Iterator[NamedLinear]:
    rename = of_module(to_stored(model))
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            bias = module.bias
            yield rename(name), module.packed, bias if isinstance(bias, Tensor) else None, module.outliers
