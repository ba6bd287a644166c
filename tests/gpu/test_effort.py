"""Every effort on an NVIDIA GPU: the same again in a second run, learned in a CUDA graph as without one."""

from typing import Any

import pytest
import torch

from awq.algorithm import learn as learn_module
from awq.algorithm.blocks import quantize_blocks
from awq.config import EFFORTS, QuantConfig
from awq.pipeline.effort import inner_loops
from tests.tiny import random_tokens, tiny_llama

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
TEXT = random_tokens(140, 48)


def quantized(effort: str) -> tuple[Any, dict[str, Any]]:
    model, results = tiny_llama(), {}
    config = QuantConfig(group_size=32, outlier_ratio=0.03, effort=effort)
    for _, linears in quantize_blocks(model, TEXT, config, lambda _name: True, GPU, inner_loops(GPU, config)):
        results.update(linears)
    return model, results


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, result in one.items():
        assert torch.equal(result.packed.qweight, other[name].packed.qweight)
        assert torch.equal(result.packed.scales, other[name].packed.scales)
        assert (result.outliers is None) == (other[name].outliers is None)
        assert result.outliers is None or torch.equal(result.outliers.residual, other[name].outliers.residual)


@pytest.mark.parametrize("effort", EFFORTS)
def test_a_second_run_is_equal_bit_by_bit(effort: str) -> None:
    (first, one), (second, other) = quantized(effort), quantized(effort)
    assert_equal(one, other)
    norms = [[p for p in model.parameters() if p.ndim == 1] for model in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*norms, strict=True))


def test_a_graph_learns_what_eager_steps_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[bool] = []
    capture = learn_module.Graphed._captured

    def spy(self: Any) -> Any:
        graph = capture(self)
        captured.append(graph is not None)
        return graph

    monkeypatch.setattr(learn_module, "CODE_RATE", 1e-3)
    monkeypatch.setattr(learn_module.Graphed, "_captured", spy)
    _, graphed = quantized("max")
    assert captured and all(captured)
    monkeypatch.setattr(learn_module.Graphed, "_captured", lambda _self: None)
    _, eager = quantized("max")
    assert {result.report["rounding"] for result in eager.values()} == {"learned"}
    for name, result in graphed.items():
        assert result.report["loss"] == pytest.approx(eager[name].report["loss"], rel=0.02)
