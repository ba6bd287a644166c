"""Plans of the GEMM: every number of rows, weight and GPU gets one that fits and covers every tile once."""

from __future__ import annotations

import pytest

from awq.kernels.cuda.designs import WGMMA, Design, Plan, Shape, designs, plan, shared_limit, variants
from awq.kernels.cuda.layout import GROUPS

ARCHS = ["sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_110a", "sm_120a", "sm_121a"]
ROWS = [*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 128, 129, 300, 777, 1024, 4096, 100_000]
SHAPES = [(8, 32), (24, 96), (72, 352), (4096, 4096), (12288, 4096), (1032, 11008), (8192, 28672), (152064, 3584)]


def segments(p: Plan, worker: int) -> list[tuple[int, int, int]]:
    """(tile, first step, last step) in the order in which a worker takes them: `Schedule` of gemm_common.cuh."""
    own = [(i * p.workers + worker, 0, p.steps) for i in range(p.whole) if i * p.workers + worker < p.tiles]
    step = worker * p.share + min(worker, p.longer)
    end = (worker + 1) * p.share + min(worker + 1, p.longer)
    while step < end:
        tile, first = divmod(step, p.steps)
        last = min(p.steps, first + end - step)
        own.append((p.whole * p.workers + tile, first, last))
        step += last - first
    return own


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("sms", [1, 40, 132])
def test_a_plan_covers_every_step_once(arch: str, n: int, k: int, sms: int) -> None:
    for rows in ROWS:
        p = plan(rows, Shape(k, n, 128, 0, False), arch, max(sms, 2))
        assert p.reason
        assert p.token_tiles * p.design.tokens >= rows
        assert p.row_blocks * p.design.block_rows * p.design.cluster >= n
        assert p.steps * p.design.step_k >= k
        assert 1 <= p.blocks <= max(sms, 2)
        if p.tiles * p.steps > 20_000:
            continue
        done = [part for worker in range(p.workers) for part in segments(p, worker)]
        assert sum(last - first for _, first, last in done) == p.tiles * p.steps
        assert len({(tile, step) for tile, first, last in done for step in range(first, last)}) == p.tiles * p.steps
        assert p.splits or all(last - first == p.steps for _, first, last in done)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kept", [0, 1, 6, 18, 100])
def test_a_plan_fits_its_gpu(arch: str, group: int, kept: int) -> None:
    for rows in (1, 16, 17, 32, 33, 64, 65, 128, 500):
        for n, k in SHAPES:
            p = plan(rows, Shape(k, n, group, kept, False), arch, 132)
            assert p.shared <= shared_limit(arch)
            assert p.design.stages >= 2
            assert not kept or not p.design.mma or 1 <= p.kept_room <= kept


def test_wgmma_only_where_it_is() -> None:
    for arch in ARCHS:
        assert bool(set(designs(arch)) & set(WGMMA)) == (arch == "sm_90a")


def test_what_is_asked_for_is_a_variant() -> None:
    """Else it would be compiled neither ahead nor in the test that compiles everything."""
    for arch in ARCHS:
        known = [(name, defines) for _, name, _, defines in variants(arch)]
        for group in GROUPS:
            for rows in ROWS:
                for n, k in SHAPES:
                    design: Design = plan(rows, Shape(k, n, group, 0, False), arch, 132).design
                    assert (design.kernel, design.defines(group, False)) in known
