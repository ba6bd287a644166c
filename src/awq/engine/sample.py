"""The next token, chosen where the logits are: what `generate` was asked for as tensor operations without a host.

`Sampling.read` translates the logits processors that transformers prepared, in the order in which it applies them, and
says which one it cannot place: that query is transformers' own. Numbers such as the temperature are read from the
device, so that a captured step serves every value of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from awq.engine.arrivals import Arrivals
from awq.kernels.cuda.step.sample import Rule, choose, draws, sets

# In the order in which transformers applies them.
_PLACED: dict[type, tuple[str, str]] = {
    hf.RepetitionPenaltyLogitsProcessor: ("penalty", "penalty"),
    hf.MinLengthLogitsProcessor: ("min_new", "min_length"),
    hf.MinNewTokensLengthLogitsProcessor: ("min_new", "min_new_tokens"),
    hf.SuppressTokensLogitsProcessor: ("suppressed", "suppress_tokens"),
    hf.TemperatureLogitsWarper: ("temperature", "temperature"),
    hf.TopKLogitsWarper: ("top_k", "top_k"),
    hf.TopPLogitsWarper: ("top_p", "top_p"),
    hf.MinPLogitsWarper: ("min_p", "min_p"),
    hf.LogitNormalization: ("", ""),
}
_ORDER = list(_PLACED)
_WARPERS = _ORDER[4:]
_DRAWS = 64  # random numbers of a row drawn at once: a kernel for each costs 2 us a step, and its graph two more


@dataclass(frozen=True)
class Sampling:
    """What to do with logits. `form` is what a captured step is made for; the other numbers may change between calls.

    min_new: how many new tokens there are before one of `ends` may come; suppressed: tokens that never come
    """

    sampled: bool = False
    penalty: float = 1.0
    min_new: int = 0
    ends: tuple[int, ...] = ()
    suppressed: tuple[int, ...] = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @classmethod
    def read(cls, processors: Iterable[Any], sampled: bool, prompt_tokens: int) -> Self | str:
        """The settings that `processors` stand for, or what is in the way."""
        found: dict[str, Any] = {}
        last = -1
        for processor in processors:
            kind = type(processor)
            place = _ORDER.index(kind) if kind in _PLACED else -1
            if place <= last or (kind in _WARPERS and not sampled) or not _usual(processor):
                return f"the logits processor {kind.__name__}"
            last = place
            name, attribute = _PLACED[kind]
            if name == "min_new":
                found["ends"] = tuple(processor.eos_token_id.tolist())
                found[name] = max(found.get(name, 0), _value(processor, attribute, prompt_tokens))
            elif name:
                found[name] = _value(processor, attribute, prompt_tokens)
        return cls(sampled, **found)

    @property
    def form(self) -> tuple[Any, ...]:
        """What decides which operations run: all but the numbers that they read from the device."""
        used = (self.penalty != 1, self.min_new > 0, self.top_p < 1, self.min_p > 0)
        return (self.sampled, *used, self.ends, self.suppressed, self.top_k)

    @property
    def bars(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tokens that never come, and those that do not come yet."""
        return self.suppressed, self.ends if self.min_new > 0 else ()

    @property
    def numbers(self) -> list[float]:
        return [self.penalty, float(self.min_new), self.temperature, self.top_p, self.min_p]


def _usual(processor: Any) -> bool:
    """No option of it is set that `Sampling` does not know."""
    return (
        getattr(processor, "filter_value", -float("inf")) == -float("inf")
        and getattr(processor, "min_tokens_to_keep", 1) == 1
        and not getattr(processor, "prompt_ignore_length", None)
        and getattr(processor, "logits_indices", None) is None
    )


def _value(processor: Any, attribute: str, prompt_tokens: int) -> Any:
    value = getattr(processor, attribute)
    if isinstance(value, Tensor):
        return tuple(value.tolist())
    return max(0, value - prompt_tokens) if attribute == "min_length" else value


