"""How far a quantized model's predictions are from its float model's: sharper than perplexity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from awq.errors import ConfigError
from awq.evaluate.perplexity import (
    PairedDifference,
    Perplexity,
    inference,
    next_token_logits,
    paired_difference,
    row_chunks,
    token_windows,
    weighted_mean,
)


@dataclass(frozen=True)
class Agreement:
    """What `compare` measures.

    kl, kl_error: KL(float || quantized) in nats, averaged over the targets, and its standard error over windows
    top1:         share of the targets where both models rank the same token first
    """

    kl: float
    kl_error: float
    top1: float
    perplexity: Perplexity
    reference_perplexity: Perplexity

    @property
    def difference(self) -> PairedDifference:
        """ln perplexity of the model less that of the reference."""
        return paired_difference(self.perplexity, self.reference_perplexity)


def compare(
    model: nn.Module,
    reference: nn.Module,
    ids: Tensor,
    window: int = 1024,
    max_windows: int | None = None,
    fast: bool = False,
) -> Agreement:
    """Compare a quantized model with its float model on tokens int64 [n], each on its own device, in one pass.

    Only one window's logits of each model are held at a time. Windows and `fast` are as in `perplexity`.
    ConfigError where the two vocabularies differ.
    """
    windows = token_windows(ids, window, max_windows, model, reference)
    with inference(model, reference, fast=fast):
        sums = torch.tensor([_compare_window(model, reference, tokens) for tokens in windows], dtype=torch.float64)
    kl, same, nll, reference_nll = sums.t().tolist()
    targets = tuple(len(tokens) - 1 for tokens in windows)
    mean = weighted_mean([total / n for total, n in zip(kl, targets, strict=True)], targets)
    return Agreement(
        kl=mean.mean,
        kl_error=mean.error,
        top1=sum(same) / sum(targets),
        perplexity=Perplexity(tuple(nll), targets),
        reference_perplexity=Perplexity(tuple(reference_nll), targets),
    )


def _compare_window(model: nn.Module, reference: nn.Module, tokens: Tensor) -> list[float]:
    """Sums over a window's targets: KL divergence, equal first choices, both negative log-likelihoods."""
    logits, expected = (next_token_logits(one, [tokens])[0] for one in (model, reference))
    if logits.shape != expected.shape:
        raise ConfigError(
            f"the models' vocabularies differ ({logits.shape[-1]} and {expected.shape[-1]} tokens): "
            "compare a quantized model with the float model it was made from."
        )
    total = torch.zeros(4, dtype=torch.float64)
    for q, p, targets in row_chunks(logits, expected, tokens[1:].to(logits.device)):
        total += _compare_rows(q, p.to(q.device), targets)
    return total.tolist()


def _compare_rows(logits: Tensor, expected: Tensor, targets: Tensor) -> Tensor:
    """The four sums, float64 [4] on the CPU (not every GPU has float64), for logits [n, vocabulary]."""
    q, p = logits.float().log_softmax(-1), expected.float().log_softmax(-1)
    kl = functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    same = logits.argmax(-1) == expected.argmax(-1)
    nll = [-log.gather(1, targets[:, None]).squeeze(1) for log in (q, p)]
    return torch.stack([part.cpu().double().sum() for part in (kl, same, *nll)])
