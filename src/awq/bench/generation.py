"""Latency of a model as its user sees it: `generate`, with the time of every token taken, for one query or many."""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from awq.bench.timing import percentile, synchronize

_WARM_UP = 3  # the first run compiles, the second records graphs, the third uses them all
PEAK_OF_GPU, PEAK_OF_PROCESS = "torch on the GPU", "this process so far"


class Streamer(Protocol):
    """What `generate` calls: `put` with the prompt, then with each new token; `end` after the last."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


@dataclass
class Clock:
    """A streamer that notes when each new token arrives, and hands everything on to `inner`."""

    inner: Streamer | None = None
    start: float = field(default_factory=time.perf_counter)
    arrivals: list[float] = field(default_factory=list)
    _prompt_seen: bool = False

    def put(self, value: Tensor) -> None:
        if self._prompt_seen:
            self.arrivals.append(time.perf_counter())
        self._prompt_seen = True
        if self.inner is not None:
            self.inner.put(value)

    def end(self) -> None:
        if self.inner is not None:
            self.inner.end()

    @property
    def first(self) -> float:
        """Seconds from the call to the first new token (TTFT): prefill and one sample."""
        return self.arrivals[0] - self.start

    @property
    def steps(self) -> list[float]:
        """Seconds of each decode step, the tokens after the first."""
        return [later - earlier for earlier, later in pairwise(self.arrivals)]

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed, without the prefill; None where there was no second token."""
        return len(self.steps) / sum(self.steps) if self.steps else None


@dataclass(frozen=True)
class Latency:
    """One model and batch: times in milliseconds a step, tokens a second over the batch, memory in bytes.

    weight_bytes: parameters and buffers
    peak_bytes:   the most memory held, None where the system does not tell; `peak_of` says of what: torch on the GPU
                  during these queries, or, on a CPU, the whole process since its start (resident)
    """

    label: str
    prompt_tokens: int
    new_tokens: int
    repeats: int
    ttft_ms: float
    token_ms_p50: float
    token_ms_p90: float
    token_ms_p99: float
    tokens_per_second: float
    weight_bytes: int
    peak_bytes: int | None
    peak_of: str
    batch: int = 1
    tier: int = 0
    engine: str = "transformers' own loop"
    read_bytes: int = 0
    ceiling_gbs: float | None = None

    @property
    def read_floor_fraction(self) -> float | None:
        """What reading a step's bytes would take at the read ceiling, over what a step takes; None where unmeasured."""
        if not self.ceiling_gbs:
            return None
        return self.read_bytes / self.ceiling_gbs / 1e6 / self.token_ms_p50


def measure_generation(
    model: Any,
    label: str,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    repeats: int = 3,
    seed: int = 0,
    batch: int = 1,
    ceiling_gbs: float | None = None,
) -> Latency:
    """Greedy generation of exactly `new_tokens` (at least 2) after `batch` prompts of random tokens.

    Runs before warm up caches and kernels; on a GPU they are whole, and record every graph. TTFT is the median of the
    repeats; the percentiles are over the decode steps of all of them.
    """
    device = torch.device(model.device)
    prompt = _random_prompt(model, prompt_tokens, seed, batch)
    for _ in range(_WARM_UP if device.type == "cuda" else 1):
        _generate(model, prompt, new_tokens if device.type == "cuda" else 4)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    clocks = [_generate(model, prompt, new_tokens) for _ in range(repeats)]
    steps = [step for clock in clocks for step in clock.steps]
    engine = getattr(model, "engine", None)
    return Latency(
        label=label,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        ttft_ms=1e3 * statistics.median(clock.first for clock in clocks),
        token_ms_p50=1e3 * percentile(steps, 50),
        token_ms_p90=1e3 * percentile(steps, 90),
        token_ms_p99=1e3 * percentile(steps, 99),
        tokens_per_second=batch * len(steps) / sum(steps),
        weight_bytes=weight_bytes(model),
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process_peak(),
        peak_of=PEAK_OF_GPU if device.type == "cuda" else PEAK_OF_PROCESS,
        batch=batch,
        tier=engine.tier_of(batch) if engine else 0,
        engine=str(engine) if engine else Latency.engine,
        read_bytes=step_bytes(model, batch, prompt_tokens + new_tokens // 2),
        ceiling_gbs=ceiling_gbs,
    )


def step_bytes(model: Any, batch: int, context: int) -> int:
    """The least that a decode step reads: all weights but the rows of a separate embedding, all keys and values."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = getattr(head, "weight", None) is getattr(embedding, "weight", None)
    unread = 0 if tied else weight_bytes(embedding)
    engine = getattr(model, "engine", None)
    cached = engine.ways.slot_bytes if engine else 0
    return weight_bytes(model) - unread + batch * context * cached


def process_peak() -> int | None:
    """The most bytes that this process ever had in RAM (resident set size); None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers, tied ones once."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def _random_prompt(model: Any, length: int, seed: int, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, (batch, length), generator=generator).to(model.device)


def _generate(model: Any, prompt: Tensor, new_tokens: int) -> Clock:
    synchronize(prompt.device)
    clock = Clock()
    with torch.inference_mode():
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            eos_token_id=None,  # barring it would cost operations that a user's query has not
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
        )
    return clock
