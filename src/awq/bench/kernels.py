"""Latency of one quantized linear by rows of its input, for both kernel versions and a dense linear beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import nn

from awq.algorithm.affine import fit_affine
from awq.algorithm.outliers import outlier_count
from awq.bench.timing import measure
from awq.config import KERNEL_VERSIONS
from awq.errors import ConfigError, KernelNotSupportedError
from awq.linear import QuantLinear
from awq.packing import Outliers, PackedInt4, pack
from awq.progress import track

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DENSE = "dense"


@dataclass(frozen=True)
class Shape:
    """A weight of N = out_features rows and K = in_features columns; written "NxK"."""

    out_features: int
    in_features: int

    @classmethod
    def parse(cls, text: str) -> Self:
        try:
            out_features, in_features = (int(part) for part in text.lower().split("x"))
        except ValueError:
            raise ConfigError(f"shape {text!r} is not of the form NxK, such as 4096x11008.") from None
        if out_features < 8 or out_features % 8 or in_features < 1:
            raise ConfigError(f"shape {text!r} cannot be packed: N must be a multiple of 8, and K positive.")
        return cls(out_features, in_features)

    def __str__(self) -> str:
        return f"{self.out_features}x{self.in_features}"


def default_shapes(device: torch.device) -> tuple[Shape, ...]:
    """The linears of Llama-2-7B on a GPU, those of SmolLM2-135M elsewhere."""
    width, inner = (4096, 11008) if device.type == "cuda" else (576, 1536)
    return Shape(width, width), Shape(inner, width), Shape(width, inner)


@dataclass(frozen=True)
class KernelRow:
    """Microseconds of one call with `rows` rows of input; version "dense" is a float linear in the same dtype."""

    out_features: int
    in_features: int
    group_size: int
    outliers: int
    dtype: str
    rows: int
    version: str
    kernel: str
    median_us: float
    p10_us: float
    p90_us: float
    repeats: int

    @property
    def shape(self) -> Shape:
        return Shape(self.out_features, self.in_features)


@dataclass(frozen=True)
class KernelBench:
    """Every measurement, and why a version has none."""

    rows: list[KernelRow]
    refused: dict[str, str]

    @property
    def crossovers(self) -> dict[str, int | None]:
        return {str(shape): crossover(self.rows, shape) for shape in dict.fromkeys(row.shape for row in self.rows)}

    def to_dict(self) -> dict[str, Any]:
        return {"rows": [asdict(row) for row in self.rows], "crossovers": self.crossovers, "refused": self.refused}


def bench_kernels(
    shapes: Sequence[Shape],
    device: torch.device,
    *,
    rows: Sequence[int] = ROWS,
    group_size: int = 64,
    outlier_ratio: float = 0.0,
    dtype: torch.dtype | None = None,
    seconds: float = 0.2,
    progress: bool = True,
) -> KernelBench:
    """Time random linears of `shapes` with zero points, both versions pinned in turn, `seconds` a point.

    dtype: of the input; float16 on a GPU, bfloat16 on a CPU by default. ConfigError where a group does not divide.
    """
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.bfloat16)
    for shape in shapes:
        _check_group(shape, group_size)
    measured: list[KernelRow] = []
    refused: dict[str, str] = {}
    steps = len(shapes) * (len(KERNEL_VERSIONS) + 1)
    with track("Timing kernels", steps, enabled=progress) as bar, torch.inference_mode():
        for shape in shapes:
            for version, linear, kernel in _candidates(shape, group_size, outlier_ratio, device, dtype, refused):
                for count in rows:
                    x = torch.randn(count, shape.in_features, device=device, dtype=dtype)
                    timing = measure(lambda layer=linear, x=x: layer(x), device, seconds=seconds)  # type: ignore[misc]
                    measured.append(
                        KernelRow(
                            shape.out_features,
                            shape.in_features,
                            group_size,
                            outlier_count(shape.in_features, outlier_ratio),
                            str(dtype).removeprefix("torch."),
                            count,
                            version,
                            kernel,
                            1e6 * timing.median,
                            1e6 * timing.p10,
                            1e6 * timing.p90,
                            timing.repeats,
                        )
                    )
                bar.advance(note=f"{shape} {version}")
    return KernelBench(measured, refused)


def crossover(rows: Sequence[KernelRow], shape: Shape) -> int | None:
    """The first row count from which on GEMM is faster than GEMV; None where it never is or one was not measured."""
    medians = {(row.version, row.rows): row.median_us for row in rows if row.shape == shape}
    counts = sorted({count for version, count in medians if version == "GEMV" and ("GEMM", count) in medians})
    found = None
    for count in reversed(counts):
        if medians["GEMM", count] >= medians["GEMV", count]:
            break
        found = count
    return found


def random_linear(shape: Shape, group_size: int, outlier_ratio: float) -> tuple[PackedInt4, Outliers | None]:
    """A linear of random weights with zero points and, for a ratio above 0, evenly spread outlier channels."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape.out_features, shape.in_features, generator=generator) / shape.in_features**0.5
    grid = fit_affine(weight, group_size, 4, zero_point=True)
    packed = pack(grid.encode(weight), grid.zeros, grid.scales)
    count = outlier_count(shape.in_features, outlier_ratio)
    if not count:
        return packed, None
    index = torch.linspace(0, shape.in_features - 1, count).round().to(torch.int32)
    return packed, Outliers(index, torch.randn(count, shape.out_features, generator=generator).to(torch.float16))


def _candidates(
    shape: Shape,
    group_size: int,
    outlier_ratio: float,
    device: torch.device,
    dtype: torch.dtype,
    refused: dict[str, str],
) -> Iterator[tuple[str, nn.Module, str]]:
    """(version, linear, kernel) of each version that this machine runs; the others' reasons go to `refused`."""
    packed, outliers = random_linear(shape, group_size, outlier_ratio)
    for version in KERNEL_VERSIONS:
        linear = QuantLinear(packed, None, outliers).to(device)
        try:
            choice = linear.prepare(version=version, dtype=dtype)
        except KernelNotSupportedError as error:
            refused[version] = str(error)
        else:
            yield version, linear, choice.kernel.name
    dense = nn.Linear(shape.in_features, shape.out_features, bias=False, device=device, dtype=dtype)
    yield DENSE, dense, "torch"


def _check_group(shape: Shape, group_size: int) -> None:
    if shape.in_features % group_size:
        raise ConfigError(f"group size {group_size} does not divide the K of {shape}: choose another of the two.")
