"""What real models hold now and then: silent channels, empty groups, infinities, weights in two places."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from awq.algorithm.folded import Folded
from awq.algorithm.search.solve import Linear
from awq.config import QuantConfig
from awq.structure.blocks import find_blocks
from awq.structure.groups import ScaleGroup
from awq.structure.linears import shared_parameters
from tests.algorithm.test_blocks import TOKENS, apply, logits, quantized
from tests.efforts import every_effort
from tests.tiny import random_tokens, tiny_llama

LOSSES = ("loss_rounding", "loss", "loss_with_outliers")
PLAIN: dict[str, Any] = {"scale": False, "clip": False, "refit": False, "effort": "fast", "outlier_ratio": 0}


def silent_channel(model: Any) -> None:
    model.model.embed_tokens.weight[:, 5] = 0
    model.model.layers[0].input_layernorm.weight[5] = 3


def silenced_by_its_norm(model: Any) -> None:
    model.model.layers[0].input_layernorm.weight[5] = 0


def silent_input(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.zero_()


def empty_groups(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj.weight[:, :32] = 0
    model.model.layers[0].self_attn.v_proj.weight[3] = 0


def empty_linear(model: Any) -> None:
    model.model.layers[1].self_attn.k_proj.weight.zero_()


def tiny_weights(model: Any) -> None:
    model.model.layers[1].self_attn.v_proj.weight.mul_(1e-6)


def huge_weights(model: Any) -> None:
    model.model.layers[1].self_attn.v_proj.weight.mul_(1e6)


def spoiled(spoil: Callable[[Any], None]) -> Any:
    model = tiny_llama()
    with torch.no_grad():
        spoil(model)
    return model


def change(original: Any, effort: str, tokens: Tensor = TOKENS, **settings: Any) -> tuple[float, dict[str, Any]]:
    """The error of the logits after quantizing a copy, and the results."""
    model = copy.deepcopy(original)
    results = quantized(model, tokens, effort=effort, **settings)
    apply(model, results)
    reference = logits(original)
    return float((logits(model) - reference).norm() / reference.norm()), results


@every_effort
@pytest.mark.parametrize(
    "spoil",
    [silent_channel, silenced_by_its_norm, silent_input, empty_groups, empty_linear, tiny_weights, huge_weights],
)
def test_oddities_are_quantized_like_anything_else(spoil: Callable[[Any], None], effort: str) -> None:
    model = spoiled(spoil)
    rounded, _ = change(model, **PLAIN)
    found, results = change(model, effort)
    assert 0 < found < rounded
    for result in results.values():
        assert result.packed.dequantize().isfinite().all()
        assert result.outliers is None or result.outliers.residual.isfinite().all()
        assert result.report["fallback"] is None
        assert all(math.isfinite(result.report[key]) for key in LOSSES)


def test_what_is_zero_stays_zero() -> None:
    results = quantized(spoiled(empty_groups), effort="fast", outlier_ratio=0)
    assert not results["model.layers.0.self_attn.q_proj"].packed.dequantize()[:, :32].any()
    assert not results["model.layers.0.self_attn.v_proj"].packed.dequantize()[3].any()


@every_effort
def test_a_channel_that_the_text_leaves_silent_may_speak_later(effort: str) -> None:
    """Its scale is that of an average channel: as small as its magnitude, it would round the channel away."""
    model = spoiled(silent_channel)
    with torch.no_grad():
        model.model.embed_tokens.weight[200:, 5] = 1  # tokens that no calibration text has; `logits` does
    rounded, _ = change(model, **PLAIN)
    found, _ = change(model, effort, TOKENS % 150 + 1)
    assert found < 1.1 * rounded


def test_norms_are_divided_within_float16() -> None:
    """A channel nearly silent, or whose weight is tiny, neither overflows nor vanishes in the norm."""
    model = spoiled(lambda model: model.model.embed_tokens.weight[:, 5:7].mul_(1e-7))
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[5] = 1000
        model.model.layers[0].input_layernorm.weight[0] = 1e-7
    reference = logits(model)
    quantized(model, clip=False, refit=False, outlier_ratio=0)
    weight = model.model.layers[0].input_layernorm.weight.half()
    assert weight.isfinite().all() and (weight != 0).all()
    assert (logits(model) - reference).norm() < 1e-3 * reference.norm()  # the scales are folded, nothing is rounded yet


@every_effort
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_one_sequence_that_is_not_finite(value: float, effort: str) -> None:
    """Be it held out or not: what has no statistics is rounded plainly, and said so."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = value
    for sequence in (0, len(TOKENS) - 1):
        tokens = TOKENS.where(TOKENS != 7, 8)
        tokens[sequence, 3] = 7
        results = quantized(copy.deepcopy(model), tokens, effort=effort)
        plain = quantized(tiny_llama(), **PLAIN)
        for name, result in results.items():
            assert result.report["fallback"] == "activations are not finite"
            assert torch.equal(result.packed.qweight, plain[name].packed.qweight)


