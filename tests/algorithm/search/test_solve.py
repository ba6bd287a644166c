"""The ridge of the corrected weight is chosen by held-out text."""

import pytest
import torch
from torch import Tensor, nn

from awq.algorithm.inputs.moments import RIDGES, Moments, missing
from awq.algorithm.inputs.stats import InputStats
from awq.algorithm.search.solution import Judge, Linear
from awq.algorithm.search.solve import _targets
from awq.config import QuantConfig

CPU = torch.device("cpu")
WIDTH = 32


def linear() -> Linear:
    torch.manual_seed(0)
    stats = InputStats(torch.eye(WIDTH), torch.ones(WIDTH), 1)
    return Linear(nn.Linear(WIDTH, 16, bias=False), stats, QuantConfig(group_size=16))


def moments(tokens: int, noise: float, seed: int, weight: Tensor) -> Moments:
    """Of an input that lost a tenth of itself, which a weight can make good, and of noise, which none can."""
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(tokens, WIDTH, generator=generator)
    x = 0.9 * exact + noise * torch.randn(tokens, WIDTH, generator=generator)
    found = Moments.empty(WIDTH, CPU, {"linear": len(weight)})
    found.add(x, {"linear": missing(weight, exact - x, None)}, judged=True)
    found.finish()
    return found


@pytest.mark.parametrize(("tokens", "noise", "short"), [(4000, 0.05, False), (40, 1.0, True)])
def test_short_and_noisy_text_takes_a_larger_ridge(tokens: int, noise: float, short: bool) -> None:
    one = linear()
    fit, held_out = (moments(count, noise, seed, one.weight) for count, seed in ((tokens, 1), (4000, 2)))
    judge = Judge("linear", one, held_out)
    trials = {ridge: fit.corrected({"linear": one.weight}, ridge)["linear"] for ridge in RIDGES}
    best = min(RIDGES, key=lambda ridge: judge(trials[ridge]))
    assert (best > RIDGES[0]) == short
    assert torch.equal(_targets({"linear": judge}, fit)["linear"], trials[best])


def test_a_correction_that_does_not_hold_is_not_made() -> None:
    one = linear()
    fit = moments(4000, 0.05, 1, one.weight)
    same = Moments.empty(WIDTH, CPU, {"linear": 16})
    same.add(torch.randn(100, WIDTH), {}, judged=True)
    same.finish()
    target = _targets({"linear": Judge("linear", one, same)}, fit)["linear"]
    assert torch.equal(target, one.weight)
