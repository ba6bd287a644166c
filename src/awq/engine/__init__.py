"""Generation on one device: static cache, the decode step as a CUDA graph, tokens chosen where the logits are."""

from awq.engine.attach import Engine, attach, engine_of
from awq.engine.cache import KVCache

__all__ = ["Engine", "KVCache", "attach", "engine_of"]
