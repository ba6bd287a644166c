"""Plans of the GEMV: every shape gets one that fits, on every GPU that has room for it at all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from awq import jit
from awq.kernels.cuda import gemv
from awq.kernels.cuda.gemv import MAX_ROWS, Plan, has_ring, max_rows, plan, requests, variants
from awq.kernels.cuda.layout import GROUPS, Gpu, Shape

# Bytes of shared memory that a block may have, and multiprocessors.
GPUS = {"sm_75": (64, 40), "sm_80": (163, 108), "sm_86": (99, 84), "sm_90a": (227, 132), "sm_100a": (227, 148)}
SHAPES = [
    (32, 8),
    (100, 24),
    (352, 72),
    (4096, 4096),
    (4096, 12288),
    (11008, 4096),
    (8192, 57344),
    (18944, 3584),
    (28672, 8192),
    (3584, 152064),
]
KEPT = [0, 1, 18]


def plans(arch: str) -> Iterator[tuple[Shape, int, Plan | None]]:
    kib, sms = GPUS[arch]
    for k, n in SHAPES:
        for group in GROUPS:
            for kept in KEPT:
                shape = Shape(k, n, group, kept, bf16=False)
                for rows in range(1, MAX_ROWS + 1):
                    yield shape, rows, plan(shape, rows, sms, 1024 * kib, has_ring(arch))


@pytest.mark.parametrize("arch", GPUS)
def test_a_plan_fits_its_gpu(arch: str) -> None:
    for shape, rows, found in plans(arch):
        if found is None:
            continue
        assert 0 < found.shared <= 1024 * GPUS[arch][0], (shape, rows)
        assert 0 <= found.in_flight <= found.stages
        assert (found.stages >= 1) is has_ring(arch)


@pytest.mark.parametrize("arch", GPUS)
def test_none_only_where_nothing_fits(arch: str) -> None:
    """x alone, with 112 KB for a ring of two stages and sums, or 48 KB for sums, is more than there is."""
    for shape, rows, found in plans(arch):
        values = 3 if rows == 1 else 2 * rows
        if found is None:
            assert values * shape.in_features + (112 if has_ring(arch) else 48) * 1024 > 1024 * GPUS[arch][0]


@pytest.mark.parametrize("arch", GPUS)
def test_fewer_rows_fit_where_more_do(arch: str) -> None:
    fits: dict[Shape, list[bool]] = {}
    for shape, _, found in plans(arch):
        fits.setdefault(shape, []).append(found is not None)
    for each in fits.values():
        assert each[1:] == sorted(each[1:], reverse=True)
    if arch in ("sm_90a", "sm_100a"):
        assert all(each[0] for each in fits.values())


@pytest.mark.parametrize("arch", GPUS)
def test_what_is_asked_for_is_a_variant(arch: str) -> None:
    """Else it would be compiled neither ahead nor in the test that compiles everything."""
    known = [defines for _, name, _, defines in variants(arch) if name == "gemv"]
    for shape, rows, found in plans(arch):
        if found is not None:
            defines = gemv._defines(shape.group, False, rows, found.way, arch)
            assert defines in known
            assert defines in [asked for *_, asked in requests(shape, arch)]


def test_which_gpus_have_a_ring() -> None:
    rings = {arch: has_ring(arch) for arch in ("sm_75", "sm_80", "sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_120a")}
    assert rings == dict.fromkeys(("sm_75", "sm_80", "sm_89", "sm_120a"), False) | dict.fromkeys(
        ("sm_90a", "sm_100a", "sm_103a"), True
    )


@pytest.mark.parametrize("arch", GPUS)
def test_rows_a_launch(monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    kib, sms = GPUS[arch]
    monkeypatch.setattr(gemv, "gpu", lambda device: Gpu(arch, sms, 1024 * kib))
    narrow, wide = Shape(1024, 4096, 128, 0, False), Shape(200_000, 4096, 128, 0, False)
    assert (max_rows(narrow, 0), max_rows(wide, 0)) == (MAX_ROWS, 0)
    for shape, rows, found in plans(arch):
        if rows == max_rows(shape, 0):
            assert found is not None


def test_no_room_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemv, "gpu", lambda device: Gpu("sm_75", 40, 64 * 1024))
    monkeypatch.setattr(jit, "kernel", lambda *arguments: pytest.fail("compiled"))
    with pytest.raises(ValueError, match="8 rows of 28672 channels do not fit"):
        gemv._launcher(0, Shape(28672, 4096, 128, 0, False), 8, True)


@pytest.mark.parametrize("arch", GPUS)
def test_no_slot_comes_round_twice_between_two_tiles_of_a_warp(arch: str) -> None:
    kib, sms = GPUS[arch]
    for units in range(1, 40):
        for rows in (1, 8):
            shape = Shape(256 * units, 200_000, 128, 1, bf16=False)
            found = plan(shape, rows, sms, 1024 * kib, has_ring(arch))
            if found is None:
                continue
            tiles = [unit // units for unit in range(0, 50 * units, found.way.warps)]
            assert max(after - tile for tile, after in itertools.pairwise(tiles)) <= found.slots <= 16
