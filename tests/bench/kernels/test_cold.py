"""The cold measurement on a CPU: its kernels are stand-ins over the same units, its graphs are loops."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from awq.bench.kernels import cold
from awq.bench.kernels.cold import ColdLinear
from awq.bench.kernels.shapes import Setting, Shape
from awq.bench.results import DENSE, PEER, KernelRow
from awq.errors import KernelError
from awq.kernels.cuda.layout import Units, units_to_dense
from awq.packing import PackedInt4

CPU = torch.device("cpu")
SETTING = Setting(Shape(64, 256), 64, torch.float16)


def multiply(x: Tensor, units: Units, y: Tensor) -> None:
    y.copy_(x.float() @ units_to_dense(units).t())


def off_by_one_percent(x: Tensor, units: Units, y: Tensor) -> None:
    y.copy_(1.01 * x.float() @ units_to_dense(units).t())


def failing(x: Tensor, units: Units, y: Tensor) -> None:
    if x.shape[0] > 1:
        raise KernelError("no more than one row.")
    multiply(x, units, y)


class Peer:
    name = "other"

    def __init__(self, factor: float = 1.0, reason: str | None = None, fails: bool = False) -> None:
        self._factor, self._reason, self._fails = factor, reason, fails

    def rejects(self, setting: Setting) -> str | None:
        return self._reason

    def dtype(self, wanted: torch.dtype) -> torch.dtype:
        return torch.bfloat16

    def prepare(self, packed: PackedInt4, setting: Setting) -> Callable[[Tensor], Tensor]:
        if self._fails:
            raise ZeroDivisionError("odd\nlong story")
        weight = self._factor * packed.dequantize()
        return lambda x: (x.float() @ weight.t()).to(x.dtype)


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"_ROTATED_BYTES": 30_000, "_CALLS": 5, "_CALLS_OF_MANY_ROWS": 3, "_PAUSE_S": 0, "_TOO_SLOW_S": 1e3}
    for name, value in values.items():
        monkeypatch.setattr(cold, name, value)


def by_version(rows: list[KernelRow]) -> dict[str, KernelRow]:
    return {row.version: row for row in rows}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 9])
def test_own_kernels_beside_a_dense_linear(dtype: torch.dtype, rows: int) -> None:
    setting = Setting(SETTING.shape, 64, dtype)
    linear = ColdLinear(setting, CPU, {"GEMV": multiply, "GEMM": multiply}, pdl=False)
    found = by_version(linear.measure(rows))
    assert list(found) == [DENSE, "GEMV", "GEMM"]
    assert [row.kernel for row in found.values()][1:] == ["awq_gemv", "awq_gemm"]
    assert all(0 < row.p10_us <= row.median_us <= row.p90_us for row in found.values())
    assert {row.dense_us for row in list(found.values())[1:]} == {found[DENSE].median_us}
    assert all(row.error is not None and row.error < 4e-3 for row in found.values())
    assert all(row.read_bytes == setting.call_bytes(rows) and row.rows == rows for row in found.values())
    assert linear.notes == []
    assert linear.left_out == {}


def test_each_way_of_launching_is_a_row_of_its_own() -> None:
    found = ColdLinear(SETTING, CPU, {"GEMV": multiply}, pdl=True).measure(2)
    assert [(row.version, row.pdl) for row in found] == [(DENSE, False), ("GEMV", False), ("GEMV", True)]


def test_copies_exceed_the_cache() -> None:
    seen = set()

    def spy(x: Tensor, units: Units, y: Tensor) -> None:
        seen.add(units.codes.data_ptr())
        multiply(x, units, y)

    ColdLinear(SETTING, CPU, {"GEMV": spy}, pdl=False).measure(1)
    assert len(seen) == math.ceil(30_000 / SETTING.weight_bytes)


def test_outlier_channels_belong_to_the_reference() -> None:
    """This stand-in forgets them."""
    setting = Setting(SETTING.shape, 64, torch.float16, outlier_ratio=0.05)
    linear = ColdLinear(setting, CPU, {"GEMV": multiply}, pdl=False)
    dense, own = linear.measure(1)
    assert dense.error is not None and dense.error < 5e-4
    assert own.error is not None and own.error > 0.05
    assert own.outliers == 13


def test_a_wrong_result_of_our_own_is_kept_and_said() -> None:
    linear = ColdLinear(SETTING, CPU, {"GEMM": off_by_one_percent}, pdl=False)
    error = by_version(linear.measure(3))["GEMM"].error
    assert error == pytest.approx(0.01, rel=0.05)
    assert linear.notes == ["awq_gemm, 64x256, 3 rows: relative error 1.0e-02"]


def test_bits_that_depend_on_the_launch_are_said() -> None:
    calls = 0

    def nervous(x: Tensor, units: Units, y: Tensor) -> None:
        nonlocal calls
        calls += 1
        multiply(x, units, y)
        y += 1e-3 * calls

    linear = ColdLinear(SETTING, CPU, {"GEMV": nervous}, pdl=True)
    linear.measure(1)
    assert "awq_gemv, 64x256, 1 rows: other bits with than without pdl" in linear.notes


def test_a_kernel_that_fails_leaves_the_others() -> None:
    linear = ColdLinear(SETTING, CPU, {"GEMV": failing, "GEMM": multiply}, pdl=False)
    assert list(by_version(linear.measure(1))) == [DENSE, "GEMV", "GEMM"]
    assert list(by_version(linear.measure(2))) == [DENSE, "GEMM"]
    assert linear.notes == ["awq_gemv, 64x256, 2 rows: KernelError: no more than one row."]


def test_gemv_is_not_timed_where_gemm_has_long_won() -> None:
    linear = ColdLinear(SETTING, CPU, {"GEMV": multiply, "GEMM": multiply}, pdl=False)
    assert list(by_version(linear.measure(cold.GEMV_MOST_ROWS + 1))) == [DENSE, "GEMM"]


def test_a_peer() -> None:
    linear = ColdLinear(SETTING, CPU, {"GEMV": multiply}, pdl=False)
    linear.add(Peer())
    row = by_version(linear.measure(2))[PEER]
    assert (row.kernel, row.dtype, row.pdl) == ("other", "bfloat16", False)
    assert row.error is not None and row.error < 4e-3
    assert row.over_dense is not None


@pytest.mark.parametrize(
    ("peer", "reason"),
    [(Peer(reason="too old"), "too old"), (Peer(fails=True), "ZeroDivisionError: odd")],
)
def test_a_peer_that_does_not_run(peer: Peer, reason: str) -> None:
    linear = ColdLinear(SETTING, CPU, {"GEMV": multiply}, pdl=False)
    linear.add(peer)
    assert linear.left_out == {"other": reason}
    assert PEER not in by_version(linear.measure(1))


def test_a_wrong_peer_is_dropped() -> None:
    linear = ColdLinear(SETTING, CPU, {"GEMV": multiply}, pdl=False)
    linear.add(Peer(factor=1.1))
    assert PEER not in by_version(linear.measure(1))
    (note,) = linear.notes
    assert note.startswith("other, 64x256, 1 rows: relative error")


def test_a_far_slower_peer_is_left_out_from_there_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold, "_TOO_SLOW_S", 0.0)
    monkeypatch.setattr(cold, "_TOO_SLOW", 0)
    linear = ColdLinear(SETTING, CPU, {"GEMV": multiply}, pdl=False)
    linear.add(Peer())
    assert PEER not in by_version(linear.measure(2))
    assert linear.left_out["other"].startswith("64x256 from 2 rows on: more than 0 times slower")
