import json
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from awq.bench.kernels import ceiling, cold, run
from awq.bench.kernels.run import bench_kernels, bench_settings
from awq.bench.kernels.shapes import Setting, Shape
from awq.bench.results import DENSE
from awq.errors import ConfigError, KernelNotSupportedError
from awq.kernels.cuda.layout import Units, units_to_dense
from awq.linear import QuantLinear

CPU = torch.device("cpu")
SHAPE = Shape(64, 128)


def test_both_versions_and_a_dense_linear_are_timed() -> None:
    found = bench_kernels([SHAPE], CPU, rows=(1, 5), group_size=64, outlier_ratio=0.02, seconds=0, progress=False)
    assert {(r.version, r.rows) for r in found.rows} == {(v, n) for v in ("GEMV", "GEMM", DENSE) for n in (1, 5)}
    assert all(0 < r.p10_us <= r.median_us <= r.p90_us for r in found.rows)
    assert {r.outliers for r in found.rows} == {3}
    assert {r.dtype for r in found.rows} == {"bfloat16"}
    assert found.refused == {}
    assert found.ceiling is None
    assert json.loads(json.dumps(found.to_dict())).keys() >= {"rows", "crossovers", "promises", "refused"}


def test_only_the_versions_asked_for() -> None:
    settings = [Setting(SHAPE, 64, torch.bfloat16)]
    found = bench_settings(settings, CPU, rows=(1,), versions=("GEMV",), seconds=0, progress=False)
    assert [row.version for row in found.rows] == ["GEMV", DENSE]


def test_a_group_that_does_not_divide_is_named_before_any_work() -> None:
    with pytest.raises(ConfigError, match="group size 48 does not divide the K of 64x128"):
        bench_kernels([SHAPE], CPU, group_size=48)


def test_a_version_that_does_not_run_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = QuantLinear.prepare

    def refuse(self: QuantLinear, version: str | None = None, **options: object) -> object:
        if version == "GEMM":
            raise KernelNotSupportedError("too old")
        return prepare(self, version=version, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(run.QuantLinear, "prepare", refuse)
    found = bench_kernels([SHAPE], CPU, rows=(1,), seconds=0, progress=False)
    assert found.refused == {"GEMM": "too old"}
    assert {r.version for r in found.rows} == {"GEMV", DENSE}
    assert found.crossovers == {"64x128": None}


def test_own_kernels_are_measured_cold_between_two_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply(x: Tensor, units: Units, y: Tensor) -> None:
        y.copy_(x.float() @ units_to_dense(units).t())

    def own(setting: Setting, device: torch.device, versions: Sequence[str]) -> object:
        if setting.group_size == 32:
            return {}, dict.fromkeys(versions, "no such group")
        return {"GEMV": multiply}, {"GEMM": "none yet"}

    ceilings = iter((4000.0, 4100.0))
    monkeypatch.setattr(ceiling, "read_ceiling", lambda device: next(ceilings))
    monkeypatch.setattr(run, "own_kernels", own)
    monkeypatch.setattr(run, "_has_pdl", lambda device: True)
    for name, value in {"_ROTATED_BYTES": 1, "_CALLS": 2, "_PAUSE_S": 0}.items():
        monkeypatch.setattr(cold, name, value)
    settings = [Setting(SHAPE, group, torch.float16) for group in (64, 32)]
    found = bench_settings(settings, CPU, rows=(1, 2), versions=("GEMV", "GEMM"), seconds=0, progress=False)
    assert found.ceiling is not None
    assert (found.ceiling.start_gbs, found.ceiling.end_gbs, found.ceiling_gbs) == (4000, 4100, 4100)
    assert {row.kernel for row in found.rows if row.group_size == 64} == {"cublas_fp16", "awq_gemv"}
    assert {row.pdl for row in found.rows if row.kernel == "awq_gemv"} == {False, True}
    assert {row.version for row in found.rows if row.group_size == 32} == {"GEMV", "GEMM", DENSE}
    assert found.refused == {"GEMM": "none yet"}
    assert list(found.crossovers) == ["64x128 group 64", "64x128 group 32"]


def test_no_own_kernel_where_there_is_no_gpu() -> None:
    assert run.own_kernels(Setting(SHAPE, 64, torch.float16), CPU, ("GEMV",)) == ({}, {})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_own_kernels_are_right_while_they_are_timed(dtype: torch.dtype) -> None:
    settings = [Setting(Shape(1024, 2048), 128, dtype, outlier_ratio=ratio) for ratio in (0.0, 0.01)]
    found = bench_settings(settings, torch.device("cuda", 0), rows=(1, 8, 40), progress=False)
    assert found.refused == {}
    assert found.notes == []
    assert {row.version for row in found.rows} >= {"GEMV", "GEMM", DENSE}
    assert found.ceiling_gbs and found.ceiling_gbs > 50
