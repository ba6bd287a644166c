from typing import Any

import pytest
import torch
from torch import Tensor

from awq.algorithm import blocks as blocks_module
from awq.algorithm import learn as learn_module
from awq.algorithm.inputs import precision
from awq.algorithm.inputs.activations import ParkedList
from awq.algorithm.inputs.capture import Call, Chunk
from awq.algorithm.inputs.propagate import Propagation
from awq.algorithm.inputs.text import Batch, Text
from awq.algorithm.learn import Learned, _Linear, _Norm, _picks, cpu_minutes, learn
from awq.algorithm.search.affine import fit_affine
from awq.algorithm.search.solution import Coded
from tests.algorithm.inputs.test_propagate import output_of
from tests.algorithm.test_blocks import apply, quantized
from tests.tiny import random_tokens, tiny_llama

TEXT = random_tokens(147, 48)  # three chunks, and one that is held out


@pytest.fixture(scope="module", autouse=True)
def _fewer_and_exact_steps() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learn_module, "STEPS", 60)
        # No target in bfloat16, in which a CPU with AMX takes small products too.
        patch.setattr(precision, "_precision", lambda _name, exactly=precision._precision: exactly("highest"))
        yield


@pytest.fixture(scope="module")
def learned() -> tuple[Any, dict[str, Any], list[Learned | None]]:
    """A tiny model after effort="max", its results, and what each block learned."""
    seen: list[Learned | None] = []
    with pytest.MonkeyPatch.context() as patch:

        def spy(*args: Any) -> Learned | None:
            seen.append(learn(*args))
            return seen[-1]

        patch.setattr(blocks_module, "learn", spy)
        model = tiny_llama()
        return model, quantized(model, TEXT, effort="max", outlier_ratio=0), seen


def test_every_block_is_closer_on_held_out_text(learned: Any) -> None:
    _, results, seen = learned
    assert len(seen) == 2
    for one in seen:
        assert one is not None and one.loss[1] < 0.995 * one.loss[0]
    assert {result.report["rounding"] for result in results.values()} == {"learned"}
    assert all(result.report["loss"] < result.report["loss_rounding"] for result in results.values())


def test_the_loss_of_the_block_is_that_of_a_real_run(learned: Any) -> None:
    model, results, seen = learned
    held = TEXT[torch.arange(len(TEXT)) % 7 == 6]
    apply(model, results)
    with torch.no_grad():
        exact, got = (one(input_ids=held, output_hidden_states=True).hidden_states[1] for one in (tiny_llama(), model))
    assert seen[0].loss[1] == pytest.approx(float((got - exact).square().mean()), rel=1e-3)


def test_kept_channels_lower_the_loss_of_the_block_that_learned(learned: Any) -> None:
    """The first block: what it is given is the float model's, with kept channels and without."""
    model, alone, _ = learned
    with_channels = tiny_llama()
    results = quantized(with_channels, TEXT, effort="max")
    apply(with_channels, results)
    apply(model, alone)
    kept = [name for name, result in results.items() if result.outliers is not None]
    assert kept
    for name, result in results.items():
        assert torch.equal(result.packed.qweight, alone[name].packed.qweight)  # they come last
    held = TEXT[torch.arange(len(TEXT)) % 7 == 6]
    with torch.no_grad():
        exact, before, after = (
            one(input_ids=held, output_hidden_states=True).hidden_states[1]
            for one in (tiny_llama(), model, with_channels)
        )
    assert (after - exact).square().sum() < (before - exact).square().sum()


def test_it_ends_in_the_plain_format(learned: Any) -> None:
    model, results, seen = learned
    for result in results.values():
        packed = result.packed
        assert packed.scales.dtype == torch.float16 and bool((packed.scales > 0).all())
        assert int(packed.codes().max()) <= 15 and int(packed.zeros().max()) <= 15
    norms = [name for one in seen if one for name in one.norms]
    assert norms == ["input_layernorm", "post_attention_layernorm"] * 2
    norm = model.model.layers[0].input_layernorm.weight.data
    assert torch.equal(norm, norm.half().float())


