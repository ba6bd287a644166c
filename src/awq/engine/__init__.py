"""Generation on one device: static cache, the decode step as a CUDA graph, tokens chosen where the logits are."""

from awq.engine.cache import KVCache
from awq.engine.engine import Engine
from awq.engine.hook import attach, check_length, engine_of

__all__ = ["Engine", "KVCache", "attach", "check_length", "engine_of"]
