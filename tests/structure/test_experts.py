"""Fused experts of every layout are split by what they compute, and left alone where no list of experts does that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import JetMoeConfig, LongcatFlashConfig, MixtralConfig

from awq.config import QuantConfig
from awq.errors import UnsupportedModelError
from awq.pretrained.source import skeleton
from awq.storage.names import from_stored, of_module, to_stored
from awq.structure.experts import Experts, Layout, expert_lists, find_layout, routers, split_experts
from awq.structure.plan import make_plan

EXPERTS, WIDTH, INNER = 5, 16, 12


class Fused(nn.Module):
    """Experts in any layout, written the slow way: expert by expert, token by token."""

    def __init__(self, gated: bool, transposed: bool, interleaved: bool, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gated, self.transposed, self.interleaved = gated, transposed, interleaved
        rows = INNER * (2 if gated else 1)
        self.into = self._weights(rows, WIDTH)
        self.out = self._weights(WIDTH, INNER)
        self.into_bias = nn.Parameter(torch.randn(EXPERTS, rows)) if bias else None
        self.out_bias = nn.Parameter(torch.randn(EXPERTS, WIDTH)) if bias else None

    def _weights(self, rows: int, columns: int) -> nn.Parameter:
        weights = torch.randn(EXPERTS, rows, columns) / columns**0.5
        return nn.Parameter(weights.transpose(1, 2).contiguous() if self.transposed else weights)

    def act_fn(self, x: Tensor) -> Tensor:
        return torch.relu(x)

    def _apply_gate(self, joined: Tensor) -> Tensor:
        gate, up = (joined[..., ::2], joined[..., 1::2]) if self.interleaved else joined.chunk(2, dim=-1)
        return (up.clamp(-1, 1) + 1) * torch.sigmoid(gate)

    def _project(self, name: str, expert: int, x: Tensor) -> Tensor:
        weight, bias = getattr(self, name)[expert], getattr(self, f"{name}_bias")
        result = x @ (weight if self.transposed else weight.t())
        return result if bias is None else result + bias[expert]

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden)
        for token, x in enumerate(hidden):
            for slot, expert in enumerate(chosen[token].tolist()):
                inner = self._project("into", expert, x)
                inner = self._apply_gate(inner) if self.gated else self.act_fn(inner)
                result[token] += weights[token, slot] * self._project("out", expert, inner)
        return result


class Sliced(Fused):
    """Called with a copy of the tokens for each expert, zero where it is not asked."""

    def _apply_gate(self, joined: Tensor) -> Tensor:
        gate, up = joined.chunk(2, dim=-1)
        return torch.relu(gate) * up

    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
        slices = hidden.view(len(self.out), -1, WIDTH)
        outputs = [self._project("out", e, self._apply_gate(self._project("into", e, x))) for e, x in enumerate(slices)]
        return torch.stack(outputs).view_as(hidden)


class Strange(Fused):
    """Shapes like experts, and another product."""

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return super().forward(hidden, chosen, weights).cumsum(0)


def routing(tokens: int = 9, slots: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(tokens, WIDTH)
    weights, chosen = torch.rand(tokens, EXPERTS).topk(slots)
    return hidden, chosen, weights


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("gated", "interleaved"), [(False, False), (True, False), (True, True)])
def test_every_layout_is_found_and_computes_the_same(
    gated: bool, interleaved: bool, transposed: bool, bias: bool
) -> None:
    fused = Fused(gated, transposed, interleaved, bias)
    assert find_layout(fused) == Layout("into", "out", gated, transposed, interleaved, routed=True)
    model = nn.Sequential(fused)
    hidden, chosen, weights = routing()
    wanted = fused(hidden, chosen, weights)
    split_experts(model)
    (experts,) = model
    assert isinstance(experts, Experts)
    assert torch.allclose(experts(hidden, chosen, weights), wanted, atol=1e-5)
    assert torch.allclose(experts(hidden, weights=weights, chosen=chosen), wanted, atol=1e-5)
    gate = fused.into[3].t() if transposed else fused.into[3]
    if gated:
        assert torch.equal(experts[3].gate_proj.weight, gate[::2] if interleaved else gate[:INNER])
        assert torch.equal(experts[3].up_proj.weight, gate[1::2] if interleaved else gate[INNER:])


def test_experts_that_are_given_slices_leave_out_the_tokens_that_are_zero() -> None:
    fused = Sliced(gated=True, transposed=True, interleaved=False, bias=False)
    assert find_layout(fused) == Layout("into", "out", True, True, routed=False)
    experts = Experts(fused, find_layout(fused))  # type: ignore[arg-type]
    hidden = torch.randn(EXPERTS, 7, WIDTH)
    hidden[2] = 0
    hidden[:, 5] = 0
    assert torch.allclose(experts(hidden.flatten(0, 1)), fused(hidden.flatten(0, 1)), atol=1e-5)
    calls: list[int] = []
    experts[1].register_forward_pre_hook(lambda _m, args: calls.append(len(args[0])))
    experts(hidden.flatten(0, 1))
    assert calls == [6]


def test_slices_through_a_bias_are_not_zero_for_zero() -> None:
    assert find_layout(Sliced(gated=True, transposed=False, interleaved=False, bias=True)) is None


def test_another_product_is_refused_and_left_as_it_is() -> None:
    model = nn.Sequential(Strange(True, False, False, False))
    assert find_layout(model[0]) is None
    split_experts(model)
    assert isinstance(model[0], Strange)


def test_weights_are_shared_with_the_fused_parameter_not_copied() -> None:
    fused = Fused(gated=True, transposed=False, interleaved=False, bias=False)
    experts = Experts(fused, find_layout(fused))  # type: ignore[arg-type]
    assert experts[1].up_proj.weight.data_ptr() == fused.into[1, INNER:].data_ptr()
    assert not list(experts.get_submodule("1").buffers())


def test_discovery_leaves_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    find_layout(Fused(True, False, False, False))
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_slot_that_is_masked_adds_nothing() -> None:
    fused = Fused(True, False, False, False)
    experts = Experts(fused, find_layout(fused))  # type: ignore[arg-type]
    hidden, chosen, weights = routing()
    masked, kept = chosen.clone(), weights.clone()
    masked[:, 0] = EXPERTS
    kept[:, 0] = 0
    assert torch.allclose(experts(hidden, masked, weights), experts(hidden, chosen, kept), atol=1e-6)


def mixtral(**changes: Any) -> Any:
    settings = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return skeleton(MixtralConfig(**settings | {"num_local_experts": 4, "vocab_size": 96, **changes}))


def test_a_skeleton_is_split_without_weights() -> None:
    model = mixtral()
    split_experts(model)
    assert sorted(expert_lists(model.model.layers)) == ["0.mlp.experts", "1.mlp.experts"]
    assert routers(model.model.layers) == ["0.mlp.gate", "1.mlp.gate"]
    assert all(parameter.is_meta for parameter in model.parameters())
    plan = make_plan(model, QuantConfig(group_size=32))
    assert "model.layers.1.mlp.experts.3.down_proj" in plan.linears
    assert plan.not_converted["model.layers.0.mlp.gate"] == "router"


def test_names_go_there_and_back() -> None:
    model = mixtral()
    split_experts(model)
    stored, own = of_module(to_stored(model)), of_module(from_stored(model))
    name = "model.layers.1.mlp.experts.3"
    for linear, file in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        assert stored(f"{name}.{linear}") == f"model.layers.1.block_sparse_moe.experts.3.{file}"
        assert own(stored(f"{name}.{linear}")) == own(f"{name}.{linear}") == f"{name}.{linear}"


@pytest.mark.parametrize(
    ("config", "parameter"),
    [
        (JetMoeConfig(hidden_size=64, intermediate_size=64, vocab_size=96), r"experts\.input_linear\.weight"),
        (
            LongcatFlashConfig(hidden_size=64, ffn_hidden_size=64, num_layers=1, num_attention_heads=4, vocab_size=96),
            r"experts\.gate_up_proj",
        ),
    ],
)
def test_experts_that_cannot_be_served_are_refused_with_the_reason(config: Any, parameter: str) -> None:
    model = skeleton(config)
    split_experts(model)
    with pytest.raises(UnsupportedModelError, match=rf"{parameter}, which are neither linear layers nor experts"):
        make_plan(model, QuantConfig(group_size=32))
