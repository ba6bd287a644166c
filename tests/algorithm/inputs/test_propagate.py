from typing import Any

import pytest
import torch
from torch import Tensor, nn

from awq.algorithm import passes as passes_module
from awq.algorithm.blocks import quantize_blocks
from awq.algorithm.inputs.propagate import enter_both, recorded
from awq.algorithm.search import solve as solve_module
from awq.algorithm.search.loops import Loops
from awq.algorithm.search.rounding import ColumnLoop, Rounded, round_columns
from awq.config import QuantConfig
from awq.structure.blocks import find_blocks
from awq.structure.stream import find_residuals
from tests.algorithm.test_blocks import apply, logits, quantized
from tests.tiny import random_tokens, tiny_llama

CPU = torch.device("cpu")
TEXT = random_tokens(24, 48)


@pytest.mark.parametrize(("sequences", "held"), [(1, 0), (2, 1), (7, 1), (14, 2), (100, 14)])
def test_every_seventh_sequence_is_held_out(sequences: int, held: int) -> None:
    model = tiny_llama()
    _, blocks = find_blocks(model)
    with torch.no_grad():
        chunks = enter_both(model, blocks, random_tokens(sequences, 8), CPU)
    counts = [sum(len(chunk.hidden) for chunk in chunks if chunk.held_out == flag) for flag in (False, True)]
    assert counts == [sequences - held, held]


def test_linears_that_write_to_the_residual_stream_are_found() -> None:
    block, hidden = tiny_llama().model.layers[0], torch.randn(2, 8, 64)
    with torch.no_grad():
        positions = tiny_llama().model.rotary_emb(hidden, torch.arange(8)[None])
        found = find_residuals(block, lambda: block(hidden, position_embeddings=positions), hidden)
    assert found == {"self_attn.o_proj": "", "mlp.down_proj": "post_attention_layernorm"}


class Scaled(nn.Module):
    """A block whose linear is scaled on its way to the residual stream: what it writes is not its output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + 0.5 * self.linear(hidden)


def test_a_linear_that_is_changed_on_its_way_to_the_stream_does_not_write_to_it() -> None:
    block, hidden = Scaled(), torch.randn(1, 8, 16)
    assert find_residuals(block, lambda: block(hidden), hidden) == {}


def test_what_modules_read_is_recorded_run_by_run() -> None:
    block = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    first, second = torch.randn(2, 3, 4), torch.randn(1, 3, 4)
    with recorded(block, ("", "1")) as runs:
        block(first)
        block(second)
    assert torch.equal(runs[0][""], first.flatten(0, 1))
    assert torch.equal(runs[1]["1"], block[0](second).flatten(0, 1))
    assert not block._forward_pre_hooks


def test_balanced_is_closer_to_the_float_model() -> None:
    reference = logits(tiny_llama())
    errors = {}
    for effort in ("fast", "balanced"):
        model = tiny_llama()
        apply(model, quantized(model, TEXT, effort=effort, outlier_ratio=0))
        errors[effort] = float((logits(model) - reference).norm() / reference.norm())
    assert errors["balanced"] < 0.75 * errors["fast"]


def test_the_report_says_what_won() -> None:
    reports = [result.report for result in quantized(tiny_llama(), TEXT, effort="balanced").values()]
    assert {report["rounding"] for report in reports} == {"compensated"}
    assert "corrected" in {report["target"] for report in reports}
    assert {result.report["rounding"] for result in quantized(tiny_llama(), TEXT).values()} == {"plain"}


def test_the_loss_is_the_error_of_outputs_on_held_out_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run for real: the last linear of the first block, in the float model and behind the quantized ones."""
    name = "model.layers.0.mlp.gate_proj"
    held = TEXT[torch.arange(len(TEXT)) % 7 == 6]
    exact, model = tiny_llama(), tiny_llama()
    results = quantized(model, TEXT, effort="balanced", outlier_ratio=0, refit=False)
    for other, result in results.items():
        if "layers.0" in other:
            model.get_submodule(other).weight.data = result.packed.dequantize()
    wanted, got = (output_of(one, name, held) for one in (exact, model))
    error = (got - wanted).square().sum() / wanted.square().sum()
    assert results[name].report["loss"] == pytest.approx(float(error), rel=0.1)  # power is that of all text


def output_of(model: Any, name: str, tokens: Tensor) -> Tensor:
    outputs: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _m, _args, output: outputs.append(output))
    with torch.no_grad():
        model(input_ids=tokens)
    handle.remove()
    return outputs[0]


def test_plain_rounding_is_taken_where_compensation_does_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    def worst(weight: Tensor, _gram: Tensor, grid: Any, *_rest: Any) -> Rounded:
        return Rounded(15 - grid.encode(weight), None)

    monkeypatch.setattr(solve_module, "round_compensated", worst)
    for result in quantized(tiny_llama(), TEXT, effort="balanced").values():
        assert result.report["rounding"] == "plain"
        assert result.report["loss"] <= result.report["loss_rounding"]


def test_a_gram_matrix_without_a_factor_leaves_plain_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve_module, "round_compensated", lambda *_args: None)
    results = quantized(tiny_llama(), TEXT, effort="balanced")
    assert {result.report["rounding"] for result in results.values()} == {"plain"}


def test_more_sets_than_passes_are_measured_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes_module, "MAX_PASSES", 2)
    reference, model = logits(tiny_llama()), tiny_llama()
    apply(model, quantized(model, TEXT, effort="balanced", outlier_ratio=0))
    assert (logits(model) - reference).norm() / reference.norm() < 0.09


def test_the_column_loop_is_passed_down() -> None:
    calls: list[int] = []

    def spy(weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        calls.append(len(weight))
        return round_columns(weight, *rest)

    config = QuantConfig(group_size=32, effort="balanced", outlier_ratio=0)
    loops = Loops(columns=ColumnLoop(spy, 32))
    for _ in quantize_blocks(tiny_llama(), TEXT, config, lambda _name: True, CPU, loops):
        pass
    assert sum(calls) == 2 * (64 + 64 + 64 + 128)


@pytest.mark.parametrize("sequences", [1, 2])
def test_very_little_text_is_enough(sequences: int) -> None:
    for result in quantized(tiny_llama(), random_tokens(sequences, 48), effort="balanced").values():
        assert result.report["loss"] <= result.report["loss_rounding"] * (1 + 1e-5)


def test_dead_channels_are_harmless() -> None:
    model = tiny_llama()
    model.model.layers[0].input_layernorm.weight.data[5] = 0
    results = quantized(model, TEXT, effort="balanced")
    assert results["model.layers.0.self_attn.q_proj"].report["rounding"] == "compensated"
    assert all(result.packed.dequantize().isfinite().all() for result in results.values())
