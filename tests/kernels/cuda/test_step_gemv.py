"""The fused step's GEMV of several rows: in how many parts it takes the input channels, and what each is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from awq.kernels.cuda.layout import UNIT_K, Gpu, Units
from awq.kernels.cuda.step import gemv

GPUS = {"sm_90a": 227, "sm_100a": 227, "sm_120a": 99}
WIDTHS = [64, 4096, 5120, 8192, 11008, 14336, 28672]


@pytest.fixture(params=GPUS)
def _gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemv, "gpu", lambda _: Gpu(request.param, 132, 1024 * GPUS[request.param]))


class Recorded:
    """A `Launch` that keeps what it was made of."""

    def __init__(self, source: Any, name: str, defines: Any, grid: int, block: int, shared: int, *_: Any) -> None:
        self.defines, self.shared, self.values = defines, shared, ()

    def bind(self, *values: Any) -> Recorded:
        assert len(gemv._PARAMS.pack(*(0 for _ in values))) % 8 == 0
        self.values = values
        return self


def units_of(rows: int, width: int, kept: int = 0) -> Units:
    tiles, units = rows // 16, -(-width // UNIT_K)
    codes = torch.zeros(tiles, units, 2048, dtype=torch.uint8)
    affine = torch.zeros(tiles, units, 80, dtype=torch.uint8)
    index = torch.zeros(16 * kept, dtype=torch.int32) if kept else None
    return Units(codes, affine, torch.zeros(tiles, kept, 256).half() if kept else None, index, width, rows, 128)


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("kept", [0, 3])
@pytest.mark.parametrize("width", WIDTHS)
def test_parts_are_the_whole(width: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Recorded] = []
    monkeypatch.setattr(gemv, "Launch", lambda *values: made.append(Recorded(*values)) or made[-1])
    units, bias = units_of(32, width, kept), torch.zeros(32).half()
    for rows in (1, 2, 8):
        made.clear()
        x, stream = torch.zeros(rows, width).half(), torch.zeros(rows, 32)
        gemv.accumulate(x, units, bias, stream, 0.5)
        step = gemv.units_at_once(units, 0, rows)
        assert len(made) == -(-units.codes.shape[1] // step) and (rows > 1 or len(made) == 1)
        past = 0
        for part in made:
            codes, affine, residual, index, some, added, out, stride, count, _, taken = part.values[:11]
            assert part.defines["ROWS"] == (1 if rows == 1 else 8) and part.defines["OUTPUT"] == 1
            assert codes.data_ptr() == units.codes.data_ptr() + 2048 * past // UNIT_K
            assert affine.data_ptr() == units.affine.data_ptr() + 80 * past // UNIT_K
            assert some.data_ptr() == x.data_ptr() + 2 * past and (stride, count) == (width, rows)
            assert out is stream and part.values[-1] == units.codes.shape[1]
            assert (residual, index, added) == ((None, None, None) if past else (units.kept, units.index, bias))
            past += taken
        assert past == width


@pytest.mark.usefixtures("_gpu")
def test_what_fits_for_more_rows_fits_for_fewer() -> None:
    for width in WIDTHS:
        units = units_of(64, width)
        found = [gemv.fits(units, 0, rows) for rows in range(1, 9)]
        steps = [gemv.units_at_once(units, 0, rows) for rows in range(1, 9)]
        assert found[0] and found[1:] == sorted(found[1:], reverse=True)
        assert all(steps) and steps[1:] == sorted(steps[1:], reverse=True)
