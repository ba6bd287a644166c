"""Which linears share an input, and what made it: found by a probe forward, accepted by the fold test.

A scale s > 0 per channel may move from a producer (a norm, or a linear) into its consumers: the producer's output
is divided by s, the consumers' input columns are multiplied by s, and nothing downstream changes. Whether that holds
is not read off names or types but tried, with a random s in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from awq.structure.probe import Run, Trace, outputs, restored, same, trace
from awq.structure.siblings import Siblings

Kind = Literal["norm", "norm_plus_one", "linear"]


@dataclass(frozen=True)
class ScaleGroup:
    """A producer and the consumers that its scale can be folded into; names are relative to the block.

    kind "norm" multiplies by its weight, "norm_plus_one" by 1 + weight, "linear" is a matrix product. Of a fused one
    only some rows feed the consumers: its rows come in `parts` equal parts (one for q, k and v in a row; one a head
    where each head's lie together), of each of which those from `first_row` on. With grouped-query attention each of
    the producer's heads of `head_dim` channels is read `repeats` times.
    """

    producer: str
    kind: Kind
    consumers: tuple[str, ...]
    first_row: int = 0
    repeats: int = 1
    head_dim: int = 1
    parts: int = 1

    def rows(self, values: Tensor) -> Tensor:
        """What of `values` [producer rows, ...] feeds the consumers, as a view [parts, channels / parts, ...]."""
        parts: Tensor = values.unflatten(0, (self.parts, -1))
        return parts[:, self.first_row :]

    def expand(self, scale: Tensor) -> Tensor:
        """Producer channels [n] -> consumer channels [n * repeats]."""
        return scale.view(-1, 1, self.head_dim).expand(-1, self.repeats, -1).reshape(-1)

    def reduce(self, values: Tensor) -> Tensor:
        """Consumer channels [n * repeats] -> producer channels [n], the mean over the repeats."""
        return values.view(-1, self.repeats, self.head_dim).mean(1).reshape(-1)


@dataclass(frozen=True)
class Structure:
    """What the probe found in one block."""

    input_sets: tuple[tuple[str, ...], ...]  # linears that read the same tensor, in order of execution
    groups: tuple[ScaleGroup, ...]


def find_structure(block: nn.Module, run: Run) -> Structure:
    """Probe `block` with `run` (one forward on a few tokens, returning its output) and test every fold.

    What is found in one expert is folded in all experts of its list, and tested as one.
    """
    calls, head_dims, like = trace(block, run), _head_dims(block), Siblings(block)
    input_sets = calls.input_sets()
    groups: list[ScaleGroup] = []
    tried: set[str] = set()
    for consumers in input_sets:
        if not tried.isdisjoint(map(like.role, consumers)):
            continue
        tried.update(map(like.role, consumers))
        for candidate in _candidates(calls, consumers, head_dims, rows=like.place(consumers[0]) is not None):
            folds = _everywhere(block, candidate, run, calls, like)
            if folds and _folds_hold(block, folds, run):
                groups += folds
                tried.update(like.role(name) for group in folds for name in group.consumers)
                break
    return Structure(_all_sets(input_sets, like), tuple(groups))


def _all_sets(input_sets: tuple[tuple[str, ...], ...], like: Siblings) -> tuple[tuple[str, ...], ...]:
    """The sets with those of experts that the probe did not reach."""
    numbered = ((names, number) for names in input_sets for number in like.numbers(names[0]))
    return tuple(dict.fromkeys(tuple(like.rename(name, number) for name in names) for names, number in numbered))


def _everywhere(block: nn.Module, group: ScaleGroup, run: Run, calls: Trace, like: Siblings) -> tuple[ScaleGroup, ...]:
    """The folds that `group` stands for: the same in each expert, or one whose consumers are in all of them."""
    producer, consumer = like.place(group.producer), like.place(group.consumers[0])
    if producer is None:
        return (_with_all_readers(block, group, run, calls, like),)
    if consumer is None or consumer[:2] != producer[:2]:
        return ()
    folds = []
    for number in like.numbers(group.producer):
        names = [like.rename(name, number) for name in (group.producer, *group.consumers)]
        folds.append(replace(group, producer=names[0], consumers=tuple(names[1:])))
    return tuple(folds)


def _with_all_readers(block: nn.Module, group: ScaleGroup, run: Run, calls: Trace, like: Siblings) -> ScaleGroup:
    """`group` with what else reads the output of its producer: routers, and experts, which read some of its rows."""
    if group.kind != "linear":
        group = replace(group, consumers=like.all_of((*group.consumers, *calls.readers(group.producer))))
    if group.kind != "linear" or like.place(group.consumers[0]):
        group = replace(
            group, consumers=like.all_of((*group.consumers, *_scaled_readers(block, group, run, calls, like)))
        )
    return group


def _scaled_readers(block: nn.Module, group: ScaleGroup, run: Run, calls: Trace, like: Siblings) -> list[str]:
    """The linears whose input is divided by the scale once `group` is folded."""
    if not like.lists:
        return []
    before = calls.linears()
    with restored(block, (group.producer, *group.consumers)):
        columns = fold(block, group, _random_scale(block, group))
        after = trace(block, run).linears()
    return [
        name
        for name, call in before.items()
        if name in after and call.input.shape[-1] == len(columns) and bool(call.input.any())
        if same(after[name].input * columns, call.input)
    ]


def fold(block: nn.Module, group: ScaleGroup, scale: Tensor, storage_dtype: torch.dtype = torch.float32) -> Tensor:
    """Divide the producer's output by `scale` and multiply the consumers' columns by it, in place.

    scale: float32 [producer channels]. Norm weights are rounded to `storage_dtype`, and what the rounding changed is
    given to the consumers, so that the product stays exact. Returns the scale applied [consumer channels].
    """
    producer = block.get_submodule(group.producer)
    weight, bias = _weight(producer), getattr(producer, "bias", None)
    if group.kind == "linear":
        by_part = scale.view(group.parts, -1)
        group.rows(weight).div_(by_part.unsqueeze(2))
        if bias is not None:
            group.rows(bias.data).div_(by_part)
    else:
        scale = _divide_norm(weight, scale, 1.0 if group.kind == "norm_plus_one" else 0.0, storage_dtype)
        if bias is not None:
            bias.data /= scale
    columns = group.expand(scale)
    for name in group.consumers:
        _weight(block.get_submodule(name)).mul_(columns)
    return columns


def _divide_norm(weight: Tensor, scale: Tensor, offset: float, storage_dtype: torch.dtype) -> Tensor:
    factor = weight + offset
    rounded = (factor / scale - offset).to(storage_dtype).float()
    exact = factor / (rounded + offset)
    storable = exact.isfinite() & (exact > 0)  # else it was 0, or would be stored as 0 or infinity
    weight.copy_(torch.where(storable, rounded, weight))
    return torch.where(storable, exact, 1.0)


def _candidates(
    calls: Trace, consumers: tuple[str, ...], head_dims: tuple[int, ...], rows: bool
) -> Iterator[ScaleGroup]:
    """Folds worth trying, likeliest first: the module that wrote the input, then earlier linears, latest first.

    rows: the input may be some rows of what a norm wrote
    """
    first = next(i for i, call in enumerate(calls) if call.name == consumers[0])
    width = calls[first].input.shape[-1]
    for call in reversed(calls[:first]):
        weight = getattr(call.module, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        wrote = call.writes == calls[first].reads
        if isinstance(call.module, nn.Linear):
            yield from _linear_candidates(call.name, weight.shape[0], width, consumers, head_dims)
        elif weight.ndim == 1 and (wrote or (rows and len(weight) == width)) and width % len(weight) == 0:
            heads = width // len(weight)  # more than one where each is normed by itself
            size = len(weight) if heads > 1 else 1
            yield ScaleGroup(call.name, "norm", consumers, repeats=heads, head_dim=size)
            yield ScaleGroup(call.name, "norm_plus_one", consumers, repeats=heads, head_dim=size)


def _linear_candidates(
    name: str, rows: int, width: int, consumers: tuple[str, ...], head_dims: tuple[int, ...]
) -> Iterator[ScaleGroup]:
    """The whole linear, its last rows (fused gate_up or qkv), the last of each head's, heads that queries share."""
    fused_values = (rows - width) // 2
    for used in dict.fromkeys((width, rows, fused_values)):
        if not 0 < used <= rows or width % used:
            continue
        sizes = [size for size in head_dims if used % size == 0]
        for head_dim in (1,) if used == width else sizes:
            yield ScaleGroup(name, "linear", consumers, rows - used, width // used, head_dim)
        for head_dim in sizes if used < rows else ():
            parts = used // head_dim
            if parts > 1 and rows % parts == 0:
                first_row = rows // parts - head_dim
                yield ScaleGroup(name, "linear", consumers, first_row, width // used, head_dim, parts)


def _head_dims(block: nn.Module) -> tuple[int, ...]:
    """What may be the size of an attention head: every number that a module keeps under a name with "head" in it."""
    attributes = [item for module in block.modules() for item in vars(module).items()]
    return tuple(dict.fromkeys(size for name, size in attributes if "head" in name and type(size) is int and size > 1))


def _folds_hold(block: nn.Module, folds: tuple[ScaleGroup, ...], run: Run) -> bool:
    """Whether the folds, all at once, leave every consumer's output as it was, and that of the block."""
    consumers = [name for group in folds for name in group.consumers]
    baseline = outputs(block, consumers, run)
    with restored(block, [*consumers, *(group.producer for group in folds)]):
        for group in folds:
            fold(block, group, _random_scale(block, group))
        folded = outputs(block, consumers, run)
    return len(folded) == len(baseline) and all(map(same, folded, baseline))


def _random_scale(block: nn.Module, group: ScaleGroup) -> Tensor:
    weight = _weight(block.get_submodule(group.producer))
    channels = group.rows(weight).shape[:2].numel()
    generator = torch.Generator().manual_seed(0)
    return torch.rand(channels, generator=generator).mul(2).sub(1).exp().to(weight.device)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.data
