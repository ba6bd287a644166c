"""What a fused step asks for ahead: whole units, one part behind the other, no more of a cache than its share."""

from __future__ import annotations

import pytest
import torch

from awq.kernels.cuda.layout import UNIT_BYTES
from awq.kernels.cuda.step import ahead as ahead_module
from awq.kernels.cuda.step.ahead import AHEAD, Ahead, ahead, asked, cache_values, values_of
from tests.kernels.cuda.test_step_gemv import units_of

KERNELS = ("qkv", "output", "gate_up", "down")


@pytest.mark.parametrize(("rows", "width", "paired"), [(4096, 4096, False), (22016, 4096, True), (4096, 11008, False)])
def test_parts_lie_one_behind_the_other(rows: int, width: int, paired: bool) -> None:
    units, end = units_of(rows, width, 3), 0
    for first, count in ((0, 3 * 2**20), (3 * 2**20, 10**6), (3 * 2**20 + 10**6, 2**22)):
        values = Ahead(units, paired, first, count).values(132)
        codes, affine, kept, tiles, pairs, per_tile, record, steps, blocks, start, taken = values
        assert codes is units.codes and affine is units.affine and kept is units.kept
        assert (record, steps) == (80, 3 * 512)
        assert (tiles, pairs, per_tile, blocks) == (rows // (32 if paired else 16), paired, -(-width // 256), 132)
        assert start == end and isinstance(taken, int)
        end += taken
    assert (end + 1) * 132 * (UNIT_BYTES + 80) > 7 * 2**20 + 10**6 >= end * 132 * (UNIT_BYTES + 80)


def test_who_asks_for_what(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"qkv": {"down": 5, "qkv": 3}, "gate_up": {"attention": 0, "output": 4, "gate_up": 2}, "down": {}}
    monkeypatch.setattr(ahead_module, "AHEAD", table)
    units = units_of(32, 256)
    assert asked("down", units, "qkv", units) == (None, Ahead(units, False, 0, 5))
    assert ahead("qkv", "qkv", units) == Ahead(units, False, 5, 3)
    assert ahead("attention", "gate_up", units) is None and ahead("down", "qkv", None) is None
    assert ahead("gate_up", "gate_up", units) == Ahead(units, True, 4, 2)
    assert not any(values_of(None, 132)) and len(values_of(None, 132)) == len(Ahead(units, True, 4, 2).values(132))


def test_every_kernel_of_a_layer_has_its_place() -> None:
    assert set(AHEAD) == {*KERNELS, "cache"}
    assert all(set(shares) <= {*KERNELS, "attention"} for shares in AHEAD.values())
    assert all(list(shares).index(name) == len(shares) - 1 for name, shares in AHEAD.items() if name in shares)


@pytest.mark.parametrize("window", [None, 1, 100, 100_000])
def test_no_more_of_a_cache_than_its_share(window: int | None) -> None:
    keys = torch.empty(2, 8, 512, 64, dtype=torch.float16)
    number = torch.zeros(1, dtype=torch.int64)
    *_, rows, heads, capacity, token, seen, most = cache_values(keys, keys, number, number, window)
    assert (rows, heads, capacity, token, seen) == (2, 8, 512, 128, window or 0)
    share = AHEAD["cache"]["qkv"] // (2 * 2 * 8 * 128)
    assert most == (share if window is None else min(share, window - 1))
