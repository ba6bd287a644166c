"""Which tokens are sampled, and how often: against the probabilities that transformers' own processors leave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from awq.engine.sample import Sampler, Sampling
from awq.kernels.cuda.step.sample import sets
from tests.engine.both import WAYS, engined
from tests.tiny import random_tokens, tiny_llama

VOCABULARY = 40
ROWS = 20_000
FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 3.0},
    {"top_k": 5},
    {"top_k": 1},
    {"top_k": 100},
    {"top_p": 0.8},
    {"top_p": 0.01},
    {"top_p": 0.0},
    {"min_p": 0.1},
    {"penalty": 1.8, "temperature": 1.5, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.5, "top_p": 0.9, "min_p": 0.2},
]


def logits(seed: int = 0) -> Tensor:
    return torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


def chi_square_fits(counts: Tensor, probabilities: Tensor) -> bool:
    """Pearson's test at about one in 10^5 (5 deviations of its normal approximation), rare tokens put together."""
    expected = probabilities.double() * counts.sum()
    assert counts[probabilities == 0].sum() == 0
    common = expected >= 5
    seen = torch.cat([counts[common].double(), counts[~common].sum()[None].double()])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    statistic, freedom = ((seen - wanted) ** 2 / wanted).sum().item(), max(1, len(seen) - 1)
    return statistic < freedom + 5 * (2 * freedom) ** 0.5 + 10


def processors(settings: dict[str, Any]) -> LogitsProcessorList:
    kinds = {
        "penalty": hf.RepetitionPenaltyLogitsProcessor,
        "temperature": hf.TemperatureLogitsWarper,
        "top_k": hf.TopKLogitsWarper,
        "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
    }
    return LogitsProcessorList([kinds[name](value) for name, value in settings.items()])


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_the_distribution_is_the_one_of_transformers(settings: dict[str, Any]) -> None:
    text, chain = torch.tensor([[3, 17, 17, 5]]), processors(settings)
    scores = chain(text, logits().clone())
    sampling = Sampling.read(chain, True, 4)
    assert isinstance(sampling, Sampling)
    sampler = Sampler(ROWS, VOCABULARY, torch.device("cpu"))
    sampler.start(sampling, text.expand(ROWS, -1))
    torch.manual_seed(1)
    tokens = torch.zeros(ROWS, 1, dtype=torch.int64)
    sampler.choose(logits().expand(ROWS, -1), tokens)
    assert chi_square_fits(tokens.flatten().bincount(minlength=VOCABULARY), scores.softmax(-1)[0])


def test_the_chi_square_test_can_fail() -> None:
    probabilities = logits().softmax(-1)[0]
    torch.manual_seed(0)
    drawn = probabilities.multinomial(ROWS, replacement=True).bincount(minlength=VOCABULARY)
    assert chi_square_fits(drawn, probabilities)
    assert not chi_square_fits(drawn, (logits() / 1.1).softmax(-1)[0])


@pytest.mark.parametrize("way", WAYS)
def test_a_whole_model_samples_its_own_probabilities(way: str) -> None:
    """The second token, so that a decode step is in it: over many rows of one prompt, given the most frequent first."""
    model, rows = engined(tiny_llama(), way), 1500
    prompt = random_tokens(1, 6).expand(rows, -1)
    torch.manual_seed(3)
    settings = {"do_sample": True, "temperature": 4.0, "top_k": 20, "pad_token_id": 0, "eos_token_id": None}
    tokens = model.generate(prompt, max_new_tokens=2, **settings)
    first, count = tokens[:, 6].bincount(minlength=300).max(0)[::-1]
    with torch.no_grad():
        for text, chosen in ((tokens[:1, :6], tokens[:, 6]), (None, tokens[tokens[:, 6] == first, 7])):
            text = torch.cat([tokens[:1, :6], first[None, None]], dim=1) if text is None else text
            scores = processors({"temperature": 4.0, "top_k": 20})(text, model(text).logits[:, -1].float())
            assert chi_square_fits(chosen.bincount(minlength=300), scores.softmax(-1)[0])
    assert count > 50


@pytest.mark.parametrize("way", WAYS)
def test_a_seed_repeats_and_another_does_not(way: str) -> None:
    model = engined(tiny_llama(), way)

    def sample(seed: int, **settings: Any) -> Tensor:
        torch.manual_seed(seed)
        return model.generate(random_tokens(2, 5), do_sample=True, max_new_tokens=20, pad_token_id=0, **settings)

    for settings in ({}, {"top_p": 0.9, "top_k": 0}, {"min_p": 0.1, "repetition_penalty": 1.1}):
        first = sample(1, temperature=2.0, **settings)
        sample(2, temperature=0.5)
        assert torch.equal(first, sample(1, temperature=2.0, **settings))
        assert not torch.equal(first, sample(2, temperature=2.0, **settings))


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        ([hf.TopPLogitsWarper(0.9), hf.TopKLogitsWarper(5)], "TopKLogitsWarper"),
        ([hf.TopKLogitsWarper(5), hf.TopKLogitsWarper(6)], "TopKLogitsWarper"),
        ([hf.TopKLogitsWarper(5, filter_value=-1.0)], "TopKLogitsWarper"),
        ([hf.MinPLogitsWarper(0.5, min_tokens_to_keep=2)], "MinPLogitsWarper"),
        ([hf.RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=2)], "RepetitionPenaltyLogitsProcessor"),
        ([hf.TypicalLogitsWarper(0.5)], "TypicalLogitsWarper"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_processors_in_another_order_or_form_are_not_placed(chain: list[Any], reason: str) -> None:
    assert Sampling.read(chain, True, 3) == f"the logits processor {reason}"


def test_warpers_of_the_caller_are_not_placed_in_greedy_search() -> None:
    assert isinstance(Sampling.read([hf.TopKLogitsWarper(5)], False, 3), str)


def test_numbers_change_without_another_form() -> None:
    first, second = Sampling(True, temperature=0.5, top_p=0.9), Sampling(True, temperature=2.0, top_p=0.8)
    assert first.form == second.form
    assert first.form != Sampling(True, temperature=0.5, top_k=3, top_p=0.9).form


@pytest.mark.parametrize("vocabulary", [1, 8192, 20000, 155648])
def test_a_set_of_tokens_is_a_bit_of_each(vocabulary: int) -> None:
    tokens = torch.rand(2, vocabulary, generator=torch.Generator().manual_seed(0)) < 0.5
    words, place = sets(tokens), torch.arange(vocabulary)
    assert words.shape == (2, 8192)
    assert torch.equal(words[:, place % 8192] >> (place // 8192) & 1, tokens.int())
