"""Mixtures of experts: split into linears, found, folded exactly, quantized, saved by expert, loaded, run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from awq.config import QuantConfig
from awq.data.calibration import CalibrationSet
from awq.linear import QuantLinear
from awq.pipeline.recipe import quantize_model
from awq.storage.load import load_dequantized, load_quantized
from awq.storage.save import save_quantized
from awq.structure.experts import split_experts
from awq.structure.groups import ScaleGroup
from awq.structure.siblings import Siblings
from tests.architectures.moe import FUSED_LINEARS, MIXTURES, Mixture
from tests.architectures.test_architectures import (
    TOKENS,
    distance,
    fold_at_random,
    linear_names,
    logits,
    model_of,
    stored_names,
    structures,
)
from tests.efforts import every_effort

every_mixture = pytest.mark.parametrize(
    "mixture",
    [pytest.param(one, id=str(one), marks=() if one.family.core else pytest.mark.slow) for one in MIXTURES],
)
TEXT = CalibrationSet(TOKENS, ("random tokens",))


def split_model(mixture: Mixture) -> Any:
    model = model_of(mixture.family)
    split_experts(model)
    return model


def described(group: ScaleGroup, like: Siblings) -> str:
    """ "producer -> consumers", an expert's number left out, routers before linears of the same name's order."""
    consumers = sorted({like.role(name) for name in group.consumers})
    return f"{like.role(group.producer)} -> {', '.join(consumers)}"


def ordered(group: str) -> str:
    producer, _, consumers = group.partition(" -> ")
    return f"{producer} -> {', '.join(sorted(consumers.split(', ')))}"


@every_mixture
def test_split_experts_compute_the_same(mixture: Mixture) -> None:
    model = model_of(mixture.family)
    before = logits(model)
    split_experts(model)
    assert distance(logits(model), before) < 1e-6
    assert not [name for name, parameter in model.named_parameters() if parameter.ndim == 3 and "conv" not in name]


@every_mixture
def test_the_groups_of_every_block(mixture: Mixture) -> None:
    for (block, structure), wanted in zip(structures(split_model(mixture)), mixture.blocks, strict=True):
        like = Siblings(block)
        assert {described(group, like) for group in structure.groups} == set(map(ordered, wanted))
        scaled = {name for group in structure.groups for name in group.consumers}
        assert scaled == set(like.all_of(scaled))  # every expert, not only those that the probe reached
        unscaled = set(mixture.unscaled) if like.lists else set()
        assert {like.role(name) for name in linear_names(block) - scaled} == unscaled
        assert linear_names(block) == {name for names in structure.input_sets for name in names}


@every_mixture
def test_folding_leaves_the_logits_unchanged(mixture: Mixture) -> None:
    model = split_model(mixture)
    before = logits(model)
    fold_at_random(model)
    assert 0 < distance(logits(model), before) < 1e-5


@every_mixture
@every_effort
def test_saved_by_expert_loaded_and_run(mixture: Mixture, effort: str, tmp_path: Path) -> None:
    model = model_of(mixture.family)
    model.save_pretrained(tmp_path / "float")
    original = logits(model)
    config = QuantConfig(group_size=32, outlier_ratio=0.03, effort=effort)
    report = quantize_model(model, config, TEXT, device="cpu", progress=False)
    save_quantized(model, tmp_path / "awq", report)
    stored, source = stored_names(tmp_path / "awq"), stored_names(tmp_path / "float")
    assert stored == (by_expert(source) if mixture.fused else source)
    assert expert_linears(stored) == set(mixture.stored)
    saved = json.loads((tmp_path / "awq" / "awq_report.json").read_text())
    assert {name.removesuffix(".weight") for name in stored} >= set(saved["linears"])
    for tensor in model.state_dict().values():  # as stored: another rounding of a router may send a token elsewhere
        if tensor.dtype == torch.float32:
            tensor.copy_(tensor.half())
    plain = logits(load_dequantized(tmp_path / "awq"))
    loaded = load_quantized(tmp_path / "awq", kernel="reference", device="cpu", dtype=torch.float32)
    assert distance(logits(loaded), plain) < 1e-4
    assert distance(plain, logits(model)) < 1e-4
    assert 0 < distance(plain, original) < 0.4
    assert loaded.generate(TOKENS[:1, :5], max_new_tokens=2, min_new_tokens=2, do_sample=False).shape == (1, 7)


@every_mixture
def test_routers_stay_float_and_experts_do_not(mixture: Mixture) -> None:
    model = model_of(mixture.family)
    report = quantize_model(model, QuantConfig(group_size=32, effort="fast"), TEXT, device="cpu", progress=False)
    blocks = model.model.layers
    kinds = {name: type(module) for name, module in blocks.named_modules()}
    routers = [name for name in kinds if re.fullmatch(r"\d+\.(mlp|feed_forward)\.(gate|router)", name)]
    assert routers
    assert not any(issubclass(kinds[name], QuantLinear) for name in routers)
    assert sum(reason == "router" for reason in report["not_converted"].values()) == len(routers)
    linears = [name for name in kinds if re.search(r"experts\.\d+\.\w+_proj$", name)]
    assert linears
    assert all(issubclass(kinds[name], QuantLinear) for name in linears)


def by_expert(names: set[str]) -> set[str]:
    """Names of fused tensors, one for each of four experts instead."""
    rest = {name for name in names if ".experts." not in name}
    for name in names - rest:
        prefix, _, fused = name.partition(".experts.")
        kind = "bias" if fused.endswith("_bias") else "weight"
        linears = FUSED_LINEARS[:2] if fused.startswith("gate_up") else FUSED_LINEARS[2:]
        rest |= {f"{prefix}.experts.{expert}.{linear}.{kind}" for expert in range(4) for linear in linears}
    return rest


def expert_linears(names: set[str]) -> set[str]:
    return {found[1] for name in names if (found := re.search(r"\.experts\.\d+\.(\w+)\.weight$", name))}


def test_what_transformers_keeps_in_float32_is_stored_and_loaded_in_float32(tmp_path: Path) -> None:
    mixture = next(one for one in MIXTURES if one.family.name == "DeepseekV3")
    model = model_of(mixture.family).to(torch.bfloat16)
    correction = model.model.layers[1].mlp.gate
    correction.e_score_correction_bias = torch.tensor([1.001, 1.002, 1.003, 1.004])
    report = quantize_model(model, QuantConfig(group_size=32, effort="fast"), TEXT, device="cpu", progress=False)
    save_quantized(model, tmp_path / "awq", report)
    loaded = load_quantized(tmp_path / "awq", kernel="reference", device="cpu", dtype=torch.bfloat16)
    assert torch.equal(loaded.model.layers[1].mlp.gate.e_score_correction_bias, correction.e_score_correction_bias)
    assert loaded.model.norm.weight.dtype == torch.bfloat16
    assert loaded(input_ids=TOKENS).logits.isfinite().all()
