"""Experts of one list are alike: what holds for a linear in one holds for the same linear in all of them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from awq.structure.experts import Experts, expert_lists


class Siblings:
    """The lists of experts in a block, and which of its modules correspond in them."""

    def __init__(self, block: nn.Module) -> None:
        self.lists = expert_lists(block)

    def place(self, name: str) -> tuple[str, int, str] | None:
        """(list, number of the expert, name in it) of a module inside an expert; None for any other."""
        for prefix in self.lists:
            if name.startswith(f"{prefix}."):
                number, _, inner = name[len(prefix) + 1 :].partition(".")
                return prefix, int(number), inner
        return None

    def role(self, name: str) -> str:
        """One name for a module and its siblings: experts.3.up_proj -> experts.*.up_proj."""
        place = self.place(name)
        return f"{place[0]}.*.{place[2]}" if place else name

    def rename(self, name: str, number: int) -> str:
        """The sibling of a module in another expert; a module outside of experts is its own."""
        place = self.place(name)
        return f"{place[0]}.{number}.{place[2]}" if place else name

    def numbers(self, name: str) -> range:
        """The experts in which a module has siblings."""
        place = self.place(name)
        return range(len(self.lists[place[0]]) if place else 1)

    def all_of(self, names: Iterable[str]) -> tuple[str, ...]:
        """The named modules with all their siblings, each once."""
        return tuple(dict.fromkeys(self.rename(name, number) for name in names for number in self.numbers(name)))

    def routed(self, name: str) -> bool:
        """Whether a module reads the tokens that a routing, which can be replayed, sends to its expert."""
        experts = self._experts(name)
        return experts is not None and experts.layout.routed

    def weight(self, name: str) -> float:
        """What the tokens count that a module is reading: 1, but for the sample that experts read while calibrating."""
        experts = self._experts(name)
        return experts.visit_weight if experts is not None and experts.visiting else 1

    def count(self, name: str, rows: int, tokens: int) -> float:
        """What all the `rows` count that a module has read of `tokens`, its sample with the others."""
        experts = self._experts(name)
        if experts is None or not experts.visit_every:
            return rows
        sample = len(range(experts.visit_every // 2, tokens, experts.visit_every))
        return rows - sample * (1 - experts.visit_weight)

    def _experts(self, name: str) -> Experts | None:
        place = self.place(name)
        experts = self.lists[place[0]] if place else None
        return experts if isinstance(experts, Experts) else None
