"""The GEMM kernels against a float32 product with the dense weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from awq import jit
from awq.kernels.cuda import dense, gemm, schedule
from awq.kernels.cuda.designs import Design, designs
from awq.kernels.cuda.layout import Shape, Units, to_units, units_to_dense
from awq.kernels.cuda.schedule import Plan
from awq.packing import pack
from tests.kernels.plain import random_outliers, random_packed

pytestmark = pytest.mark.gpu

ROWS = [*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 128, 129, 300, 777]
# Few and many outputs, not multiples of a tile or a block; in_features of less than a unit, and not of whole units.
SHAPES = [(8, 32), (24, 96), (72, 352), (136, 576), (1032, 1536), (4096, 4096), (256, 11008), (16 * 132 + 8, 256)]
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3}
HALF, BRAIN = torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(autouse=True)
def fresh_launches() -> Iterator[None]:
    gemm._launch.cache_clear()
    yield
    gemm._launch.cache_clear()


def weight(n: int, k: int, group: int = 128, kept: int = 0, seed: int = 0) -> Units:
    group = group if group == -1 or k % group == 0 else 32
    packed = random_packed(n, k, group, seed=seed)
    return to_units(packed, random_outliers(packed, kept) if kept else None, "cuda")


def activations(rows: int, k: int, dtype: torch.dtype = HALF, padding: int = 0) -> Tensor:
    wide = torch.full((rows, -(-k // 8) * 8 + padding), float("nan"), dtype=dtype, device="cuda")
    x = wide[:, :k]
    x.copy_(torch.randn(rows, k, device="cuda"))
    return x


def product(units: Units, x: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x.float() @ units_to_dense(units).t()
    if units.kept is not None and units.index is not None:
        kept = units.kept.view(*units.kept.shape[:2], 8, 4, 2, 2, 2)  # tile, step, r, c, half k, half row, bit
        residual = kept.permute(0, 5, 2, 1, 4, 3, 6).reshape(-1, units.index.numel())[: units.out_features].float()
        there = units.index >= 0
        y = y + x.float()[:, units.index[there].long()] @ residual[:, there].t()
    return y if bias is None else y + bias.float()


def run(x: Tensor, units: Units, bias: Tensor | None = None) -> Tensor:
    """With room behind the result, poisoned like it, that no kernel may write."""
    poisoned = torch.full((len(x) + 3, units.out_features), float("nan"), dtype=x.dtype, device="cuda")
    gemm.gemm(x, units, bias, poisoned[: len(x)])
    torch.cuda.synchronize()
    assert poisoned[len(x) :].isnan().all()
    return poisoned[: len(x)]


def error(y: Tensor, wanted: Tensor) -> float:
    assert y.isfinite().all()
    return float((y.float() - wanted).norm() / wanted.norm())


def check(rows: int, units: Units, dtype: torch.dtype = HALF, padding: int = 0, bias: bool = False) -> None:
    x = activations(rows, units.in_features, dtype, padding)
    b = torch.randn(units.out_features, device="cuda").to(dtype) if bias else None
    y = run(x, units, b)
    assert error(y, product(units, x, b)) < TOLERANCE[dtype], plan_of(rows, units, dtype)
    assert torch.equal(y, run(x, units, b)), "other bits the second time"


def plan_of(rows: int, units: Units, dtype: torch.dtype = HALF) -> Plan:
    steps = 0 if units.kept is None else units.kept.shape[1]
    shape = Shape(units.in_features, units.out_features, units.group, steps, dtype is BRAIN)
    return gemm._launch(0, shape, rows, jit.programmatic()).plan


def force(monkeypatch: pytest.MonkeyPatch, design: Design) -> None:
    monkeypatch.setattr(schedule, "_choose", lambda *_: (design, "asked for"))
    gemm._launch.cache_clear()


def own_designs() -> list[Design]:
    if not torch.cuda.is_available():
        return []
    return list(designs(jit.arch_of(torch.cuda.get_device_capability())))


def all_designs() -> list[Design]:
    """Of this GPU, and those of older ones that it can run too."""
    found = own_designs()
    if not found or torch.cuda.get_device_capability() < (9, 0):
        return found
    archs = ("sm_75", "sm_80", "sm_86", "sm_100a", "sm_120a")
    older = [(arch, design) for arch in archs for design in designs(arch)]
    return found + [replace(design, name=f"{design.name} {arch}") for arch, design in older]


def by_name(design: Design) -> str:
    return design.name.replace(" ", "-")


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_row_count(n: int, k: int) -> None:
    units = weight(n, k)
    for rows in ROWS:
        check(rows, units)


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("kept", [0, 1, 16, 100])
def test_groups_dtypes_and_kept_channels(dtype: torch.dtype, group: int, kept: int) -> None:
    units = weight(1032, 1536, group, kept)
    for rows in (1, 8, 16, 17, 33, 65, 128, 300, 777):
        check(rows, units, dtype, padding=8, bias=True)


@pytest.mark.parametrize("design", all_designs(), ids=by_name)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_every_design(monkeypatch: pytest.MonkeyPatch, design: Design, group: int, dtype: torch.dtype) -> None:
    if dtype is BRAIN and design.copy == 0:
        pytest.skip("float16 only")
    force(monkeypatch, design)
    for n, k, kept in ((1032, 1536, 0), (392, 4096, 40), (24, 352, 5), (4096, 1024, 0), (2048, 8192, 300)):
        units = weight(n, k, group, kept)
        for rows in (1, design.tokens - 1, design.tokens, 2 * design.tokens + 1):
            check(rows, units, dtype, bias=kept > 0)


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_many_rows_as_where_there_is_no_wgmma(monkeypatch: pytest.MonkeyPatch, group: int, dtype: torch.dtype) -> None:
    """Dequantized, then multiplied by torch: the dense weight bit for bit, and what comes of it."""
    monkeypatch.setattr(gemm, "dequantizes", lambda rows, arch: True)
    for n, k, kept in ((8, 32, 0), (24, 352, 5), (1032, 1536, 16), (392, 4096, 300)):
        units = weight(n, k, group, kept)
        eye = torch.eye(k, device="cuda").to(dtype)
        wanted = product(units, eye).t()
        assert torch.equal(dense.dequantize(units, dtype), wanted.to(dtype))
        for rows in (1, 77, 512):
            check(rows, units, dtype, padding=8, bias=True)
    check(300, weight(24, 100, -1), dtype)


def test_in_features_that_are_no_multiple_of_eight() -> None:
    for rows in (1, 16, 40, 200, 500):
        check(rows, weight(24, 100, -1))


@pytest.mark.parametrize("rows", [3, 30, 60, 120, 500])
@pytest.mark.parametrize("kept", [0, 20])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_stays_alone(rows: int, kept: int, value: float) -> None:
    units = weight(392, 4096, kept=kept)
    x = activations(rows, 4096)
    clean = run(x, units).clone()
    x[1, 77] = value
    y = run(x, units)
    others = [row for row in range(rows) if row != 1]
    assert torch.equal(y[others], clean[others])
    assert not y[1].isfinite().any()


@pytest.mark.parametrize("rows", [1, 16, 32, 64, 128, 512, 1024])
def test_huge_channels_do_not_drown_the_others(rows: int) -> None:
    """A channel 1000 times the rest whose weights are 0: what is left must be as right as with it at rest."""
    packed = random_packed(1024, 4096, 128)
    codes, zeros = packed.codes(), packed.zeros()
    codes[:, 5] = zeros[:, 0]
    units = to_units(pack(codes, zeros, packed.scales.t()), None, "cuda")
    x = activations(rows, 4096)
    x[:, 5] *= 1000
    y = run(x, units)
    wanted = product(units, x)
    errors = (y.float() - wanted).norm(dim=1) / wanted.norm(dim=1)
    cublas = (x @ units_to_dense(units).half().t()).float()
    allowed = 2 * ((cublas - wanted).norm(dim=1) / wanted.norm(dim=1)).clamp(min=2e-4)
    assert (errors <= allowed).all()


@pytest.mark.parametrize("rows", [8, 32, 64, 128, 256])
def test_two_streams_at_once(rows: int) -> None:
    units = weight(4096, 4096)
    x = [activations(rows, 4096) for _ in range(2)]
    wanted = [run(a, units).clone() for a in x]
    streams = [torch.cuda.Stream() for _ in range(2)]
    y = [[torch.empty_like(w) for _ in range(20)] for w in wanted]
    torch.cuda.synchronize()
    for i in range(20):
        for which, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                gemm.gemm(x[which], units, None, y[which][i])
    torch.cuda.synchronize()
    for which in range(2):
        assert all(torch.equal(out, wanted[which]) for out in y[which])


@pytest.mark.parametrize("rows", [8, 32, 64, 128, 256, 600])
@pytest.mark.parametrize("kept", [0, 40])
def test_dependent_launches_in_a_graph(rows: int, kept: int) -> None:
    """Each takes the one before as its input; started early, they must still see all of it."""
    units = weight(2048, 2048, kept=kept)

    def chain(first: Tensor, outs: list[Tensor]) -> None:
        for before, after in zip([first, *outs], outs, strict=False):
            gemm.gemm(before, units, None, after)

    x = activations(rows, 2048) * 0.01
    outs = [torch.empty(rows, 2048, dtype=HALF, device="cuda") for _ in range(6)]
    with jit.programmatic(False):
        chain(x, outs)
    torch.cuda.synchronize()
    wanted = [out.clone() for out in outs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(x, outs)
    for _ in range(3):
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(out, w) for out, w in zip(outs, wanted, strict=True))


def test_two_graphs_at_once() -> None:
    units, x = weight(4096, 4096), activations(16, 4096)
    wanted = run(x, units).clone()
    outs = [torch.empty_like(wanted) for _ in range(2)]
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    for graph, out in zip(graphs, outs, strict=True):
        with torch.cuda.graph(graph):
            for _ in range(10):
                gemm.gemm(x, units, None, out)
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(out, wanted) for out in outs)
