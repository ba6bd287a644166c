"""Fused experts, one 3-D parameter for all as transformers 5 holds them, split into a list of experts made of linears.

How a fused module lays out its weights is found on a miniature of it with random weights: of the layouts that its
shapes allow, the one whose list of experts computes the same. That takes no weights of the model, so that a checkpoint
is loaded into the very structure that was quantized.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from awq.structure.linears import linear_shape

SAME = 1e-5  # relative; what float32 leaves of another order of summing
_EXPERTS, _INNER, _TOKENS = 4, 8, 12  # of a miniature
# What a forward raises that is given other arguments, or other shapes, than it was written for.
_MISFITS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)

Activate = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Layout:
    """How a fused module holds its experts.

    into, out:   names of its 3-D parameters, towards the inner width and back
    gated:       `into` holds a gate and an up projection, whose rows lie in two halves or (interleaved) take turns
    transposed:  [experts, in, out] where the rule is [experts, out, in]
    routed:      called with each token's experts and their weights; else with a copy of the tokens for every expert,
                 zero where it is not asked
    """

    into: str
    out: str
    gated: bool
    transposed: bool
    interleaved: bool = False
    routed: bool = True

    @property
    def parts(self) -> tuple[str, ...]:
        return ("gate_proj", "up_proj") if self.gated else ("up_proj",)

    def split(self, fused: Tensor) -> list[Tensor]:
        """The rows [inner, ...] of each part of `into` [parts x inner, ...], as views."""
        count = len(self.parts)
        return [fused[part::count] for part in range(count)] if self.interleaved else list(fused.chunk(count))

    def join(self, outputs: list[Tensor]) -> Tensor:
        """What `into` gives, from the outputs [..., inner] of its parts."""
        return torch.stack(outputs, -1).flatten(-2) if self.interleaved else torch.cat(outputs, -1)


class Expert(nn.Module):
    """down(activate(gate and up, joined)), or down(activate(up)): each of them a linear."""

    def __init__(self, layout: Layout, activate: Activate, linears: dict[str, nn.Linear]) -> None:
        super().__init__()
        self.layout, self.activate = layout, activate
        for name, linear in linears.items():
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        outputs = [self.get_submodule(part)(x) for part in self.layout.parts]
        result: Tensor = self.get_submodule("down_proj")(self.activate(self.layout.join(outputs)))
        return result


class Experts(nn.ModuleList):
    """The experts of a fused module as a list, called as that was, over the same memory where its layout allows.

    For calibration:
    visit_every:  of all tokens, every so many-th is read by all experts besides their own, to no effect; 0 for none
    visit_weight: what such a token counts
    visiting:     whether such tokens are being read
    route:        looks at, or replaces, the tokens' experts and their weights
    """

    def __init__(self, fused: nn.Module, layout: Layout) -> None:
        bare = copy.copy(fused)
        bare._parameters = {}
        activate = _activation(bare, layout.gated)
        super().__init__(Expert(layout, activate, linears) for linears in _linears(fused, layout))
        self.layout = layout
        self.width = fused.get_parameter(layout.out).shape[1 + layout.transposed]
        self.visit_every, self.visit_weight, self.visiting = 0, 1.0, False
        self.route: Callable[[list[Tensor]], list[Tensor]] | None = None
        self._signature = inspect.signature(fused.forward)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """hidden [tokens, width], experts int [tokens, k] and weights [tokens, k]; or [experts x tokens, width]."""
        hidden, *routing = self._signature.bind(*args, **kwargs).arguments.values()
        if not self.layout.routed:
            return self._sliced(hidden)
        chosen, weights = self.route(routing) if self.route else routing
        return self._routed(hidden, chosen, weights)

    def _routed(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        self._visit(hidden)
        result = torch.zeros_like(hidden)
        for expert in chosen.unique().tolist():
            if expert < len(self):  # one beyond the last masks a slot
                tokens, slot = torch.where(chosen == expert)
                output = self[expert](hidden[tokens]) * weights[tokens, slot, None]
                result.index_add_(0, tokens, output.to(result.dtype))
        return result

    def _sliced(self, hidden: Tensor) -> Tensor:
        slices = hidden.view(len(self), -1, hidden.shape[-1])
        self._visit(slices.sum(0))
        result = torch.zeros_like(slices)
        for expert, x in enumerate(slices):
            asked = x.any(-1).nonzero().squeeze(1)
            if len(asked):
                result[expert, asked] = self[expert](x[asked])
        return result.view_as(hidden)

    def _visit(self, hidden: Tensor) -> None:
        if self.visit_every:
            sample = hidden[self.visit_every // 2 :: self.visit_every]
            self.visiting = True
            for expert in self:
                expert(sample)
            self.visiting = False


def split_experts(model: nn.Module) -> None:
    """Replace every fused module of `model` by its `Experts`, in place; what is in no known layout stays as it is."""
    known: dict[tuple[Any, ...], Layout | None] = {}
    for name, module in list(model.named_modules()):
        if _is_fused(module):
            key = type(module), *((label, p.shape) for label, p in module.named_parameters(recurse=False))
            if key not in known:
                known[key] = find_layout(module)
            if layout := known[key]:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, Experts(module, layout))


def expert_lists(module: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of experts in `module` by name: two or more modules of one class, with the same linears in each."""

    def kind(expert: nn.Module) -> tuple[Any, ...]:
        return type(expert), *((name, shape) for name, part in expert.named_modules() if (shape := linear_shape(part)))

    lists = ((name, part) for name, part in module.named_modules() if name and isinstance(part, nn.ModuleList))
    kinds = ((name, part, {kind(expert) for expert in part}) for name, part in lists)
    return {name: part for name, part, found in kinds if len(part) > 1 and len(found) == 1 and len(*found) > 1}


