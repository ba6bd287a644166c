"""The residual stream of a block: which linears write to it, and who reads it just before."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

BLOCK = ""  # the name of the block itself among its modules
TOLERANCE = 1e-3  # what float32 leaves of a linear's output in the difference of two points of the residual stream


def find_residuals(block: nn.Module, run: Callable[[], Tensor], hidden: Tensor) -> dict[str, str]:
    """The linears whose output is added to the residual stream as it is, and the module that reads it just before.

    run: one forward of `block` on `hidden`. Found by arithmetic: two tensors that modules read, or the block's input
    and output, differ by the linear's output.
    """
    width = hidden.shape[-1]
    points: list[tuple[str, Tensor]] = [(BLOCK, hidden.flatten(0, -2).clone())]
    outputs: list[tuple[str, int, Tensor]] = []

    def before(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].numel() == hidden.numel():
                points.append((name, args[0].reshape(-1, width).clone()))

        return hook

    def after(name: str) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and output.numel() == hidden.numel():
                outputs.append((name, len(points), output.reshape(-1, width).clone()))

        return hook

    with ExitStack() as hooks:
        for name, module in block.named_modules():
            if name and not any(True for _ in module.children()):
                hooks.enter_context(module.register_forward_pre_hook(before(name)))
            if isinstance(module, nn.Linear):
                hooks.enter_context(module.register_forward_hook(after(name)))
        points.append((BLOCK, run().reshape(-1, width)))
    found = ((name, _residual(points[:count], points[count:], output)) for name, count, output in outputs)
    return {name: point for name, point in found if point is not None}


def _residual(before: list[tuple[str, Tensor]], after: list[tuple[str, Tensor]], output: Tensor) -> str | None:
    """The first point before the linear from which `output` leads to one after it."""
    tolerance = TOLERANCE * output.norm()
    for name, earlier in before:
        if any(bool((later - earlier - output).norm() <= tolerance) for _, later in after):
            return name
    return None
