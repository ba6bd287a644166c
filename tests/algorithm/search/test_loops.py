"""The inner loops of the search in plain torch, and that the search runs those that it is given."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from awq.algorithm.blocks import quantize_blocks
from awq.algorithm.search.affine import fit_affine, ranges, span
from awq.algorithm.search.clip import SHRINKS, search_clip
from awq.algorithm.search.loops import PLAIN_LOOPS, Loops
from awq.algorithm.search.loss import output_error
from awq.config import QuantConfig
from tests.tiny import random_tokens, tiny_llama

GRIDS = pytest.mark.parametrize(("group", "bits", "zero_point"), [(16, 4, True), (32, 3, False), (-1, 8, True)])


def problem(out: int = 12, width: int = 64) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(200, width, generator=random) @ torch.randn(width, width, generator=random)
    return torch.randn(out, width, generator=random), x.t() @ x / len(x)


@GRIDS
def test_the_best_shrink_costs_least_in_its_group(group: int, bits: int, zero_point: bool) -> None:
    weight, gram = problem()
    low, high = ranges(weight, group)
    best = PLAIN_LOOPS.best_shrinks(weight, low, high, gram, SHRINKS, bits, zero_point)
    size, losses = weight.shape[1] // low.shape[1], []
    for shrink in SHRINKS:
        delta = span(low * shrink, high * shrink, bits, zero_point).round(weight) - weight
        parts = [delta[:, i : i + size] for i in range(0, weight.shape[1], size)]
        blocks = [gram[i : i + size, i : i + size] for i in range(0, weight.shape[1], size)]
        losses.append(torch.stack([(d @ b * d).sum(1) for d, b in zip(parts, blocks, strict=True)], 1))
    assert torch.equal(best, torch.tensor(SHRINKS)[torch.stack(losses).argmin(0)])


def test_the_first_of_equal_shrinks_is_taken() -> None:
    weight, gram = problem()
    weight[3, 16:32] = 0
    low, high = ranges(weight, 16)
    best = PLAIN_LOOPS.best_shrinks(weight, low, high, gram, SHRINKS, 4, True)
    assert best[3, 1] == 1
    assert torch.equal(PLAIN_LOOPS.best_shrinks(weight, low, high, gram * 0, SHRINKS, 4, True), torch.ones_like(low))


@GRIDS
def test_deltas_are_what_rounding_changes(group: int, bits: int, zero_point: bool) -> None:
    weight, _ = problem()
    scale = torch.rand(weight.shape[1]) + 0.5
    grid, scaled = (fit_affine(part, group, bits, zero_point) for part in (weight, weight * scale))
    plain, by_scale = (PLAIN_LOOPS.rounded_delta(weight, s, group, bits, zero_point, False) for s in (None, scale))
    assert torch.equal(plain, grid.round(weight) - weight)
    assert torch.equal(by_scale, scaled.round(weight * scale) / scale - weight)
    assert torch.equal(PLAIN_LOOPS.grid_delta(weight, grid.scales, grid.zeros, bits), plain)
    assert torch.allclose(PLAIN_LOOPS.row_dots(weight.clone(), plain), (weight * plain).sum(1), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("first", "count"), [(0, 4), (4, 3), (6, 1)])
def test_dots_of_groups_fill_a_symmetric_matrix(first: int, count: int, dtype: torch.dtype) -> None:
    steps, products = torch.randn(5, 7, 16).to(dtype), torch.randn(count, 5, 7 - first, 16).to(dtype)
    normal = torch.full((5, 7, 7), torch.nan)
    PLAIN_LOOPS.group_dots(products.clone(), steps, normal, first)
    wanted = torch.full_like(normal, torch.nan)
    for c in range(count):
        dots = (products[c].double() * steps[:, first:].double()).sum(-1).float()
        wanted[:, first + c, first + count :], wanted[:, first:, first + c] = dots[:, count:], dots
    assert torch.allclose(normal, wanted, atol=1e-5 if dtype == torch.float32 else 0.1, equal_nan=True)


@pytest.mark.parametrize(("group", "bits", "zero_point"), [(16, 4, True), (32, 3, False), (-1, 2, True)])
def test_clipping_is_taken_where_it_is_better(group: int, bits: int, zero_point: bool) -> None:
    weight, gram = problem(200)
    full = fit_affine(weight, group, bits, zero_point)
    grid = search_clip(weight, gram, group, bits, zero_point)
    assert output_error(grid.round(weight) - weight, gram) < output_error(full.round(weight) - weight, gram)
    none_better = PLAIN_LOOPS._replace(best_shrinks=lambda weight, low, *rest: torch.full_like(low, 0.1))
    assert torch.equal(search_clip(weight, gram, group, bits, zero_point, none_better).scales, full.scales)


@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_the_loops_that_are_given_do_the_work(effort: str) -> None:
    calls: Counter[str] = Counter()

    def counted(name: str, loop: Any) -> Any:
        def run(*arguments: Any) -> Any:
            calls[name] += 1
            return loop(*arguments)

        return run

    names = [name for name in Loops._fields if name != "columns"]
    loops = PLAIN_LOOPS._replace(**{name: counted(name, getattr(PLAIN_LOOPS, name)) for name in names})
    config, text = QuantConfig(group_size=32, effort=effort), random_tokens(4, 48)
    for _ in quantize_blocks(tiny_llama(), text, config, lambda _name: True, torch.device("cpu"), loops):
        pass
    linears = 2 * 7
    assert calls["best_shrinks"] == linears and calls["grid_delta"] == 2 * linears
    assert calls["rounded_delta"] > calls["row_dots"] > linears
    assert calls["group_dots"] >= linears
