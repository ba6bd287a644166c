from dataclasses import replace

import torch

from awq.algorithm.search.affine import fit_affine
from awq.algorithm.search.loss import group_errors, output_error, row_errors, row_gains
from awq.algorithm.search.outliers import residual
from awq.algorithm.search.refit import _change, refit_scales


def test_output_error_is_the_mean_squared_error_of_the_outputs() -> None:
    x, delta = torch.randn(500, 32), torch.randn(8, 32)
    expected = (x @ delta.t()).square().sum(1).mean()
    assert torch.isclose(output_error(delta, x.t() @ x / 500), expected, rtol=1e-4)


def test_group_errors_are_the_errors_of_one_group_alone() -> None:
    x, delta = torch.randn(500, 32), torch.randn(8, 32)
    errors = group_errors(delta, x.t() @ x / 500, 4)
    assert errors.shape == (8, 4)
    alone = (x[:, 8:16] @ delta[3, 8:16]).square().mean()
    assert torch.isclose(errors[3, 1], alone, rtol=1e-4)


def test_the_residual_lies_between_the_original_weight_and_least_squares() -> None:
    mixed = torch.randn(400, 64) @ torch.randn(64, 64)
    gram = mixed.t() @ mixed / 400
    weight = torch.randn(16, 64)
    delta = fit_affine(weight, 32, 4, True).round(weight) - weight
    channels = (delta.square().sum(0) * gram.diagonal()).topk(6).indices.sort().values

    def loss(added: torch.Tensor) -> float:
        return float(output_error(delta.index_add(1, channels, added), gram))

    given_back = loss(-delta[:, channels])
    least_squares = loss(-torch.linalg.solve(gram[channels][:, channels], gram[channels] @ delta.t()).t())
    assert least_squares < loss(residual(delta, channels, gram).t().float()) < given_back


def test_dead_channels_are_harmless() -> None:
    gram = torch.zeros(32, 32)
    gram[3, 3] = 1.0
    delta = torch.randn(8, 32)
    assert residual(delta, torch.tensor([0, 3, 30]), gram).isfinite().all()


def test_refit_never_raises_any_rows_error() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 128) * torch.rand(128).mul(3)
    gram = x.t() @ x / 400
    weight = torch.randn(32, 128)
    weight[3] = 0
    grid = fit_affine(weight, 32, 4, True)
    codes = grid.encode(weight)
    refitted = refit_scales(weight, codes, grid, gram)

    def row_errors(g: object) -> torch.Tensor:
        delta = g.decode(codes) - weight  # type: ignore[attr-defined]
        return ((delta @ gram) * delta).sum(1)

    assert torch.equal(refitted.zeros, grid.zeros)
    assert torch.equal(refitted.scales, refitted.scales.half().float())
    assert (row_errors(refitted) <= row_errors(grid)).all()
    assert row_errors(refitted).sum() < 0.98 * row_errors(grid).sum()


def test_gains_are_differences_of_errors_without_their_noise() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 64, dtype=torch.float64) * torch.linspace(0.1, 10, 64, dtype=torch.float64)
    gram = x.t() @ x / 400
    before = torch.randn(16, 64, dtype=torch.float64)
    after = before.clone()
    after[:, 3] *= 1 - 1e-5
    exact = row_errors(before, gram) - row_errors(after, gram)
    single = before.float(), after.float(), gram.float()
    gains = row_gains(*single)
    assert torch.allclose(gains.double(), exact, rtol=1e-2)
    subtracted = row_errors(single[0], single[2]) - row_errors(single[1], single[2])
    assert (gains - exact).abs().max() < 0.1 * (subtracted - exact).abs().max()


def test_refit_bears_products_of_bf16() -> None:
    """Of inputs that have much in common, whose groups' systems are far from diagonal."""
    torch.manual_seed(0)
    x = torch.randn(400, 128, dtype=torch.float64) + 5 * torch.randn(400, 1, dtype=torch.float64)
    gram = (x.t() @ x / 400).float()
    weight = torch.randn(64, 128)
    grid = fit_affine(weight, 32, 4, True)
    codes = grid.encode(weight)
    steps, delta = replace(grid, scales=torch.ones_like(grid.scales)).decode(codes), grid.decode(codes) - weight

    def gain(change: torch.Tensor) -> float:
        after = replace(grid, scales=grid.scales + change).decode(codes) - weight
        return float((row_errors(delta.double(), gram.double()) - row_errors(after.double(), gram.double())).sum())

    best = gain(_change(steps.double(), delta.double(), gram.double(), 4))
    assert best > 0
    assert gain(_change(steps, delta.bfloat16().float(), gram.bfloat16().float(), 4)) > 0.99 * best
