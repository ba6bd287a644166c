"""Every expert sees calibration text: its own tokens, which are counted, and a sample of all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from awq.algorithm.capture import Chunk
from awq.experts import Experts, expert_lists

# The sample counts as many tokens as the experts are wide: PRIOR_HERE
SAMPLE = 8192  # tokens that stand for all; 512 of them did no better than none

Counts = dict[str, list[int]]


@contextmanager
def every_expert(block: nn.Module, chunks: list[Chunk]) -> Iterator[None]:
    """Let every expert of `block` read tokens from all of `chunks`, besides those it is given.

    They are SAMPLE tokens at even distances, which count as many as the experts are wide. Only in lists of `Experts`:
    others cannot be told to.
    """
    total = sum(chunk.hidden.shape[:-1].numel() for chunk in chunks)
    lists = [module for module in block.modules() if isinstance(module, Experts)]
    for experts in lists:
        experts.visit_every = max(1, total // SAMPLE)
        experts.visit_weight = min(1.0, experts.width * experts.visit_every / total)
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
