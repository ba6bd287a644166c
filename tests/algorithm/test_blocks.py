from typing import Any

import pytest
import torch
from torch import nn

from awq.algorithm.blocks import QuantizedLinear, quantize_blocks
from awq.algorithm.inputs.capture import enter_model
from awq.config import QuantConfig
from awq.errors import UnsupportedModelError
from awq.structure.blocks import find_blocks
from tests.efforts import every_effort
from tests.tiny import random_tokens, tiny_llama

CPU = torch.device("cpu")
TOKENS = random_tokens(6, 48)


def quantized(
    model: Any, tokens: torch.Tensor = TOKENS, wanted: Any = lambda _name: True, **settings: Any
) -> dict[str, QuantizedLinear]:
    config = QuantConfig(**{"group_size": 32, "outlier_ratio": 0.05, "effort": "fast", **settings})
    results: dict[str, QuantizedLinear] = {}
    for _, linears in quantize_blocks(model, tokens, config, wanted, CPU):
        results |= linears
    return results


def apply(model: Any, results: dict[str, QuantizedLinear], outliers: bool = True) -> None:
    for name, result in results.items():
        weight = result.packed.dequantize()
        if outliers and result.outliers is not None:
            weight = result.outliers.add_to(weight)
        model.get_submodule(name).weight.data = weight


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=random_tokens(2, 40, seed=9)).logits
        return result


def test_entering_the_model_sees_what_the_blocks_see() -> None:
    """The calls noted while the blocks are passed over are those of a real forward."""
    model = tiny_llama()
    _, blocks = find_blocks(model)
    with torch.no_grad():
        chunk = enter_model(model, blocks, TOKENS, CPU)[0]
        hidden = chunk.hidden
        for index, block in enumerate(blocks):
            hidden = chunk.calls[index].run(block, hidden)
        expected = model.model(input_ids=TOKENS).last_hidden_state
        assert torch.allclose(model.model.norm(hidden), expected, atol=1e-5)


def test_chunks_cover_all_text_and_models_are_left_as_they_were() -> None:
    model = tiny_llama()
    _, blocks = find_blocks(model)
    with torch.no_grad():
        chunks = enter_model(model, blocks, random_tokens(20, 200), CPU)
    assert sum(chunk.hidden.shape[0] for chunk in chunks) == 20
    assert all("forward" not in block.__dict__ for block in blocks)


def test_every_step_lowers_the_error_of_the_logits() -> None:
    reference = logits(tiny_llama())
    errors = []
    for settings in ({"scale": False, "clip": False, "refit": False, "outlier_ratio": 0}, {"outlier_ratio": 0}, {}):
        model = tiny_llama()
        apply(model, quantized(model, **settings))
        errors.append(float((logits(model) - reference).norm() / reference.norm()))
    assert errors[0] > 1.1 * errors[1] > 1.1 * errors[2] > 0


@every_effort
def test_no_linear_is_worse_than_plain_rounding(effort: str) -> None:
    reports = [result.report for result in quantized(tiny_llama(), random_tokens(16, 48), effort=effort).values()]
    for report in reports:
        assert max(report["loss"], report["loss_with_outliers"]) <= report["loss_rounding"] * (1 + 1e-5)


def test_kept_channels_lower_the_loss() -> None:
    reports = [result.report for result in quantized(tiny_llama()).values()]
    assert {report["outliers"] for report in reports} == {3, 6}  # 5 % of 64 and of 128
    assert sum(r["loss_with_outliers"] for r in reports) < 0.95 * sum(r["loss"] for r in reports)


@pytest.mark.parametrize("ratio", [0.01, 0.05])
def test_kept_channels_behind_quantized_blocks_are_paid_from_one_budget(ratio: float) -> None:
    results = quantized(tiny_llama(), random_tokens(56, 48), effort="balanced", outlier_ratio=ratio)
    stored = sum(result.outliers.residual.numel() for result in results.values() if result.outliers)
    weights = sum(result.packed.in_features * result.packed.out_features for result in results.values())
    assert 0 < stored <= ratio * weights
    kept = [result.report for result in results.values() if result.outliers]
    assert sum(r["loss_with_outliers"] for r in kept) < sum(r["loss"] for r in kept)


@every_effort
def test_the_int4_under_kept_channels_is_what_it_is_without(effort: str) -> None:
    with_outliers = quantized(tiny_llama(), effort=effort)
    without = quantized(tiny_llama(), effort=effort, outlier_ratio=0)
    for name, result in with_outliers.items():
        assert torch.equal(result.packed.qweight, without[name].packed.qweight)
        assert torch.equal(result.packed.scales, without[name].packed.scales)
        assert without[name].outliers is None


def test_linears_with_one_input_keep_the_same_channels() -> None:
    results = quantized(tiny_llama())
    indices = [results[f"model.layers.0.self_attn.{name}_proj"].outliers for name in "qkv"]
    assert all(kept is not None and torch.equal(kept.index, indices[0].index) for kept in indices)  # type: ignore[union-attr]
    assert indices[0].index.tolist() == sorted(set(indices[0].index.tolist()))  # type: ignore[union-attr]


