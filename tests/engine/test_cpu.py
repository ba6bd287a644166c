"""The CPU's own step: which models it takes, that its logits and tokens are the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from awq.algorithm.search.affine import fit_affine
from awq.bench.models import random_model
from awq.engine import attach
from awq.engine.choose import Probe, choose
from awq.engine.cpu import CpuStep, cpu_step
from awq.engine.loop import Way
from awq.linear import QuantLinear
from awq.packing import pack
from awq.pretrained.source import replace_module
from awq.structure.linears import as_linear
from tests.architectures.families import FAMILIES, Family, tiny
from tests.engine.ties import largest_gap
from tests.tiny import random_tokens, tiny_llama

CPU = torch.device("cpu")
# What the plan of a decoder holds; the others have other norms, activations or orders.
TAKEN = {"Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Granite", "Gemma", "Phi3", "Ernie4_5"}


def quantized(model: Any) -> Any:
    """Its linears rounded plainly, in bfloat16."""
    model = model.to(torch.bfloat16)
    for name, module in list(model.named_modules()):
        linear = as_linear(module)
        if not isinstance(linear, nn.Linear) or module is model.get_output_embeddings():
            continue
        if linear.in_features % 32 or linear.out_features % 8:
            continue
        weight = linear.weight.detach().float()
        affine = fit_affine(weight, 32, 4, zero_point=True)
        bias = None if linear.bias is None else linear.bias.detach()
        layer = QuantLinear(pack(affine.encode(weight), affine.zeros, affine.scales), bias)
        layer.prepare(dtype=torch.bfloat16)
        replace_module(model, name, layer)
    return model


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.model_class()], ids=str)
def test_families(family: Family) -> None:
    """Taken, and then right to a hundredth, or left to the model's own forward with a reason."""
    model = quantized(tiny(family))
    ways = choose(model)
    step = cpu_step(model)
    assert isinstance(step, CpuStep) == (family.name in TAKEN), step
    if isinstance(step, CpuStep):
        assert ways.ways[0].step.how == CpuStep.how, ways.refused
        probe = Probe(model, ways.windows)
        assert probe.difference(Way(step, captured=False)) is None
    elif ways.ways:
        assert ways.refused["cpu step"] == step


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("outlier_ratio", [0.0, 0.03])
@pytest.mark.parametrize(
    "changes", [{}, {"attention_bias": True, "mlp_bias": True}, {"intermediate_size": 96}], ids=str
)
def test_tokens_are_the_models_own(batch: int, outlier_ratio: float, changes: dict[str, Any]) -> None:
    model = random_model(tiny_llama(**changes).config, CPU, dtype=torch.bfloat16, outlier_ratio=outlier_ratio)
    assert model.engine.tier == 2, model.engine
    mask = torch.ones(batch, 9, dtype=torch.int64)
    mask[1:, :4] = 0
    settings = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": None}
    tokens = model.generate(random_tokens(batch, 9), attention_mask=mask, **settings)
    for row, seen in zip(tokens, mask, strict=True):
        start = int((seen == 0).sum())
        gap, _, size = largest_gap(model, row[None, start:], 9 - start)
        assert gap <= 4 * torch.finfo(torch.bfloat16).eps * abs(size)


def test_padding_between_tokens_is_the_models_own_forwards() -> None:
    model = random_model(tiny_llama().config, CPU, dtype=torch.bfloat16)
    plain = random_model(tiny_llama().config, CPU, dtype=torch.bfloat16)
    plain.engine.limit(1)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, 3:5] = 0
    settings = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
    both = [each.generate(random_tokens(2, 9), attention_mask=mask, **settings) for each in (model, plain)]
    assert torch.equal(*both)


def test_more_rows_than_it_takes_and_other_kernels() -> None:
    model = random_model(tiny_llama().config, CPU, dtype=torch.bfloat16)
    assert [model.engine.tier_of(batch) for batch in (1, 8, 9)] == [2, 2, 1]
    for version in ("GEMM", "GEMV"):
        found = cpu_step(random_model(tiny_llama().config, CPU, dtype=torch.bfloat16, version=version))
        assert isinstance(found, CpuStep) == (version == "GEMV")
    assert cpu_step(attach(tiny_llama())) == "activations are not bfloat16"
    assert "kernel 'cpu'" in str(cpu_step(tiny_llama().to(torch.bfloat16)))


def test_the_model_itself_still_runs_and_frees_its_memory() -> None:
    """Joined codes are what its linears see; nothing holds the model."""
    import gc
    import weakref

    model = random_model(tiny_llama().config, CPU, dtype=torch.bfloat16)
    before = model(random_tokens(1, 9)).logits
    model.engine.ways  # noqa: B018 - makes the step
    assert torch.equal(model(random_tokens(1, 9)).logits, before)
    model.generate(random_tokens(1, 9), max_new_tokens=3, pad_token_id=0)
    gone = weakref.ref(model)
    gc.disable()
    del model
    try:
        assert gone() is None
    finally:
        gc.enable()
