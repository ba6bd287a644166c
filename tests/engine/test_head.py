"""The int8 head: how exact it is, in every shape, and that the model runs with it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from awq.engine import attach
from awq.engine.head import Int8Head, use_head
from awq.errors import ConfigError
from tests.tiny import random_tokens, tiny_llama


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_float_head_up_to_rounding(dtype: torch.dtype, rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 1000, bias=bias)
    head = Int8Head(linear.weight.detach().to(dtype), linear.bias.detach().to(dtype) if bias else None)
    x = torch.randn(2, rows, 64)
    y = head(x.to(dtype)).float()
    assert y.shape == (2, rows, 1000)
    exact = linear(x)
    assert (y - exact).norm() < 0.012 * exact.norm()
    weight = head.codes.float() * head.scales[:, None].float()
    assert (weight - linear.weight).abs().max() <= linear.weight.abs().max() / 127 * 0.6 + 1e-3 * (
        dtype != torch.float32
    )
    assert head.codes.dtype == torch.int8


def test_a_weight_larger_than_a_part_and_rows_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awq.engine.head._CHUNK", 640)
    weight = torch.randn(101, 64)
    weight[7] = 0
    y = Int8Head(weight)(torch.randn(5, 64, generator=torch.Generator().manual_seed(1)))
    assert y.isfinite().all()
    assert (y[:, 7] == 0).all()


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_generates_with_it(tied: bool) -> None:
    model = attach(tiny_llama(tie_word_embeddings=tied))
    before = model.get_input_embeddings().weight.clone()
    use_head(model, "int8")
    assert isinstance(model.get_output_embeddings(), Int8Head)
    assert torch.equal(model.get_input_embeddings().weight, before)
    tokens = model.generate(random_tokens(1, 8), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert model.engine.last == ""
    with torch.no_grad():
        assert int(model(tokens[:, :8]).logits[0, -1].argmax()) == int(tokens[0, 8])


def test_words_for_it() -> None:
    model = tiny_llama()
    for word in (None, "float"):
        use_head(model, word)
        assert isinstance(model.get_output_embeddings(), nn.Linear)
    with pytest.raises(ConfigError, match="head='int4' is unknown: use one of float, int8"):
        use_head(model, "int4")
