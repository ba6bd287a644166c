"""Which list of blocks text runs through: a model may have towers for images and sounds beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress

import torch
from torch import nn

from awq.errors import UnsupportedModelError
from awq.structure.linears import linear_shape
from awq.structure.probe import Stop

PROBE_TOKENS = 32
_FAILED = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)  # what a model raises for its inputs


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of blocks that text runs through, and its name; `model` may be on the meta device.

    Vision and audio towers have lists of their own: of several, it is the first that a forward on tokens alone enters.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        within = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not within and any(map(_has_linears, module)):
            lists[name] = module
    if not lists:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of blocks with linear layers, so there is nothing to quantize."
        )
    name = next(iter(lists)) if len(lists) == 1 else _first_entered(model, lists)
    return name, lists[name]


def _has_linears(block: nn.Module) -> bool:
    return linear_shape(block) is None and any(linear_shape(module) for module in block.modules())


def _first_entered(model: nn.Module, lists: Mapping[str, nn.ModuleList]) -> str:
    """The list one of whose blocks a forward on tokens alone calls first. Zeros stand for the weights on the way."""
    entered: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def hook(_block: nn.Module, _args: object) -> None:
            entered.append(name)
            raise Stop

        return hook

    # one zero each, expanded: an embedding may be gigabytes, and on the meta device
    zeros = {
        name: torch.zeros((), dtype=p.dtype, device="cpu" if p.is_meta else p.device).expand(p.shape)
        for name, p in model.named_parameters()
        if not any(name.startswith(f"{blocks}.") for blocks in lists)
    }
    tokens = torch.zeros(1, PROBE_TOKENS, dtype=torch.int64, device=next(iter(zeros.values())).device)
    reason = "none of them is run"
    with ExitStack() as hooks, torch.no_grad(), suppress(Stop):
        for name, blocks in lists.items():
            for block in blocks:
                hooks.callback(block.register_forward_pre_hook(note(name)).remove)
        try:
            torch.func.functional_call(model, zeros, kwargs={"input_ids": tokens, "use_cache": False})
        except _FAILED as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
    if not entered:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not show on text alone which of {', '.join(lists)} reads it: {reason}."
        )
    return entered[0]
