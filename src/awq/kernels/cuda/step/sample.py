"""The next token of every row, chosen by one kernel: src/step_sample.cu."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from struct import Struct

import torch
from torch import Tensor

from awq import jit
from awq.kernels.cuda.layout import SOURCES
from awq.kernels.cuda.step.launch import OLDEST, Launch

SOURCE = SOURCES / "step_sample.cu"
_BLOCKS, _THREADS = 8, 1024  # a row's
_HELD = (4, 8, 16, 19)  # scores of a thread; more than 19 have no room in its registers
MOST_TOKENS = _BLOCKS * _THREADS * _HELD[-1]  # of a vocabulary; sums of masses stay in 32 bits
_PARAMS = Struct("<4Q4i")  # scores, chance, numbers, tokens; vocabulary, top_k, top_p, min_p


def draws(device: torch.device, vocabulary: int) -> bool:
    """Whether `draw` and `largest` work there."""
    if device.type != "cuda" or vocabulary > MOST_TOKENS or jit.missing():
        return False
    return torch.cuda.get_device_capability(device) >= OLDEST


def draw(scores: Tensor, chance: Tensor, numbers: Tensor, top_k: int, top_p: bool, min_p: bool) -> Tensor:
    """int64 [rows, 1]: tokens by the softmax of scores / temperature over those that top-k, top-p and min-p leave.

    Each is the first token at which the sum of probabilities, in a fixed order, exceeds the row's chance.

    scores: float32 [rows, vocabulary], contiguous; chance: float64 [rows], from 0 to below 1
    numbers: float32 [5], the last three the temperature and what top-p and min-p take; top_k: 0 for all
    """
    return _choose(scores, chance, numbers, top_k, int(top_p), int(min_p))


def largest(scores: Tensor) -> Tensor:
    """int64 [rows, 1]: the token of the largest score, the first of equals; NaN is none. scores: as of `draw`

    Of 128256 tokens `argmax` takes longer than a gate projection of Llama-3-8B: 27 us.
    """
    return _choose(scores, None, None, 0, 0, 0)


def _choose(scores: Tensor, chance: Tensor | None, numbers: Tensor | None, *filters: int) -> Tensor:
    rows, vocabulary = scores.shape
    tokens = torch.empty(rows, 1, dtype=torch.int64, device=scores.device)
    held = next(count for count in _HELD if count * _BLOCKS * _THREADS >= vocabulary)
    with torch.cuda.device(scores.device):
        grid, device = rows * _BLOCKS, scores.get_device()
        launch = Launch(SOURCE, "sample", {"HELD": held}, grid, _THREADS, 0, _PARAMS, device)
        launch.bind(scores, chance, numbers, tokens, vocabulary, *filters)
        launch(torch.cuda.current_stream().cuda_stream)
    return tokens


def variants(arch: str) -> Iterator[tuple[Path, str, str, dict[str, int]]]:
    """Every (source, kernel, arch, defines) that can be asked for on `arch`."""
    for held in _HELD:
        yield SOURCE, "sample", arch, {"HELD": held}
