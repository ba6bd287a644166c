"""How far the tokens that were chosen are from what the model's own forward says is the likeliest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


@torch.inference_mode()
def largest_gap(model: Any, tokens: Tensor, prompt: int) -> tuple[float, int, float]:
    """tokens [1, length], the first `prompt` given -> how far below the largest logit, which token, the largest logit.

    The model's own forward, with transformers' own cache: the prompt, then a token at a time, so that products have the
    shapes that they have for transformers' users. Of all tokens the one furthest below; 0 where all are the likeliest.
    """
    cache, past, worst = DynamicCache(config=model.config.get_text_config(decoder=True)), 0, (0.0, 0, 1.0)
    for end in range(prompt, tokens.shape[1]):
        output = model(input_ids=tokens[:, past:end], past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits, past = output.logits[0, -1].float(), end
        largest = logits.max().item()
        worst = max(worst, (largest - logits[tokens[0, end]].item(), end - prompt, largest))
    return worst
