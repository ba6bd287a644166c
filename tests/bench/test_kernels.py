import json

import pytest
import torch

from awq.bench import kernels
from awq.bench.kernels import DENSE, KernelRow, Shape, bench_kernels, crossover, default_shapes, random_linear
from awq.errors import ConfigError, KernelNotSupportedError
from awq.linear import QuantLinear

CPU = torch.device("cpu")
SHAPE = Shape(64, 128)


def row(version: str, rows: int, median: float, shape: Shape = SHAPE) -> KernelRow:
    sizes = (shape.out_features, shape.in_features, 64, 0)
    return KernelRow(*sizes, "bfloat16", rows, version, "cpu", median, median, median, 9)


def rows_of(gemv: dict[int, float], gemm: dict[int, float]) -> list[KernelRow]:
    timed = (("GEMV", gemv), ("GEMM", gemm))
    return [row(version, rows, median) for version, medians in timed for rows, median in medians.items()]


@pytest.mark.parametrize(
    ("gemv", "gemm", "expected"),
    [
        ({1: 1, 8: 8, 64: 64}, {1: 30, 8: 31, 64: 40}, 64),
        ({1: 1, 8: 8, 64: 64}, {1: 30, 8: 7, 64: 40}, 8),
        ({1: 9, 8: 9}, {1: 1, 8: 1}, 1),
        ({1: 1, 8: 1}, {1: 9, 8: 9}, None),
        ({1: 9, 8: 1, 64: 64}, {1: 1, 8: 9, 64: 40}, 64),  # an early outlier is no crossover
        ({1: 1, 8: 8}, {1: 2}, None),
        ({}, {1: 2}, None),
        ({1: 2}, {1: 2}, None),
    ],
)
def test_crossover(gemv: dict[int, float], gemm: dict[int, float], expected: int | None) -> None:
    assert crossover(rows_of(gemv, gemm), SHAPE) == expected


def test_crossover_looks_at_one_shape() -> None:
    other = [row("GEMV", 1, 9, Shape(8, 8)), row("GEMM", 1, 1, Shape(8, 8))]
    assert crossover([*rows_of({1: 1}, {1: 2}), *other], SHAPE) is None


@pytest.mark.parametrize("text", ["64x128", "64X128"])
def test_shape(text: str) -> None:
    assert Shape.parse(text) == SHAPE
    assert str(SHAPE) == "64x128"


@pytest.mark.parametrize("text", ["", "64", "64x", "64x128x2", "axb", "12x64", "0x64", "-8x64", "64x0", "64.0x64"])
def test_wrong_shapes(text: str) -> None:
    with pytest.raises(ConfigError, match="shape"):
        Shape.parse(text)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_default_shapes_can_be_packed(device: str) -> None:
    assert all(Shape.parse(str(shape)) == shape for shape in default_shapes(torch.device(device)))


@pytest.mark.parametrize("ratio", [0.0, 0.05])
def test_random_linear_runs(ratio: float) -> None:
    packed, outliers = random_linear(SHAPE, 64, ratio)
    assert (outliers is None) == (ratio == 0)
    y = QuantLinear(packed, None, outliers)(torch.ones(3, 128))
    assert y.shape == (3, 64)
    assert y.isfinite().all()


def test_both_versions_and_a_dense_linear_are_timed() -> None:
    found = bench_kernels([SHAPE], CPU, rows=(1, 5), group_size=64, outlier_ratio=0.02, seconds=0, progress=False)
    assert {(r.version, r.rows) for r in found.rows} == {(v, n) for v in ("GEMV", "GEMM", DENSE) for n in (1, 5)}
    assert all(0 < r.p10_us <= r.median_us <= r.p90_us for r in found.rows)
    assert {r.outliers for r in found.rows} == {3}
    assert {r.dtype for r in found.rows} == {"bfloat16"}
    assert found.refused == {}
    assert json.loads(json.dumps(found.to_dict())).keys() == {"rows", "crossovers", "refused"}


def test_a_group_that_does_not_divide_is_named_before_any_work() -> None:
    with pytest.raises(ConfigError, match="group size 48 does not divide the K of 64x128"):
        bench_kernels([SHAPE], CPU, group_size=48)


def test_a_version_that_does_not_run_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = QuantLinear.prepare

    def refuse(self: QuantLinear, version: str | None = None, **options: object) -> object:
        if version == "GEMM":
            raise KernelNotSupportedError("too old")
        return prepare(self, version=version, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels.QuantLinear, "prepare", refuse)
    found = bench_kernels([SHAPE], CPU, rows=(1,), seconds=0, progress=False)
    assert found.refused == {"GEMM": "too old"}
    assert {r.version for r in found.rows} == {"GEMV", DENSE}
    assert found.crossovers == {"64x128": None}
