"""The kernel that ends a decode step: which tokens it chooses, how often, what it counts, and where else it writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from awq.engine import attach, engine, sample
from awq.engine.arrivals import PLACES
from awq.engine.loop import AHEAD
from awq.engine.sample import Sampler, Sampling
from awq.kernels.cuda.step.launch import OLDEST
from tests.engine.test_sample import FILTERS, ROWS, VOCABULARY, chi_square_fits, logits, processors
from tests.gpu.on_gpu import GPU
from tests.tiny import random_tokens, tiny_llama

NEW = torch.cuda.is_available() and torch.cuda.get_device_capability() >= OLDEST
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not NEW, reason="needs compute capability 9.0"),
    pytest.mark.filterwarnings("ignore:.*generation flags are not valid.*"),
]
DEVICE = torch.device("cuda", 0)
SETTINGS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 40, "pad_token_id": 0, "eos_token_id": None}


def started(rows: int, vocabulary: int, sampling: Sampling, text: Tensor | None = None) -> Sampler:
    sampler = Sampler(rows, vocabulary, DEVICE)
    assert sampler.by_kernel
    sampler.start(sampling, torch.zeros(rows, 1, dtype=torch.int64) if text is None else text.to(GPU))
    return sampler


def chosen(sampler: Sampler, scores: Tensor, number: int = 0) -> Tensor:
    """int64 [rows] of the CPU, the same in the device's memory and in the host's"""
    tokens = torch.full((len(scores) + 1, 1), -1, device=GPU)
    sampler.prepare(number)
    sampler.choose(scores.to(GPU), tokens[:-1])
    arrived = sampler.expect(number, tokens[:-1])()
    assert tokens.flatten().tolist() == [*arrived, -1]
    assert sampler.made.flatten().tolist() == [number + 1] * sampler.rows
    return torch.tensor(arrived)


def read(settings: dict[str, Any]) -> Sampling:
    sampling = Sampling.read(processors(settings), True, 4)
    assert isinstance(sampling, Sampling)
    return sampling


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_the_distribution_is_the_one_of_transformers(settings: dict[str, Any]) -> None:
    text = torch.tensor([[3, 17, 17, 5]])
    scores = processors(settings)(text, logits().clone())
    torch.manual_seed(1)
    sampler = started(ROWS, VOCABULARY, read(settings), text.expand(ROWS, -1))
    tokens = chosen(sampler, logits().expand(ROWS, -1))
    assert chi_square_fits(tokens.bincount(minlength=VOCABULARY), scores.softmax(-1)[0])


@pytest.mark.parametrize("settings", FILTERS, ids=str)
@pytest.mark.parametrize("vocabulary", [40, 5000, 32001, 128256])
def test_chances_in_even_steps_give_every_token_its_probability(settings: dict[str, Any], vocabulary: int) -> None:
    rows, text = 2000, torch.tensor([[1, 4]])
    scores = 2 * torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(0))
    scores[:, 1::7] = -torch.inf
    sampler = started(rows, vocabulary, read(settings), text.expand(rows, -1))
    chances = sampler._chances()
    assert chances is not None
    chances[1] = (torch.arange(rows, dtype=torch.float64) + 0.5).to(GPU) / rows
    sampler.made.fill_(1)
    tokens = chosen(sampler, scores.expand(rows, -1), number=1)
    wanted = processors(settings)(text, scores.clone()).double().softmax(-1)[0]
    counts = tokens.bincount(minlength=vocabulary)
    assert counts[wanted == 0].sum() == 0
    assert (counts - rows * wanted).abs().max() <= 1.1


def exact(scores: Tensor, sampling: Sampling) -> Tensor:
    """float64 [vocabulary], what is left of the softmax of scores [vocabulary]."""
    weights = (scores.double() / sampling.temperature).softmax(-1)
    if sampling.top_k:
        weights[weights < weights.topk(sampling.top_k).values[-1]] = 0
    weights /= weights.sum()
    if sampling.top_p < 1:
        ordered, places = weights.sort(descending=True)
        weights[places[ordered.cumsum(0) - ordered >= sampling.top_p]] = 0
    weights[weights < sampling.min_p * weights.max()] = 0
    return weights / weights.sum()


LARGE = [{}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.01}, {"temperature": 0.8, "top_k": 200, "top_p": 0.9}]


@pytest.mark.parametrize("settings", LARGE, ids=str)
def test_draws_from_a_large_vocabulary(settings: dict[str, Any]) -> None:
    rows, vocabulary, sampling = 4096, 128256, read(settings)
    scores = 3 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(2)
    sampler, every = started(rows, vocabulary, sampling), scores.to(GPU).expand(rows, -1).contiguous()
    counts = sum(chosen(sampler, every, number).bincount(minlength=vocabulary) for number in range(16))
    assert isinstance(counts, Tensor)
    assert chi_square_fits(counts, exact(scores, sampling))
    warmer = Sampling(**vars(sampling) | {"temperature": 1.1 * sampling.temperature})
    assert not chi_square_fits(counts * (exact(scores, warmer) > 0), exact(scores, warmer))


@pytest.mark.parametrize("vocabulary", [1, 40, 32001, 128256, 151936])
def test_the_largest_score_is_the_first_of_equals(vocabulary: int) -> None:
    scores = torch.randn(6, vocabulary, generator=torch.Generator().manual_seed(0)) - 9
    scores[1] = scores[1].round()
    scores[2], scores[3] = -torch.inf, -0.0
    scores[3, vocabulary // 2 :] = 0.0
    scores[4, -1] = torch.inf
    wanted = scores.argmax(-1)
    scores[5] = torch.nan  # none is chosen, not even where there is nothing else
    scores[5, vocabulary // 2], wanted[5] = -torch.inf if vocabulary == 1 else -3.0, vocabulary // 2
    assert torch.equal(chosen(started(6, vocabulary, Sampling()), scores), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocabulary", [300, 32000, 128256])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(penalty=1.7),
        Sampling(penalty=0.4),
        Sampling(min_new=2, ends=(5, 299)),
        Sampling(suppressed=tuple(range(150))),
        Sampling(penalty=1.3, min_new=3, ends=(2,), suppressed=(0, 7, 10**9)),
        Sampling(True, penalty=1.3, min_new=3, ends=(2,), suppressed=(0, 7), top_k=1),
    ],
    ids=str,
)
def test_penalty_and_barred_tokens(sampling: Sampling, vocabulary: int, dtype: torch.dtype) -> None:
    """Against the operations of torch that do it elsewhere, step by step: the chosen join the text."""
    rows, text = 5, random_tokens(5, 4)
    ours, plain = started(rows, vocabulary, sampling, text), Sampler(rows, vocabulary, DEVICE)
    plain.by_kernel = False
    plain.start(sampling, text.to(GPU))
    tokens = torch.zeros(rows, 1, dtype=torch.int64, device=GPU)
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        scores = torch.randn(rows, vocabulary, generator=generator)
        scores[:, :300] += 4  # in the text, ends and suppressed tokens are ahead
        scores = scores.to(GPU, torch.float32 if sampling.sampled else dtype)  # without equals, of which one is drawn
        plain.choose(scores, tokens)
        assert chosen(ours, scores, number).tolist() == tokens.flatten().tolist()


@pytest.mark.parametrize("planes", [0, 1, 3])
def test_what_is_counted(planes: int) -> None:
    rows, room = 9, 12
    slot = torch.tensor([40], device=GPU)
    shape = (planes, room, 1) if planes > 1 else (room, 1)
    positions = torch.arange(torch.Size(shape).numel(), device=GPU).view(shape)
    before, counts = positions.clone(), (slot, positions) if planes else ()
    sampler, tokens = started(rows, 1000, Sampling()), torch.zeros(rows, 1, dtype=torch.int64, device=GPU)
    for _ in range(5):
        sampler.choose(torch.randn(rows, 1000, device=GPU), tokens, *counts)
    counted = 5 if planes else 0
    assert slot.item() == 40 + counted
    assert (positions - before)[..., :rows, :].unique().tolist() == [counted]
    assert (positions - before)[..., rows:, :].unique().tolist() == [0]
    assert sampler.made.unique().tolist() == [5]


def test_random_numbers_are_drawn_anew() -> None:
    sampler = started(3, 1000, Sampling(True))
    chances = sampler._chances()
    assert chances is not None
    seen = [chances.clone()]
    for number in range(1, 2 * len(chances) + 1):
        sampler.prepare(number)
        if number % len(chances) == 0:
            seen.append(chances.clone())
    assert len(seen) == 3
    assert len(torch.cat(seen).unique()) == 3 * chances.numel()


def test_what_runs_late_writes_into_nobodys_memory() -> None:
    """Steps enqueued ahead write to pinned memory after their sampler is gone."""
    for _ in range(3):
        sampler = started(8, 1000, Sampling())
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        sampler.choose(torch.randn(8, 1000, device=GPU), torch.zeros(8, 1, dtype=torch.int64, device=GPU))
        del sampler
        others = [torch.full((PLACES, 8), -1, pin_memory=True) for _ in range(8)]
        torch.cuda.synchronize()
        assert all(bool((other == -1).all()) for other in others)


def test_the_host_reads_a_place_before_it_is_taken_again() -> None:
    assert PLACES > AHEAD + 1 >= 1


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return attach(tiny_llama().cuda()), attach(tiny_llama().cuda())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"min_new_tokens": 20, "eos_token_id": list(range(0, 300, 3))},
        {"suppress_tokens": list(range(1, 300, 2))},
        {"repetition_penalty": 1.4},
        {"repetition_penalty": 0.7, "min_new_tokens": 5, "eos_token_id": [5, 6, 7, 8], "suppress_tokens": [9, 10]},
        {"max_new_tokens": 300},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [1, 3, 9, 33])
def test_greedy_tokens_with_and_without_the_kernel(
    models: tuple[Any, Any], settings: dict[str, Any], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, mask = random_tokens(batch, 12).cuda(), torch.ones(batch, 12, dtype=torch.int64, device=GPU)
    for row in range(batch):
        mask[row, : row % 4] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask} | SETTINGS | settings
    found = []
    for model, kernel in zip(models, (True, False), strict=True):
        with monkeypatch.context() as patched:
            if not kernel:
                patched.setattr(sample, "draws", lambda *_: False)
            found.append([model.generate(**inputs) for _ in range(3)])
            assert model.engine._sampler.by_kernel is kernel
    assert all(torch.equal(one, found[1][0]) for one in found[0])


@pytest.mark.parametrize("way", ["whole", "growing", "ending", "asked at once"])
def test_counts_after_an_answer(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the device counted is what was enqueued, also where there is room for more rows than the batch has."""
    monkeypatch.setattr(engine, "_FIRST_TOKENS", 30 if way == "growing" else 2048)
    model, prompt = attach(tiny_llama().cuda()), random_tokens(1, 9).cuda()
    whole = model.generate(random_tokens(4, 9).cuda(), **SETTINGS)
    settings, length = SETTINGS | {"max_new_tokens": 600 if way == "growing" else 40}, 600 if way == "growing" else 40
    if way == "ending":
        tokens = model.generate(prompt, **SETTINGS)[0, 9:].tolist()
        settings["eos_token_id"], length = tokens[20], tokens.index(tokens[20]) + 1
    if way == "asked at once":
        settings["stopping_criteria"], length = StoppingCriteriaList([Long()]), 8
    for _ in range(3):
        assert model.generate(prompt, **settings).shape == (1, 9 + length)
        cache, made = model.engine._cache, model.engine._sampler.made[0].item()
        assert length <= made <= length + (AHEAD if way == "ending" else 0)
        assert cache.slot.item() == 9 + made - 1 == cache.next_positions().item()
    assert torch.equal(model.generate(random_tokens(4, 9).cuda(), **SETTINGS), whole)


