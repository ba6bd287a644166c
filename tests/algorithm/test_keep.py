"""Which channels a block keeps after plain rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from awq.algorithm.keep import share_out
from tests.algorithm.test_blocks import quantized
from tests.tiny import tiny_llama


def kept(results: dict[str, Any]) -> dict[str, int]:
    """How many channels, by linear."""
    return {name: result.report["outliers"] for name, result in results.items()}


def test_the_dearest_channels_for_a_stored_weight_are_kept() -> None:
    cheap, dear = torch.zeros(100), torch.zeros(50)
    cheap[[7, 3, 90]] = torch.tensor([5.0, 4.0, 1.0])
    dear[[2, 49]] = torch.tensor([80.0, 30.0])
    channels = share_out([cheap, dear], [10, 100], 0.02)  # 120 weights: one of 100 rows and two of 10
    assert [each.tolist() for each in channels] == [[3, 7], [2]]


def test_what_costs_nothing_is_not_kept_and_no_input_has_more_than_its_most() -> None:
    costs = torch.arange(200.0).flip(0)
    none, capped = share_out([torch.zeros(200), costs], [4, 4], 0.05)
    assert none.tolist() == []
    assert capped.tolist() == list(range(10))  # 5 % of 200, though 20 are paid for


@pytest.mark.parametrize("ratio", [0.005, 0.01, 0.03, 0.05])
def test_a_block_spends_its_share_and_no_more(ratio: float) -> None:
    results = quantized(tiny_llama(), outlier_ratio=ratio)
    for block in (0, 1):
        mine = [result for name, result in results.items() if f"layers.{block}." in name]
        stored = sum(result.outliers.residual.numel() for result in mine if result.outliers)
        weights = sum(result.packed.in_features * result.packed.out_features for result in mine)
        assert 0 < stored <= ratio * weights


def test_salient_channels_are_kept() -> None:
    model = tiny_llama()
    assert {0, 1, 2} & set(
        quantized(model, scale=False, clip=False)["model.layers.0.self_attn.q_proj"].outliers.index.tolist()
    )  # type: ignore[union-attr]


def test_linears_that_move_no_output_keep_nothing() -> None:
    """Nobody reads what queries, keys and values give: all is spent on the others."""
    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    for name, count in kept(quantized(model, outlier_ratio=0.02)).items():
        assert (count == 0) == ("self_attn" in name), name
