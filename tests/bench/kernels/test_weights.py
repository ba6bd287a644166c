import pytest
import torch

from awq.bench.kernels import weights
from awq.bench.kernels.shapes import Setting, Shape
from awq.bench.kernels.weights import dense_weight, random_linear
from awq.linear import QuantLinear

SHAPE = Shape(512, 1024)


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("ratio", [0.0, 0.05])
@pytest.mark.parametrize("group_size", [64, -1])
def test_outputs_vary_as_inputs_do(zero_point: bool, ratio: float, group_size: int) -> None:
    packed, outliers = random_linear(Setting(SHAPE, group_size, torch.float16, zero_point, ratio))
    assert (packed.out_features, packed.in_features) == (512, 1024)
    assert packed.group_size == (64 if group_size == 64 else 1024)
    assert (outliers is None) == (ratio == 0)
    weight = dense_weight(packed, outliers)
    y = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1)) @ weight.t()
    assert y.std().item() == pytest.approx(1, abs=0.1)


def test_symmetric_codes_are_centred_on_their_zero_points() -> None:
    packed, _ = random_linear(Setting(SHAPE, 64, torch.float16, zero_point=False))
    assert (packed.zeros() == 8).all()
    codes = packed.codes()
    assert codes.unique().tolist() == list(range(1, 16))
    assert codes.float().mean().item() == pytest.approx(8, abs=0.05)


def test_asymmetric_weights_use_every_code_and_zero_point() -> None:
    packed, _ = random_linear(Setting(SHAPE, 64, torch.float16))
    assert packed.codes().unique().tolist() == packed.zeros().unique().tolist() == list(range(16))


@pytest.mark.parametrize("chunk", [1, 10_000, 1 << 28])
def test_the_dense_weight_is_what_a_linear_multiplies_by(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_CHUNK", chunk)
    packed, outliers = random_linear(Setting(Shape(72, 128), 32, torch.float16, outlier_ratio=0.05))
    x = torch.randn(3, 128)
    torch.testing.assert_close(x @ dense_weight(packed, outliers).t(), QuantLinear(packed, None, outliers)(x))
