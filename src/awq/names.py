"""Tensor names in files and in the model: where transformers renames between them, so do we."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


def _renamings(conversions: Iterable[Any]) -> list[WeightRenaming]:
    return [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
