"""Which linears share an input, and what made it: found by a probe forward, accepted by the fold test.

A scale s > 0 per channel may move from a producer (a norm, or a linear) into its consumers: the producer's output
is divided by s, the consumers' input columns are multiplied by s, and nothing downstream changes. Whether that holds
is not read off names or types but tried, with a random s in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

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
    """Probe `block` with `run` (one forward on a few tokens, returning its output) and test every fold."""
    trace = _trace(block, run)
    head_dims = _head_dims(block)
    input_sets = trace.input_sets()
    groups = []
    for consumers in input_sets:
        baseline = _outputs(block, consumers, run)
        for group in trace.candidates(consumers, head_dims):
            if _fold_holds(block, group, run, baseline):
                groups.append(group)
                break
    return Structure(input_sets, tuple(groups))


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


@dataclass
class _Call:
    name: str
    module: nn.Module
    reads: tuple[int, int, int]
    writes: tuple[int, int, int]
    keep: tuple[Tensor, Tensor]  # alive, so that no address is used twice


class _Trace(list[_Call]):
    def input_sets(self) -> tuple[tuple[str, ...], ...]:
        sets: dict[tuple[int, int, int], list[str]] = {}
        for call in self:
            if isinstance(call.module, nn.Linear) and call.name not in sets.setdefault(call.reads, []):
                sets[call.reads].append(call.name)
        return tuple(tuple(names) for names in sets.values() if names)

    def candidates(self, consumers: tuple[str, ...], head_dims: tuple[int, ...]) -> Iterator[ScaleGroup]:
        """Folds worth trying, likeliest first: the module that wrote the input, then earlier linears, latest first."""
        first = next(i for i, call in enumerate(self) if call.name == consumers[0])
        width = self[first].keep[0].shape[-1]
        for call in reversed(self[:first]):
            weight = getattr(call.module, "weight", None)
            if not isinstance(weight, Tensor):
                continue
            if weight.shape == (width,) and call.writes == self[first].reads:
                yield ScaleGroup(call.name, "norm", consumers)
                yield ScaleGroup(call.name, "norm_plus_one", consumers)
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
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                trace.append(_Call(name, module, _address(args[0]), _address(output), (args[0], output)))

        return hook

    leaves = [(name, module) for name, module in block.named_modules() if not any(True for _ in module.children())]
    handles = [module.register_forward_hook(record(name)) for name, module in leaves if name]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return trace


def _address(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()), tensor.numel()


def _outputs(block: nn.Module, names: tuple[str, ...], run: Run) -> list[Tensor]:
    """The outputs of the named linears and of the block: a residual stream must not hide a wrong fold."""
    seen: list[Tensor] = []
    handles = [
        block.get_submodule(name).register_forward_hook(lambda _module, _args, output: seen.append(output))
        for name in names
    ]
    try:
        return [run(), *seen]
    finally:
        for handle in handles:
            handle.remove()


def _fold_holds(block: nn.Module, group: ScaleGroup, run: Run, baseline: list[Tensor]) -> bool:
    weight = _weight(block.get_submodule(group.producer))
    generator = torch.Generator().manual_seed(0)
    channels = group.rows(weight).shape[:2].numel()
    scale = torch.rand(channels, generator=generator).mul(2).sub(1).exp().to(weight.device)
    with _restored(block, group):
        fold(block, group, scale)
        folded = _outputs(block, group.consumers, run)
    return all(_distance(new, old) < FOLD_TOLERANCE for new, old in zip(folded, baseline, strict=True))


@contextmanager
def _restored(block: nn.Module, group: ScaleGroup) -> Iterator[None]:
    names = (group.producer, *group.consumers)
    parameters = [p for name in names for p in block.get_submodule(name).parameters(recurse=False)]
    saved = [parameter.data.clone() for parameter in parameters]
    try:
        yield
    finally:
        for parameter, data in zip(parameters, saved, strict=True):
            parameter.data.copy_(data)


def _distance(new: Tensor, old: Tensor) -> float:
    return float((new - old).norm() / old.norm().clamp_min(1e-30))  # NaN compares false: refused


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.data
