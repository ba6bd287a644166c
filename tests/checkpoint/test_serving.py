"""What vLLM can do with a checkpoint: Marlin, and splitting over several GPUs."""

from __future__ import annotations

import pytest

from awq.checkpoint.serving import marlin_takes, serving_warnings, splits
from awq.config import QuantConfig
from awq.packing import StoredShape


def shape(in_features: int, out_features: int, group_size: int = 128) -> StoredShape:
    return StoredShape("gemm", in_features, out_features, group_size)


@pytest.mark.parametrize(
    ("linear", "group_size", "shards", "fits"),
    [
        (shape(4096, 4096), 128, 1, True),
        (shape(4096, 4096), 128, 8, True),
        (shape(576, 576, 64), 64, 1, False),  # 576 % 128
        (shape(512, 96, 64), 64, 1, False),  # 96 % 64
        (shape(256, 256, 16), 16, 1, False),  # groups of 16
        (shape(256, 256, 256), -1, 2, True),  # whole rows are cut anywhere
        (shape(11008, 4096), 128, 2, True),  # 86 groups: 43 a GPU
        (shape(11008, 4096), 128, 4, False),
    ],
)
def test_marlin(linear: StoredShape, group_size: int, shards: int, fits: bool) -> None:
    assert marlin_takes(linear, QuantConfig(group_size=group_size), shards) == fits


def test_symmetric_weights_are_not_marlins() -> None:
    quant = QuantConfig(group_size=128, zero_point=False)
    assert not marlin_takes(shape(4096, 4096), quant, 1)
    assert serving_warnings({"a": shape(4096, 4096)}, quant) == [
        "symmetric weights run on vLLM's slower AWQ kernel: its Marlin kernel wants zero points."
    ]


def test_rows_and_columns_must_both_divide() -> None:
    quant = QuantConfig(group_size=64)
    assert splits(shape(512, 64, 64), quant, 8) and not splits(shape(512, 56, 64), quant, 2)
    assert not splits(shape(576, 64, 64), quant, 2) and splits(shape(512, 64, 512), QuantConfig(group_size=-1), 8)


def test_nothing_to_say_of_a_common_shape() -> None:
    shapes = {"q": shape(4096, 4096), "down": shape(14336, 4096)}
    assert serving_warnings(shapes, QuantConfig(group_size=128)) == []


def test_sentences_name_the_linear_that_limits() -> None:
    shapes = {"q": shape(4096, 4096), "down": shape(11008, 4096)}
    (split,) = serving_warnings(shapes, QuantConfig(group_size=128))
    assert split.startswith("vLLM cannot split this checkpoint over 4 or 8 GPUs, only over 1 or 2: down (11008 x 4096")
    shapes = {"q": shape(576, 576, 64)}
    marlin, split = serving_warnings(shapes, QuantConfig(group_size=64))
    assert marlin.startswith("1 of 1 linears, such as q (576 x 576, groups of 64), may run on vLLM's slower AWQ kernel")
    assert "over 2 or 4 or 8 GPUs, only over 1" in split


def test_shards_that_leave_marlin() -> None:
    shapes = {"k": shape(1024, 256, 32)}
    assert serving_warnings(shapes, QuantConfig(group_size=32)) == [
        "over 8 GPUs some linears may leave vLLM's Marlin kernel for a slower one."
    ]
