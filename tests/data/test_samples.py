from __future__ import annotations

import pytest
import torch

from awq.data.samples import sample_tokens
from awq.errors import CalibrationError
from tests.tiny import VOCABULARY, tiny_llama


def test_shape_range_and_seed() -> None:
    model = tiny_llama()
    rows = sample_tokens(model, 18, 7, seed=3)
    assert [len(row) for row in rows] == [7] * 18
    assert all(0 <= token < VOCABULARY for row in rows for token in row)
    assert rows == sample_tokens(model, 18, 7, seed=3)
    assert rows != sample_tokens(model, 18, 7, seed=4)


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    sample_tokens(tiny_llama(), 1, 3)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sample_tokens_model = tiny_llama()
    torch.set_rng_state(before)
    sample_tokens(sample_tokens_model, 2, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(state)


def test_samples_follow_the_model() -> None:
    """A model that is certain of its next token, whatever came before, writes only that token."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.fill_(1)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight[42] = 10
    assert all(row[1:] == [42] * 5 for row in sample_tokens(model, 4, 6))


def test_cached_sampling_equals_the_distribution_without_a_cache() -> None:
    """Each sampled token has the probability that a full forward gives it: their mean log equals minus the entropy."""
    model = tiny_llama()
    tokens = torch.tensor(sample_tokens(model, 32, 64))
    with torch.inference_mode():
        log = model(input_ids=tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
    got = log.gather(2, tokens[:, 1:, None]).mean()
    entropy = (log.exp() * log).sum(-1)
    error = entropy.numel() ** -0.5 * (log.exp() * log**2).sum(-1).sub(entropy**2).mean().sqrt()
    assert abs(got - entropy.mean()) < 4 * error


def test_nan_is_said() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[0] = torch.nan
    with pytest.raises(CalibrationError, match="computes NaN"):
        sample_tokens(model, 1, 4)
