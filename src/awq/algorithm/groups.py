"""Which linears share an input, and what made it: found by a probe forward, accepted by the fold test.

A scale s > 0 per channel may move from a producer (a norm, or a linear) into its consumers: the producer's output
is divided by s, the consumers' input columns are multiplied by s, and nothing downstream changes. Whether that holds
is not read off names or types but tried, with a random s in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from awq.algorithm.siblings import Siblings

# Float32 forwards differ by about 1e-6 after an exact fold; a wrong one is off by far more than this.
FOLD_TOLERANCE = 3e-5

Kind = Literal["norm", "norm_plus_one", "linear"]
Run = Callable[[], Tensor]


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
    trace = _trace(block, run)
    head_dims, like = _head_dims(block), Siblings(block)
    input_sets = trace.input_sets()
    groups: list[ScaleGroup] = []
    tried: set[str] = set()
    for consumers in input_sets:
        if not tried.isdisjoint(map(like.role, consumers)):
            continue
        for candidate in trace.candidates(consumers, head_dims, loose=like.place(consumers[0]) is not None):
            together = _with_siblings(block, candidate, run, trace, like)
            if together and _folds_hold(block, together, run):
                groups += together
                tried.update(like.role(name) for group in together for name in group.consumers)
                break
        tried.update(map(like.role, consumers))
    return Structure(_all_sets(input_sets, like), tuple(groups))


def _all_sets(input_sets: tuple[tuple[str, ...], ...], like: Siblings) -> tuple[tuple[str, ...], ...]:
    """The sets with those of experts that the probe did not reach."""
    numbered = ((names, number) for names in input_sets for number in like.numbers(names[0]))
    return tuple(dict.fromkeys(tuple(like.rename(name, number) for name in names) for names, number in numbered))


def _with_siblings(
    block: nn.Module, group: ScaleGroup, run: Run, trace: _Trace, like: Siblings
) -> tuple[ScaleGroup, ...]:
    """The folds that `group` stands for: the same in each expert, or one whose consumers are in all of them.

    A producer outside of experts has every reader of its output for a consumer: those of the very tensor, be they
    linears or not (routers), and experts, which read some of its rows.
    """
    producer, consumer = like.place(group.producer), like.place(group.consumers[0])
    if producer is not None:
        if consumer is None or consumer[:2] != producer[:2]:
            return ()
        return tuple(
            replace(
                group,
                producer=like.rename(group.producer, number),
                consumers=tuple(like.rename(name, number) for name in group.consumers),
            )
            for number in like.numbers(group.producer)
        )
    if group.kind != "linear":
        names = (*group.consumers, *trace.float_readers(group.producer))
        group = replace(group, consumers=like.all_of(names))
    if like.lists:
        rows = trace.inputs_scaled_by(block, group, run)
        group = replace(group, consumers=tuple(dict.fromkeys((*group.consumers, *like.all_of(rows)))))
    return (group,)


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
    weight.copy_(rounded)
    return torch.where(exact.isfinite() & (exact > 0), exact, scale)


@dataclass
class _Call:
    name: str
    module: nn.Module
    reads: tuple[int, int, int]
    writes: tuple[int, int, int] | None
    keep: tuple[Tensor, object]  # alive, so that no address is used twice


class _Trace(list[_Call]):
    def input_sets(self) -> tuple[tuple[str, ...], ...]:
        sets: dict[tuple[int, int, int], list[str]] = {}
        for call in self.first_calls():
            sets.setdefault(call.reads, []).append(call.name)
        return tuple(tuple(names) for names in sets.values())

    def first_calls(self) -> list[_Call]:
        """The first call of each linear."""
        first: dict[str, _Call] = {}
        for call in self:
            if isinstance(call.module, nn.Linear):
                first.setdefault(call.name, call)
        return list(first.values())

    def float_readers(self, producer: str) -> list[str]:
        """What else multiplies the output of `producer` by a matrix [out, in] of its own, such as a router."""
        written = {call.writes for call in self if call.name == producer}
        return [call.name for call in self if call.reads in written and _columns(call.module) == call.keep[0].shape[-1]]

    def inputs_scaled_by(self, block: nn.Module, group: ScaleGroup, run: Run) -> list[str]:
        """Linears whose input is divided by the scale once `group` is folded: they read rows of the output."""
        with _restored(block, (group,)):
            columns = fold(block, group, _random_scale(block, group))
            after = {call.name: call.keep[0] for call in _trace(block, run).first_calls()}
        pairs = [(call.name, call.keep[0], after.get(call.name)) for call in self.first_calls()]
        return [
            name
            for name, old, new in pairs
            if new is not None and new.shape == old.shape and old.shape[-1] == len(columns) and bool(old.any())
            if name not in group.consumers and _distance(new * columns, old) < FOLD_TOLERANCE
        ]

    def candidates(
        self, consumers: tuple[str, ...], head_dims: tuple[int, ...], loose: bool = False
    ) -> Iterator[ScaleGroup]:
        """Folds worth trying, likeliest first: the module that wrote the input, then earlier linears, latest first.

        loose: the input may be rows of what a norm wrote
        """
        first = next(i for i, call in enumerate(self) if call.name == consumers[0])
        width = self[first].keep[0].shape[-1]
        for call in reversed(self[:first]):
            weight = getattr(call.module, "weight", None)
            if not isinstance(weight, Tensor):
                continue
            wrote = call.writes == self[first].reads
            if weight.shape == (width,) and (wrote or loose):
                yield ScaleGroup(call.name, "norm", consumers)
                yield ScaleGroup(call.name, "norm_plus_one", consumers)
            elif weight.ndim == 1 and wrote and width % len(weight) == 0:  # of each head by itself
                heads = width // len(weight)
                yield ScaleGroup(call.name, "norm", consumers, repeats=heads, head_dim=len(weight))
                yield ScaleGroup(call.name, "norm_plus_one", consumers, repeats=heads, head_dim=len(weight))
            elif isinstance(call.module, nn.Linear):
                yield from _linear_candidates(call.name, weight.shape[0], width, consumers, head_dims)


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


def _trace(block: nn.Module, run: Run) -> _Trace:
    trace = _Trace()

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            if args and isinstance(args[0], Tensor):
                writes = _address(output) if isinstance(output, Tensor) else None
                trace.append(_Call(name, module, _address(args[0]), writes, (args[0], output)))

        return hook

    def is_step(module: nn.Module) -> bool:
        return "weight" in dict(module.named_parameters(recurse=False)) or not any(True for _ in module.children())

    handles = [m.register_forward_hook(record(name)) for name, m in block.named_modules() if name and is_step(m)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return trace


def _address(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()), tensor.numel()


def _columns(module: nn.Module) -> int | None:
    weight = getattr(module, "weight", None)
    return weight.shape[1] if isinstance(weight, Tensor) and weight.ndim == 2 else None


def _outputs(block: nn.Module, names: Iterable[str], run: Run) -> list[Tensor]:
    """The outputs of the named modules and of the block: a residual stream must not hide a wrong fold."""
    seen: list[Tensor] = []

    def look(_module: nn.Module, _args: object, output: object) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        seen.extend(part for part in parts if isinstance(part, Tensor) and part.is_floating_point())

    handles = [block.get_submodule(name).register_forward_hook(look) for name in names]
    try:
        return [run(), *seen]
    finally:
        for handle in handles:
            handle.remove()


def _folds_hold(block: nn.Module, groups: tuple[ScaleGroup, ...], run: Run) -> bool:
    """Whether the folds, all at once, leave every consumer's output as it was, and that of the block."""
    consumers = [name for group in groups for name in group.consumers]
    baseline = _outputs(block, consumers, run)
    with _restored(block, groups):
        for group in groups:
            fold(block, group, _random_scale(block, group))
        folded = _outputs(block, consumers, run)
    return len(folded) == len(baseline) and all(map(_same, folded, baseline))


def _random_scale(block: nn.Module, group: ScaleGroup) -> Tensor:
    weight = _weight(block.get_submodule(group.producer))
    channels = group.rows(weight).shape[:2].numel()
    generator = torch.Generator().manual_seed(0)
    return torch.rand(channels, generator=generator).mul(2).sub(1).exp().to(weight.device)


@contextmanager
def _restored(block: nn.Module, groups: tuple[ScaleGroup, ...]) -> Iterator[None]:
    names = dict.fromkeys(name for group in groups for name in (group.producer, *group.consumers))
    parameters = [p for name in names for p in block.get_submodule(name).parameters(recurse=False)]
    saved = [parameter.data.clone() for parameter in parameters]
    try:
        yield
    finally:
        for parameter, data in zip(parameters, saved, strict=True):
            parameter.data.copy_(data)


def _same(new: Tensor, old: Tensor) -> bool:
    return new.shape == old.shape and _distance(new, old) < FOLD_TOLERANCE


def _distance(new: Tensor, old: Tensor) -> float:
    return float((new - old).norm() / old.norm().clamp_min(1e-30))  # NaN compares false: refused


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.data