def routers(model: nn.Module) -> list[str]:
    """What chooses experts: the matrices of the modules beside a list of them that have a row for each expert."""
    found = []
    for name, experts in expert_lists(model).items():
        parent = name.rpartition(".")[0]
        for leaf, module in model.get_submodule(parent).named_children():
            matrices = {inner: rows for inner, part in module.named_modules() if (rows := _matrix_rows(part))}
            if module is not experts and len(experts) in matrices.values():
                found += [".".join(filter(None, (parent, leaf, inner))) for inner in matrices]
    return found


def _matrix_rows(module: nn.Module) -> int:
    weight = getattr(module, "weight", None)
    return len(weight) if isinstance(weight, Tensor) and weight.ndim == 2 else 0


def find_layout(fused: nn.Module) -> Layout | None:
    """The layout under which a list of experts computes what `fused` does; None if there is none. Reads no weights."""
    for layout in _candidates(fused):
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            miniature = _miniature(fused, layout)
            args = _arguments(miniature, layout)
            try:
                wanted = inspect.unwrap(type(fused).forward)(miniature, *args)
                got = Experts(miniature, layout)(*args)
                if bool((got - wanted).norm() < SAME * wanted.norm()):
                    return layout
            except _MISFITS:
                continue
    return None


def _is_fused(module: nn.Module) -> bool:
    return len(_fused_parameters(module)) == 2


def _fused_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters(recurse=False) if p.ndim == 3}


def _candidates(fused: nn.Module) -> Iterator[Layout]:
    """The layouts that the shapes allow, of what they leave open the usual first."""
    (first, a), (second, b) = _fused_parameters(fused).items()
    if len(a) != len(b):
        return
    for transposed in (False, True):
        for into, out, (rows, width), (back, inner) in (
            (first, second, *_sizes(a, b, transposed)),
            (second, first, *_sizes(b, a, transposed)),
        ):
            if width == back and rows in (inner, 2 * inner):
                gated = rows == 2 * inner
                interleaved = gated and _takes_turns(fused)
                for routed in (True, False):
                    yield Layout(into, out, gated, transposed, interleaved, routed)


def _sizes(into: Tensor, out: Tensor, transposed: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    """(rows, columns) of one expert's matrix in each."""
    order = (2, 1) if transposed else (1, 2)
    return (into.shape[order[0]], into.shape[order[1]]), (out.shape[order[0]], out.shape[order[1]])


def _takes_turns(fused: nn.Module) -> bool:
    """Whether the first output of the activation depends on the second row of `into`: gate and up take turns."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        before = torch.randn(_TOKENS, 2 * _INNER)
    after = before.clone()
    after[:, 1] += 1
    activate = _activation(fused, gated=True)
    try:
        return not torch.equal(activate(before)[:, 0], activate(after)[:, 0])
    except _MISFITS:
        return False


def _activation(module: Any, gated: bool) -> Activate:
    """What lies between `into` and `out`: transformers' `_apply_gate` where there is one, else act(gate) * up."""
    act: Activate = getattr(module, "act_fn", nn.functional.silu)
    if not gated:
        return act

    def glu(joined: Tensor) -> Tensor:
        gate, up = joined.chunk(2, dim=-1)
        return act(gate) * up

    apply_gate: Activate = getattr(module, "_apply_gate", glu)
    return apply_gate


def _miniature(fused: nn.Module, layout: Layout) -> nn.Module:
    """`fused` with few and narrow experts, weights random and large enough for clamps to act."""
    width = fused.get_parameter(layout.out).shape[1 + layout.transposed]
    rows = _INNER * len(layout.parts)
    into, out = (rows, width), (width, _INNER)
    shapes = {layout.into: into[:: 1 - 2 * layout.transposed], layout.out: out[:: 1 - 2 * layout.transposed]}
    shapes |= {f"{layout.into}_bias": (rows,), f"{layout.out}_bias": (width,)}
    small = copy.copy(fused)
    small._parameters = {
        name: nn.Parameter(
            4 * torch.randn(min(_EXPERTS, len(p)), *shapes.get(name, p.shape[1:])) / width**0.5, requires_grad=False
        )
        for name, p in fused.named_parameters(recurse=False)
    }
    return small


def _arguments(miniature: nn.Module, layout: Layout) -> tuple[Tensor, ...]:
    width = miniature.get_parameter(layout.out).shape[1 + layout.transposed]
    hidden = torch.randn(_TOKENS, width)
    experts = len(miniature.get_parameter(layout.out))
    weights, chosen = torch.rand(_TOKENS, experts).topk(min(2, experts))
    if layout.routed:
        return hidden, chosen, weights
    asked = torch.zeros(_TOKENS, experts).scatter(1, chosen, weights)
    return ((asked.t().unsqueeze(2) * hidden).flatten(0, 1),)


def _linears(fused: nn.Module, layout: Layout) -> Iterator[dict[str, nn.Linear]]:
    """The linears of each expert; a weight is a view of the fused parameter where that has it row by row."""
    into, out = (list(_matrices(fused, name, layout.transposed)) for name in (layout.into, layout.out))
    for (weight, bias), down in zip(into, out, strict=True):
        biases = layout.split(bias) if bias is not None else [None] * len(layout.parts)
        parts = zip(layout.parts, layout.split(weight), biases, strict=True)
        yield {name: _linear(w, b) for name, w, b in parts} | {"down_proj": _linear(*down)}


def _matrices(fused: nn.Module, name: str, transposed: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
    biases = dict(fused.named_parameters(recurse=False)).get(f"{name}_bias")
    for expert, weight in enumerate(fused.get_parameter(name).data):
        yield weight.t() if transposed else weight, None if biases is None else biases.data[expert]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
    return linear