@every_effort
def test_infinite_activations_in_a_later_block(effort: str) -> None:
    model = spoiled(lambda model: model.model.layers[1].input_layernorm.weight[3].fill_(3e38))
    results = quantized(model, effort=effort)
    assert results["model.layers.0.mlp.up_proj"].report["fallback"] is None
    assert results["model.layers.1.self_attn.q_proj"].report["fallback"] == "activations are not finite"
    assert all(result.packed.dequantize().isfinite().all() for result in results.values())


def one_module_in_two_blocks(model: Any) -> tuple[str, str]:
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    return "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"


def one_weight_in_two_linears(model: Any) -> tuple[str, str]:
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    return "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"


def one_norm_in_two_blocks(model: Any) -> tuple[()]:
    model.model.layers[1].input_layernorm = model.model.layers[0].input_layernorm
    return ()


@every_effort
@pytest.mark.parametrize("share", [one_module_in_two_blocks, one_weight_in_two_linears, one_norm_in_two_blocks])
def test_what_is_in_two_places_is_left_alone(share: Callable[[Any], tuple[str, ...]], effort: str) -> None:
    model = tiny_llama()
    names = share(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found, results = change(model, effort)
    assert not set(names) & set(results) and len(results) == 14 - len(names)
    assert 0 < found < change(model, **PLAIN)[0]
    quantized(model, effort=effort)
    after = model.state_dict()
    for name in names or ("model.layers.0.input_layernorm", "model.layers.1.input_layernorm"):
        assert torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])


def test_a_part_with_two_names_is_in_one_place() -> None:
    model = tiny_llama()
    model.alias = model.model
    assert not shared_parameters(model)
    model.lm_head.weight = model.model.embed_tokens.weight
    assert set(shared_parameters(model)) == {id(model.lm_head.weight)}


@pytest.mark.parametrize("seed", [2, 5])
@pytest.mark.parametrize("tokens", [random_tokens(2, 12), random_tokens(8, 32)], ids=["few", "some"])
def test_no_linear_is_worse_than_plain_rounding_on_held_out_text(tokens: Tensor, seed: int) -> None:
    """Scales are chosen by what is fitted to; where held-out text finds them worse, they are taken back."""
    results = quantized(tiny_llama(seed, num_hidden_layers=3), tokens, effort="balanced")
    for name, result in results.items():
        report = result.report
        assert max(report["loss"], report["loss_with_outliers"]) <= report["loss_rounding"] * (1 + 1e-5), name


@pytest.mark.parametrize(
    "group",
    [
        ScaleGroup("input_layernorm", "norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ScaleGroup("self_attn.v_proj", "linear", ("self_attn.o_proj",), repeats=2, head_dim=16),
        ScaleGroup("mlp.up_proj", "linear", ("mlp.down_proj",)),
    ],
    ids=lambda group: group.producer,
)
def test_taking_back_a_fold_leaves_no_trace(group: ScaleGroup) -> None:
    block = find_blocks(tiny_llama())[1][0]
    before = {key: value.clone() for key, value in block.state_dict().items()}
    linears = {name: Linear(m, None, QuantConfig()) for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    rounded = {name: linear.rounded.clone() for name, linear in linears.items()}
    with torch.no_grad():
        scale = torch.rand(group.rows(block.get_submodule(group.producer).weight).shape[:2].numel()) + 0.5
        made = Folded.into(block, group, scale, linears, torch.float16)
        assert linears[group.consumers[0]].scaled_by == group.producer
        made.undo(block, linears)
    for key, value in block.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=1e-6, atol=0)
    assert torch.equal(block.state_dict()["input_layernorm.weight"], before["input_layernorm.weight"])
    for name, linear in linears.items():
        assert linear.scaled_by is None
        torch.testing.assert_close(linear.rounded, rounded[name], rtol=1e-6, atol=0)
