import pytest
import torch

from awq.algorithm.search.affine import fit_affine, ranges, span


@pytest.mark.parametrize("group_size", [-1, 16, 32, 64])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("zero_point", [True, False])
def test_rounding_is_within_half_a_step(group_size: int, bits: int, zero_point: bool) -> None:
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(bits))
    grid = fit_affine(weight, group_size, bits, zero_point)
    error = (grid.round(weight) - weight).unflatten(1, (grid.scales.shape[1], -1)).abs()
    # the range covers the data, up to the rounding of the zero point: half a step at the ends
    assert (error <= grid.scales.unsqueeze(-1) * (1.0 if zero_point else 0.51)).all()
    assert torch.equal(grid.decode(grid.encode(weight)), grid.round(weight))


def test_scales_are_what_float16_stores_and_zeros_are_whole() -> None:
    grid = fit_affine(torch.randn(8, 64) * 1e-3, 32, 4, True)
    assert torch.equal(grid.scales, grid.scales.half().float())
    assert torch.equal(grid.zeros, grid.zeros.round())
    assert ((grid.zeros >= 0) & (grid.zeros <= 15)).all()


@pytest.mark.parametrize("zero_point", [True, False])
def test_constant_and_zero_groups(zero_point: bool) -> None:
    weight = torch.zeros(8, 64)
    weight[1] = 0.5
    weight[2] = -3.0
    weight[3, 0] = 1e-9
    restored = fit_affine(weight, 32, 4, zero_point).round(weight)
    assert torch.allclose(restored, weight, rtol=1e-3, atol=1e-7)


def test_zero_stays_zero() -> None:
    weight = torch.rand(8, 32) + 1.0
    weight[:, 5] = 0.0
    assert (fit_affine(weight, 32, 4, True).round(weight)[:, 5] == 0).all()


def test_symmetric_zeros_are_eight() -> None:
    assert (fit_affine(torch.randn(8, 32), 32, 4, False).zeros == 8).all()


def test_shrink_narrows_the_range() -> None:
    weight = torch.randn(8, 64)
    full = fit_affine(weight, 32, 4, True)
    low, high = ranges(weight, 32)
    half = span(low / 2, high / 2, 4, True)
    assert torch.allclose(half.scales, full.scales / 2, rtol=2e-3)


def test_codes_of_a_grid_survive() -> None:
    """Weights that lie on a grid come back as the same codes."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (16, 64), generator=generator, dtype=torch.uint8)
    codes[:, ::32], codes[:, 1::32] = 0, 15
    scales = torch.rand(16, 2, generator=generator).half().float() + 0.01
    zeros = torch.randint(1, 15, (16, 2), generator=generator).float()
    weight = (
        (codes.unflatten(1, (2, 32)).float() - zeros.unsqueeze(-1)) * scales.half().float().unsqueeze(-1)
    ).flatten(1)
    assert torch.equal(fit_affine(weight, 32, 4, True).encode(weight), codes)
