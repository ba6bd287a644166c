"""The model's own samples: calibration text of the model's own distribution, with no download."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from awq.errors import CalibrationError

# Sequences written at a time; a constant, so that the same seed writes the same text on any machine of a kind.
_BATCH = 16


@torch.inference_mode()
def sample_tokens(model: nn.Module, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """`count` token lists of `length` tokens that a causal language model of `transformers` samples by itself.

    One uniformly random first token, then temperature 1 over the whole vocabulary; the end-of-sequence token does not
    stop it. Runs on the model's device with its key-value cache. CalibrationError where the model computes NaN.
    """
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(embedding.num_embeddings, (count, 1), generator=generator)
    sampler = torch.Generator(embedding.weight.device).manual_seed(seed)
    batches = torch.split(first.to(embedding.weight.device), _BATCH)
    return [row for batch in batches for row in _continue(model, batch, length, sampler).tolist()]


def _continue(model: nn.Module, tokens: Tensor, length: int, sampler: torch.Generator) -> Tensor:
    """`tokens` [batch, 1] continued to [batch, length]."""
    cache = None
    columns = [tokens]
    while len(columns) < length:
        output = model(input_ids=columns[-1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[:, -1].float()
        if logits.isnan().any():
            raise CalibrationError("the model computes NaN, so it cannot write its own calibration text: give another.")
        columns.append(torch.multinomial(logits.softmax(-1), 1, generator=sampler).to(tokens.device))
    return torch.cat(columns, dim=1)
