"""What vLLM will make of a checkpoint: its fast Marlin kernel, and the numbers of GPUs it can be split over."""

from __future__ import annotations

from collections.abc import Iterable

from awq.config import QuantConfig
from awq.packing import StoredShape

TENSOR_PARALLEL = (1, 2, 4, 8)
_MARLIN_GROUPS = (-1, 32, 64, 128)


def serving_warnings(shapes: dict[str, StoredShape], quant: QuantConfig) -> list[str]:
    """One sentence each about what vLLM cannot do fast, or split, with the linears of a checkpoint.

    Which linears are split by rows and which by columns is not visible from a name: both must divide.
    """
    return [*_marlin_sentences(shapes, quant), *_split_sentences(shapes, quant)]


def marlin_takes(shape: StoredShape, quant: QuantConfig, shards: int) -> bool:
    """Whether Marlin multiplies this linear when it is split over `shards` GPUs."""
    tiles = shape.in_features % (128 * shards) == 0 and shape.out_features % (64 * shards) == 0
    return quant.zero_point and quant.group_size in _MARLIN_GROUPS and tiles and splits(shape, quant, shards)


def splits(shape: StoredShape, quant: QuantConfig, shards: int) -> bool:
    """Whether the linear can be cut into `shards`, by rows and by columns, without cutting a group or a word."""
    unit = 1 if quant.group_size == -1 else shape.group_size
    return shape.in_features % (unit * shards) == 0 and shape.out_features % (8 * shards) == 0


def _marlin_sentences(shapes: dict[str, StoredShape], quant: QuantConfig) -> list[str]:
    if not quant.zero_point:
        return ["symmetric weights run on vLLM's slower AWQ kernel: its Marlin kernel wants zero points."]
    refused = [name for name, shape in shapes.items() if not marlin_takes(shape, quant, 1)]
    if not refused:
        return []
    sentence = (
        f"{len(refused)} of {len(shapes)} linears, such as {_label(refused[0], shapes)}, may run on vLLM's slower AWQ "
        "kernel: Marlin wants in_features % 128 == 0, out_features % 64 == 0 and groups of 32, 64, 128 or -1."
    )
    return [sentence]


def _split_sentences(shapes: dict[str, StoredShape], quant: QuantConfig) -> list[str]:
    limits = {n: next((name for name in shapes if not splits(shapes[name], quant, n)), None) for n in TENSOR_PARALLEL}
    refused = {n: name for n, name in limits.items() if name is not None}
    fits = [n for n in TENSOR_PARALLEL if n not in refused]
    sentences = []
    if refused:
        sentences.append(
            f"vLLM cannot split this checkpoint over {_either(refused)} GPUs, only over {_either(fits)}: "
            f"{_label(next(iter(refused.values())), shapes)} limits it."
        )
    if slow := [n for n in fits if _loses_marlin(shapes, quant, n)]:
        sentences.append(f"over {_either(slow)} GPUs some linears may leave vLLM's Marlin kernel for a slower one.")
    return sentences


def _loses_marlin(shapes: dict[str, StoredShape], quant: QuantConfig, shards: int) -> bool:
    return any(marlin_takes(shape, quant, 1) and not marlin_takes(shape, quant, shards) for shape in shapes.values())


def _label(name: str, shapes: dict[str, StoredShape]) -> str:
    shape = shapes[name]
    return f"{name} ({shape.in_features} x {shape.out_features}, groups of {shape.group_size})"


def _either(numbers: Iterable[int]) -> str:
    return " or ".join(map(str, numbers))
