"""Units against the drawing in common.cuh, word by word, and back to the weight that they came from."""

from __future__ import annotations

import itertools

import pytest
import torch

from awq.kernels.cuda.layout import GROUPS, Units, effective_group, to_units, units_to_dense
from awq.packing import Outliers, PackedInt4
from tests.kernels.plain import CPU, random_outliers, random_packed

# out_features, in_features: less than a tile or a unit, exactly one, and neither a multiple of one.
SHAPES = [(8, 256), (16, 256), (24, 768), (40, 1280), (200, 512)]
# The drawing: bits of a word from the highest nibble to the lowest, the step of each, its k within the step.
BITS = (28, 24, 20, 16, 12, 8, 4, 0)
STEPS = "oeoeoeoe"
K_OF_LANE = ((2, 9), (2, 9), (2, 1), (2, 1), (2, 8), (2, 8), (2, 0), (2, 0))  # factor of c, and what is added


def units_of(packed: PackedInt4, outliers: Outliers | None = None) -> Units:
    return to_units(packed, outliers, CPU)


def padded(tensor: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return torch.nn.functional.pad(tensor, (0, columns - tensor.shape[1], 0, rows - tensor.shape[0]))


@pytest.mark.parametrize("group", [32, 64, 128, 256, -1])
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_there_and_back(out_features: int, in_features: int, group: int) -> None:
    packed = random_packed(out_features, in_features, group)
    assert torch.equal(units_to_dense(units_of(packed)), packed.dequantize())


@pytest.mark.parametrize("in_features", [8, 32, 96, 100, 288, 1000])
def test_one_scale_a_row_of_any_width(in_features: int) -> None:
    packed = random_packed(24, in_features, -1)
    units = units_of(packed)
    assert (units.group, units.in_features) == (32 if in_features == 32 else 128, in_features)
    assert torch.equal(units_to_dense(units), packed.dequantize())


@pytest.mark.parametrize(("group", "in_features"), [(32, 32), (32, 352), (64, 576), (128, 384)])
def test_widths_that_are_not_whole_units(group: int, in_features: int) -> None:
    packed = random_packed(40, in_features, group)
    assert torch.equal(units_to_dense(units_of(packed)), packed.dequantize())


def test_effective_groups() -> None:
    assert [effective_group(group, 768) for group in (32, 64, 128, 256, 384, 768)] == [32, 64, 128, 128, 128, 128]
    assert [effective_group(group, 960) for group in (16, 48, 96, 960)] == [None, None, None, 128]
    with pytest.raises(ValueError, match="groups of 48 have no units"):
        units_of(random_packed(8, 96, 48))


@pytest.mark.parametrize(("out_features", "in_features"), [(24, 352), (16, 512)])
def test_codes_word_by_word(out_features: int, in_features: int) -> None:
    packed = random_packed(out_features, in_features, 32)
    codes = units_of(packed).codes
    tiles, units, _ = codes.shape
    assert (tiles, units) == (-(-out_features // 16), -(-in_features // 256))
    true = padded(packed.codes(), 16 * tiles, 256 * units)
    words = codes.view(torch.int32).view(tiles, units, 4, 32, 4) & 0xFFFFFFFF
    for tile, unit, j, lane, (name, word) in itertools.product(
        range(tiles), range(units), range(4), range(32), enumerate("xyzw")
    ):
        r, c = divmod(lane, 4)
        row = tile * 16 + (r if word in "xz" else r + 8)
        found = int(words[tile, unit, j, lane, name])
        for bits, step, (factor, rest) in zip(BITS, STEPS, K_OF_LANE, strict=True):
            step16 = (0 if word in "xy" else 2) + (step == "o")
            k = unit * 256 + j * 64 + step16 * 16 + factor * c + rest
            assert found >> bits & 15 == true[row, k], (tile, unit, j, lane, word, bits)


@pytest.mark.parametrize("group", GROUPS)
def test_records_of_scales_and_zero_points(group: int) -> None:
    packed = random_packed(24, 768, group)
    affine, groups = units_of(packed).affine, 256 // group
    tiles, units, size = affine.shape
    assert size == 40 * groups
    scales = padded(packed.scales.t(), 16 * tiles, units * groups)
    zeros = padded(packed.zeros(), 16 * tiles, units * groups)
    for tile, unit, r, g, half in itertools.product(range(tiles), range(units), range(8), range(groups), range(2)):
        record, row, column = affine[tile, unit], tile * 16 + r + 8 * half, unit * groups + g
        assert record[: 32 * groups].view(torch.float16)[(r * groups + g) * 2 + half] == scales[row, column]
        assert int(record[32 * groups + r * groups + g]) >> 4 * half & 15 == zeros[row, column]


@pytest.mark.parametrize("count", [1, 16, 21, 40])
def test_kept_channels_lane_by_lane(count: int) -> None:
    packed = random_packed(40, 256, 64)
    outliers = random_outliers(packed, count)
    units = units_of(packed, outliers)
    assert units.kept is not None and units.index is not None
    tiles, steps, halves = units.kept.shape
    assert (tiles, steps, halves) == (3, -(-count // 16), 256)
    assert units.index.tolist() == outliers.index.tolist() + [-1] * (16 * steps - count)
    residual = padded(outliers.residual.t(), 16 * tiles, 16 * steps)
    for tile, step, lane in itertools.product(range(tiles), range(steps), range(32)):
        r, c = divmod(lane, 4)
        places = [(row, k) for low in (0, 8) for row in (r, r + 8) for k in (2 * c + low, 2 * c + low + 1)]
        expected = torch.stack([residual[tile * 16 + row, step * 16 + k] for row, k in places])
        assert torch.equal(units.kept[tile, step, lane * 8 : lane * 8 + 8], expected)


def test_without_kept_channels() -> None:
    units = units_of(random_packed(8, 32, 32))
    assert units.kept is None and units.index is None


def test_padding_adds_nothing() -> None:
    """Codes, scales and zero points of rows and k that the weight has not are 0."""
    units = units_of(random_packed(8, 32, 32))
    codes = units.codes.view(1, 1, 4, 8, 4, 4, 4)  # slice, r, c, word, byte
    assert not codes[:, :, 1:].any() and not codes[..., 1::2, :].any() and not codes[..., 2:, :].any()
    assert not units.affine.view(-1)[:256].view(torch.float16).view(8, 8, 2)[:, 1:].any()
    assert not (units.affine.view(-1)[256:] >> 4).any()
