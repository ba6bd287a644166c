import pytest
import torch
from torch import Tensor

from awq.algorithm.inputs.moments import RESIDUAL, RIDGES, Moments, missing


def streams() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Float and quantized input, the residual stream's error, and a weight."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(500, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    x = exact + 0.3 * exact.roll(1, 1)
    lag = 0.2 * exact[:, :16] + torch.randn(500, 16, generator=generator)
    return exact, x, lag, torch.randn(16, 32, generator=generator)


def measured(exact: Tensor, x: Tensor, lag: Tensor | None, weight: Tensor, parts: int = 1) -> Moments:
    moments = Moments.empty(32, torch.device("cpu"), {"linear": len(weight)})
    lags = [None] * parts if lag is None else lag.chunk(parts)
    for e, part, g in zip((exact - x).chunk(parts), x.chunk(parts), lags, strict=True):
        moments.add(part, {"linear": missing(weight, e, g)}, judged=True)
    moments.finish()
    return moments


@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("parts", [1, 4])
def test_the_loss_is_the_distance_to_the_target(writes: bool, parts: int) -> None:
    exact, x, lag, weight = streams()
    moments = measured(exact, x, lag if writes else None, weight, parts)
    trial = weight + 0.1 * torch.randn_like(weight)
    target = exact @ weight.t() + (RESIDUAL * lag if writes else 0)
    expected = (target - x @ trial.t()).square().mean(0)
    rows = moments.row_losses("linear", weight, trial)
    assert torch.allclose(rows, expected, rtol=1e-4)


@pytest.mark.parametrize("writes", [True, False])
def test_the_corrected_weight_is_the_ridge_regression_on_the_target(writes: bool) -> None:
    exact, x, lag, weight = streams()
    moments = measured(exact, x, lag if writes else None, weight)
    target = exact @ weight.t() + (RESIDUAL * lag if writes else 0)
    gram = x.t() @ x / 500
    damped = gram + RIDGES[0] * gram.diagonal().mean() * torch.eye(32)
    expected = weight + torch.linalg.solve(damped, x.t() @ (target - x @ weight.t()) / 500).t()
    corrected = moments.corrected({"linear": weight}, RIDGES[0])["linear"]
    assert torch.allclose(corrected, expected, atol=1e-4)
    before, after = (moments.row_losses("linear", weight, trial).sum() for trial in (weight, corrected))
    assert after < 0.9 * before


def test_equal_streams_ask_for_no_correction() -> None:
    exact, _, _, weight = streams()
    moments = Moments.empty(32, torch.device("cpu"), {"linear": len(weight)})
    moments.add(exact, {}, judged=True)
    moments.finish()
    assert torch.equal(moments.corrected({"linear": weight}, RIDGES[0])["linear"], weight)
    assert not moments.missed["linear"].any()


def test_no_token_and_values_that_are_not_finite_are_of_no_use() -> None:
    exact, x, lag, weight = streams()
    assert not Moments.empty(32, torch.device("cpu"), {}).usable
    assert measured(exact, x, lag, weight).usable
    assert not measured(exact * float("nan"), x, lag, weight).usable
    assert not measured(exact, x, lag * float("inf"), weight).usable


def test_dead_channels_are_harmless() -> None:
    exact, x, lag, weight = streams()
    exact[:, 3], x[:, 3] = 0, 0
    assert measured(exact, x, lag, weight).corrected({"linear": weight}, RIDGES[0])["linear"].isfinite().all()
    moments = measured(exact * 0, x * 0, lag * 0, weight)
    assert torch.equal(moments.corrected({"linear": weight}, RIDGES[0])["linear"], weight)


def test_a_larger_ridge_corrects_less() -> None:
    exact, x, lag, weight = streams()
    moments = measured(exact, x, lag, weight)
    moved = [float((moments.corrected({"linear": weight}, ridge)["linear"] - weight).norm()) for ridge in RIDGES]
    assert moved == sorted(moved, reverse=True) and moved[-1] > 0
