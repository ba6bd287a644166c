"""Plans of the GEMM: every number of rows, weight and GPU gets one that fits and covers every tile once."""

from __future__ import annotations

import pytest

from awq.kernels.cuda.designs import WGMMA, Design, dequantizes, designs, shared_limit, variants
from awq.kernels.cuda.layout import GROUPS, Shape
from awq.kernels.cuda.schedule import Plan, plan

ARCHS = ["sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_110a", "sm_120a", "sm_121a"]
ROWS = [*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 128, 129, 300, 777, 1024, 4096, 100_000]
SHAPES = [(8, 32), (24, 96), (72, 352), (4096, 4096), (12288, 4096), (1032, 11008), (8192, 28672), (152064, 3584)]


# Out and in features -> the fastest design measured on an H200 at 8, 16, 32, ... 4096 rows; ~: a tie with another.
FASTEST = {
    (12288, 4096): "PPACFGHHHH",
    (4096, 4096): "PP~DDFFGGH",
    (22016, 4096): "PPACFHHHHH",
    (4096, 11008): "PPADFFFGGH",
    (8192, 8192): "PP~CFFG~HH",
    (8192, 28672): "QQBEFHGHHH",
}


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


@pytest.mark.parametrize(("n", "k"), FASTEST)
def test_the_fastest_design_is_taken(n: int, k: int) -> None:
    taken = "".join(plan(8 << i, Shape(k, n, 128, 0, False), "sm_90a", 132).design.name[0] for i in range(10))
    assert all(best in (found, "~") for found, best in zip(taken, FASTEST[n, k], strict=True)), taken


def test_no_design_is_compiled_for_nothing() -> None:
    for arch in ARCHS:
        taken = {
            plan(rows, Shape(k, n, 128, 0, False), arch, 132).design.name
            for n, k in {*SHAPES, *FASTEST}
            for rows in ROWS
            if not dequantizes(rows, arch)
        }
        assert taken == {design.name for design in designs(arch)}


def test_many_rows_are_dequantized_where_there_is_no_wgmma() -> None:
    first = {arch: next((rows for rows in range(1, 5000) if dequantizes(rows, arch)), None) for arch in ARCHS}
    assert first.pop("sm_90a") is None
    assert first.pop("sm_75") == 256 and set(first.values()) == {512}
    for arch in ARCHS:
        sources = {source.stem for source, *_ in variants(arch)}
        assert ("dequantize" in sources) is (arch != "sm_90a") and ("gather" in sources) is (arch == "sm_90a")


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
