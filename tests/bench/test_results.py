import json
import math

import pytest
import torch

from awq.bench.kernels.shapes import Setting, Shape
from awq.bench.results import DENSE, PEER, Ceiling, KernelBench, KernelRow, crossover, gemv_gain, panels, row_of
from awq.bench.timing import Timing

SHAPE = Shape(64, 128)
HALF = torch.float16


def row(
    version: str, rows: int, us: float, setting: Setting | None = None, pdl: bool = False, dense_us: float | None = None
) -> KernelRow:
    setting = setting or Setting(SHAPE, 64, HALF)
    timing = Timing(us / 1e6, us / 1e6, us / 1e6, 9)
    return row_of(setting, rows, version, version.lower(), timing, pdl=pdl, dense_us=dense_us)


def rows_of(gemv: dict[int, float], gemm: dict[int, float], pdl: bool = False) -> list[KernelRow]:
    timed = (("GEMV", gemv), ("GEMM", gemm))
    return [row(version, rows, us, pdl=pdl) for version, times in timed for rows, us in times.items()]


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
    assert crossover(rows_of(gemv, gemm)) == expected


def test_the_way_an_engine_launches_decides() -> None:
    rows = [*rows_of({1: 1, 8: 2}, {1: 2, 8: 1}, pdl=True), *rows_of({1: 3, 8: 1}, {1: 2, 8: 2})]
    assert crossover(rows) == crossover(rows[::-1]) == 8
    assert gemv_gain(rows) == pytest.approx(50)


def test_gain_needs_both_versions_for_one_row() -> None:
    assert gemv_gain(rows_of({1: 1}, {8: 1})) is None
    assert gemv_gain(rows_of({1: 3}, {1: 2})) == pytest.approx(-50)


def test_panels_are_named_by_what_differs() -> None:
    plain = row("GEMV", 1, 1)
    assert list(panels([plain, row(PEER, 1, 1), row(DENSE, 1, 1)])) == ["64x128"]
    assert panels([plain, row(PEER, 1, 1)]) == {"64x128": [plain]}
    other = [
        row("GEMV", 1, 1, Setting(SHAPE, 32, HALF)),
        row("GEMV", 1, 1, Setting(SHAPE, 64, HALF, outlier_ratio=0.02)),
        row("GEMV", 1, 1, Setting(SHAPE, 64, HALF, zero_point=False)),
    ]
    assert list(panels([plain, *other])) == [
        "64x128 group 64",
        "64x128 group 32",
        "64x128 group 64 2 % outliers",
        "64x128 group 64 symmetric",
    ]
    assert list(panels([plain, row("GEMV", 1, 1, Setting(SHAPE, 64, torch.bfloat16))])) == [
        "64x128 fp16",
        "64x128 bf16",
    ]


def test_share_of_the_ceiling() -> None:
    one = row("GEMV", 1, 2.0)
    assert one.of_ceiling(4.0) == pytest.approx(100 * Setting(SHAPE, 64, HALF).call_bytes(1) / 2e-6 / 4e9)
    assert one.of_ceiling(None) is None
    assert row("GEMM", 64, 2.0).of_ceiling(4.0) is None
    assert row(DENSE, 1, 2.0).of_ceiling(4.0) is None


def test_the_higher_ceiling_counts() -> None:
    assert Ceiling(4500, 4600).gbs == Ceiling(4600, 4500).gbs == 4600


def test_what_takes_too_long_for_its_bytes() -> None:
    size = Setting(SHAPE, 64, HALF).call_bytes(1)
    gbs = size / 1e3  # the bytes take a microsecond
    fast, slow = rows_of({1: 3.4}, {1: 9}), rows_of({1: 3.6}, {1: 9})
    assert KernelBench(fast, {}, Ceiling(gbs, gbs)).slow == []
    assert KernelBench(slow, {}, Ceiling(gbs, gbs)).slow == ["64x128"]
    assert KernelBench(slow, {}).slow == []


def test_json() -> None:
    rows = [row(DENSE, 1, 6), row("GEMV", 1, 2, dense_us=6), row("GEMM", 1, 4, dense_us=6)]
    bench = KernelBench(rows, {}, Ceiling(1, 2), {"marlin": "absent"}, ["odd"])
    found = json.loads(json.dumps(bench.to_dict()))
    assert KernelBench.from_dict(found) == bench
    assert found.keys() == {
        *("rows", "crossovers", "promises", "refused", "ceiling", "slow", "left_out", "notes"),
    }
    assert found["promises"] == {"64x128": {"gemv_less_percent": 50.0, "gemm_from_rows": None}}
    assert found["ceiling"] == {"start_gbs": 1, "end_gbs": 2, "gbs": 2}
    assert rows[1].over_dense == 3
    assert rows[0].over_dense is None
    assert math.isfinite(found["rows"][1]["percent_of_ceiling"])
