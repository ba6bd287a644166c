"""What will be quantized and what not, decided from shapes alone, before any weight is read."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from awq.config import QuantConfig
from awq.errors import ConfigError, UnsupportedModelError
from awq.structure.blocks import find_blocks
from awq.structure.experts import routers
from awq.structure.linears import LinearShape, linear_shape, shared_parameters

DEFAULT_GROUP_SIZES = (128, 64, 32)
# A linear that no format can hold stays float where it is this small, such as a shared expert's gate.
SMALL_LINEAR = 1 << 16


@dataclass(frozen=True)
class Plan:
    """The settings with the group size resolved, and which linears they apply to.

    blocks:        name of the list of blocks
    linears:       full names of the linears to quantize
    not_converted: full names of all others, with the reason
    notes:         what was decided for the user, a sentence each
    """

    config: QuantConfig
    blocks: str
    linears: tuple[str, ...]
    not_converted: dict[str, str]
    notes: tuple[str, ...] = ()


def make_plan(model: nn.Module, config: QuantConfig) -> Plan:
    """The plan for `model`, which may be on the meta device; ConfigError where it cannot be quantized as asked."""
    blocks, _ = find_blocks(model)
    _check_linears(model, blocks)
    wanted: dict[str, LinearShape] = {}
    not_converted: dict[str, str] = {f"{blocks}.{name}": "router" for name in routers(model.get_submodule(blocks))}
    shared = shared_parameters(model)
    once = dict(model.named_modules())
    for name, module in model.named_modules(remove_duplicate=False):
        in_two_places = id(getattr(module, "weight", None)) in shared
        if name not in not_converted and (shape := linear_shape(module)) and (name in once or in_two_places):
            reason = _keep_float(name, shape, blocks, config) or (
                "shared with another place" if in_two_places else None
            )
            if reason is None:
                wanted[name] = shape
            else:
                not_converted[name] = reason
    if not wanted:
        reasons = {reason for name, reason in not_converted.items() if name.startswith(blocks + ".")}
        raise ConfigError(f"nothing is left to quantize: the linears of the blocks are {', '.join(sorted(reasons))}.")
    config, notes = _resolve_group_size(wanted, config)
    _check_shapes(wanted, config)
    return Plan(config, blocks, tuple(wanted), not_converted, (*notes, *_unmatched(model, config)))


def _check_linears(model: nn.Module, blocks: str) -> None:
    """UnsupportedModelError where the blocks keep most of their weights in something else than linears."""
    linear, other = 0, dict[str, int]()
    for prefix, module in model.get_submodule(blocks).named_modules(prefix=blocks):
        for name, parameter in module.named_parameters(recurse=False):
            if linear_shape(module):
                linear += parameter.numel()
            elif parameter.ndim > 1:
                other[f"{prefix}.{name}"] = parameter.numel()
    if sum(other.values()) > linear:
        largest = max(other, key=other.__getitem__)
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps most of its weights in parameters such as {largest}, which are neither "
            "linear layers nor experts in a layout that is known here: use this model in float."
        )


def _unmatched(model: nn.Module, config: QuantConfig) -> list[str]:
    names = [name for name, _ in model.named_modules()]
    return [
        f"modules_to_not_convert: no module's name has {part!r} in it."
        for part in config.modules_to_not_convert
        if not any(part in name for name in names)
    ]


def _keep_float(name: str, shape: LinearShape, blocks: str, config: QuantConfig) -> str | None:
    if not name.startswith(blocks + "."):
        return "outside the blocks"
    if any(part in name for part in config.modules_to_not_convert):
        return "excluded by modules_to_not_convert"
    if shape.out_features % 8 and math.prod(shape) < SMALL_LINEAR:
        return f"out_features {shape.out_features} is not a multiple of 8"
    return None


def _resolve_group_size(linears: dict[str, LinearShape], config: QuantConfig) -> tuple[QuantConfig, tuple[str, ...]]:
    if config.group_size is not None:
        return config, ()
    default = DEFAULT_GROUP_SIZES[0]
    misfit = next((name for name, shape in linears.items() if shape.in_features % default), None)
    if misfit is None:
        return config.with_group_size(default), ()
    blame = f"{default} does not divide the {linears[misfit].in_features} inputs of {misfit}"
    size = next((s for s in DEFAULT_GROUP_SIZES[1:] if not _misfits(linears, s)), None)
    if size is None:
        raise ConfigError(f"{blame}, nor does 64 or 32: give a group size (16 or -1), or exclude such linears.")
    return config.with_group_size(size), (f"Group size {size}: {blame}.",)


def _check_shapes(linears: dict[str, LinearShape], config: QuantConfig) -> None:
    size = config.group_size or -1
    for name in _misfits(linears, size):
        fitting = [s for s in (*DEFAULT_GROUP_SIZES, 16) if not _misfits(linears, s)]
        raise ConfigError(
            f"group size {size} does not divide the {linears[name].in_features} inputs of {name}: "
            f"use {', '.join(map(str, fitting))}{' or ' if fitting else ''}-1 (one group a row)."
        )
    for name, shape in linears.items():
        if shape.out_features % 8:
            raise ConfigError(
                f"{name} has {shape.out_features} outputs, which words of eight 4-bit codes cannot hold: "
                "list it in modules_to_not_convert."
            )


def _misfits(linears: dict[str, LinearShape], size: int) -> list[str]:
    return [name for name, shape in linears.items() if size != -1 and shape.in_features % size]
