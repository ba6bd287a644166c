"""The column loop's kernel against the loop in torch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from awq.algorithm.search.affine import Affine, fit_affine
from awq.algorithm.search.rounding import PLAIN_LOOP, ColumnLoop, _inverse_factor, round_compensated
from awq.kernels.cuda import columns

pytestmark = pytest.mark.gpu
KERNEL = ColumnLoop(columns.round_columns, columns.COLUMNS)


def problem(out: int, width: int, group: int = 32, bits: int = 4) -> tuple[Tensor, Tensor, Affine]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * width, width, generator=generator) @ torch.randn(width, width, generator=generator)
    weight = torch.randn(out, width, generator=generator).cuda()
    return weight, (x.t() @ x / len(x)).cuda(), fit_affine(weight, group, bits, True)


@pytest.mark.parametrize("count", [1, 5, 16, 48, 63, 64])
@pytest.mark.parametrize("out", [1, 63, 64, 200, 5000])
def test_a_block_of_columns_is_rounded_as_torch_does(count: int, out: int) -> None:
    """Not the first block of its matrix: the factor is a part of a larger one."""
    weight, gram, grid = problem(out, 128)
    factor, part = _inverse_factor(gram, torch.arange(128, device="cuda")), slice(64, 64 + count)
    assert factor is not None
    group = torch.arange(128, device="cuda") // 32
    arguments: Any = (weight.t()[part].contiguous(), factor[part, part])
    arguments += (grid.scales.t()[group][part], grid.zeros.t()[group][part], 15)
    codes, errors = columns.round_columns(*arguments)
    expected_codes, expected = PLAIN_LOOP.round(*arguments)
    same = codes == expected_codes
    assert codes.dtype == torch.uint8 and same.float().mean() > 0.999
    assert torch.allclose(errors[same], expected[same], atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(("out", "width", "group", "bits"), [(40, 96, 32, 4), (512, 576, 64, 4), (64, 200, -1, 3)])
def test_a_matrix_is_rounded_as_torch_does(out: int, width: int, group: int, bits: int) -> None:
    weight, gram, grid = problem(out, width, group, bits)
    got, expected = (round_compensated(weight, gram, grid, loop) for loop in (KERNEL, PLAIN_LOOP))
    assert got is not None and expected is not None
    assert (got.codes == expected.codes).float().mean() > 0.998  # a tie that falls otherwise moves its neighbours
    losses = [float(((d @ gram) * d).sum()) for d in (grid.decode(r.codes) - weight for r in (got, expected))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_second_run_is_equal_bit_by_bit() -> None:
    weight, gram, grid = problem(256, 320)
    first, second = (round_compensated(weight, gram, grid, KERNEL) for _ in range(2))
    assert first is not None and second is not None
    assert torch.equal(first.codes, second.codes) and torch.equal(first.unrounded, second.unrounded)


def test_other_devices_have_another_loop() -> None:
    assert columns.obstacle(torch.device("cpu")) == "it runs on NVIDIA GPUs, not on cpu"
    assert columns.obstacle(torch.device("cuda")) is None
