"""One call of `generate` as the engine sees it, or the reason why it is transformers' own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.generation import stopping_criteria as hf
from transformers.generation import utils

from awq.engine.cache import KVCache
from awq.engine.sample import Sampling

# What `generate` hands to its loop. The inputs of images and such go through the prefill only.
PLAIN_ARGUMENTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "return_dict"}
_FOR_CRITERIA = {"tokenizer"}
_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
_ON_HOST = (hf.StopStringCriteria, hf.MaxTimeCriteria)


@dataclass
class Query:
    """tokens int64 [batch, prompt]; `arguments` are the model's, for the prefill.

    criteria: asked after every token, beside ends and length; `at_once`: they want tokens of the model's device, so
              that no step may be enqueued before they have answered
    returned: the caller gets the cache
    """

    tokens: Tensor
    arguments: dict[str, Any]
    config: GenerationConfig
    sampling: Sampling
    max_new: int
    ends: frozenset[int]
    pad: int
    criteria: list[hf.StoppingCriteria] = field(default_factory=list)
    streamer: Any = None
    cache: KVCache | None = None
    returned: bool = False

    @property
    def at_once(self) -> bool:
        return any(type(criterion) not in _ON_HOST for criterion in self.criteria)

    @property
    def slots(self) -> int:
        """Tokens that the cache holds in the end, at most."""
        mask = self.arguments.get("attention_mask")
        past = self.cache.get_seq_length() if self.cache else 0
        length = self.tokens.shape[1]
        return (max(mask.shape[1], length) if mask is not None else past + length) + self.max_new


def read_query(
    tokens: Tensor,
    processors: Any,
    criteria: Any,
    config: GenerationConfig,
    streamer: Any,
    arguments: Mapping[str, Any],
) -> Query | str:
    """The query, or what in it the engine does not do."""
    arguments = {name: value for name, value in arguments.items() if name not in _FOR_CRITERIA}
    if reason := _unusual(tokens, config, arguments):
        return reason
    sampling = Sampling.read(processors, bool(config.do_sample), tokens.shape[1])
    if isinstance(sampling, str):
        return sampling
    lengths = [criterion.max_length for criterion in criteria if isinstance(criterion, hf.MaxLengthCriteria)]
    if not lengths:
        return "a query without a maximal length"
    ends = [token for one in criteria if type(one) is hf.EosTokenCriteria for token in one.eos_token_id.tolist()]
    pad: Tensor | None = getattr(config, "_pad_token_tensor", None)
    cache = arguments.get("past_key_values")
    return Query(
        tokens,
        {name: value for name, value in arguments.items() if name != "past_key_values"},
        config,
        sampling,
        max(1, min(lengths) - tokens.shape[1]),
        frozenset(ends),
        int(pad) if pad is not None else 0,
        [one for one in criteria if type(one) not in (hf.MaxLengthCriteria, hf.EosTokenCriteria)],
        streamer,
        cache if isinstance(cache, KVCache) else None,
        bool(config.return_dict_in_generate),
    )


def _unusual(tokens: Tensor, config: GenerationConfig, arguments: Mapping[str, Any]) -> str | None:
    if config.return_dict_in_generate and (asked := [name for name in _OUTPUTS if getattr(config, name, None)]):
        return asked[0]
    if config.use_cache is False or config.is_assistant:
        return "use_cache=False" if config.use_cache is False else "assisting another model"
    if tokens.ndim != 2 or not tokens.shape[1]:
        return "a prompt that is not tokens"
    once = PLAIN_ARGUMENTS | set(getattr(utils, "MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL", ()))
    if unknown := sorted(name for name, value in arguments.items() if name not in once and value is not None):
        return f"the argument {unknown[0]}"
    cache = arguments.get("past_key_values")
    ours = type(cache) is DynamicCache and getattr(cache, "made_by_generate", False)
    if cache is not None and not isinstance(cache, KVCache) and not ours:
        return f"a {type(cache).__name__} of the caller's"
    return None


@dataclass(frozen=True)
class Text:
    """The new tokens [batch, new] of a prompt, behind `past` that the cache holds, and the position of the next one.

    padding: tokens of each row that count for nothing, all before the others; empty, and no mask, for none
    """

    tokens: Tensor
    past: int
    padding: tuple[int, ...]
    mask: Tensor | None
    positions: Tensor


def read_text(tokens: Tensor, mask: Tensor | None, positions: Tensor | None, past: int) -> Text | None:
    """What `generate` gave, if it is counted as usual, from the first token of a row that is no padding; else None.

    tokens: [batch, length] with those of the cache, or without; mask: [batch, past + new]; positions: [..., length]
    """
    whole = mask is not None and mask.shape[-1] == tokens.shape[1]
    new = tokens[:, past:] if whole else tokens
    (batch, count), total = new.shape, past + new.shape[1]
    if not count or (mask is not None and mask.shape != (batch, total)):
        return None
    counts = torch.ones(1, total, dtype=torch.bool, device=tokens.device) if mask is None else mask != 0
    first = (~counts).sum(1).expand(batch)
    ragged = (counts[:, 1:] < counts[:, :-1]).any().expand(1)
    expected = torch.arange(past, total, device=tokens.device) - first.unsqueeze(1)
    wrong = torch.zeros_like(ragged)
    if positions is not None:
        known = positions[..., -count:]
        if known.ndim < 2 or known.shape[-1] != count or known.shape[-2] not in (1, batch):
            return None
        wrong = ((known != expected) & (expected >= 0)).any().expand(1)
    *padding, ragged_or_wrong = torch.cat([first, ragged | wrong]).tolist()  # the host waits once
    unpadded = not any(padding)
    if ragged_or_wrong or max(padding) >= total or (positions is None and not unpadded):
        return None
    after = (total - first).unsqueeze(1)
    return Text(new, past, () if unpadded else tuple(padding), None if unpadded else mask, after)
