"""Every expert sees calibration text: its own tokens, which are counted, and a sample of all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from awq.algorithm.inputs.capture import Chunk
from awq.algorithm.ranks import here
from awq.structure.experts import Experts, expert_lists

# What all tokens count beside an expert's own, over the width. With clusters of the inputs of SmolLM2's gate_proj (576
# wide) for experts, error on a cluster's held-out tokens over plain rounding's: by 128 tokens of its own 0.455, and all
# tokens at a quarter of the width 0.347, at the width 0.345, by all alone 0.380; by 512 of its own 0.324, 0.299, 0.303;
# by 2048 0.252, 0.254, 0.261.
PRIOR = 0.25
SAMPLE = 4096  # of all tokens, to stand for them; 512 were too few to help

Counts = dict[str, list[int]]


@contextmanager
def every_expert(block: nn.Module, chunks: list[Chunk]) -> Iterator[None]:
    """Let every expert of `block` read tokens from all of the ranks' `chunks`, besides those it is given.

    They are SAMPLE tokens at even distances, which count PRIOR times the experts' width. Only in lists of `Experts`:
    others cannot be told to.
    """
    total = sum(here().tell(sum(chunk.parked.shape[:-1].numel() for chunk in chunks)))
    lists = [module for module in block.modules() if isinstance(module, Experts)]
    for experts in lists:
        experts.visit_every = max(1, total // SAMPLE)
        experts.visit_weight = min(1.0, PRIOR * experts.width * experts.visit_every / total)
    try:
        yield
    finally:
        for experts in lists:
            experts.visit_every = 0


@contextmanager
def counted(block: nn.Module) -> Iterator[Counts]:
    """By list of experts in `block`, how many tokens each expert is given: by this rank, `in_all` by all."""
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


def in_all(counts: Counts) -> Counts:
    """The sums of all ranks' counts."""
    told = here().tell(counts)
    return {name: [sum(numbers) for numbers in zip(*(one[name] for one in told), strict=True)] for name in counts}