def test_a_second_run_is_equal_bit_by_bit(learned: Any) -> None:
    model, results, _ = learned
    again = tiny_llama()
    for name, result in quantized(again, TEXT, effort="max", outlier_ratio=0).items():
        assert torch.equal(result.packed.qweight, results[name].packed.qweight)
        assert torch.equal(result.packed.scales, results[name].packed.scales)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert one.ndim > 1 or torch.equal(one, other)


def test_the_loss_is_measured_behind_what_was_learned(learned: Any) -> None:
    """Run for real: a linear in the float model, and behind the learned ones."""
    name = "model.layers.0.mlp.gate_proj"
    model, results, _ = learned
    held = TEXT[torch.arange(len(TEXT)) % 7 == 6]
    apply(model, results)
    wanted, got = (output_of(one, name, held) for one in (tiny_llama(), model))
    error = (got - wanted).square().sum() / wanted.square().sum()
    assert results[name].report["loss"] == pytest.approx(float(error), rel=0.1)  # power is that of all text


def test_what_is_worse_on_held_out_text_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learn_module, "STEPS", 5)
    monkeypatch.setattr(learn_module, "CODE_RATE", 3.0)
    monkeypatch.setattr(learn_module, "GAIN_RATE", 0.3)
    results, balanced = (
        quantized(tiny_llama(), TEXT[:28], effort=effort, outlier_ratio=0) for effort in ("max", "balanced")
    )
    for name, result in results.items():
        assert torch.equal(result.packed.qweight, balanced[name].packed.qweight)
        assert result.report == balanced[name].report


def test_text_of_which_nothing_is_held_out_teaches_nothing() -> None:
    results = quantized(tiny_llama(), random_tokens(1, 48), effort="max")
    assert {result.report["rounding"] for result in results.values()} <= {"compensated", "plain"}


def test_a_learner_starts_where_rounding_ended_and_its_gradient_passes() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    coded = Coded.plainly(weight, fit_affine(weight, 32, 4, True), learned=True)
    learner = _Linear(coded)
    assert torch.equal(learner.weight(), coded.weight)
    assert torch.equal(learner.coded().codes, coded.codes)
    codes, gain = torch.autograd.grad(learner.weight().sum(), (learner.codes, learner.gain))
    assert torch.equal(codes, coded.grid.scales.unsqueeze(-1).expand_as(codes))
    assert torch.allclose(gain, coded.weight.view(8, 2, 32).sum(-1), atol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norms_gain_multiplies_what_the_norm_multiplies_by(offset: float) -> None:
    norm = torch.nn.LayerNorm(8)
    norm.weight.data = torch.rand(8)
    learner = _Norm(norm, offset)
    learner.gain.data += 0.1
    assert torch.allclose(learner.weight() + offset, 1.1 * (norm.weight + offset))


@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_all_chunks_are_seen_before_any_is_seen_again(chunks: int) -> None:
    picks = list(_picks(chunks))
    assert len(picks) == learn_module.STEPS and picks == list(_picks(chunks))
    flat = [chunk for pick in picks for chunk in pick]
    for start in range(0, len(flat) - chunks, chunks):
        assert sorted(flat[start : start + chunks]) == list(range(chunks))


def test_calls_that_differ_are_not_one() -> None:
    def batch(*masks: Tensor) -> Batch:
        calls = [Call((), {"mask": mask, "cache": None}) for mask in masks]
        chunks = [Chunk(torch.ones(2), [call], number=number) for number, call in enumerate(calls)]
        inputs = ParkedList([chunk.parked for chunk in chunks])
        return Batch(Text(Propagation(torch.nn.Identity(), 0, chunks, inputs)))

    ones, twos = torch.ones(3), torch.full((3,), 2.0)
    assert batch(ones, ones.clone()).uniform
    assert not batch(ones, twos).uniform


def test_the_estimate_for_a_cpu_is_of_the_size_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learn_module, "STEPS", 200)
    assert 30 < cpu_minutes(106_000_000) < 300
