import warnings

import pytest
import torch

from awq.algorithm.search.rounding import PLAIN_LOOP
from awq.config import QuantConfig
from awq.pipeline.effort import column_loop, warn_if_slow
from tests.tiny import tiny_llama

CPU = torch.device("cpu")


def test_the_plain_column_loop_serves_a_cpu() -> None:
    assert column_loop(CPU) is PLAIN_LOOP


def test_hours_of_learning_are_said_before_they_start() -> None:
    large = torch.nn.ModuleDict({"linear": torch.nn.Linear(1 << 14, 1 << 13, device="meta")})
    with pytest.warns(UserWarning, match=r"about \d\d+ minutes without a GPU"):
        warn_if_slow(large, ["linear"], QuantConfig(effort="max"), CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_slow(large, ["linear"], QuantConfig(), CPU)
        warn_if_slow(tiny_llama(), ["model.layers.0.mlp.up_proj"], QuantConfig(effort="max"), CPU)
