"""Experts in the search: whom the text reaches, the sample that all read, the routing that both streams follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from awq.algorithm import blocks as blocks_module
from awq.algorithm import passes as passes_module
from awq.algorithm.blocks import quantize_blocks
from awq.algorithm.inputs.capture import Call, Chunk, capture
from awq.algorithm.inputs.coverage import counted, every_expert
from awq.algorithm.inputs.routing import recorded_routing, replayed_routing
from awq.config import QuantConfig
from awq.structure.experts import split_experts
from awq.structure.groups import find_structure
from awq.structure.siblings import Siblings
from tests.efforts import every_effort
from tests.tiny import VOCABULARY, random_tokens

CPU = torch.device("cpu")
TEXT = random_tokens(16, 48)


def tiny_mixtral(experts: int = 4) -> Any:
    torch.manual_seed(0)
    settings = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = MixtralForCausalLM(
        MixtralConfig(**settings, num_key_value_heads=2, num_local_experts=experts, vocab_size=VOCABULARY)
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1 if "norm" in name else 4)
    split_experts(model)
    return model


def shun(model: Any, expert: int) -> None:
    """No token is sent to this expert: an embedding that is the same in one channel, which the router reads."""
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight.data[0] = 0
        layer.mlp.gate.weight.data[expert] = 0
        layer.mlp.gate.weight.data[expert, 1] = -1
    model.model.embed_tokens.weight.data[:, 1] = 50


class ListBlock(nn.Module):
    """A block whose experts are a plain list, chosen by a linear."""

    def __init__(self, width: int = 32, experts: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)) for _ in range(experts)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.norm(hidden)
        scores, chosen = self.gate(x).softmax(-1).max(-1)
        result = hidden.clone()
        for number, expert in enumerate(self.experts):
            asked = chosen == number
            if asked.any():
                result[asked] += scores[asked].unsqueeze(-1) * expert(x[asked])
        return result


class ListModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.blocks = nn.ModuleList([ListBlock(), ListBlock()])

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def quantized(model: Any, effort: str, **settings: Any) -> dict[str, Any]:
    config = QuantConfig(**{"group_size": 32, "outlier_ratio": 0.0, "effort": effort, **settings})
    wanted = lambda name: not name.endswith("gate")  # noqa: E731
    return {
        name: result.report
        for _, part in quantize_blocks(model, TEXT, config, wanted, CPU)
        for name, result in part.items()
    }


def test_a_plain_list_of_experts_is_found_with_its_router() -> None:
    block, hidden = ListBlock(), torch.randn(2, 16, 32)
    with torch.no_grad():
        structure = find_structure(block, lambda: block(hidden))
    first, *rest = structure.groups
    assert first.producer == "norm"
    assert set(first.consumers) == {"gate", "experts.0.0", "experts.1.0", "experts.2.0"}
    assert {(group.producer, group.consumers) for group in rest} == {
        (f"experts.{number}.0", (f"experts.{number}.2",)) for number in range(3)
    }


def test_what_is_found_in_one_expert_holds_for_those_that_the_probe_misses() -> None:
    block, hidden = ListBlock(), torch.randn(1, 8, 32)
    block.gate.bias.data[2] = -1e4
    with torch.no_grad():
        structure = find_structure(block, lambda: block(hidden))
    assert "experts.2.0" in structure.groups[0].consumers
    assert ("experts.2.2",) in {group.consumers for group in structure.groups}
    assert ("experts.2.0",) in structure.input_sets


@every_effort
def test_an_expert_of_a_plain_list_that_no_token_reaches_is_rounded_plainly(effort: str) -> None:
    model = ListModel()
    for block in model.blocks:
        block.gate.bias.data[2] = -1e4
    reports = quantized(model, effort)
    for name, report in reports.items():
        assert report["fallback"] == ("no calibration token reached it" if "experts.2." in name else None)
        assert (report["tokens"] == 0) == ("experts.2." in name)
    assert reports["blocks.0.experts.1.0"]["scaled_by"] == reports["blocks.0.experts.2.0"]["scaled_by"]
    assert sum(reports[f"blocks.0.experts.{number}.0"]["tokens"] for number in range(3)) == TEXT.numel()


@every_effort
def test_an_expert_without_tokens_of_its_own_is_calibrated_by_all(effort: str) -> None:
    model = tiny_mixtral()
    shun(model, 3)
    reports = quantized(model, effort)
    shunned = {name: report for name, report in reports.items() if ".experts.3." in name}
    assert len(shunned) == 6
    for report in shunned.values():
        assert report["tokens"] == 0
        assert report["fallback"] is None
        assert report["loss"] <= report["loss_rounding"] * (1 + 1e-5)


def moe_chunk(model: Any) -> tuple[nn.Module, Chunk]:
    """The experts of the first layer as a block, on random hidden states."""
    torch.manual_seed(3)
    return model.model.layers[0].mlp, Chunk(torch.randn(2, 40, 64), [Call((), {})])


def test_the_sample_counts_a_quarter_of_the_width() -> None:
    block, chunk = moe_chunk(tiny_mixtral())
    hidden = chunk.hidden.flatten(0, 1)
    with torch.no_grad(), every_expert(block, [chunk]), counted(block) as counts:
        stats = capture(block, 0, [chunk], tuple((f"experts.{number}.gate_proj",) for number in range(4)))
    assert sum(counts["experts"]) == 2 * 80
    assert not any(experts.visit_every for experts in [block.experts])
    for number, own in enumerate(counts["experts"]):
        found = stats[f"experts.{number}.gate_proj"]
        assert found.tokens == pytest.approx(own + 16)
    routed = torch.zeros(80, 4)
    _, _, chosen = block.gate(hidden)
    routed.scatter_(1, chosen, 1.0)
    weights = routed[:, 1] + 16 / 80
    expected = (hidden * weights.unsqueeze(1)).t() @ hidden / weights.sum()
    assert torch.allclose(stats["experts.1.gate_proj"].gram, expected, atol=1e-4)


def test_reading_a_sample_changes_no_output() -> None:
    block, chunk = moe_chunk(tiny_mixtral())
    with torch.no_grad():
        before = block(chunk.hidden)
        with every_expert(block, [chunk]):
            assert torch.equal(block(chunk.hidden), before)


def test_routing_is_recorded_and_replayed() -> None:
    block, chunk = moe_chunk(tiny_mixtral())
    other = torch.randn(2, 40, 64)
    with torch.no_grad():
        with recorded_routing(block) as runs:
            block(chunk.hidden)
            block(other)
        assert len(runs) == 2
        free = block(other)
        with replayed_routing(block, runs[1]):
            assert torch.equal(block(other), free)
        with replayed_routing(block, runs[0]):
            assert not torch.allclose(block(other), free)
        assert torch.equal(block(other), free)


def test_experts_are_corrected_for_what_was_quantized_before_them() -> None:
    reports = quantized(tiny_mixtral(), "balanced")
    assert "corrected" in {report["target"] for name, report in reports.items() if ".experts." in name}


def test_the_number_of_passes_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    together = quantized(tiny_mixtral(), "balanced")
    monkeypatch.setattr(passes_module, "PASS_BYTES", 1)
    assert quantized(tiny_mixtral(), "balanced") == together


def test_statistics_too_large_for_memory_are_had_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_module, "STATS_BYTES", 1)
    for report in quantized(tiny_mixtral(), "balanced").values():
        assert report["fallback"] is None
        assert report["loss"] < 1.05 * report["loss_rounding"]


def test_roles_leave_out_the_number_of_the_expert() -> None:
    like = Siblings(tiny_mixtral().model.layers[0])
    assert like.role("mlp.experts.3.up_proj") == "mlp.experts.*.up_proj"
    assert like.role("mlp.gate") == "mlp.gate"
    assert like.all_of(["mlp.gate", "mlp.experts.2.up_proj"]) == (
        "mlp.gate",
        *(f"mlp.experts.{number}.up_proj" for number in range(4)),
    )
