"""Which experts the calibration text reaches, and all of the text for those that it hardly does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from awq.algorithm.capture import Chunk, fast_matmul
from awq.experts import Experts, expert_lists

MIN_TOKENS = 256  # an expert with fewer of its own reads all tokens


def count_tokens(block: nn.Module, index: int, chunks: list[Chunk]) -> dict[str, list[int]]:
    """By list of experts in `block`, how many tokens of `chunks` each expert is given in the float model."""
    counts = {name: [0] * len(experts) for name, experts in expert_lists(block).items()}
    if not counts:
        return {}

    def counter(name: str, number: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            counts[name][number] += args[0].shape[:-1].numel()

        return hook

    with ExitStack() as hooks, fast_matmul():
        for name in counts:
            for number, expert in enumerate(block.get_submodule(name).children()):
                hooks.enter_context(expert.register_forward_pre_hook(counter(name, number)))
        for chunk in chunks:
            chunk.calls[index].run(block, chunk.hidden)
    return counts


@contextmanager
def every_expert(block: nn.Module, counts: Mapping[str, list[int]]) -> Iterator[None]:
    """Let experts with fewer than MIN_TOKENS read all tokens too; in lists that are not `Experts` nothing can."""
    lists = {name: experts for name in counts if isinstance(experts := block.get_submodule(name), Experts)}
    for name, experts in lists.items():
        experts.visited = tuple(number for number, count in enumerate(counts[name]) if count < MIN_TOKENS)
    try:
        yield
    finally:
        for experts in lists.values():
            experts.visited = ()
