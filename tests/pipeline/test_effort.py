import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from awq.algorithm.search.loops import PLAIN_LOOPS
from awq.config import QuantConfig
from awq.errors import KernelError
from awq.pipeline import effort
from awq.pipeline.effort import inner_loops, warn_if_slow
from tests.tiny import tiny_llama

CPU = torch.device("cpu")


def of_plain_kernels(monkeypatch: pytest.MonkeyPatch, **wrong: Any) -> Any:
    """The loops of a device whose kernels are torch's own, but for some."""
    kernels = PLAIN_LOOPS._replace(columns=PLAIN_LOOPS.columns._replace(columns=64), **wrong)
    monkeypatch.setattr(effort.columns, "obstacle", lambda _device: None)
    monkeypatch.setattr(effort, "KERNELS", kernels)
    monkeypatch.setattr(effort, "COLUMNS", kernels.columns)
    for name in ("_searches", "_rounds"):
        monkeypatch.setattr(effort, name, getattr(effort, name).__wrapped__)
    return kernels


@pytest.mark.parametrize("name", ["fast", "balanced", "max"])
def test_plain_loops_serve_a_cpu(name: str) -> None:
    assert inner_loops(CPU, QuantConfig(effort=name)) is PLAIN_LOOPS


def test_kernels_that_agree_with_torch_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = of_plain_kernels(monkeypatch)
    assert inner_loops(CPU, QuantConfig(effort="balanced", group_size=32)) == kernels
    assert inner_loops(CPU, QuantConfig(effort="fast", group_size=128)) == kernels._replace(columns=PLAIN_LOOPS.columns)
    per_channel = inner_loops(CPU, QuantConfig(effort="balanced", group_size=-1))
    assert per_channel == PLAIN_LOOPS._replace(columns=kernels.columns)


@pytest.mark.parametrize("name", ["best_shrinks", "rounded_delta", "row_dots"])
def test_a_kernel_that_is_wrong_is_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> Tensor:
        values: Tensor = getattr(PLAIN_LOOPS, name)(*arguments)
        return torch.where(torch.arange(values.numel()).view(values.shape) % 8 == 3, torch.nan, values)

    of_plain_kernels(monkeypatch, **{name: wrong})
    check_refused()


def test_a_kernel_whose_sums_are_wrong_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(products: Tensor, steps: Tensor, normal: Tensor, first: int) -> None:
        PLAIN_LOOPS.group_dots(products, steps, normal, first)
        normal[:, 1] += 1

    of_plain_kernels(monkeypatch, group_dots=wrong)
    check_refused()


def check_refused() -> None:
    with pytest.warns(UserWarning, match=r"ranges runs in torch: its kernel is wrong on cpu"):
        assert inner_loops(CPU, QuantConfig(effort="fast", group_size=64)) == PLAIN_LOOPS


def test_a_kernel_that_does_not_run_is_not_either(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_arguments: Any) -> Tensor:
        raise KernelError("The cubin is broken.")

    kernels = of_plain_kernels(monkeypatch, row_dots=fails)
    with pytest.warns(UserWarning, match=r"ranges runs in torch: The cubin"):
        loops = inner_loops(CPU, QuantConfig(effort="balanced", group_size=128))
    assert loops == PLAIN_LOOPS._replace(columns=kernels.columns)


def test_hours_of_learning_are_said_before_they_start() -> None:
    large = torch.nn.ModuleDict({"linear": torch.nn.Linear(1 << 14, 1 << 13, device="meta")})
    with pytest.warns(UserWarning, match=r"about \d\d+ minutes without a GPU"):
        warn_if_slow(large, ["linear"], QuantConfig(effort="max"), CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_slow(large, ["linear"], QuantConfig(), CPU)
        warn_if_slow(tiny_llama(), ["model.layers.0.mlp.up_proj"], QuantConfig(effort="max"), CPU)
