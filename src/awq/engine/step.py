"""A decode step: one token a sequence in, the logits of the next one out. What a faster tier plugs in.

The engine owns the cache, the sampling and the CUDA graph; a `Step` computes logits from tokens and nothing else:

    engine                                         step
    prefill: `prompt` of a `PromptStep`, or the model's own forward; cache filled
    warm-up: one plain call                        decode(tokens, positions, cache) -> logits
    capture: decode + choice of the token + count, as one CUDA graph for each bucket of lengths
    replay:  once a token; the host never waits

`decode` is called with tensors whose addresses and shapes are those of the replays. It may allocate through torch (the
graph's pool keeps that memory), and must neither wait for the device nor look at a value of it.

How the cache lies in memory (`KVCache`; for layer i, with S = cache.capacity slots):

    cache.keys(i), cache.values(i)   [batch, kv_heads, S, head_dim], contiguous, in the model's dtype (fp16 or bf16);
                                     keys are stored after RoPE and after any norm of them, as the model's forward does
    cache.slot     int64 [1]         the slot that this step's key and value are written to, one for all rows
    cache.first    int64 [batch]     row b attends to the slots first[b] .. slot, both included (left padding before)
    cache.bucket   int               slot < bucket for as long as this graph is replayed: what a launch is sized for
    cache.windows  list[int | None]  per layer: how many slots, this one included, a sliding window sees; None for all

The step writes the key and value of this token to `slot` of every layer. It leaves tokens, positions, slot and first as
they are: the engine counts. Slots after `slot` hold what earlier queries left there, and must not be read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from awq.engine.cpu import cpu_step
from awq.engine.fused.build import fused_step

if TYPE_CHECKING:
    from awq.engine.cache import KVCache


class Step(Protocol):
    """One way to run a decode step.

    tier:      1 for the model's own forward, 2 for fused kernels
    how:       what it is, in a few words, for `model.engine`
    max_batch: rows that it takes, None without a limit; the next tier takes more
    """

    @property
    def tier(self) -> int: ...

    @property
    def how(self) -> str: ...

    @property
    def max_batch(self) -> int | None: ...

    def decode(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """tokens, positions int64 [batch, 1] -> logits [batch, vocabulary], half precision or float32.

        positions: what the model calls position_ids, slot - first where nobody gave others
        """
        ...


@runtime_checkable
class PromptStep(Step, Protocol):
    """A step that takes prompts too, of up to `rows` tokens at once where they are captured."""

    @property
    def rows(self) -> int: ...

    def takes(self, cache: KVCache) -> bool: ...

    def prompt(
        self, tokens: Tensor, cache: KVCache, past: int = 0, padding: Sequence[int] = (), last: Tensor | None = None
    ) -> Tensor:
        """tokens int64 [batch, columns] into the slots from `past` on -> logits [batch, vocabulary] of the last column,
        or of column `last`, int64 [1]. padding: how many slots before each row count for nothing, as in cache.first."""
        ...


# A builder makes a step of a loaded model (transformers', its linears `QuantLinear`), or says in a few words why not.
# It discovers the structure; that the logits are those of the model's own forward is verified by the engine.
# What it keeps of the model it must hold weakly or as tensors, so that both are freed together.
Builder = Callable[[Any], Step | str]

# In order of preference, before the model's own forward, which takes whatever they refuse.
BUILDERS: list[Builder] = [fused_step]
# The same where there are no graphs: `decode` is called with the cache in its plain state.
PLAIN_BUILDERS: list[Builder] = [cpu_step]
