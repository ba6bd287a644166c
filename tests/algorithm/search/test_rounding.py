from typing import Any

import pytest
import torch
from torch import Tensor

from awq.algorithm.search.affine import Affine, fit_affine
from awq.algorithm.search.loss import output_error
from awq.algorithm.search.rounding import DAMPING, ColumnLoop, round_columns, round_compensated


def problem(out: int = 8, width: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the Gram matrix of inputs that hang together."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return torch.randn(out, width, generator=generator), x.t() @ x / 400


def codes_of(*args: Any, **options: Any) -> Tensor | None:
    rounded = round_compensated(*args, **options)
    return rounded and rounded.codes


def brute_force(weight: Tensor, gram: Tensor, grid: Affine) -> Tensor:
    """Column after column, the ones not yet rounded solved anew for the error made so far, in float64."""
    width = weight.shape[1]
    damped = gram.double() + DAMPING * gram.double().diagonal().mean() * torch.eye(width, dtype=torch.float64)
    current, left = weight.double().clone(), gram.diagonal().argsort(descending=True, stable=True).tolist()
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    while left:
        j = left.pop(0)
        group = j * grid.scales.shape[1] // width
        scale, zero = grid.scales[:, group].double(), grid.zeros[:, group].double()
        code = (torch.round(current[:, j] / scale) + zero).clamp(0, 2**grid.bits - 1)
        codes[:, j] = code.to(torch.uint8)
        error = current[:, j] - (code - zero) * scale
        if left:  # minimize the output error over what is left, given this error
            answer = torch.linalg.solve(damped[left][:, left], damped[left, j])
            current[:, left] += error.unsqueeze(1) * answer
    return codes


@pytest.mark.parametrize("group_size", [-1, 16, 32])
@pytest.mark.parametrize("zero_point", [True, False])
def test_it_is_what_solving_anew_after_each_column_gives(group_size: int, zero_point: bool) -> None:
    weight, gram = problem()
    grid = fit_affine(weight, group_size, 4, zero_point)
    codes = codes_of(weight, gram, grid)
    assert codes is not None and codes.dtype == torch.uint8
    assert torch.equal(codes, brute_force(weight, gram, grid))


@pytest.mark.parametrize("block", [1, 5, 16, 64])
def test_the_size_of_a_block_of_columns_changes_no_code(block: int) -> None:
    weight, gram = problem(24, 96)
    grid = fit_affine(weight, 32, 4, True)
    codes = codes_of(weight, gram, grid)
    again = codes_of(weight, gram, grid, ColumnLoop(round_columns, block))
    assert codes is not None and again is not None
    assert torch.equal(codes, again)


def test_the_order_of_the_channels_changes_nothing() -> None:
    """The columns go by their Gram diagonal, so a shuffled problem has the shuffled answer."""
    weight, gram = problem(16, 48)
    grid = fit_affine(weight, -1, 4, True)
    shuffle = torch.randperm(48, generator=torch.Generator().manual_seed(3))
    codes = codes_of(weight, gram, grid)
    shuffled = codes_of(weight[:, shuffle], gram[shuffle][:, shuffle], grid)
    assert codes is not None and shuffled is not None
    assert torch.equal(codes[:, shuffle], shuffled)


def test_linears_solved_as_one_come_out_as_alone() -> None:
    weight, gram = problem(24, 64)
    grid = fit_affine(weight, 32, 4, True)
    together = codes_of(weight, gram, grid)
    alone = codes_of(weight[:8], gram, Affine(grid.scales[:8], grid.zeros[:8], 4))
    assert together is not None and alone is not None
    assert torch.equal(together[:8], alone)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_costs_less_than_plain_rounding(bits: int) -> None:
    weight, gram = problem(32, 128)
    grid = fit_affine(weight, 32, bits, True)
    codes = codes_of(weight, gram, grid)
    assert codes is not None
    compensated = output_error(grid.decode(codes) - weight, gram)
    assert int(codes.max()) < 2**bits
    assert compensated < 0.6 * output_error(grid.round(weight) - weight, gram)


def test_dead_channels_are_rounded_plainly_and_the_rest_goes_on() -> None:
    weight, gram = problem()
    gram[5], gram[:, 5] = 0, 0
    grid = fit_affine(weight, 16, 4, True)
    codes = codes_of(weight, gram, grid)
    assert codes is not None
    assert torch.equal(codes[:, 5], grid.encode(weight)[:, 5])
    assert output_error(grid.decode(codes) - weight, gram) < output_error(grid.round(weight) - weight, gram)


def test_all_zero_groups_stay_zero() -> None:
    weight, gram = problem()
    weight[:, :16] = 0
    grid = fit_affine(weight, 16, 4, True)
    codes = codes_of(weight, gram, grid)
    assert codes is not None
    assert grid.decode(codes).isfinite().all()


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_gram_matrix_of_no_use_is_said(value: float) -> None:
    weight, gram = problem()
    assert round_compensated(weight, gram * 0 + value, fit_affine(weight, 16, 4, True)) is None


def test_a_matrix_that_is_not_positive_definite_takes_more_damping() -> None:
    weight, gram = problem()
    gram -= 0.1 * gram.diagonal().mean() * torch.eye(len(gram))
    codes = codes_of(weight, gram, fit_affine(weight, 16, 4, True))
    assert codes is not None


def test_another_column_loop_can_be_passed_in() -> None:
    weight, gram = problem(8, 64)
    widths: list[int] = []

    def spy(part: Tensor, *rest: Tensor | int) -> tuple[Tensor, Tensor]:
        widths.append(len(part))
        return round_columns(part, *rest)  # type: ignore[arg-type]

    grid = fit_affine(weight, 32, 4, True)
    codes = codes_of(weight, gram, grid, ColumnLoop(spy, 48))
    expected = codes_of(weight, gram, grid)
    assert codes is not None and expected is not None
    assert widths == [48, 16]
    assert torch.equal(codes, expected)
