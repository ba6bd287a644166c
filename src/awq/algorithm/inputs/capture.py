"""Run one block over the calibration text and keep what the search needs of its inputs. All device moves live here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from awq.algorithm.held import IN_MEMORY, Weights
from awq.algorithm.inputs.activations import Activations, Kept, Parked, ahead
from awq.algorithm.inputs.precision import cast_once, half_forward
from awq.algorithm.inputs.stats import InputStats
from awq.algorithm.ranks import fold, mine, rounds
from awq.errors import UnsupportedModelError
from awq.structure.probe import Stop
from awq.structure.siblings import Siblings

# The unit of every forward and Gram product, summed in fixed order: results do not depend on the memory at hand, nor on
# the number of processes.
CHUNK_TOKENS = 2048


@dataclass
class Call:
    """How the model called a block: everything but the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        output = block(hidden, *self.args, **self.kwargs)
        result = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(result, Tensor):
            raise UnsupportedModelError(
                f"{type(block).__name__} returns {type(result).__name__} where its hidden states are looked for: "
                "models are quantized block by block, each from the one before."
            )
        return result


@dataclass
class Chunk:
    """A few sequences on their way through the model: hidden states [sequences, tokens, width], each block's call.

    calls:     None for a block that text does not run, such as one that looks at images
    quantized: the hidden states behind quantized blocks, where they are propagated and the first block is passed
    held_out:  not fitted to, only judged by
    number:    in the order of all text; a rank holds some chunks
    """

    activations: ClassVar[Activations] = Activations()  # until they are moved elsewhere
    hidden: Tensor = Kept()  # type: ignore[assignment]  # noqa: RUF009
    calls: list[Call | None] = field(default_factory=list)
    quantized: Tensor | None = Kept(often=True)  # type: ignore[assignment]  # noqa: RUF009
    held_out: bool = False
    number: int = 0

    def move(self, activations: Activations) -> None:
        """Keep what is to come, and what there is, in other rooms."""
        self.__dict__["activations"] = activations
        self.hidden, self.quantized = self.hidden, self.quantized

    @property
    def parked(self) -> Parked:
        """The hidden states where they are."""
        parked: Parked = self.__dict__["_hidden"]
        return parked

    @property
    def behind(self) -> Parked | None:
        """The hidden states behind quantized blocks where they are."""
        parked: Parked | None = self.__dict__["_quantized"]
        return parked

    def call(self, index: int) -> Call:
        """How text calls a block that it runs."""
        call = self.calls[index]
        assert call is not None
        return call

    def run(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """What `block` makes of `hidden`, called as the model calls it."""
        call = self.calls[index]
        if call is None:
            return hidden
        with half_forward(hidden.device):
            return call.run(block, hidden).float()


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


def in_chunks(tokens: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tokens, max(1, CHUNK_TOKENS // tokens.shape[1]))


def _entered(
    model: nn.Module, blocks: nn.ModuleList, parts: list[tuple[int, Tensor]], device: torch.device, weights: Weights
) -> list[Chunk]:
    outputs = _count_outputs(model, blocks, parts[0][1][:1, :8], device, weights) if parts else 0
    chunks = [_enter(model, blocks, part, outputs, device) for _, part in parts]
    for chunk, (number, _) in zip(chunks, parts, strict=True):
        chunk.number = number
    return chunks


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


@contextmanager
def lifted(block: nn.Module, device: torch.device) -> Iterator[None]:
    """`block` in float32 on `device`; afterwards each tensor that it still holds goes back to where and what it was."""
    origin = {name: (p.device, p.dtype) for name, p in block.named_parameters()}
    buffers = {name: b.device for name, b in block.named_buffers()}
    for parameter in block.parameters():
        parameter.data = parameter.data.to(device).to(torch.float32)
    for buffer in block.buffers():
        buffer.data = buffer.data.to(device)
    try:
        yield
    finally:
        for name, parameter in block.named_parameters():
            if name in origin and not parameter.is_meta:
                parameter.data = parameter.data.to(*origin[name])
        for name, buffer in block.named_buffers():
            if name in buffers:
                buffer.data = buffer.data.to(buffers[name])


def capture(
    block: nn.Module,
    index: int,
    chunks: list[Chunk],
    input_sets: tuple[tuple[str, ...], ...],
    share: Callable[[str], str] = str,
) -> dict[str, InputStats]:
    """Run `block` over all chunks, moving them on to its output; statistics by linear, shared within an input set.

    Sets whose first linears have one name under `share` have their statistics in common too.
    """
    stats: dict[str, InputStats] = {}
    like = Siblings(block)
    totals: dict[str, InputStats] = {}
    parts: dict[str, InputStats] = {}
    handles = []
    for names in input_sets:
        linear = block.get_submodule(names[0])
        assert isinstance(linear, nn.Linear)
        key = share(names[0])
        for sums in (totals, parts):
            if key not in sums:
                sums[key] = InputStats.empty(linear.in_features, linear.weight.device)
        stats.update(dict.fromkeys(names, totals[key]))
        handles.append(linear.register_forward_pre_hook(_adder(parts[key], names[0], like)))
    try:
        with cast_once(block):
            entering = ahead([chunk.parked for chunk in chunks])
            for lane in rounds(chunks, lambda chunk: chunk.number):
                for chunk, hidden in zip(lane, entering, strict=False):
                    chunk.hidden = chunk.run(index, block, hidden)
                fold(list(totals.values()), list(parts.values()))
    finally:
        for handle in handles:
            handle.remove()
    for total in totals.values():
        total.finish()
    return stats


def _adder(stats: InputStats, name: str, like: Siblings) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        stats.add(args[0], like.weight(name))

    return hook
