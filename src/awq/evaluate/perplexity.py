"""Perplexity in non-overlapping windows, and the paired error of a difference.

A window of n tokens has n - 1 targets: its first token is only context. No beginning-of-sequence token is added.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from awq.errors import ConfigError

# Positions whose log-probabilities are computed at a time: bounds the float32 copies beside a window's logits.
_ROWS = 256


@dataclass(frozen=True)
class Perplexity:
    """Negative log-likelihood in nats, summed over the targets of each window, and the number of those targets."""

    nll: tuple[float, ...]
    targets: tuple[int, ...]

    @property
    def value(self) -> float:
        return math.inf if self.log > 700 else math.exp(self.log)

    @property
    def log(self) -> float:
        """The mean negative log-likelihood of a target."""
        return math.fsum(self.nll) / self.tokens

    @property
    def tokens(self) -> int:
        """Targets in all."""
        return sum(self.targets)


class PairedDifference(NamedTuple):
    """A mean over windows weighted by their targets, and its standard error (NaN with one window)."""

    mean: float
    error: float


def perplexity(
    model: nn.Module,
    ids: Tensor,
    window: int = 1024,
    max_windows: int | None = None,
    batch: int = 1,
    fast: bool = False,
) -> Perplexity:
    """Perplexity of a causal language model of `transformers` on tokens int64 [n], on the model's own device.

    window:      tokens a window; less where the model takes fewer positions. A last partial window counts if it
                 holds 2 tokens or more
    max_windows: only the first ones
    batch:       windows in one forward
    fast:        see `inference`
    """
    nll: list[float] = []
    windows = token_windows(ids, window, max_windows, model)
    with inference(model, fast=fast):
        for group in _batches(windows, batch):
            logits = next_token_logits(model, group)
            nll += [_nll(rows, tokens[1:]) for rows, tokens in zip(logits, group, strict=True)]
    return Perplexity(tuple(nll), tuple(len(tokens) - 1 for tokens in windows))


def paired_difference(a: Perplexity, b: Perplexity) -> PairedDifference:
    """ln perplexity of `a` less that of `b`, on the same windows, and the standard error of that difference."""
    if a.targets != b.targets:
        raise ConfigError("the two perplexities were taken on different windows: evaluate both on the same tokens.")
    differences = [(x - y) / n for x, y, n in zip(a.nll, b.nll, a.targets, strict=True)]
    return weighted_mean(differences, a.targets)


def weighted_mean(values: Sequence[float], weights: Sequence[int]) -> PairedDifference:
    """The weighted mean and its standard error, the values taken as independent."""
    total, count = sum(weights), len(values)
    mean = math.fsum(w * v for w, v in zip(weights, values, strict=True)) / total
    if count < 2:
        return PairedDifference(mean, math.nan)
    spread = math.fsum((w / total * (v - mean)) ** 2 for w, v in zip(weights, values, strict=True))
    return PairedDifference(mean, math.sqrt(spread * count / (count - 1)))


def token_windows(ids: Tensor, window: int, max_windows: int | None, *models: nn.Module) -> list[Tensor]:
    """`ids` in windows that fit all models; ConfigError where they hold no target or a token that one does not know."""
    window = min(window, *(_max_positions(model) or window for model in models))
    if window < 2 or ids.ndim != 1 or len(ids) < 2:
        shape = list(ids.shape)
        raise ConfigError(f"perplexity needs at least 2 tokens in one row, not {shape} in windows of {window}.")
    windows = [tokens for tokens in torch.split(ids, window) if len(tokens) > 1][:max_windows]
    known = min(_embedding(model).num_embeddings for model in models)
    if not windows or max(int(tokens.max()) for tokens in windows) >= known:
        raise ConfigError(f"the text holds a token beyond the model's {known}: tokenize it with the model's tokenizer.")
    return windows


def next_token_logits(model: nn.Module, windows: Sequence[Tensor]) -> Tensor:
    """Logits [windows, n - 1, vocabulary] of the targets of windows of n tokens each, in the model's dtype."""
    tokens = torch.stack(list(windows)).to(_embedding(model).weight.device)
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits[:, :-1]


@contextmanager
def inference(*models: nn.Module, fast: bool = False) -> Iterator[None]:
    """Evaluation mode and no gradients for the models, and float32 products as `fast` says; all restored after.

    fast=True lets linears round their inputs to bfloat16 or TF32: on a CPU with bfloat16 units about 1.8 times faster,
    with a change of 1e-4 of the perplexity. It is off by default, so that a figure does not depend on the units of the
    machine at hand.
    """
    modes = [model.training for model in models]
    precision = torch.get_float32_matmul_precision()
    try:
        for model in models:
            model.eval()
        torch.set_float32_matmul_precision("highest")
        with torch.inference_mode(), _rounding_linears(models if fast else ()):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


@contextmanager
def _rounding_linears(models: Sequence[nn.Module]) -> Iterator[None]:
    """In linears alone: RoPE multiplies positions, of which bfloat16 holds 256.

    With those rounded too SmolLM2 had a perplexity of 44 instead of 25, on a CPU with AMX.
    """
    linears = [module for model in models for module in model.modules() if isinstance(module, nn.Linear)]
    before = [one.register_forward_pre_hook(lambda *_: torch.set_float32_matmul_precision("medium")) for one in linears]
    after = [
        one.register_forward_hook(lambda *_: torch.set_float32_matmul_precision("highest"), always_call=True)
        for one in linears
    ]
    try:
        yield
    finally:
        for handle in (*before, *after):
            handle.remove()


def row_chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors with the same first dimension, some positions at a time."""
    return zip(*(torch.split(tensor, _ROWS) for tensor in tensors), strict=True)


def _nll(logits: Tensor, targets: Tensor) -> float:
    """Summed negative log-likelihood of targets [n] under logits [n, vocabulary]."""
    parts = row_chunks(logits, targets.to(logits.device))
    return sum(
        functional.cross_entropy(rows.float(), row_targets, reduction="none").cpu().double().sum().item()
        for rows, row_targets in parts
    )


def _batches(windows: Sequence[Tensor], size: int) -> Iterator[Sequence[Tensor]]:
    """Windows of one length, `size` at a time; a partial window goes alone."""
    full = [tokens for tokens in windows if len(tokens) == len(windows[0])]
    for start in range(0, len(full), size):
        yield full[start : start + size]
    if len(full) < len(windows):
        yield windows[len(full) :]


def _max_positions(model: nn.Module) -> int | None:
    config: Any = model.config
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _embedding(model: nn.Module) -> nn.Embedding:
    embedding: nn.Embedding = model.get_input_embeddings()  # type: ignore[operator]
    return embedding