def test_losses_are_measured_on_the_outputs_themselves() -> None:
    """The report's relative loss is the error of the linear's outputs on the calibration text, run for real."""
    model, name = tiny_llama(), "model.layers.0.self_attn.q_proj"
    original = model.get_submodule(name).weight.detach().clone()
    inputs: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    with torch.no_grad():
        model(input_ids=TOKENS)
    handle.remove()
    result = quantized(model, scale=False, refit=False, outlier_ratio=0)[name]
    x = inputs[0].flatten(0, 1)
    error = (x @ (result.packed.dequantize() - original).t()).square().sum() / (x @ original.t()).square().sum()
    assert result.report["loss"] == pytest.approx(float(error), rel=2e-2)  # bf16 products in the Gram matrix


def test_unwanted_linears_stay_float_and_the_model_still_fits_together() -> None:
    model = tiny_llama()
    reference = logits(model)
    results = quantized(model, wanted=lambda name: "k_proj" not in name and "up_proj" not in name)
    assert not any("k_proj" in name or "up_proj" in name for name in results)
    apply(model, results)
    assert (logits(model) - reference).norm() / reference.norm() < 0.2


@every_effort
def test_results_do_not_depend_on_the_run(effort: str) -> None:
    first, second = (quantized(tiny_llama(), random_tokens(20, 200), effort=effort) for _ in range(2))
    for name, result in first.items():
        assert torch.equal(result.packed.qweight, second[name].packed.qweight)
        assert torch.equal(result.packed.scales, second[name].packed.scales)


@every_effort
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_are_solved_in_float32_and_come_back(dtype: torch.dtype, effort: str) -> None:
    model = tiny_llama().to(dtype)
    reference = logits(tiny_llama())
    apply(model, quantized(model, effort=effort))
    assert {p.dtype for n, p in model.named_parameters() if "norm" in n} == {dtype}
    assert (logits(model.float()) - reference).norm() / reference.norm() < 0.15


@pytest.mark.parametrize("bits", [2, 3])
def test_fewer_bits_use_fewer_codes(bits: int) -> None:
    for result in quantized(tiny_llama(), bits=bits).values():
        assert int(result.packed.codes().max()) < 2**bits


def test_symmetric_zeros_are_eight() -> None:
    assert all((result.packed.zeros() == 8).all() for result in quantized(tiny_llama(), zero_point=False).values())


@every_effort
def test_nan_activations_fall_back_to_plain_rounding(effort: str) -> None:
    model = tiny_llama()
    model.model.layers[1].input_layernorm.weight.data[3] = float("nan")
    results = quantized(model, effort=effort)
    broken = results["model.layers.1.self_attn.q_proj"]
    assert broken.report["fallback"] == "activations are not finite"
    assert broken.outliers is None
    assert broken.report["scaled_by"] is None
    assert results["model.layers.0.self_attn.q_proj"].report["fallback"] is None
    plain = quantized(tiny_llama(), scale=False, clip=False, refit=False)
    assert torch.equal(broken.packed.qweight, plain["model.layers.1.self_attn.q_proj"].packed.qweight)


class Unreached(nn.Module):
    """A block with a linear that the forward never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        return hidden + self.used(hidden), None


class TupleModel(nn.Module):
    """Blocks that answer with a tuple, as older architectures do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(300, 32)
        self.blocks = nn.ModuleList([Unreached(), Unreached()])

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = block(hidden)[0]
        return hidden


@every_effort
def test_unreached_linears_and_tuple_outputs(effort: str) -> None:
    results = quantized(TupleModel(), effort=effort)
    assert results["blocks.1.unused"].report["fallback"] == "no calibration token reached it"
    assert results["blocks.1.used"].report["fallback"] is None
    assert results["blocks.1.used"].bias is not None


class TwoTowers(nn.Module):
    """A large tower that text does not run, or of which it shows nothing, and a small one."""

    def __init__(self, fault: str | None = None) -> None:
        super().__init__()
        self.fault = fault
        self.embedding, self.head = nn.Embedding(300, 8), nn.ModuleList([nn.Linear(8, 8)])
        self.vision = nn.ModuleList([nn.Sequential(nn.Linear(64, 64)) for _ in range(4)])
        self.text = nn.ModuleList([nn.Sequential(nn.Linear(8, 8))])

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        hidden = self.head[0](self.embedding(input_ids))
        if self.fault:
            raise ValueError(self.fault)
        return self.text[0](hidden) if self.fault is None else hidden


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_blocks_are_those_that_text_runs_through(device: str) -> None:
    with torch.device(device):
        assert find_blocks(TwoTowers())[0] == "text"


@pytest.mark.parametrize(
    ("fault", "reason"), [("pixels are missing", "pixels are missing"), ("", "none of them is run")]
)
def test_a_model_that_text_says_nothing_of_is_refused(fault: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"which of vision, text reads it: {reason}"):
        find_blocks(TwoTowers(fault))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no list of blocks"):
        find_blocks(nn.Sequential(nn.Linear(8, 8)))
