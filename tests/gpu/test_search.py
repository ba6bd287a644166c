"""The kernels of the scale and the clip search against the same loops in torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awq.algorithm.search.affine import ranges, span
from awq.algorithm.search.clip import SHRINKS, search_clip
from awq.algorithm.search.loops import PLAIN_LOOPS
from awq.kernels.cuda import search
from awq.pipeline.effort import KERNELS

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
SHAPES = [(1, 32, 32), (333, 1408, 128), (130, 192, 64), (1376, 4096, 128), (1000, 1056, 32), (17, 128, 128)]
GRIDS = [(4, True), (4, False), (2, True), (3, False), (8, True)]
each_shape = pytest.mark.parametrize(("out", "width", "group"), SHAPES)
each_grid = pytest.mark.parametrize(("bits", "zero_point"), GRIDS)


def problem(out: int, width: int, kind: str = "plain") -> tuple[Tensor, Tensor]:
    random = torch.Generator(GPU).manual_seed(0)
    weight = torch.randn(out, width, generator=random, device=GPU) * 0.05
    x = torch.randn(2 * width, width, generator=random, device=GPU)
    if kind == "outliers":
        x[:, ::17] *= 300
        weight[:, ::29] *= 8
    elif kind == "mean":
        x += 3
    elif kind == "silent":
        x[:, :32], x[:, width // 2] = 0, 0
    elif kind == "extremes":
        for row, (start, value) in enumerate([(0, 0.0), (0, 0.25), (16, -1.0), (0, 1e-12), (5, 60000.0), (7, -3e6)]):
            weight[row % out, start:32] = value
        weight[6 % out] *= 1e-6
        weight[7 % out] *= 1e5
    return weight, x.t() @ x / len(x)


def errors(weight: Tensor, low: Tensor, high: Tensor, gram: Tensor, bits: int, zero_point: bool) -> Tensor:
    """What each shrink costs in each group, float64 [shrinks, out, groups]; infinity where float16 holds no scale."""
    groups = low.shape[1]
    size, found = weight.shape[1] // groups, []
    blocks = gram.double().view(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    for shrink in SHRINKS:
        delta = span(low * shrink, high * shrink, bits, zero_point).round(weight) - weight
        grouped = delta.double().view(-1, groups, size).transpose(0, 1)
        found.append((grouped @ blocks).mul_(grouped).sum(-1).t())
    return torch.stack(found).nan_to_num(float("inf"))


@each_shape
@each_grid
@pytest.mark.parametrize("kind", ["plain", "outliers", "mean", "silent", "extremes"])
def test_the_shrink_is_the_best_or_costs_the_same(
    out: int, width: int, group: int, bits: int, zero_point: bool, kind: str
) -> None:
    weight, gram = problem(out, width, kind)
    low, high = ranges(weight, group)
    best = search.best_shrinks(weight, low, high, gram, SHRINKS, bits, zero_point)
    losses = errors(weight, low, high, gram, bits, zero_point)
    index = ((1 - best) * 40).round().long()
    assert torch.equal(best, torch.tensor(SHRINKS, device=GPU)[index])
    (least, first), got = losses.min(0), losses.gather(0, index[None])[0]
    # One input of 300 times the others: what float16 leaves of its error hides the rest.
    assert (index == first).float().mean() > 0.97 or kind == "outliers" or out < 50
    known = least.isfinite()
    assert (index[~known] == 0).all()
    # A strong mean of the inputs cancels: of 44000 groups one or two take a neighbour that costs them a tenth more.
    assert (got[known] <= least[known] * 1.02).float().mean() > 0.999
    assert got[known].sum() <= least[known].sum() * (1 + 2e-4)


def test_equals_and_what_no_text_reads_are_not_shrunk() -> None:
    weight, gram = problem(200, 256)
    weight[3, 128:] = 0
    low, high = ranges(weight, 128)
    best = search.best_shrinks(weight, low, high, gram, SHRINKS, 4, True)
    assert best[3, 1] == 1
    assert (search.best_shrinks(weight, low, high, gram * 0, SHRINKS, 4, True) == 1).all()
    gram[5, 5] = float("nan")
    unknown = search.best_shrinks(weight, low, high, gram, SHRINKS, 4, True)
    assert (unknown[:, 0] == 1).all() and torch.equal(unknown[:, 1], best[:, 1])


@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e12, 1e30])
def test_the_unit_of_the_inputs_changes_no_shrink(factor: float) -> None:
    weight, gram = problem(200, 256)
    arguments = weight, *ranges(weight, 64)
    one, other = (search.best_shrinks(*arguments, g, SHRINKS, 4, True) for g in (gram, gram * factor))
    assert (one != other).float().mean() < 5e-3  # the product by the factor is rounded


@each_shape
@each_grid
@pytest.mark.parametrize("kind", ["plain", "extremes"])
def test_deltas_are_those_of_torch_bit_by_bit(
    out: int, width: int, group: int, bits: int, zero_point: bool, kind: str
) -> None:
    weight, _ = problem(out, width, kind)
    for scale in (None, torch.rand(width, device=GPU) * 3 + 0.1, torch.logspace(-4, 4, width, device=GPU)):
        arguments = weight, scale, group, bits, zero_point
        wanted = PLAIN_LOOPS.rounded_delta(*arguments, True)
        exact, fast = (search.rounded_delta(*arguments, fast) for fast in (False, True))
        assert exact.dtype == torch.float32 and torch.equal(exact.nan_to_num(7), wanted.nan_to_num(7))
        assert torch.equal(fast.nan_to_num(7), wanted.to(fast.dtype).nan_to_num(7))
        assert fast.dtype == (torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float32)
    low, high = ranges(weight, group)
    grid = span(low * 0.7, high * 0.7, bits, zero_point)
    got, wanted = (loops.grid_delta(weight, grid.scales, grid.zeros, bits) for loops in (KERNELS, PLAIN_LOOPS))
    assert torch.equal(got.nan_to_num(7), wanted.nan_to_num(7))


@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_dots(out: int, width: int, group: int, dtype: torch.dtype) -> None:
    product, delta = torch.randn(out, width, device=GPU), torch.randn(out, width, device=GPU).to(dtype)
    terms = product.double() * delta.double()
    got = search.row_dots(product, delta)
    assert ((got - terms.sum(1)).abs() <= 1e-6 * terms.abs().sum(1)).all()


@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_dots(out: int, width: int, group: int, dtype: torch.dtype) -> None:
    groups = width // group
    steps = torch.randint(-8, 16, (out, groups, group), device=GPU).to(dtype)
    for first in {0, groups // 2, groups - 1}:
        count = min(search.MOST_PRODUCTS, groups - first)
        products = torch.randn(count, out, groups - first, group, device=GPU).to(dtype)
        size = (products.double().abs() * steps[:, first:].abs()).sum(-1).max()
        found = [torch.full((out, groups, groups), torch.nan, device=GPU) for _ in range(3)]
        for normal in found[:2]:
            search.group_dots(products, steps, normal, first)
        PLAIN_LOOPS.group_dots(products.double(), steps.double(), found[2], first)
        assert torch.equal(found[0].nan_to_num(7), found[1].nan_to_num(7))
        assert torch.allclose(found[0], found[2], atol=float(1e-6 * size), equal_nan=True)
    with pytest.raises(ValueError, match="5 products"):
        search.group_dots(torch.zeros(5, out, groups, group, device=GPU), steps.float(), found[0], 0)


@each_shape
def test_rows_by_themselves_and_a_second_run_are_equal_bit_by_bit(out: int, width: int, group: int) -> None:
    """What a rank finds for its rows is what one process finds for all of them."""
    weight, gram = problem(out, width)
    low, high = ranges(weight, group)
    part = slice(out // 3, out // 3 + 100)
    for _ in range(2):
        all_of_them, some = (
            search.best_shrinks(weight[p], low[p], high[p], gram, SHRINKS, 4, True) for p in (slice(None), part)
        )
        assert torch.equal(all_of_them[part], some)
        delta, some_delta = (
            search.rounded_delta(weight[p], gram[0].abs(), group, 4, True) for p in (slice(None), part)
        )
        assert torch.equal(delta[part].nan_to_num(7), some_delta.nan_to_num(7))
        assert torch.equal(
            search.row_dots(weight, gram[:1].expand(out, -1))[part],
            search.row_dots(weight[part], gram[:1].expand(len(some), -1)),
        )


def test_operands_of_any_alignment() -> None:
    weight, gram = problem(64, 128)
    moved = torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view_as(weight)
    low, high = ranges(weight, 32)
    assert torch.equal(
        search.best_shrinks(moved, low.t().contiguous().t(), high, gram, SHRINKS, 4, True),
        search.best_shrinks(weight, low, high, gram, SHRINKS, 4, True),
    )
    assert torch.equal(search.rounded_delta(moved, None, 32, 4, True), search.rounded_delta(weight, None, 32, 4, True))


def test_the_clip_search_finds_the_same_loss() -> None:
    weight, gram = problem(512, 1024, "outliers")
    losses = []
    for loops in (KERNELS, PLAIN_LOOPS):
        delta = search_clip(weight, gram, 128, 4, True, loops).round(weight) - weight
        losses.append(float(((delta.double() @ gram.double()) * delta).sum()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
