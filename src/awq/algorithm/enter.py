"""What a model's blocks are given for the calibration text, before any of them has run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from awq.algorithm.capture import Call, Chunk, Stop, in_chunks, lifted
from awq.algorithm.held import IN_MEMORY, Weights
from awq.algorithm.ranks import mine
from awq.errors import UnsupportedModelError


def enter_model(
    model: nn.Module, blocks: nn.ModuleList, tokens: Tensor, device: torch.device, weights: Weights = IN_MEMORY
) -> list[Chunk]:
    """What each block would be given for `tokens` [sequences, seq_len], the blocks themselves passed over.

    Only the embedding runs: every block is replaced by one that notes how it was called and hands its input on. The
    first is run once, on a few tokens, to see what a block returns.
    """
    return _entered(model, blocks, list(enumerate(in_chunks(tokens))), device, weights)


def enter_dealt(
    model: nn.Module,
    blocks: nn.ModuleList,
    tokens: Tensor,
    device: torch.device,
    weights: Weights = IN_MEMORY,
    first: int = 0,
) -> list[Chunk]:
    """`enter_model` with the chunks that this rank takes, lane by lane; the first of all is number `first`."""
    parts = dict(enumerate(in_chunks(tokens), first))
    return _entered(model, blocks, [(number, parts[number]) for number in mine(list(parts))], device, weights)


def _entered(
    model: nn.Module, blocks: nn.ModuleList, parts: list[tuple[int, Tensor]], device: torch.device, weights: Weights
) -> list[Chunk]:
    outputs = _count_outputs(model, blocks, parts[0][1][:1, :8], device, weights) if parts else 0
    return [replace(_enter(model, blocks, part, outputs, device), number=number) for number, part in parts]


def _enter(model: nn.Module, blocks: nn.ModuleList, tokens: Tensor, outputs: int, device: torch.device) -> Chunk:
    inputs: list[Tensor] = []
    calls: list[Call | None] = []
    moved: dict[int, tuple[Tensor, Tensor]] = {}  # what blocks share, such as masks and rotary tables, is moved once

    def pass_through(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hidden, *rest = args if args else (kwargs.pop("hidden_states"),)
        inputs.append(hidden)
        calls.extend([None] * (_next_index(blocks, block, len(calls)) - len(calls)))
        calls.append(Call(_moved(tuple(rest), device, moved), _moved(kwargs, device, moved)))
        if len(calls) == len(blocks):
            raise Stop
        return (hidden, *[None] * (outputs - 1)) if outputs else hidden

    with _replaced_forward(list(blocks), pass_through):
        _forward(model, tokens)
    calls.extend([None] * (len(blocks) - len(calls)))
    return Chunk(_moved(inputs[0], device, moved), calls)


def _next_index(blocks: nn.ModuleList, block: nn.Module, start: int) -> int:
    index = next((i for i in range(start, len(blocks)) if blocks[i] is block), None)
    if index is None:
        raise UnsupportedModelError(
            f"{type(block).__name__} runs again after later blocks: models are quantized block by block, in one pass."
        )
    return index


def _count_outputs(
    model: nn.Module, blocks: nn.ModuleList, tokens: Tensor, device: torch.device, weights: Weights
) -> int:
    """How many values a block returns, 0 for a bare tensor."""
    seen: list[int] = []
    numbers = {block: index for index, block in reversed(list(enumerate(blocks)))}
    forwards = {block: block.forward for block in numbers}

    def run(block: nn.Module, *args: Any, **kwargs: Any) -> None:
        args, kwargs = _moved(args, device, {}), _moved(kwargs, device, {})
        with weights.block(numbers[block]), lifted(block, device):
            output = forwards[block](*args, **kwargs)
        seen.append(len(output) if isinstance(output, tuple | list) else 0)
        raise Stop

    with _replaced_forward(list(numbers), run):
        _forward(model, tokens)
    return seen[0]


def _forward(model: nn.Module, tokens: Tensor) -> None:
    device = next(parameter.device for parameter in model.parameters() if not parameter.is_meta)
    with suppress(Stop):
        model(input_ids=tokens.to(device), use_cache=False)


@contextmanager
def _replaced_forward(modules: list[nn.Module], forward: Any) -> Iterator[None]:
    """`forward`, given the module first, in place of the modules' own."""
    originals = {module: module.__dict__.get("forward") for module in modules}
    for module in originals:
        module.forward = partial(forward, module)
    try:
        yield
    finally:
        for module, original in originals.items():
            if original is None:
                del module.forward
            else:
                module.forward = original


def _moved(value: Any, device: torch.device, memo: dict[int, tuple[Tensor, Tensor]]) -> Any:
    """Tensors anywhere in `value` on `device`, floating ones in float32; `memo` holds those moved before, by id."""
    if isinstance(value, Tensor):
        if id(value) not in memo:
            moved = value.to(device)  # before it is widened: half the bytes to move
            memo[id(value)] = value, moved.float() if moved.is_floating_point() else moved
        return memo[id(value)][1]
    if isinstance(value, dict):
        return {key: _moved(item, device, memo) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_moved(item, device, memo) for item in value)
    return value
