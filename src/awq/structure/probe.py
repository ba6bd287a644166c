"""One forward of a block on a few tokens: which module read which tensor, and what modules gave."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

# Float32 forwards differ by about 1e-6 after an exact fold; a wrong one is off by far more than this.
FOLD_TOLERANCE = 3e-5

Run = Callable[[], Tensor]
Address = tuple[int, int, int]


class Stop(BaseException):
    """Ends a forward once what is wanted has been seen; no `except Exception` on the way may catch it."""


@dataclass
class Call:
    """A module's call: where its first input lies in memory, and its output if that is a tensor."""

    name: str
    module: nn.Module
    reads: Address
    writes: Address | None
    input: Tensor
    output: object  # alive with the input, so that no address is used twice


class Trace(list[Call]):
    """The calls of the modules that have a weight, or nothing in them, in order."""

    def input_sets(self) -> tuple[tuple[str, ...], ...]:
        """The linears that read one tensor, in order of execution."""
        sets: dict[Address, list[str]] = {}
        for call in self.linears().values():
            sets.setdefault(call.reads, []).append(call.name)
        return tuple(tuple(names) for names in sets.values())

    def linears(self) -> dict[str, Call]:
        """The first call of each linear."""
        first: dict[str, Call] = {}
        for call in self:
            if isinstance(call.module, nn.Linear):
                first.setdefault(call.name, call)
        return first

    def readers(self, producer: str) -> list[str]:
        """Whatever multiplies the output of `producer` by a matrix [out, in] of its own, such as a router."""
        written = {call.writes for call in self if call.name == producer}
        return [call.name for call in self if call.reads in written and _columns(call.module) == call.input.shape[-1]]


def trace(block: nn.Module, run: Run) -> Trace:
    """Run `block` once and note the calls in it."""
    calls = Trace()

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            if args and isinstance(args[0], Tensor):
                writes = _address(output) if isinstance(output, Tensor) else None
                calls.append(Call(name, module, _address(args[0]), writes, args[0], output))

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in block.named_modules() if _is_step(module)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return Trace(call for call in calls if call.name)


def outputs(block: nn.Module, names: Iterable[str], run: Run) -> list[Tensor]:
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


@contextmanager
def restored(block: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """The parameters of the named modules are what they were when it ends."""
    parameters = [p for name in dict.fromkeys(names) for p in block.get_submodule(name).parameters(recurse=False)]
    saved = [parameter.data.clone() for parameter in parameters]
    try:
        yield
    finally:
        for parameter, data in zip(parameters, saved, strict=True):
            parameter.data.copy_(data)


def same(new: Tensor, old: Tensor) -> bool:
    """Equal but for what float32 leaves; NaN is not."""
    return new.shape == old.shape and float((new - old).norm() / old.norm().clamp_min(1e-30)) < FOLD_TOLERANCE


def _is_step(module: nn.Module) -> bool:
    return "weight" in dict(module.named_parameters(recurse=False)) or not any(True for _ in module.children())


def _columns(module: nn.Module) -> int | None:
    weight = getattr(module, "weight", None)
    return weight.shape[1] if isinstance(weight, Tensor) and weight.ndim == 2 else None


def _address(tensor: Tensor) -> Address:
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()), tensor.numel()
