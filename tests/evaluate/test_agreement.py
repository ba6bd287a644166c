from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from awq.errors import ConfigError
from awq.evaluate import compare, paired_difference, perplexity
from tests.tiny import random_tokens, tiny_llama


def plain_kl(model: nn.Module, reference: nn.Module, tokens: Tensor) -> tuple[list[float], list[bool]]:
    """KL(reference || model) and the same first choice, at each target of one window, by the definition."""
    with torch.no_grad():
        q = model(input_ids=tokens[None]).logits[0, :-1].double().softmax(-1)
        p = reference(input_ids=tokens[None]).logits[0, :-1].double().softmax(-1)
    divergences = [float((row * (row.log() - other.log())).sum()) for row, other in zip(p, q, strict=True)]
    return divergences, [bool(row.argmax() == other.argmax()) for row, other in zip(p, q, strict=True)]


def nearby(reference: nn.Module) -> nn.Module:
    model = tiny_llama()
    model.load_state_dict(reference.state_dict())
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * parameter.std() * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("length", [96, 107])
def test_equals_the_definition(length: int) -> None:
    reference, ids = tiny_llama(), random_tokens(1, length)[0]
    model = nearby(reference)
    parts = [plain_kl(model, reference, tokens) for tokens in ids.split(32)]
    kl = [value for values, _ in parts for value in values]
    same = [value for _, values in parts for value in values]
    found = compare(model, reference, ids, window=32)
    assert found.kl == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert found.top1 == pytest.approx(sum(same) / len(same))
    assert 0 < found.top1 < 1
    assert found.perplexity.nll == pytest.approx(perplexity(model, ids, window=32).nll)
    assert found.reference_perplexity.nll == pytest.approx(perplexity(reference, ids, window=32).nll)
    assert found.difference == paired_difference(found.perplexity, found.reference_perplexity)


def test_the_error_of_the_divergence() -> None:
    reference, ids = tiny_llama(), random_tokens(1, 128)[0]
    model = nearby(reference)
    means = torch.tensor([sum(plain_kl(model, reference, part)[0]) / 31 for part in ids.split(32)])
    found = compare(model, reference, ids, window=32)
    assert found.kl_error == pytest.approx((means.std() / 2).item(), rel=1e-3)
    assert math.isnan(compare(model, reference, ids, window=32, max_windows=1).kl_error)


def test_a_model_agrees_with_itself() -> None:
    model = tiny_llama()
    found = compare(model, model, random_tokens(1, 64)[0], window=32)
    assert (found.kl, found.kl_error, found.top1) == (0.0, 0.0, 1.0)
    assert found.difference == (0.0, 0.0)


def test_divergence_is_from_the_float_model() -> None:
    """KL is not symmetric: the first argument is the approximation."""
    reference, ids = tiny_llama(), random_tokens(1, 32)[0]
    model = nearby(reference)
    assert compare(model, reference, ids).kl != pytest.approx(compare(reference, model, ids).kl, rel=1e-3)


def test_windows_fit_both_models() -> None:
    small, large = tiny_llama(max_position_embeddings=20), tiny_llama()
    for pair in [(small, large), (large, small)]:
        assert compare(*pair, random_tokens(1, 50)[0]).perplexity.targets == (19, 19, 9)


def test_models_of_different_dtypes() -> None:
    reference, ids = tiny_llama(), random_tokens(1, 64)[0]
    assert 0 < compare(tiny_llama().to(torch.bfloat16), reference, ids).kl < 0.1


def test_vocabularies_that_differ() -> None:
    with pytest.raises(ConfigError, match=r"differ \(310 and 300 tokens\)"):
        compare(tiny_llama(vocab_size=310), tiny_llama(), random_tokens(1, 32)[0])


def test_one_windows_logits_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every forward sees one window, and asks for no key-value cache."""
    model, calls = tiny_llama(), []
    forward = model.forward

    def watched(input_ids: Tensor, use_cache: bool) -> object:
        calls.append((tuple(input_ids.shape), use_cache))
        return forward(input_ids=input_ids, use_cache=use_cache)

    monkeypatch.setattr(model, "forward", watched)
    compare(model, model, random_tokens(1, 96)[0], window=32)
    assert calls == [((1, 32), False)] * 6
