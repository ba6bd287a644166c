"""Run one block over the calibration text and keep what the search needs of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from awq.algorithm.activations import Activations, Kept, Parked
from awq.algorithm.ranks import fold, here, rounds
from awq.algorithm.siblings import Siblings
from awq.errors import UnsupportedModelError

# The unit of every forward and Gram product, summed in fixed order: results do not depend on the memory at hand, nor on
# the number of processes.
CHUNK_TOKENS = 2048


@dataclass
class InputStats:
    """Second moments of a linear's input x over the calibration text.

    gram:     float32 [in_features, in_features], the mean of x x^T over the tokens
    mean_abs: float32 [in_features], the mean of |x|
    """

    gram: Tensor
    mean_abs: Tensor
    tokens: float = 0

    @classmethod
    def empty(cls, in_features: int, device: torch.device) -> Self:
        return cls(torch.zeros(in_features, in_features, device=device), torch.zeros(in_features, device=device))

    def add(self, x: Tensor, weight: float = 1) -> None:
        x = x.reshape(-1, x.shape[-1])
        self.gram.addmm_(x.t(), x, alpha=weight)
        self.mean_abs += x.abs().sum(0) * weight
        self.tokens += x.shape[0] * weight

    def tensors(self) -> list[Tensor]:
        return [self.gram, self.mean_abs]

    def finish(self) -> None:
        for total in self.tensors():
            here().complete(total)
            total /= self.tokens or 1

    def rescaled(self, scale: Tensor) -> InputStats:
        """The statistics of x / scale."""
        return replace(self, gram=self.gram / scale / scale.unsqueeze(1), mean_abs=self.mean_abs / scale)

    @property
    def finite(self) -> bool:
        return bool(self.gram.isfinite().all())


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
    quantized: Tensor | None = Kept()  # type: ignore[assignment]  # noqa: RUF009
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

    def call(self, index: int) -> Call:
        """How text calls a block that it runs."""
        call = self.calls[index]
        assert call is not None
        return call

    def run(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """What `block` makes of `hidden`, called as the model calls it."""
        call = self.calls[index]
        return hidden if call is None else call.run(block, hidden)


class Stop(BaseException):
    """Ends a forward once what is wanted has been seen; no `except Exception` on the way may catch it."""


def in_chunks(tokens: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tokens, max(1, CHUNK_TOKENS // tokens.shape[1]))


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


@contextmanager
def fast_matmul(enabled: bool = True) -> Iterator[None]:
    """float32 products of bf16 (CPU) or tf32 (GPU) operands, accumulated in float32.

    2.3 x as fast as float32 on a CPU with avx512_bf16 and harmless in the forward and the search; what is accepted is
    compared outside of this.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if enabled else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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
        for lane in rounds(chunks, lambda chunk: chunk.number):
            for chunk in lane:
                chunk.hidden = chunk.run(index, block, chunk.hidden)
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