class Long(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 17, device=input_ids.device)


def test_a_seed_repeats_and_the_distribution_is_the_models_own() -> None:
    model, rows = attach(tiny_llama().cuda()), 4000
    settings = {"do_sample": True, "temperature": 4.0, "top_k": 20, "pad_token_id": 0, "eos_token_id": None}
    prompt = random_tokens(1, 6).cuda()

    def sampled(seed: int, count: int, **more: Any) -> Tensor:
        torch.manual_seed(seed)
        found: Tensor = model.generate(prompt.expand(count, -1), **settings | more)
        return found

    for more in ({"top_p": 0.9}, {"top_k": 0, "top_p": 0.8}, {"min_p": 0.1, "repetition_penalty": 1.2}):
        sampled(0, 2, max_new_tokens=150, **more)
        first = sampled(1, 2, max_new_tokens=150, **more)
        assert not torch.equal(sampled(2, 2, max_new_tokens=150, **more), first)
        assert torch.equal(sampled(1, 2, max_new_tokens=150, **more), first)
        sampled(1, 5, max_new_tokens=10, **more)  # a sampler with room for more rows
        assert torch.equal(sampled(1, 2, max_new_tokens=150, **more), first)
    for seed in range(3):
        tokens = sampled(seed, rows, max_new_tokens=3)
    frequent = tokens[:, 6].bincount().argmax()
    taken = tokens[tokens[:, 6] == frequent, 7].cpu()
    text = torch.cat([prompt, frequent[None, None]], dim=1)
    with torch.no_grad():
        scores = processors({"temperature": 4.0, "top_k": 20})(text, model(text).logits[:, -1].float())
    assert chi_square_fits(taken.bincount(minlength=300), scores.softmax(-1)[0].cpu())
