"""Behind quantized linears each token is sent to the experts that it has in the float model: only then do their inputs
in the two streams compare row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from awq.structure.experts import Experts

Routing = Mapping[str, Any]  # by list of experts, the choice of experts and their weights


def routed_lists(block: nn.Module) -> dict[str, Experts]:
    """The lists of experts in `block` that are told which tokens go where."""
    found = {name: module for name, module in block.named_modules() if isinstance(module, Experts)}
    return {name: experts for name, experts in found.items() if experts.layout.routed}


@contextmanager
def recorded_routing(block: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """For every run of `block`, where its tokens go."""
    runs: list[dict[str, Any]] = []
    lists = routed_lists(block)

    def look(name: str) -> Callable[[Any], Any]:
        def route(routing: Any) -> Any:
            runs[-1][name] = routing
            return routing

        return route

    start = block.register_forward_pre_hook(lambda _module, _args: runs.append({}))
    try:
        with _routed_by(lists, {name: look(name) for name in lists}):
            yield runs
    finally:
        start.remove()


@contextmanager
def replayed_routing(block: nn.Module, routing: Routing) -> Iterator[None]:
    """`block` with its tokens sent where `routing` says."""
    lists = {name: experts for name, experts in routed_lists(block).items() if name in routing}

    def replay(name: str) -> Callable[[Any], Any]:
        return lambda _own: routing[name]

    with _routed_by(lists, {name: replay(name) for name in lists}):
        yield


@contextmanager
def _routed_by(lists: Mapping[str, Experts], routes: Mapping[str, Callable[[Any], Any]]) -> Iterator[None]:
    for name, experts in lists.items():
        experts.route = routes[name]
    try:
        yield
    finally:
        for experts in lists.values():
            experts.route = None
