from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from awq.errors import CalibrationError, ConfigError
from awq.evaluate import Perplexity, evaluation_tokens, paired_difference, perplexity
from awq.evaluate.perplexity import inference, weighted_mean
from tests.tiny import byte_tokenizer, random_tokens, tiny_llama


def plain(model: nn.Module, ids: Tensor, window: int) -> tuple[list[float], list[int]]:
    """Token by token, one window after the other."""
    nll, targets = [], []
    for start in range(0, len(ids), window):
        tokens = ids[start : start + window]
        if len(tokens) < 2:
            continue
        with torch.no_grad():
            logits = model(input_ids=tokens[None]).logits[0].double()
        nll.append(0.0)
        for position in range(len(tokens) - 1):
            probabilities = torch.exp(logits[position]) / torch.exp(logits[position]).sum()
            nll[-1] -= math.log(probabilities[tokens[position + 1]].item())
        targets.append(len(tokens) - 1)
    return nll, targets


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("length", [2, 31, 32, 33, 34, 96, 100])
def test_equals_a_plain_loop(length: int, batch: int) -> None:
    """With 33 tokens the last window holds one, which has no target."""
    model, ids = tiny_llama(), random_tokens(1, length)[0]
    nll, targets = plain(model, ids, 32)
    found = perplexity(model, ids, window=32, batch=batch)
    assert found.targets == tuple(targets)
    assert found.nll == pytest.approx(nll, rel=1e-5)
    assert found.tokens == sum(targets)
    assert found.value == pytest.approx(math.exp(sum(nll) / sum(targets)), rel=1e-5)


def test_many_positions_are_taken_in_parts() -> None:
    """A window of more positions than are scored at a time."""
    model, ids = tiny_llama(max_position_embeddings=700), random_tokens(1, 600)[0]
    nll, _ = plain(model, ids, 600)
    assert perplexity(model, ids).nll == pytest.approx(nll, rel=1e-5)


def test_windows_fit_the_model_and_stop_in_time() -> None:
    model, ids = tiny_llama(max_position_embeddings=40), random_tokens(1, 210)[0]
    assert perplexity(model, ids).targets == (39, 39, 39, 39, 39, 9)
    assert perplexity(model, ids, max_windows=2).nll == perplexity(model, ids).nll[:2]
    assert perplexity(model, ids, window=30, max_windows=1).targets == (29,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    model, ids = tiny_llama(), random_tokens(1, 64)[0]
    expected = perplexity(model, ids).log
    assert perplexity(model.to(dtype), ids).log == pytest.approx(expected, rel=0.05)


def test_dropout_and_gradients_are_off_and_all_is_restored() -> None:
    model, ids = tiny_llama(attention_dropout=0.9), random_tokens(1, 64)[0]
    model.train()
    model.model.norm.eval()
    expected = perplexity(tiny_llama(), ids).nll
    precision = torch.get_float32_matmul_precision()
    assert perplexity(model, ids, fast=True).nll == pytest.approx(expected, rel=1e-2)
    assert perplexity(model, ids).nll == expected
    assert model.training
    assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize(("fast", "inside"), [(False, "highest"), (True, "medium")])
def test_precision_is_set_in_linears_and_restored_after_an_error(fast: bool, inside: str) -> None:
    model, before, seen = nn.Linear(2, 2), torch.get_float32_matmul_precision(), list[str]()
    torch.set_float32_matmul_precision("high")
    model.register_forward_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    try:
        with suppress(KeyError), inference(model, fast=fast):
            model(torch.zeros(1, 2))
            assert seen == [inside]
            assert torch.get_float32_matmul_precision() == "highest"
            assert torch.is_inference_mode_enabled()
            assert not model.training
            raise KeyError
        assert torch.get_float32_matmul_precision() == "high"
        assert model.training
    finally:
        torch.set_float32_matmul_precision(before)


def test_positions_are_not_rounded() -> None:
    """RoPE multiplies them in a product that a CPU with AMX takes in bfloat16 too."""
    model, seen = tiny_llama(), list[str]()
    model.model.rotary_emb.register_forward_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    perplexity(model, random_tokens(1, 64)[0], fast=True)
    assert seen == ["highest"]


def test_nan_and_overflow_are_shown_not_hidden() -> None:
    assert math.isnan(Perplexity((math.nan,), (3,)).value)
    assert Perplexity((9000.0,), (3,)).value == math.inf


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([1]), "at least 2 tokens"),
        (torch.tensor([], dtype=torch.int64), "at least 2 tokens"),
        (torch.ones(2, 8, dtype=torch.int64), "in one row"),
        (torch.tensor([1, 2, 300]), "beyond the model's 300"),
    ],
)
def test_text_that_cannot_be_scored(ids: Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        perplexity(tiny_llama(), ids)


def test_paired_difference_equals_the_difference_and_its_error() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(12, generator=generator) * 50 + 100
    shift = torch.randn(12, generator=generator) + 3
    a = Perplexity(tuple((base + shift).tolist()), (50,) * 12)
    b = Perplexity(tuple(base.tolist()), (50,) * 12)
    found = paired_difference(a, b)
    assert found.mean == pytest.approx(a.log - b.log)
    assert found.mean == pytest.approx(-paired_difference(b, a).mean)
    assert found.error == pytest.approx(((shift / 50).std() / 12**0.5).item(), rel=1e-4)


def test_a_partial_window_weighs_what_it_holds() -> None:
    a, b = Perplexity((20.0, 30.0, 4.0), (10, 10, 1)), Perplexity((10.0, 10.0, 1.0), (10, 10, 1))
    assert paired_difference(a, b).mean == pytest.approx(a.log - b.log)
    assert paired_difference(a, a) == (0.0, 0.0)
    assert weighted_mean([1.0, 5.0], [3, 1]).mean == 2.0
    assert math.isnan(weighted_mean([1.0], [3]).error)
    with pytest.raises(ConfigError, match="different windows"):
        paired_difference(a, Perplexity((1.0,), (10,)))


def test_evaluation_tokens(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    builtin = evaluation_tokens(tokenizer)
    assert builtin.dtype == torch.int64
    assert builtin.ndim == 1
    assert 0 not in builtin
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}')
    assert tokenizer.decode(evaluation_tokens(tokenizer, tmp_path / "a.jsonl").tolist()) == "one\n\ntwo"
    with pytest.raises(CalibrationError, match="does not exist"):
        evaluation_tokens(tokenizer, "absent.txt")
