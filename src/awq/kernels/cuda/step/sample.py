"""The next token of every row, chosen by one kernel that also makes all ready for the next step: src/step_sample.cu."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from struct import Struct

import torch
from torch import Tensor

from awq import jit
from awq.kernels.cuda.layout import SOURCES
from awq.kernels.cuda.step.launch import OLDEST, Launch

SOURCE = SOURCES / "step_sample.cu"
_BLOCKS, _THREADS = 8, 1024  # a row's
_WORDS = _BLOCKS * _THREADS  # of a set of tokens
_HELD = (4, 8, 16, 19)  # scores of a thread; more than 19 have no room in its registers
MOST_TOKENS = _WORDS * _HELD[-1]  # of a vocabulary; sums of masses stay in 32 bits
# scores, chances, numbers, barred, seen, tokens, arrivals, made, slot, positions; vocabulary, rows, draws, places,
# arrival_rows, planes, position_rows, top_k, top_p, min_p
_PARAMS = Struct("<10Q10i")


def draws(device: torch.device, vocabulary: int) -> bool:
    """Whether `choose` works there."""
    if device.type != "cuda" or vocabulary > MOST_TOKENS or jit.missing():
        return False
    return torch.cuda.get_device_capability(device) >= OLDEST


@dataclass(frozen=True)
class Rule:
    """What tokens are chosen by, and what is told of them.

    numbers:  float32 [5], the repetition penalty, how many tokens come before an end may, the temperature, and what
              top-p and min-p take
    made:     int64 [rows, 1], how many tokens came before; `choose` counts
    arrivals: int64 [places, rows], pinned memory of the host: where token n of a row goes, at place n modulo places
    chances:  float64 [draws, rows], from 0 to below 1, token n's at n modulo draws; None for the largest scores
    barred:   `sets` [2, ...] of the tokens that may not come, and of those that may not before an end may
    seen:     `sets` [rows, ...] of the tokens in the text, which the penalty is for; `choose` adds to them
    top_k:    0 for all; top_p, min_p: whether there is one
    """

    numbers: Tensor
    made: Tensor
    arrivals: Tensor
    chances: Tensor | None = None
    barred: Tensor | None = None
    seen: Tensor | None = None
    top_k: int = 0
    top_p: bool = False
    min_p: bool = False


def choose(
    scores: Tensor, rule: Rule, tokens: Tensor, slot: Tensor | None = None, positions: Tensor | None = None
) -> None:
    """The next token of every row into `tokens`, int64 [rows, 1], and into the rule's `arrivals`.

    It is the first token at which the sum of probabilities, in a fixed order, exceeds the row's chance: those of
    softmax(scores / temperature), of the tokens that top-k, top-p and min-p leave. Without chances that of the largest
    score, the first of equals; NaN is none. Of 128256 tokens `argmax` takes longer than a gate projection of
    Llama-3-8B: 27 us.

    scores: float32 [rows, vocabulary], contiguous
    slot, positions: int64 [1] and [..., rows or more, 1], contiguous, to be counted up by one; None: they stay
    """
    rows, vocabulary = scores.shape
    held = next(count for count in _HELD if count * _WORDS >= vocabulary)
    places, arrival_rows = rule.arrivals.shape
    drawn = 0 if rule.chances is None else len(rule.chances)
    planes, position_rows = (0, 0) if positions is None else (positions[..., 0, 0].numel(), positions.shape[-2])
    state = (rule.chances, rule.numbers, rule.barred, rule.seen, tokens, rule.arrivals, rule.made, slot, positions)
    sizes = (vocabulary, rows, drawn, places, arrival_rows, planes, position_rows)
    with torch.cuda.device(scores.device):
        launch = Launch(SOURCE, "sample", {"HELD": held}, rows * _BLOCKS, _THREADS, 0, _PARAMS, scores.get_device())
        launch.bind(scores, *state, *sizes, rule.top_k, int(rule.top_p), int(rule.min_p))
        launch(torch.cuda.current_stream().cuda_stream)


def sets(tokens: Tensor) -> Tensor:
    """bool [..., vocabulary], True for the tokens of a set, as `choose` reads it: int32 [..., a word for each thread].

    Token t is bit t // 8192 of word t % 8192: a thread has all of its own in one word.
    """
    padded = torch.nn.functional.pad(tokens, (0, -tokens.shape[-1] % _WORDS)).unflatten(-1, (-1, _WORDS))
    bits = 1 << torch.arange(padded.shape[-2], dtype=torch.int32, device=tokens.device)
    words: Tensor = (padded * bits.unsqueeze(1)).sum(-2, dtype=torch.int32)
    return words


def variants(arch: str) -> Iterator[tuple[Path, str, str, dict[str, int]]]:
    """Every (source, kernel, arch, defines) that can be asked for on `arch`."""
    for held in _HELD:
        yield SOURCE, "sample", arch, {"HELD": held}
