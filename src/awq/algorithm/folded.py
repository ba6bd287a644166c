"""A scale that was folded in, and the way back: text it was not chosen by may find it worse than none."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from awq.algorithm.inputs.stats import InputStats
from awq.algorithm.search.loops import PLAIN_LOOPS, Loops
from awq.algorithm.search.scale import Consumer, search_scale
from awq.algorithm.search.solution import Linears, Losses
from awq.config import QuantConfig
from awq.structure.groups import ScaleGroup, fold
from awq.structure.siblings import Siblings

SLACK = 1e-6  # what float32 leaves between two equal losses


@dataclass
class Folded:
    """A fold that was made.

    scale:   float32 [producer channels]; columns: [consumer channels], by which the consumers were multiplied
    origin:  a norm's weight and bias as they were, for what rounding to the stored dtype changed cannot be divided out
    """

    group: ScaleGroup
    scale: Tensor
    columns: Tensor
    origin: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def into(cls, block: nn.Module, group: ScaleGroup, scale: Tensor, linears: Linears, stored_in: Any) -> Self:
        """Fold `scale` into the group, and note it in its linears."""
        producer = block.get_submodule(group.producer)
        norm = dict(producer.named_parameters()) if group.kind != "linear" else {}
        origin = {name: parameter.data.clone() for name, parameter in norm.items()}
        folded = cls(group, scale, fold(block, group, scale, stored_in), origin)
        folded._note(linears, folded.columns, scale)
        return folded

    def is_worse(self, losses: Losses) -> bool:
        """Whether a consumer lost more than plain rounding would have; `losses` holds both, by linear."""
        found = (losses[name] for name in self.group.consumers if name in losses)
        return any(loss > rounding * (1 + SLACK) for loss, rounding in found)

    def undo(self, block: nn.Module, linears: Linears) -> None:
        """Make the group and its linears what they were."""
        for name, parameter in block.get_submodule(self.group.producer).named_parameters():
            if self.origin:
                parameter.data.copy_(self.origin[name])
            else:
                rows = self.group.rows(parameter.data)
                rows.mul_(self.scale.view(self.group.parts, -1, *[1] * (rows.ndim - 2)))
        for name in self.group.consumers:
            block.get_submodule(name).weight.data.div_(self.columns)  # type: ignore[operator]
        self._note(linears, 1 / self.columns, 1 / self.scale)
        for name in self.group.consumers:
            if name in linears:
                linears[name].scaled_by = None

    def _note(self, linears: Linears, columns: Tensor, scale: Tensor) -> None:
        shared: dict[int, InputStats] = {}
        for consumer in (linears[name] for name in self.group.consumers if name in linears):
            key = id(consumer.stats)
            if key not in shared:
                shared[key] = consumer.stats.rescaled(columns)
            consumer.scale_input(columns, shared[key], self.group.producer)
        if self.group.producer in linears:
            self.group.rows(linears[self.group.producer].row_scale).mul_(scale.view(self.group.parts, -1))


def undo_worse(folds: list[Folded], losses: Losses, block: nn.Module, linears: Linears) -> bool:
    """Take back the folds under which held-out text finds a linear worse than rounded plainly; whether there were."""
    worse = [made for made in folds if made.is_worse(losses)]
    for made in worse:
        made.undo(block, linears)
        folds.remove(made)
    return bool(worse)


def is_alone(block: nn.Module, group: ScaleGroup, shared: Collection[int]) -> bool:
    """Whether a fold of `group` changes nothing that the model uses elsewhere too."""
    modules = map(block.get_submodule, (group.producer, *group.consumers))
    return not any(id(parameter) in shared for module in modules for parameter in module.parameters())


def scale_group(
    block: nn.Module,
    group: ScaleGroup,
    linears: Linears,
    like: Siblings,
    config: QuantConfig,
    stored_in: torch.dtype,
    loops: Loops = PLAIN_LOOPS,
) -> Folded | None:
    """The group with the best scale folded in, if any is better than none. stored_in: the dtype of norms"""
    reached = [name for name in group.consumers if name in linears and linears[name].stats.tokens]
    if not all(linears[name].usable for name in reached):
        return None
    consumers = [
        Consumer(linear.weight, linear.stats, max(linear.tokens, 1), like.role(name))
        for name, linear in ((name, linears[name]) for name in reached)
    ]

    def delta(weight: Tensor, scale: Tensor | None, fast: bool) -> Tensor:
        return loops.rounded_delta(weight, scale, config.group_size or -1, config.bits, config.zero_point, fast)

    scale = search_scale(consumers, delta, loops.row_dots, group.reduce, group.expand)
    return None if scale is None else Folded.into(block, group, scale, linears, stored_in)
