"""Tensor names in files and in the model: where transformers renames between them, so do we."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from copy import deepcopy
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, rename_source_key

from awq.structure.experts import Experts

Rename = Callable[[str], str]


def from_stored(model: Any) -> Rename:
    """Stored tensor name -> its name in `model` (GPT-NeoX's embed_out.weight -> lm_head.weight)."""
    renamings = _of_kind(WeightRenaming, get_model_conversion_mapping(model))
    own = dict.fromkeys([name for name, _ in model.named_parameters(remove_duplicate=False)], True)
    own |= dict.fromkeys([name for name, _ in model.named_buffers()], True)
    experts = {name: linear for linear, stored in _expert_linears(model, _reversed(model)) for name in (linear, stored)}
    return _by_prefix(experts, lambda name: rename_source_key(name, renamings, [], model.base_model_prefix, own)[0])


def to_stored(model: Any) -> Rename:
    """Tensor name in `model` -> the name under which transformers, and so every engine, stores it."""
    back = _reversed(model)
    renamings = _of_kind(WeightRenaming, back)
    return _by_prefix(
        dict(_expert_linears(model, back)), lambda name: rename_source_key(name, renamings, [], reverse=True)[0]
    )


def of_module(rename: Rename) -> Rename:
    """The same renaming for a linear, which goes by its weight: transformers' patterns are made for tensors."""
    return lambda name: rename(f"{name}.weight").removesuffix(".weight")


def by_stored_names(model: Any, report: dict[str, Any]) -> dict[str, Any]:
    """The report of the linears under the names that the checkpoint has them under."""
    stored = of_module(to_stored(model))
    return report | {
        key: {stored(name): of for name, of in report[key].items()} for key in ("linears", "not_converted")
    }


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


def kept_in_float32(model: Any) -> Callable[[str], bool]:
    """Whether transformers keeps a tensor of `model` in float32 in any half precision, as a router's correction."""
    parts = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return lambda name: any(f".{part}." in f".{name}." for part in parts)


def _by_prefix(linears: dict[str, str], rename: Rename) -> Rename:
    """`rename`, but for the tensors of `linears`."""

    def renamed(name: str) -> str:
        linear, _, tensor = name.rpartition(".")
        return f"{linears[linear]}.{tensor}" if linear in linears else rename(name)

    return renamed


def _reversed(model: Any) -> list[Any]:
    """The conversions by which transformers would store `model`, in the order in which it applies them."""
    used = getattr(model, "_weight_conversions", None)
    if used is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        used = [conversion for conversion in conversions if not isinstance(conversion, PrefixChange)]
    return [conversion.reverse_transform() for conversion in reversed(used)]


def _of_kind(kind: type, conversions: Iterable[Any]) -> list[Any]:
    return [conversion for conversion in conversions if isinstance(conversion, kind)]


def _expert_linears(model: Any, back: list[Any]) -> Iterator[tuple[str, str]]:
    """The linears of split experts: their names in `model`, and those of the files that they were fused from.

    Where the files hold them fused too, the names are those of here: experts.3.gate_proj.
    """
    renamings = _of_kind(WeightRenaming, back)
    for prefix, experts in model.named_modules():
        if isinstance(experts, Experts):
            layout = experts.layout
            for source, parts in ((layout.into, layout.parts), (layout.out, ("down_proj",))):
                stored = _stored_parts(f"{prefix}.{source}", len(experts), len(parts), back)
                for expert in range(len(experts)):
                    for part, name in enumerate(parts):
                        own = f"{prefix}.{expert}.{name}"
                        weight = f"{own}.weight"
                        yield (
                            own,
                            stored.get((expert, part))
                            or _linear(rename_source_key(weight, renamings, [], reverse=True)[0]),
                        )


def _stored_parts(fused: str, experts: int, parts: int, back: list[Any]) -> dict[tuple[int, int], str]:
    """(expert, part) -> stored linear, for those that transformers takes a fused parameter apart into.

    It is asked to do so to a tensor of their numbers.
    """
    renamed, pattern = rename_source_key(
        fused, _of_kind(WeightRenaming, back), _of_kind(WeightConverter, back), reverse=True
    )
    converter = next((c for c in _of_kind(WeightConverter, back) if pattern in c.source_patterns), None)
    if converter is None:
        return {}
    converter = deepcopy(converter)
    numbers = torch.arange(experts * parts).view(experts, parts, 1)
    converter.add_tensor(renamed, fused, pattern, numbers)
    found = {name: _only(value) for name, value in converter.convert(renamed).items()}
    return {divmod(int(value), parts): _linear(name) for name, value in found.items() if value.numel() == 1}


def _only(value: Any) -> torch.Tensor:
    result: torch.Tensor = value[0] if isinstance(value, list) else value
    return result


def _linear(name: str) -> str:
    return name.removesuffix(".weight")
