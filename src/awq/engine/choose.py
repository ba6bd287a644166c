"""Which way a model generates: every step is tried on a few random tokens and compared with the model's own forward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from awq.engine.cache import BUCKET, KVCache, windows_of
from awq.engine.forward import ModelStep, device_of, positions_taken, prompt_logits
from awq.engine.loop import Way
from awq.engine.step import BUILDERS, PLAIN_BUILDERS, Builder, PromptStep, Step

# ||logits - own|| / ||own||: rounding differs with the shape of a product; a wrong step is off by 1.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
_PROMPT, _STEPS = 8, 4
# What a forward raises where it cannot be run so: not interrupts, not the package's own errors of hardware.
_CANNOT = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, NotImplementedError, AssertionError)


@dataclass
class Ways:
    """The ways that hold, the fastest first, and why; none: transformers' own loop.

    windows: per layer, for the cache; slot_bytes: what one token of one row takes in all layers
    padded_prompts: whether padding behind a prompt changes nothing, so that one graph serves many lengths
    prompts: what takes them in place of the model's own forward, if anything does
    """

    ways: list[Way] = field(default_factory=list)
    reason: str = ""
    refused: dict[str, str] = field(default_factory=dict)
    windows: list[int | None] = field(default_factory=list)
    slot_bytes: int = 0
    vocabulary: int = 0
    padded_prompts: bool = False
    prompts: PromptStep | None = None

    def way(self, batch: int, ragged: bool = False) -> Way | None:
        """The first that takes so many rows; `ragged`: with padding between tokens, which only tier 1 does."""
        takes = (way for way in self.ways if batch <= (way.max_batch or batch))
        return next((way for way in takes if way.step.tier == 1 or not ragged), None)

    def try_out(self, way: Way, probe: Probe) -> None:
        """Take `way` if it holds. One row and several may be other kernels: each is tried, and one may hold alone."""
        step = way.step
        alone = step.max_batch == 1 or (way.captured and step.max_batch is not None)
        if reason := probe.difference(way, alone):
            self.refused[step.how] = reason
            return
        if alone and step.max_batch != 1 and (reason := probe.difference(way)):
            self.refused[f"{step.how} of several rows"] = reason
            way.most = 1
        self.ways.append(way)
        if self.prompts is None and isinstance(step, PromptStep):
            if reason := probe.prompt_difference(step):
                self.refused["fused prompts"] = reason
            else:
                self.prompts = step

    @property
    def names(self) -> str:
        """What the first way is, and what takes more rows than it does."""
        first, *others = self.ways
        if first.max_batch is None or not others:
            return first.step.how
        rows = "1 row" if first.max_batch == 1 else f"up to {first.max_batch} rows"
        return f"{first.step.how} ({rows}, more by {others[0].step.how})"


def choose(model: Any) -> Ways:
    """Try what there is for `model`, and compare. A few forwards of 8 tokens; nothing of them stays."""
    windows = windows_of(model.config)
    if isinstance(windows, str):
        return Ways(reason=windows)
    probe = Probe(model, windows)
    found = Ways(windows=windows)
    for own in (ModelStep(model), ModelStep(model, grouped=False)):
        reason = probe.difference(Way(own, captured=False))
        if reason is None:
            break
    else:
        return Ways(reason=f"a static cache: {reason}")
    found.slot_bytes, found.vocabulary = probe.slot_bytes, probe.vocabulary
    plain = probe.cannot_capture()
    builders = BUILDERS if not plain else PLAIN_BUILDERS if probe.whole else []
    for step in _steps(model, builders, found.refused, own):
        found.try_out(Way(step, captured=not plain), probe)
    found.padded_prompts = not plain and bool(found.ways) and probe.padding_is_harmless()
    if not found.ways:
        plain = found.refused[own.how]
        found.ways.append(Way(own, captured=False))
    found.reason = f"{found.names}, static cache, " + (f"no CUDA graph ({plain})" if plain else "CUDA graph")
    return found


def _steps(model: Any, builders: list[Builder], refused: dict[str, str], own: Step) -> Iterator[Step]:
    for builder in builders:
        built = builder(model)
        if isinstance(built, str):
            refused[getattr(builder, "__name__", "step").replace("_", " ")] = built
        else:
            yield built
            if (wider := getattr(built, "wider", None)) is not None:
                yield wider
    yield own


class Probe:
    """Random tokens in two rows, the first with padding before it, through the model with its own cache: the truth."""

    def __init__(self, model: Any, windows: list[int | None]) -> None:
        self.model, self.windows = model, windows
        self.device = device_of(model)
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        tokens = torch.randint(vocabulary, (2, _PROMPT + _STEPS), generator=generator)
        mask = torch.ones_like(tokens)
        mask[0, :3] = 0
        self.tokens, self.mask = tokens.to(self.device), mask.to(self.device)
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.slot_bytes = self.vocabulary = 0
        self.whole = True  # on one device
        self.truth: Tensor | None = None

    def cannot_capture(self) -> str | None:
        """Why no graph holds this model's step, before any is tried."""
        devices = {tensor.device for tensor in (*self.model.parameters(), *self.model.buffers())}
        hooked = any(hasattr(module, "_hf_hook") for module in self.model.modules())
        self.whole = len(devices) == 1 and not hooked
        if not self.whole:
            places = ", ".join(sorted({"offloaded" if d.type == "meta" else str(d) for d in devices}))
            return f"the model is spread over {places}"
        return None if self.device.type == "cuda" else f"{self.device.type} has none"

    def difference(self, way: Way, alone: bool = False) -> str | None:
        """What is wrong with `way`, None where its logits are the model's own; `alone`: of the first row by itself."""
        rows = slice(0, 1 if alone else 2)
        try:
            with torch.inference_mode():
                if self.truth is None:
                    self.truth = self._plain(DynamicCache(config=self.model.config.get_text_config(decoder=True)))
                logits = self._logits(way, rows)
        except _CANNOT as error:
            return _told(error)
        return self._compare(logits, self.truth[:, rows])

    def prompt_difference(self, step: PromptStep) -> str | None:
        """What is wrong with its prompts: one with other tokens behind it, and a conversation of padded rows."""
        assert self.truth is not None
        behind = torch.cat([self.tokens[1:, :_PROMPT], self.tokens[:1, :_PROMPT]], dim=1)
        alone, both = (KVCache(self.windows, batch, BUCKET, self.device) for batch in (1, 2))
        alone.last.fill_(_PROMPT - 1)
        both.set_padding(self.mask)
        padding = both.first.tolist()
        try:
            with torch.inference_mode():
                if not step.takes(alone):
                    return "its RoPE depends on the length of the text"
                logits = [step.prompt(behind, alone, last=alone.last).expand(2, -1)]
                logits.append(step.prompt(self.tokens[:, :_PROMPT], both, padding=padding))
                logits.append(step.prompt(self.tokens[:, _PROMPT:], both, _PROMPT, padding))
        except _CANNOT as error:
            return _told(error)
        truth = torch.stack([self.truth[0, 1:].expand(2, -1), self.truth[0], self.truth[-1]])
        return self._compare(torch.stack(logits).float(), truth)

    def padding_is_harmless(self) -> bool:
        """Whether the second row's prompt, with as many tokens behind it, has the logits that it has alone."""
        tokens = torch.cat([self.tokens[1:, :_PROMPT], self.tokens[:1, :_PROMPT]], dim=1)
        cache = KVCache(self.windows, 1, BUCKET, self.device)
        cache.last.fill_(_PROMPT - 1)
        try:
            with torch.inference_mode():
                logits = prompt_logits(self.model, tokens, cache.last, cache)
        except _CANNOT:
            return False
        assert self.truth is not None
        return self._compare(logits.float(), self.truth[0, 1:]) is None

    def _compare(self, logits: Tensor, truth: Tensor) -> str | None:
        self.vocabulary = truth.shape[-1]
        off = ((logits - truth).norm() / truth.norm()).item()
        tolerance = _TOLERANCE.get(self.model.dtype, 1e-3)
        return None if off <= tolerance else f"its logits differ by {off:.2g} from the model's own"

    def _plain(self, cache: Any) -> Tensor:
        """float32 logits [steps + 1, 2, vocabulary] of the prompt's last token and of every one after it."""
        logits, past = [], 0
        for end in range(_PROMPT, _PROMPT + _STEPS + 1):
            logits.append(self._forward(past, end, cache))
            past = end
        return torch.stack(logits).float()

    def _forward(self, past: int, end: int, cache: Any, rows: slice = slice(None)) -> Tensor:
        more = {"position_ids": self.positions[rows, past:end]} if positions_taken(self.model) else {}
        output = self.model(
            input_ids=self.tokens[rows, past:end],
            attention_mask=self.mask[rows, :end],
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **more,
        )
        logits: Tensor = output.logits[:, -1].clone()
        return logits

    def _logits(self, way: Way, rows: slice) -> Tensor:
        """The same of `rows` by `way`: the prompts by a forward, then a step a token."""
        batch = rows.stop - rows.start
        cache = KVCache(self.windows, batch, BUCKET, self.device)
        logits = [self._forward(0, _PROMPT, cache, rows)]
        self.slot_bytes = cache.slot_bytes
        cache.set_padding(self.mask[rows])
        cache.set_positions(self.positions[rows, : _PROMPT + 1], batch)

        def advance() -> Tensor:
            found = way.step.decode(cache.tokens, cache.next_positions(), cache)
            cache.slot.add_(1)
            cache.positions.add_(1)
            return found

        cache.slot.fill_(_PROMPT)
        for place in range(_PROMPT, _PROMPT + _STEPS):
            cache.tokens.copy_(self.tokens[rows, place : place + 1])
            if way.captured:
                with cache.stepping(BUCKET):
                    logits.append(cache.graphs.run("probe", advance).clone())
            else:
                logits.append(advance().clone())
        return torch.stack(logits).float()


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
