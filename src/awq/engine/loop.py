"""One query from its prompt to its last token. Steps are enqueued ahead; the host reads tokens behind, and decides.

The device never learns that a sequence has ended: rows are independent, so the host replaces what comes after by
padding, and drops the few steps that were enqueued before it knew. That number is fixed, so a seed repeats.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from awq.engine.cache import PROMPTS, KVCache, bucket_of
from awq.engine.forward import prompt_logits
from awq.engine.query import PLAIN_ARGUMENTS, Query, Text, read_text
from awq.engine.sample import Sampler
from awq.engine.step import PromptStep, Step

AHEAD = 2  # steps enqueued before the token of an earlier one is read: one runs while the host looks at the last


@dataclass
class Way:
    """How decode steps run: captured in CUDA graphs, or each launched from here.

    most: rows for which that was found right, None for as many as the step takes
    """

    step: Step
    captured: bool
    most: int | None = None

    @property
    def max_batch(self) -> int | None:
        """Rows that it takes, None without a limit."""
        return min((limit for limit in (self.step.max_batch, self.most) if limit), default=None)


class Run:
    """A query on its way. The cache is empty, or holds the conversation so far."""

    def __init__(
        self, model: Any, way: Way, cache: KVCache, sampler: Sampler, query: Query, padded_prompts: bool = False
    ) -> None:
        self.model, self.way, self.cache, self.sampler, self.query = model, way, cache, sampler, query
        self.batch, self.prompt = query.tokens.shape
        self.length = self.past = 0  # tokens in the cache: once all that was enqueued has run, and before the answer
        self.padded_prompts = padded_prompts
        self.ragged_way: Way | None = None  # the way where there is padding between tokens
        self.prompts: PromptStep | None = None  # what takes prompts in place of the model's own forward
        self.ahead = AHEAD if way.captured and not query.at_once else 0

    def answer(self) -> Tensor:
        """The new tokens [batch, count] on the CPU, counted as transformers counts them."""
        query, rows, finished = self.query, [], [False] * self.batch
        text = query.tokens.cpu() if query.criteria else None
        for tokens in self._tokens():
            if query.ends:
                tokens = [query.pad if done else token for token, done in zip(tokens, finished, strict=True)]
            rows.append(torch.tensor(tokens))
            finished = [done or token in query.ends for token, done in zip(tokens, finished, strict=True)]
            if text is not None:
                text = torch.cat([text, rows[-1][:, None]], dim=1)
                finished = self._asked(text, finished)
            if query.streamer is not None:
                query.streamer.put(rows[-1])
            if all(finished):
                break
        if query.streamer is not None:
            query.streamer.end()
        if self.way.captured:  # else the forwards have counted
            self.cache.set_length(self.past + len(rows) - 1)
        return torch.stack(rows, dim=1)

    def _asked(self, text: Tensor, finished: list[bool]) -> list[bool]:
        """Who is finished by what the criteria say of `text`."""
        for criterion in self.query.criteria:
            seen = text.to(self.query.tokens.device) if self.query.at_once else text
            says = criterion(seen, None)
            finished = [done or bool(now) for done, now in zip(finished, torch.as_tensor(says).tolist(), strict=True)]
        return finished

    def _tokens(self) -> Iterator[list[int]]:
        """The new tokens of every row, step by step; the caller stops when it has seen enough."""
        waiting: deque[Callable[[], list[int]]] = deque()
        tokens, sampler = self.cache.tokens[: self.batch], self.sampler
        self._prefill()
        waiting.append(sampler.expect(0, tokens))
        for number in range(1, self.query.max_new):
            if len(waiting) > self.ahead:
                yield waiting.popleft()()
            sampler.prepare(number)
            self._decode()
            waiting.append(sampler.expect(number, tokens))
        while waiting:
            yield waiting.popleft()()

    def _prefill(self) -> None:
        """The prompt into the cache, and the first token."""
        query, cache = self.query, self.cache
        given = self._given()
        if given is not None and self._captured_prompt(given):
            columns = cache.set_prompt(query.tokens)
            self._count(given)
            key = ("prompt", self.batch, columns, cache.capacity, self.sampler, query.sampling.form)
            cache.graphs.run(key, lambda: self._read_prompt(columns))
            cache.set_length(self.length)
            return
        if given is not None and self.prompts is not None and self.prompts.takes(cache):
            self._count(given)
            self._choose(self.prompts.prompt(given.tokens, cache, given.past, given.padding))
            cache.set_length(self.length)
            return
        arguments = query.arguments | {"past_key_values": cache}
        output = self.model._prefill(query.tokens, query.config, arguments)
        arguments = self.model._update_model_kwargs_for_generation(output, arguments, is_encoder_decoder=False)
        cache.set_padding(arguments.get("attention_mask"))
        if cache.ragged and self.ragged_way is not None:
            self.way = self.ragged_way
        cache.set_positions(arguments.get("position_ids"), self.batch)
        self._begin(cache.get_seq_length())
        self._choose(output.logits[:, -1])

    def _given(self) -> Text | None:
        """What the prompt is, if it is nothing but text that is counted as usual, from the first token that counts."""
        query = self.query
        others = {name for name, value in query.arguments.items() if value is not None} - PLAIN_ARGUMENTS
        if others or query.config.prefill_chunk_size is not None:
            return None
        mask, positions = (query.arguments.get(name) for name in ("attention_mask", "position_ids"))
        past = query.cache.get_seq_length() if query.cache is not None else 0
        return read_text(query.tokens, mask, positions, past)

    def _captured_prompt(self, given: Text) -> bool:
        """Whether the prompt is of a kind that graphs are recorded for: a first one, not too long, no padding."""
        if not self.way.captured or given.past or any(given.padding) or self.prompt > PROMPTS[-1]:
            return False
        if self.prompts is None or not self.prompts.takes(self.cache):
            return self.padded_prompts
        return self.batch * self.prompt <= self.prompts.rows

    def _read_prompt(self, columns: int) -> None:
        cache, prompts = self.cache, self.prompts
        tokens = cache.prompt[: self.batch, :columns]
        if prompts is not None and prompts.takes(cache):
            self._choose(prompts.prompt(tokens, cache, last=cache.last))
        else:
            self._choose(prompt_logits(self.model, tokens, cache.last, cache))

    def _count(self, given: Text) -> None:
        self.cache.set_padding(given.mask)
        self.cache.set_positions(given.positions, self.batch)
        self._begin(given.past + given.tokens.shape[1])

    def _begin(self, length: int) -> None:
        self.length = self.past = length
        self.cache.slot.fill_(length)
        self.sampler.start(self.query.sampling, self.query.tokens)

    def _decode(self) -> None:
        cache, step = self.cache, self.way.step
        if self.length >= cache.capacity:
            if self.way.captured:
                cache.set_length(self.length)
            cache.grow(self.length + 1)
        if self.way.captured:
            bucket = min(bucket_of(self.length + 1), cache.capacity)
            with cache.stepping(bucket):
                key = (step, self.batch, bucket, cache.capacity, self.sampler, self.query.sampling.form)
                cache.graphs.run(key, self._advance)
        else:
            self._advance()
        self.length += 1

    def _advance(self) -> None:
        """What is captured: one token of every row through the model, the next one chosen, and the count."""
        cache = self.cache
        logits = self.way.step.decode(cache.tokens[: self.batch], cache.next_positions(), cache)
        self._choose(logits, cache.slot, cache.positions)

    def _choose(self, logits: Tensor, *counts: Tensor) -> None:
        self.sampler.choose(logits, self.cache.tokens[: self.batch], *counts)
