"""Tensor names in files and in the model: where transformers renames between them, so do we."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming, rename_source_key

Rename = Callable[[str], str]


def from_stored(model: Any) -> Rename:
    """Stored tensor name -> its name in `model` (GPT-NeoX's embed_out.weight -> lm_head.weight)."""
    renamings = _renamings(get_model_conversion_mapping(model))
    own = dict.fromkeys([name for name, _ in model.named_parameters(remove_duplicate=False)], True)
    own |= dict.fromkeys([name for name, _ in model.named_buffers()], True)
    return lambda name: rename_source_key(name, renamings, [], model.base_model_prefix, own)[0]


def to_stored(model: Any) -> Rename:
    """Tensor name in `model` -> the name under which transformers, and so every engine, stores it."""
    used = getattr(model, "_weight_conversions", None)
    if used is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        used = [conversion for conversion in conversions if not isinstance(conversion, PrefixChange)]
    renamings = _renamings(conversion.reverse_transform() for conversion in reversed(used))
    return lambda name: rename_source_key(name, renamings, [], reverse=True)[0]


def of_module(rename: Rename) -> Rename:
    """The same renaming for a linear, which goes by its weight: transformers' patterns are made for tensors."""
    return lambda name: rename(f"{name}.weight").removesuffix(".weight")


def not_converted(model: Any, kept: Collection[str], quantized: Collection[str]) -> tuple[str, ...]:
    """What stays float, as vLLM looks for it, by stored names, and as transformers does, by its own."""
    found: dict[str, None] = {}
    for spelled in (of_module(to_stored(model)), str):
        found |= dict.fromkeys(prefixes(map(spelled, kept), list(map(spelled, quantized))))
    return tuple(found)


def text_prefixes(model: Any, quantized: Collection[str]) -> tuple[str, ...]:
    """What the names of the language part begin with: the tower that holds its embeddings and what is `quantized`."""
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules() if module in (inner, outer)}
    tower = names[inner]
    while tower and not all(name.startswith(f"{tower}.") for name in quantized):
        tower = tower.rpartition(".")[0]
    return (f"{tower}." if tower else "", *(f"{name}." for name in names.values()))


def prefixes(kept: Iterable[str], quantized: Collection[str]) -> list[str]:
    """The names of `kept` linears, as "tower." for all of a part of the model where none is `quantized`.

    Engines that build a part from modules of other names leave it alone by its prefix; the dot is what they match by.
    """
    found: dict[str, None] = {}
    for name in kept:
        parts = name.split(".")
        parents = (".".join(parts[:depth]) + "." for depth in range(1, len(parts)))
        found[next((parent for parent in parents if not any(parent in other for other in quantized)), name)] = None
    return list(found)


def _renamings(conversions: Iterable[Any]) -> list[WeightRenaming]:
    return [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