class Sampler:
    """Chooses tokens for up to `rows` sequences; its state is at fixed addresses.

    by_kernel: one kernel does it all, takes the tokens to the host and counts
    """

    def __init__(self, rows: int, vocabulary: int, device: torch.device) -> None:
        self.rows, self.vocabulary, self.device = rows, vocabulary, device
        self.by_kernel = draws(device, vocabulary)
        self.arrivals = Arrivals(rows, device)
        with torch.inference_mode(False):
            self.numbers = torch.zeros(5, dtype=torch.float32, device=device)
            self.made = torch.zeros(rows, 1, dtype=torch.int64, device=device)  # new tokens so far
        self.chances: Tensor | None = None  # for the kernel, float64 [_DRAWS * rows]
        self.seen: Tensor | None = None  # bool [rows, vocabulary]: in the text so far, where repetition costs
        self.barred: dict[Hashable, Tensor] = {}  # bool [2, vocabulary]: what may not come, and before an end may
        self.sampling, self.batch = Sampling(), rows

    def start(self, sampling: Sampling, tokens: Tensor) -> None:
        """A new query, its text so far `tokens` [batch, length]."""
        self.sampling, self.batch = sampling, len(tokens)
        self.numbers.copy_(torch.tensor(sampling.numbers))
        self.made.zero_()
        # torch keeps pinned memory that it has copied to in this stream until all has run that is enqueued when it is
        # freed: the kernel's writes for steps that an answer did not need are.
        self.arrivals.put(0, self.made)
        with torch.inference_mode(False):
            self._allocate()
        if sampling.penalty != 1 and self.seen is not None:
            seen = torch.zeros(self.batch, self.vocabulary, dtype=torch.bool, device=self.device)
            self.seen[: self.batch] = self._set(seen.scatter_(1, tokens, True))
        self.prepare(0)

    def _set(self, tokens: Tensor) -> Tensor:
        """bool [..., vocabulary] as it is kept"""
        return sets(tokens) if self.by_kernel else tokens

    def _allocate(self) -> None:
        """What this query asks for, and no earlier one did."""
        sampling = self.sampling
        if sampling.penalty != 1 and self.seen is None:
            none = torch.zeros(1, self.vocabulary, dtype=torch.bool, device=self.device)
            self.seen = self._set(none).repeat(self.rows, 1)
        if sampling.sampled and self.by_kernel and self.chances is None:
            self.chances = torch.zeros(_DRAWS * self.rows, dtype=torch.float64, device=self.device)
        if any(sampling.bars) and sampling.bars not in self.barred:
            barred = torch.zeros(2, self.vocabulary, dtype=torch.bool, device=self.device)
            never, ends = ([token for token in which if 0 <= token < self.vocabulary] for which in sampling.bars)
            barred[:, never] = True
            barred[1, ends] = True
            self.barred[sampling.bars] = self._set(barred)

    def prepare(self, number: int) -> None:
        """Before the choice of token `number` of a query is enqueued."""
        if number % _DRAWS == 0 and (chances := self._chances()) is not None:
            chances.uniform_()

    def _chances(self) -> Tensor | None:
        """float64 [_DRAWS, batch]: the same for a seed, however many rows there is room for."""
        if self.chances is None or not self.sampling.sampled:
            return None
        return self.chances[: _DRAWS * self.batch].view(_DRAWS, self.batch)

    def choose(self, logits: Tensor, tokens: Tensor, *counts: Tensor) -> None:
        """The next tokens into `tokens` int64 [batch, 1]; what `counts` hold becomes one more.

        logits: [batch, vocabulary], of any float dtype; counts: none, or a cache's `slot` and `positions`
        """
        if self.by_kernel:
            choose(logits.to(self.device, torch.float32).contiguous(), self._rule(), tokens, *counts)
            return
        tokens.copy_(self._chosen(logits))
        for count in counts:
            count.add_(1)

    def expect(self, number: int, tokens: Tensor) -> Callable[[], list[int]]:
        """What waits for token `number` of every row, whose choice into `tokens` is enqueued, and returns them."""
        if not self.by_kernel:
            self.arrivals.put(number, tokens)
        return self.arrivals.expect(number, len(tokens))

    def _rule(self) -> Rule:
        sampling = self.sampling
        return Rule(
            self.numbers,
            self.made,
            self.arrivals.places,
            self._chances(),
            self.barred.get(sampling.bars),
            self.seen if sampling.penalty != 1 else None,
            sampling.top_k,
            sampling.top_p < 1,
            sampling.min_p > 0,
        )

    def _chosen(self, logits: Tensor) -> Tensor:
        """int64 [batch, 1]"""
        sampling = self.sampling
        if sampling == Sampling():
            return logits.argmax(-1, keepdim=True)
        scores = self._barred(self._penalized(logits.float()))
        tokens = self._sample(scores) if sampling.sampled else scores.argmax(-1, keepdim=True)
        self.made.add_(1)
        if sampling.penalty != 1 and self.seen is not None:
            self.seen[: len(tokens)].scatter_(1, tokens, True)
        return tokens

    def _penalized(self, scores: Tensor) -> Tensor:
        if self.sampling.penalty == 1 or self.seen is None:
            return scores
        penalty = self.numbers[0]
        lowered = torch.where(scores < 0, scores * penalty, scores / penalty)
        return torch.where(self.seen[: len(scores)], lowered, scores)

    def _barred(self, scores: Tensor) -> Tensor:
        if not any(self.sampling.bars):
            return scores
        never, yet = self.barred[self.sampling.bars]
        early = self.made[: len(scores)] < self.numbers[1]
        return scores.masked_fill(torch.where(early, yet, never), -torch.inf)

    def _sample(self, scores: Tensor) -> Tensor:
        """By the exponential race: p_i / e_i is largest for token i with probability p_i."""
        sampling = self.sampling
        scores, tokens = scores / self.numbers[2], None
        if sampling.top_k:
            scores, tokens = scores.topk(min(sampling.top_k, scores.shape[-1]))
        elif sampling.top_p < 1:
            scores, tokens = scores.sort(descending=True)
        weights = scores.softmax(-1)
        if sampling.top_p < 1:  # a token stays if those before it hold less than top_p
            before = weights.cumsum(-1) - weights
            weights = weights.masked_fill(before >= self.numbers[3], 0)
            weights[:, 0] += 1e-30  # the first stays for top_p = 0 as well
        if sampling.min_p > 0:
            weights = weights.masked_fill(weights < self.numbers[4] * weights.amax(-1, keepdim=True), 0)
        race = torch.empty_like(weights).exponential_()
        winner = (weights / race).argmax(-1, keepdim=True)
        return winner if tokens is None else tokens.gather(1, winner)
