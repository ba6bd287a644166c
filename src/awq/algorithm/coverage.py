"""Every expert sees calibration text: its own tokens, which are counted, and a sample of all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from awq.algorithm.capture import Chunk
from awq.experts import Experts, expert_lists

SAMPLE = 512

Counts = dict[str, list[int]]


@contextmanager
def every_expert(block: nn.Module, chunks: list[Chunk]) -> Iterator[None]:
    """Let every expert of `block` read SAMPLE tokens, evenly from all of `chunks`, besides those it is given.

    Only in lists of `Experts`: others choose the tokens themselves.
    """
    total = sum(chunk.hidden.shape[:-1].numel() for chunk in chunks)
    lists = [module for module in block.modules() if isinstance(module, Experts)]
    for experts in lists:
        experts.visit_every = max(1, total // SAMPLE)
    try:
        yield
    finally:
        for experts in lists:
            experts.visit_every = 0


@contextmanager
def counted(block: nn.Module) -> Iterator[Counts]:
    """By list of experts in `block`, how many tokens each expert is given."""
    lists = expert_lists(block)
    counts = {name: [0] * len(experts) for name, experts in lists.items()}

    def counter(name: str, number: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if not getattr(lists[name], "visiting", False):
                counts[name][number] += args[0].shape[:-1].numel()

        return hook

    with ExitStack() as hooks:
        for name, experts in lists.items():
            for number, expert in enumerate(experts):
                hooks.enter_context(expert.register_forward_pre_hook(counter(name, number)))
        yield counts
