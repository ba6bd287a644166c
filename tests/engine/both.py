"""A model that generates in steps of one shape, as CUDA graphs need them, here run as they are."""

from __future__ import annotations

from typing import Any

from awq.engine import attach
from awq.engine.choose import Probe
from awq.engine.loop import Way

WAYS = ("plain", "stepping")


def engined(model: Any, way: str) -> Any:
    """plain: what a CPU does; stepping: what a GPU captures, without the capture."""
    attach(model)
    ways = model.engine.ways
    assert model.engine.tier == 1, model.engine
    if way == "stepping":
        ways.ways = [Way(ways.ways[0].step, captured=True)]
        probe = Probe(model, ways.windows)
        assert probe.difference(ways.ways[0]) is None
        ways.padded_prompts = probe.padding_is_harmless()
    return model
