"""Greedy tokens of a real model through the engine are those of the model's own forward, up to ties.

In float32, with the values of the int4 weights, a tie is 1e-2 of a logit. In bfloat16, as a CPU runs int4, logits of 8
to 16 are 1/16 apart, and of 16 to 32 1/8; next to float32 those of the model's own forward are off by 0.35 on average,
and those of the engine's step by 0.33: a tie is a few such steps. Ties are printed.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from awq.algorithm.search.affine import fit_affine
from awq.cli.demo import find_embedded_model
from awq.engine import attach
from awq.linear import QuantLinear
from awq.packing import pack
from awq.pretrained.source import find_source, replace_module
from tests.engine.prompts import PROMPTS
from tests.engine.ties import largest_gap

NEW, GROUP, TIE = 200, 64, 1e-2
SPACINGS = 4  # of the dtype, where they are wider than TIE


def rounded(dtype: torch.dtype) -> Any:
    """The model with its linears rounded plainly: int4 for bfloat16, the same values for float32."""
    found = find_source(find_embedded_model()).load(dtype)
    for name, module in list(found.named_modules()):
        if isinstance(module, nn.Linear) and module is not found.get_output_embeddings():
            weight = module.weight.detach().float()
            affine = fit_affine(weight, GROUP, 4, zero_point=True)
            if dtype == torch.float32:
                module.weight.data = affine.round(weight)
                continue
            layer = QuantLinear(pack(affine.encode(weight), affine.zeros, affine.scales))
            layer.prepare(dtype=dtype)
            replace_module(found, name, layer)
    return attach(found)


@pytest.fixture(scope="module")
def exact() -> Any:
    return rounded(torch.float32)


@pytest.fixture(scope="module")
def int4() -> Any:
    return rounded(torch.bfloat16)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return find_source(find_embedded_model()).tokenizer()


def check(model: Any, tokenizer: Any, prompts: tuple[str, ...], captured: bool = False) -> None:
    """captured: the model's own forward in steps of one shape, as a GPU replays them."""
    if captured:
        model.engine.limit(1)
        model.engine.ways.ways[0].captured = True
    else:
        model.engine.reset()
    assert model.engine.tier == (2 if model.dtype == torch.bfloat16 and not captured else 1)
    for prompt in prompts:
        tokens = _ask(tokenizer, prompt)
        said = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=NEW)
        assert model.engine.last == ""
        gap, place, size = largest_gap(model, said, tokens.shape[1])
        spacing = torch.finfo(model.dtype).eps * 2.0 ** (torch.tensor(size).frexp().exponent.item() - 1)
        if gap:
            sys.stdout.write(f"{prompt!r}: {gap:.4f} of a logit below {size:.2f}, new token {place}\n")
        assert gap <= max(TIE, SPACINGS * spacing), f"{prompt!r}: token {place} is {gap} below {size}"


def _ask(tokenizer: Any, prompt: str) -> Tensor:
    messages = [{"role": "user", "content": prompt}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens: Tensor = encoded["input_ids"]
    return tokens


def test_some_prompts(int4: Any, tokenizer: Any) -> None:
    check(int4, tokenizer, PROMPTS[:2])


@pytest.mark.slow
@pytest.mark.parametrize("captured", [False, True])
def test_all_prompts(int4: Any, tokenizer: Any, captured: bool) -> None:
    assert len(PROMPTS) == 20
    check(int4, tokenizer, PROMPTS, captured)


@pytest.mark.slow
@pytest.mark.parametrize("captured", [False, True])
def test_all_prompts_in_float32(exact: Any, tokenizer: Any, captured: bool) -> None:
    check(exact, tokenizer, PROMPTS, captured)
